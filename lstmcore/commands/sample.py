"""lstmcore sample: write text."""

import json

from lstmcore.commands import terminal

HELP = "write text with a model"
EXAMPLE = 'lstmcore sample m.safetensors --prime "The " --temperature 0.7'


def options(p):
    """Add the arguments."""
    p.add_argument("model", metavar="M")
    p.add_argument("--prime", default="", metavar="TEXT", help="what the text begins with; - for "
                   "standard input")
    p.add_argument("--length", type=int, default=400, metavar="N", help="tokens (default: 400)")
    p.add_argument("--temperature", type=float, default=1.0, metavar="X", help="(default: 1)")
    p.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    p.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens with "
                   "probability P in all")
    p.add_argument("--beam", dest="width", type=int, metavar="W",
                   help="search for the likeliest text instead")
    p.add_argument("--stop", action="append", metavar="TEXT", help="end after TEXT")
    p.add_argument("--seed", type=int, metavar="S", help="for the same text again")
    terminal.add_precision(p)
    p.add_argument("--json", action="store_true", help="a JSON object instead of text")


def run(args):
    """Write text as it is drawn."""
    model = terminal.model_to_use(args)
    prime = terminal.read_text("-") if args.prime == "-" else terminal.argument(args.prime)
    if args.width is not None:
        pieces = [model.beam_search(prime, args.length, width=args.width, stop=args.stop)]
    else:
        pieces = model.generate(prime, args.length, temperature=args.temperature,
                                top_k=args.top_k, top_p=args.top_p, seed=args.seed, stop=args.stop)
    if args.json:
        print(json.dumps({"prime": prime, "text": "".join(pieces)}))
        return
    print(prime, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
