"""lstmcore eval: how well a model predicts a text."""

import json

from lstmcore.commands import terminal

HELP = "measure how well a model predicts a text"
EXAMPLE = "lstmcore eval m.safetensors other.txt --json"


def options(p):
    """Add the arguments."""
    p.add_argument("model", metavar="M")
    p.add_argument("files", nargs="+", metavar="FILE", help="- for standard input")
    terminal.add_encoding(p)
    terminal.add_precision(p)
    p.add_argument("--json", action="store_true", help="a JSON object instead of text")


def run(args):
    """Print nats, bits per character and perplexity."""
    from lstmcore.models.corpus import Corpus

    model = terminal.model_to_use(args)
    corpus = Corpus(terminal.existing(args.files), model.level, args.encoding)
    found = model.evaluate(corpus)
    terminal.say_guesses(corpus.parts)
    if args.json:
        print(json.dumps(found._asdict()))
        return
    print(f"{found.nats:.4f} nats per {terminal.token(model)}\n{found.bits_per_char:.4f} bits per "
          f"character\n{found.perplexity:.4f} perplexity\n{found.tokens} tokens")
    if found.unknown:
        whose = " but <unk>" if model.level in ("word", "whitespace") else ""
        terminal.say(f"{found.unknown} of them are not in the model's vocabulary{whose}")
