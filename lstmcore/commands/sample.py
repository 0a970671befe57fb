"""lstmcore sample: write text."""

import json
import warnings

from lstmcore.commands import terminal

HELP = "write text with a model"
EXAMPLE = 'lstmcore sample m.safetensors --prime "The " --temperature 0.7'


def options(p):
    """Add the arguments."""
    p.add_argument("model", metavar="M")
    p.add_argument("--prime", default="", metavar="TEXT", help="what the text begins with; - for "
                   "standard input")
    p.add_argument("--length", type=int, default=400, metavar="N", help="tokens (default: 400)")
    p.add_argument("--count", type=int, default=1, metavar="N",
                   help="so many texts, with the seeds S, S + 1, ... (default: 1)")
    terminal.add_drawing(p, temperature=1.0)
    p.add_argument("--beam", dest="width", type=int, metavar="W",
                   help="search for the likeliest text instead")
    terminal.add_precision(p)
    p.add_argument("--json", action="store_true", help="a JSON object per text instead of text")


def run(args):
    """Write text as it is drawn."""
    from lstmcore import scalars

    model = terminal.model_to_use(args)
    prime = terminal.read_text("-") if args.prime == "-" else terminal.argument(args.prime)
    stop = terminal.stops(args)
    count = scalars.size("count", args.count)
    if count > 1 and args.width is not None:
        raise ValueError("count must be 1 with --beam, which finds the same text every time")
    for n in range(count):
        seed = None if args.seed is None else args.seed + n
        if args.width is not None:
            pieces = [model.beam_search(prime, args.length, width=args.width, stop=stop)]
        else:
            with warnings.catch_warnings():
                if n:
                    warnings.simplefilter("ignore")         # of the prime, as the first text said
                pieces = model.generate(prime, args.length, temperature=args.temperature,
                                        top_k=args.top_k, top_p=args.top_p, seed=seed, stop=stop)
        if args.json:
            print(json.dumps({"prime": prime, "text": "".join(pieces)}), flush=True)
            continue
        text = prime
        print(prime, end="", flush=True)
        for piece in pieces:
            text += piece
            print(piece, end="", flush=True)
        # Of several, a line each where they are lines; else a blank line between them.
        print(end="" if count > 1 and text.endswith("\n") else "\n")
        if n + 1 < count and "\n" in text[:-1]:
            print()
