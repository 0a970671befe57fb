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
    model = terminal.model_to_use(args)
    found = model.evaluate(terminal.existing(args.files), encoding=args.encoding)
    if args.json:
        print(json.dumps(found._asdict()))
        return
    print(f"{found.nats:.4f} nats per {terminal.token(model)}\n{found.bits_per_char:.4f} bits per "
          f"character\n{found.perplexity:.4f} perplexity\n{found.tokens} tokens")
    if found.unknown:
        terminal.say(f"{found.unknown} of them are not in the model's vocabulary")
