"""The command `lstmcore`: train, sample, eval, inspect, gradflow, convert, info.

Results go to standard output, everything else to standard error. A mistake is one line there and
exit code 2; an interrupted training is saved and ends with 130 (Ctrl-C) or 143 (SIGTERM).
"""

import argparse
import contextlib
import json
import os
import re
import sys
import warnings

from lstmcore import __version__

DEFAULT_OUT = "lstmcore-model.safetensors"
DEFAULT_MINUTES = 1.0
# For a minute on two cores; a model made in Python has the constructor's sizes.
DEFAULT_HIDDEN, DEFAULT_LR, DEFAULT_SEQ, DEFAULT_BATCH = 128, 5e-3, 64, 32
EXIT_OF = {"SIGINT": 130, "SIGTERM": 143}

EXAMPLES = """examples:
  lstmcore train                                 a minute on Python's own documentation
  lstmcore train book.txt --hidden 256 --epochs 20 --dropout 0.3 --out book.safetensors
  zcat *.gz | lstmcore train - --level byte --minutes 10
  lstmcore train book.txt --resume book.safetensors --epochs 40
  lstmcore sample book.safetensors --prime "It was" --length 500 --temperature 0.7
  lstmcore eval book.safetensors other.txt
"""


def main(argv=None):
    """Run the command with these arguments, by default those of the process; the exit code."""
    _open_streams()
    args = build_parser().parse_args(argv)
    try:
        if args.threads is not None:
            from lstmcore import checks, set_num_threads
            set_num_threads(checks.size("threads", args.threads))
        code = args.run(args)
        sys.stdout.flush()
        return code or 0
    except BrokenPipeError:             # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        name = f"{error.filename}: " if error.filename is not None else ""
        return _mistake(f"{name}{error.strerror or error}")
    except (ValueError, TypeError, ImportError, FloatingPointError, MemoryError) as error:
        return _mistake(_in_options(str(error), args.parser) or type(error).__name__)


def _open_streams():
    """Streams to write to, where a service or a shell has closed them, and for every character."""
    for name in "stdout", "stderr":
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    if hasattr(sys.stdout, "reconfigure"):      # a test's stand-in has none
        sys.stdout.reconfigure(errors="backslashreplace")


class _Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser():
    """The parser of all commands."""
    parser = _Parser(
        prog="lstmcore", description="Train LSTM language models on the CPU and use them.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"lstmcore {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_train, _add_sample, _add_eval, _add_inspect, _add_gradflow, _add_convert, _add_info):
        add(commands)
    return parser


def _command(commands, name, run, help, example):
    parser = commands.add_parser(
        name, help=help, description=help[0].upper() + help[1:] + ".",
        epilog="example:\n  " + example, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    return parser


def _add_train(commands):
    p = _command(commands, "train", train, "train a model on text and save it",
                 "lstmcore train book.txt --hidden 256 --epochs 20 --out book.safetensors")
    p.add_argument("files", nargs="*", metavar="FILE",
                   help="text in any encoding, also .gz; - for standard input; without FILE: "
                        "Python's documentation of its own language")
    p.add_argument("--out", metavar="M", help=f"the model (default: the resumed one, or "
                                              f"{DEFAULT_OUT})")
    p.add_argument("--resume", metavar="M", help="continue the run that wrote M, on the same text")
    p.add_argument("--encoding", help="of FILE (default: found out)")
    p.add_argument("--seed", type=int, help="of weights, dropout and sample (default: 0)")
    p.add_argument("--json", action="store_true", help="one JSON object per line instead of text")
    p.add_argument("--plot", metavar="PNG", help="draw the losses (needs matplotlib)")
    p.add_argument("--log", metavar="CSV", help="write the losses as a table, a line per evaluation")
    p.add_argument("--sample-every", type=int, metavar="N",
                   help="write 200 tokens after every N steps, at the next evaluation")
    p.add_argument("--no-sample", action="store_true", help="do not write 400 tokens at the end")

    g = p.add_argument_group("model (that of M if resumed)")
    g.add_argument("--level", choices=("char", "byte", "word"), help="(default: char)")
    g.add_argument("--cell", choices=("lstm", "gru", "rnn"), help="(default: lstm)")
    g.add_argument("--hidden-size", "--hidden", type=int, metavar="N", help=f"(default: {DEFAULT_HIDDEN})")
    g.add_argument("--num-layers", "--layers", type=int, metavar="N", help="(default: 2)")
    g.add_argument("--embed-size", "--embed", type=int, metavar="N",
                   help="width of the table of tokens (default: 64; words: 128; 0: one-hot)")
    g.add_argument("--peepholes", action="store_true", default=None)
    g.add_argument("--dropout", type=float, metavar="P", help="(default: 0)")
    g.add_argument("--vocab-size", "--vocab", type=int, metavar="N",
                   help="keep the N most frequent tokens")
    g.add_argument("--min-count", type=int, metavar="N",
                   help="keep tokens seen so often (default: 1; words: 2)")
    g.add_argument("--compute", choices=("float32", "bfloat16"),
                   help="format of the operands of products (default: float32)")

    g = p.add_argument_group("budget, whatever comes first, resumed parts included")
    g.add_argument("--epochs", type=float, metavar="N")
    g.add_argument("--minutes", type=float, metavar="M", help=f"(default: {DEFAULT_MINUTES:g})")
    g.add_argument("--steps", type=int, metavar="N")

    g = p.add_argument_group("training (as before if resumed)")
    g.add_argument("--seq-length", type=int, metavar="T", help=f"(default: {DEFAULT_SEQ})")
    g.add_argument("--batch-size", type=int, metavar="B", help=f"(default: {DEFAULT_BATCH})")
    g.add_argument("--optimizer", choices=("adam", "adamw", "rmsprop", "adagrad", "sgd"),
                   help="(default: adam)")
    g.add_argument("--lr", type=float, help=f"learning rate (default: {DEFAULT_LR:g})")
    g.add_argument("--schedule", choices=("step", "cosine", "plateau", "constant"),
                   help="of the learning rate (default: cosine over --minutes, else step)")
    g.add_argument("--decay", type=float, help="step: factor per epoch (default: 0.97)")
    g.add_argument("--decay-after", type=int, metavar="N", help="step: epoch (default: 10)")
    g.add_argument("--warmup", type=int, metavar="N", help="steps (default: 0)")
    g.add_argument("--clip", type=float, help="norm of the gradients (default: 5; 0: none)")
    g.add_argument("--weight-decay", type=float, metavar="X", help="(default: 0)")
    g.add_argument("--validation", "--val", type=float, metavar="P",
                   help="share kept for validation (default: 0.05)")
    g.add_argument("--evaluate-every", type=int, metavar="N", help="steps (default: an epoch)")
    g.add_argument("--patience", type=int, metavar="N",
                   help="end after N evaluations without a better one")

    g = p.add_argument_group("several processes (mpiexec -n 4 lstmcore train ...)")
    g.add_argument("--shards", type=int, metavar="N",
                   help="parts of a batch, summed in a fixed order: the bits depend on N alone, not on the "
                        "number of processes (default: 8 under mpiexec, else none)")
    g.add_argument("--reduction", choices=("tree", "allreduce"),
                   help="allreduce: one shard for each process, summed by MPI, other bits (default: tree)")
    g.add_argument("--wire", choices=("bfloat16",), help="send gradients in half the bytes, rounded")


def train(args):
    """Train, save, write a sample; under an MPI launcher with all its processes."""
    from lstmcore import distributed

    if (comm := distributed.launched()) is None:
        return _train(args, distributed.ALONE)
    processes = distributed.Processes(comm, own=True)
    if processes.rank:                  # rank 0 alone speaks
        args.json, args.log, args.plot, args.sample_every = False, None, None, None
        sys.stdin = None
    try:
        with processes.ending_together(), open(os.devnull, "w") as silence, contextlib.ExitStack() as stack:
            if processes.rank:
                for redirect in contextlib.redirect_stdout, contextlib.redirect_stderr:
                    stack.enter_context(redirect(silence))
            return _train(args, processes)
    except Exception:                   # of all ranks alike
        if processes.rank == 0:
            raise
        return 2


def _train(args, processes):
    from lstmcore import LanguageModel, checks
    from lstmcore.formats.disk import check_writable
    from lstmcore.models.training import Budget, Settings

    def asked(names):
        return {name: value for name in names if (value := getattr(args, name, None)) is not None}

    out = args.out or args.resume or DEFAULT_OUT

    def check_places():
        for path in filter(None, (out, args.log)):
            check_writable(path)
        if args.plot:
            _check_picture(args.plot)
        return _existing(args.files)
    files = processes.at_root(check_places)
    settings, budget = asked(Settings.__dataclass_fields__), asked(Budget.__dataclass_fields__)
    if args.resume:
        model = processes.at_root(lambda: LanguageModel.load(args.resume))
        model.check_same(LanguageModel(**{**model.config, **asked(model.config)}))
    else:
        model = LanguageModel(**{"hidden_size": DEFAULT_HIDDEN, **asked(LanguageModel().config)})
        settings = {"seq_length": DEFAULT_SEQ, "batch_size": DEFAULT_BATCH, "lr": DEFAULT_LR, **settings}
        budget = budget or {"minutes": DEFAULT_MINUTES}
    bar = False if args.json else sys.stderr.isatty() or "lines"
    callbacks = [] if bar is True else [_print_json if args.json else _print_record]
    if args.sample_every is not None:
        callbacks.append(_Samples(checks.size("sample_every", args.sample_every), args))
    Settings(**settings)
    Budget(**budget)
    if not args.json:
        replaced = f"; {out} will be replaced" if os.path.exists(out) and not args.resume else ""
        _say(f"training {model} on "
             + (", ".join(args.files) or "Python's documentation of its own language") + replaced)
    done = model.history[-1]["step"] if model.history else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *rest, **more: _say(f"warning: {message}")
        if args.log:
            callbacks.append(_table(stack.enter_context(open(args.log, "a" if args.resume else "w"))))
        model.fit(files or None, checkpoint=out, resume=args.resume, callbacks=callbacks, progress=bar,
                  encoding=args.encoding, comm=processes, **budget, **settings)
    if args.resume and model.history and model.history[-1]["step"] == done:
        _say(f"nothing to do: the run was at its end, after {done} steps; more --epochs, --minutes "
             "or --steps continue it")
    if args.plot:
        from lstmcore.models.curves import plot_history
        plot_history(model.history, args.plot)
    if processes.rank == 0:
        _conclude(model, out, args)
    return EXIT_OF.get(model.outcome, 0)


class _Samples:
    """A callback that shows what the model writes, every so many steps."""

    def __init__(self, every, args):
        self.every, self.json, self.seed, self.done = every, args.json, args.seed or 0, 0

    def __call__(self, model, record):
        if (due := record["step"] // self.every) <= self.done:
            return
        self.done, text = due, model.sample(length=200, seed=self.seed, temperature=0.7)
        if self.json:
            print(json.dumps({"step": record["step"], "sample": text}), flush=True)
        else:
            _say(f"step {record['step']} writes:\n{text}\n")


def _table(file):
    """A callback that writes each record as a line of comma-separated values."""
    def note(model, record):
        if not file.tell():
            print(*record, sep=",", file=file)
        print(*("" if value is None else value for value in record.values()), sep=",", file=file,
              flush=True)
    return note


def _conclude(model, out, args):
    """Say how the training ended, and show what the model writes."""
    record = min((r for r in model.history if r["best"]), default=None,
                 key=lambda r: (r["validation"] is None, r["validation"] or -r["step"]))
    finished = model.outcome in ("finished", "no progress")
    sample = model.sample(seed=args.seed or 0, temperature=0.7) \
        if finished and not args.no_sample else None
    if args.json:
        print(json.dumps({"outcome": model.outcome, "model": out, "best": record,
                          "bits_per_char": _bits(model, record), "sample": sample}))
        return
    if record and record["validation"] is not None:
        bits = _bits(model, record)
        _say(f"best validation loss: {record['validation']:.4f} nats per {_token(model)}"
             + (f" = {bits:.3f} bits per character" if bits else "")
             + f" (epoch {record['epoch']:.4g}, step {record['step']})")
    if finished:
        _say(f"saved {out}; write more: lstmcore sample {out}")
    else:
        _say(f"{model.outcome}: saved {out}; continue: lstmcore train "
             + " ".join([*args.files, "--resume", out]))
    if sample is not None:
        print(sample)


def _bits(model, record):
    if model.level != "char" or not record or record["validation"] is None:
        return None
    return record["validation"] / 0.6931471805599453


def _add_sample(commands):
    p = _command(commands, "sample", sample, "write text with a model",
                 'lstmcore sample m.safetensors --prime "The " --temperature 0.7')
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
    _add_precision(p)
    p.add_argument("--json", action="store_true", help="a JSON object instead of text")


def _add_precision(p):
    p.add_argument("--precision", choices=("float32", "bfloat16", "int8"),
                   help="format of the operands of products (default: as M was trained or saved)")


def _model_to_use(args):
    """The model in args.model, in the precision asked for."""
    from lstmcore import LanguageModel

    model = LanguageModel.load(args.model)
    return model.freeze(args.precision) if args.precision else model


def sample(args):
    """Write text as it is drawn."""
    model = _model_to_use(args)
    if args.prime == "-" and sys.stdin is None:
        raise ValueError("standard input is closed")
    prime = sys.stdin.read() if args.prime == "-" else args.prime
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


def _add_eval(commands):
    p = _command(commands, "eval", evaluate, "measure how well a model predicts a text",
                 "lstmcore eval m.safetensors other.txt --json")
    p.add_argument("model", metavar="M")
    p.add_argument("files", nargs="+", metavar="FILE", help="- for standard input")
    p.add_argument("--encoding", help="of FILE (default: found out)")
    _add_precision(p)
    p.add_argument("--json", action="store_true", help="a JSON object instead of text")


def evaluate(args):
    """Print nats, bits per character and perplexity."""
    model = _model_to_use(args)
    found = model.evaluate(_existing(args.files), encoding=args.encoding)
    if args.json:
        print(json.dumps(found._asdict()))
        return
    print(f"{found.nats:.4f} nats per {_token(model)}\n{found.bits_per_char:.4f} bits per "
          f"character\n{found.perplexity:.4f} perplexity\n{found.tokens} tokens")
    if found.unknown:
        _say(f"{found.unknown} of them are not in the model's vocabulary")


def _add_inspect(commands):
    p = _command(commands, "inspect", look_inside, "color a text by the neurons of a model",
                 "lstmcore inspect m.safetensors book.txt --out page.html")
    p.add_argument("model", metavar="M")
    p.add_argument("file", metavar="FILE", help="- for standard input")
    p.add_argument("--out", default="inspect.html", metavar="PAGE", help="(default: inspect.html)")
    p.add_argument("--limit", type=int, default=2000, metavar="N", help="tokens (default: 2000)")
    p.add_argument("--encoding", help="of FILE (default: found out)")


def look_inside(args):
    """Write the HTML page of `lstmcore.inspect`."""
    from lstmcore import LanguageModel, checks, inspect
    from lstmcore.models import text
    from lstmcore.formats.disk import check_writable

    check_writable(args.out)
    checks.size("limit", args.limit)
    model = LanguageModel.load(args.model).unfreeze()       # of int8: only floats keep gates
    path, = _existing([args.file])
    shown = text.decode(text.read_bytes(path), args.encoding, args.file)
    name = "standard input" if args.file == "-" else os.path.basename(args.file)
    inspect.page(model, shown[:32 * args.limit], args.out, limit=args.limit,
                 title=f"{os.path.basename(args.model)} reads {name}")
    _say(f"saved {args.out}")


def _add_gradflow(commands):
    p = _command(commands, "gradflow", gradflow, "measure how a gradient vanishes in RNN and LSTM",
                 "lstmcore gradflow --out flow.png")
    p.add_argument("--out", metavar="PNG", help="draw it (needs matplotlib)")
    p.add_argument("--hidden-size", "--hidden", type=int, default=64, metavar="N", help="(default: 64)")
    p.add_argument("--steps", type=int, default=100, metavar="N", help="(default: 100)")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="(default: 0)")
    p.add_argument("--json", action="store_true", help="a JSON object instead of a table")


def gradflow(args):
    """Print, and draw, the norms of `lstmcore.gradflow.compare`."""
    from lstmcore import checks, gradflow

    if args.out:
        _check_picture(args.out)
    flows = gradflow.compare(args.hidden_size, args.steps, seed=checks.size("seed", args.seed, 0))
    if args.out:
        gradflow.plot(flows, args.out)
        _say(f"saved {args.out}")
    if args.json:
        print(json.dumps({name: norms.tolist() for name, norms in flows.items()}))
        return
    print("norm of dL/dh(t-k)".ljust(24) + "".join(f"{name:>22}" for name in flows))
    for k in range(0, args.steps + 1, max(1, args.steps // 10)):
        print(f"k = {k}".ljust(24) + "".join(f"{norms[k]:22.3e}" for norms in flows.values()))


def _add_convert(commands):
    p = _command(commands, "convert", convert, "turn a file of recurrent layers into another kind",
                 "lstmcore convert model.pt model.onnx")
    p.add_argument("source", metavar="IN", help=".safetensors, .pt, .keras, .h5 or .onnx")
    p.add_argument("target", metavar="OUT", help=".safetensors, .onnx or .weights.h5")
    p.add_argument("--name", help="which layer, where IN has several")
    p.add_argument("--batch-first", action="store_true", default=None,
                   help="x and y are (B, T, ...), where IN does not say it")
    p.add_argument("--nonlinearity", choices=("tanh", "relu"),
                   help="of an RNN, where IN does not say it")
    p.add_argument("--precision", choices=("float32", "int8"),
                   help="int8: weights of a quarter of the size, in a .safetensors")


def convert(args):
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
        _say(str(warning.message))
    _say(f"saved {module} as {args.target}")


def _add_info(commands):
    p = _command(commands, "info", info, "say what runs here: version, instructions, threads",
                 "lstmcore info --json")
    p.add_argument("--json", action="store_true", help="a JSON object instead of a table")


def info(args):
    """Print `lstmcore.info()`."""
    import lstmcore

    found = lstmcore.info()
    if args.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        value = ", ".join(value) if isinstance(value, (list, tuple)) else value
        print(f"{name.replace('_', ' '):16}{value}")


def _existing(files):
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
    return [name if name == "-" else Path(name) for name in files]


def _check_picture(path):
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


def _token(model):
    return {"char": "character"}.get(model.level, model.level)


def _print_record(model, record):
    parts = [f"{name} {record[name]:.4f}" for name in ("loss", "validation")
             if record[name] is not None]
    _say(f"epoch {record['epoch']:7.2f}  step {record['step']:6}  " + "  ".join(parts)
         + f"  {record['tokens_per_second']:,} tokens/s  {record['seconds']:.0f} s")


def _print_json(model, record):
    print(json.dumps(record), flush=True)


def _say(line):
    print(line, file=sys.stderr, flush=True)


def _in_options(message, parser):
    """A message about an argument in Python, about the option that gave it."""
    options = {action.dest: action.option_strings[0] for action in parser._actions
               if action.option_strings}
    before, name, rest = re.fullmatch(r"(a resumed run cannot change )?(\w*)(.*)", message,
                                      re.DOTALL).groups("")
    return f"{before}{options.get(name, name)}{rest}"


def _mistake(line):
    _say("lstmcore: " + " ".join(line.split()))
    return 2
