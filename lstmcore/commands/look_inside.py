"""lstmcore inspect: a page of what the neurons do."""

import os

from lstmcore.commands import terminal

HELP = "color a text by the neurons of a model"
EXAMPLE = "lstmcore inspect m.safetensors book.txt --out page.html"


def options(p):
    """Add the arguments."""
    p.add_argument("model", metavar="M")
    p.add_argument("file", metavar="FILE", help="- for standard input")
    p.add_argument("--out", default="inspect.html", metavar="PAGE", help="(default: inspect.html)")
    p.add_argument("--limit", type=int, default=2000, metavar="N", help="tokens (default: 2000)")
    terminal.add_encoding(p)


def run(args):
    """Write the HTML page of `lstmcore.inspect`."""
    from lstmcore import LanguageModel, inspect, scalars
    from lstmcore.formats.disk import check_writable

    check_writable(args.out)
    scalars.size("limit", args.limit)
    model = LanguageModel.load(args.model).unfreeze()       # of int8: only floats keep gates
    shown = terminal.read_text(args.file, args.encoding)
    name = "standard input" if args.file == "-" else os.path.basename(args.file)
    inspect.page(model, shown[:32 * args.limit], args.out, limit=args.limit,
                 title=f"{os.path.basename(args.model)} reads {name}")
    terminal.say(f"saved {args.out}")
