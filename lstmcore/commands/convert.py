"""lstmcore convert: from one kind of file to another."""

import warnings

from lstmcore.commands import terminal

HELP = "turn a file of recurrent layers into another kind"
EXAMPLE = "lstmcore convert model.pt model.onnx"


def options(p):
    """Add the arguments."""
    p.add_argument("source", metavar="IN", help=".safetensors, .pt, .keras, .h5 or .onnx")
    p.add_argument("target", metavar="OUT", help=".safetensors, .onnx or .weights.h5")
    p.add_argument("--name", help="which layer, where IN has several")
    p.add_argument("--batch-first", action="store_true", default=None,
                   help="x and y are (B, T, ...), where IN does not say it")
    p.add_argument("--nonlinearity", choices=("tanh", "relu"),
                   help="of an RNN, where IN does not say it")
    p.add_argument("--precision", choices=("float32", "int8"),
                   help="int8: weights of a quarter of the size, in a .safetensors")


def run(args):
    """Convert a file by `lstmcore.formats.convert`."""
    import lstmcore
    from lstmcore.formats.disk import check_writable

    check_writable(args.target)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        options = {name: value for name in ("batch_first", "nonlinearity")
                   if (value := getattr(args, name)) is not None}
        module = lstmcore.convert(args.source, args.target, args.name, precision=args.precision,
                                  **options)
    for warning in said:
        terminal.say(str(warning.message))
    terminal.say(f"saved {module} as {args.target}")
