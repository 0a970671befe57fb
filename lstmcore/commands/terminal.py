"""What the commands share: lines on standard error, options and files that several of them take."""

import os
import re
import sys


def say(line):
    """A line on standard error."""
    print(line, file=sys.stderr, flush=True)


def add_encoding(parser):
    """Add --encoding."""
    parser.add_argument("--encoding", help="of FILE (default: found out)")


def add_precision(p):
    """Add --precision."""
    p.add_argument("--precision", choices=("float32", "bfloat16", "int8"),
                   help="format of the operands of products (default: as M was trained or saved)")


def add_drawing(p, temperature):
    """Add what decides how tokens are drawn, and where a text ends."""
    p.add_argument("--temperature", type=float, default=temperature, metavar="X",
                   help=f"below 1 plays safe, above 1 dares (default: {temperature:g})")
    p.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    p.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens with "
                   "probability P in all")
    p.add_argument("--stop", action="append", metavar="TEXT",
                   help=r"end after TEXT, in which \n is a line end; may be given several times")
    p.add_argument("--seed", type=int, metavar="S", help="for the same text again")


def stops(args):
    """The texts of --stop, or None."""
    escapes = {r"\n": "\n", r"\t": "\t", r"\f": "\f", "\\\\": "\\"}
    return args.stop and [re.sub(r"\\[ntf\\]", lambda found: escapes[found[0]], argument(text))
                          for text in args.stop]


def model_to_use(args):
    """The model in args.model, in the precision asked for."""
    from lstmcore import LanguageModel

    model = LanguageModel.load(args.model)
    return model.freeze(args.precision) if args.precision else model


def existing(files):
    """The paths, each found to be there, or "-": here a name is never a text."""
    import stat
    from pathlib import Path

    for name in files:
        if name != "-":
            found = os.stat(name)       # an OSError if it is not there
            if stat.S_ISDIR(found.st_mode):
                raise IsADirectoryError(21, "Is a directory", name)
            if stat.S_ISREG(found.st_mode) and found.st_size == 0:
                raise ValueError(f"{name} is empty")
    return [Path(name) for name in files]


def read_text(path, encoding=None, level="char"):
    """The text of a file, or of standard input for "-"; a guess of its encoding is said."""
    from lstmcore.models.corpus import Corpus

    corpus = Corpus(existing([path])[0], level, encoding)
    found = corpus.read()
    say_guesses(corpus.parts)
    return found


def argument(text):
    """What was typed, where the locale says less of its encoding than its bytes do."""
    from lstmcore.models.corpus import decode

    return text if not any("\udc80" <= c <= "\udcff" for c in text) \
        else decode(os.fsencode(text))


def say_guesses(parts):
    """Say which encodings of the texts that were read are but likely."""
    for part in parts:
        if part.guessed:
            say(f"{part.name}: encoding {part.encoding} is a guess; --encoding names another")


def check_picture(path):
    """Says before the work, not after it, that a picture cannot be drawn or written."""
    from lstmcore.formats.disk import check_writable

    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"drawing {path} needs matplotlib: pip install 'lstmcore[plot]'") \
            from error
    kinds = Figure().canvas.get_supported_filetypes()
    if os.path.splitext(path)[1][1:].lower() not in kinds:
        raise ValueError(f"{path} must end in one of ." + ", .".join(sorted(kinds)))
    check_writable(path)


def token(model):
    """What a token of a model is called."""
    return {"char": "character", "whitespace": "token"}.get(model.level, model.level)
