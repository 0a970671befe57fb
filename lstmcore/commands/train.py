"""lstmcore train: read texts, train, save, write a sample."""

import contextlib
import json
import math
import os
import pathlib
import sys

from lstmcore.commands import terminal

DEFAULT_OUT = "lstmcore-model.safetensors"
DEFAULT_MINUTES = 1.0
# For a minute on two cores; a model made in Python has the constructor's sizes.
DEFAULT_HIDDEN, DEFAULT_LR, DEFAULT_SEQ, DEFAULT_BATCH = 128, 5e-3, 64, 32
EXIT_OF = {"SIGINT": 130, "SIGTERM": 143}

HELP = "train a model on text and save it"
EXAMPLE = "lstmcore train book.txt --hidden 256 --epochs 20 --out book.safetensors"


def options(p):
    """Add the arguments."""
    p.add_argument("files", nargs="*", metavar="FILE",
                   help="text in any encoding, also .gz; - for standard input; without FILE: "
                        "Python's documentation of its own language")
    p.add_argument("--out", metavar="M", help=f"the model (default: the resumed one, or {DEFAULT_OUT}); "
                   "without the run, once that is finished")
    p.add_argument("--checkpoint", metavar="R",
                   help="keep the model with what --resume needs, three times its size, in R")
    p.add_argument("--resume", metavar="R",
                   help="continue the run in R, an interrupted M or a --checkpoint, on the same text")
    terminal.add_encoding(p)
    p.add_argument("--seed", type=int, help="of weights, dropout and sample (default: 0)")
    p.add_argument("--json", action="store_true", help="one JSON object per line instead of text")
    p.add_argument("--plot", metavar="PNG", help="draw the losses (needs matplotlib)")
    p.add_argument("--log", metavar="CSV", help="write the losses as a table, a line per evaluation")
    p.add_argument("--tensorboard", metavar="DIR",
                   help="write the losses for TensorBoard (needs tensorboard)")
    p.add_argument("--sample-every", type=int, metavar="N",
                   help="write 200 tokens after every N steps, at the next evaluation")
    p.add_argument("--no-sample", action="store_true", help="do not write 400 tokens at the end")

    g = p.add_argument_group("model (that of M if resumed)")
    g.add_argument("--level", "--tokens", choices=("char", "byte", "word", "whitespace"),
                   help="(default: char); whitespace: FILE is cut into tokens, a line end is <eos>")
    g.add_argument("--cell", choices=("lstm", "gru", "rnn"), help="(default: lstm)")
    g.add_argument("--hidden-size", "--hidden", type=int, metavar="N", help=f"(default: {DEFAULT_HIDDEN})")
    g.add_argument("--num-layers", "--layers", type=int, metavar="N", help="(default: 2)")
    g.add_argument("--embed-size", "--embed", type=int, metavar="N",
                   help="width of the table of tokens (default: 64; words: 128; 0: one-hot)")
    g.add_argument("--peepholes", action="store_true", default=None)
    g.add_argument("--dropout", type=float, metavar="P", help="(default: 0)")
    g.add_argument("--recurrent-dropout", type=float, metavar="P",
                   help="of what an LSTM hears of its last h, one mask for a sequence (default: 0)")
    g.add_argument("--zoneout", type=float, metavar="P",
                   help="probability of h and c of an LSTM to keep their last value (default: 0)")
    g.add_argument("--weight-dropout", type=float, metavar="P", help="of W_hh (default: 0)")
    g.add_argument("--locked-dropout", action="store_true", default=None,
                   help="dropout between layers is one mask for a sequence")
    g.add_argument("--layer-norm", choices=("products", "gates"),
                   help="normalize the products of an LSTM and c, or its gates and c")
    g.add_argument("--vocab-size", "--vocab", type=int, metavar="N",
                   help="keep the N most frequent tokens")
    g.add_argument("--min-count", type=int, metavar="N",
                   help="keep tokens seen so often (default: 1; words: 2)")
    g.add_argument("--init-uniform", type=float, metavar="X",
                   help="all parameters from -X to X at the start (default: each layer's own way)")
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
    g.add_argument("--momentum", type=float, metavar="X", help="of sgd (default: 0.9)")
    g.add_argument("--lr", type=float, help=f"learning rate (default: {DEFAULT_LR:g})")
    g.add_argument("--schedule", choices=("step", "cosine", "plateau", "constant"),
                   help="of the learning rate (default: cosine over --minutes, else step)")
    g.add_argument("--decay", type=float, help="step: factor per epoch (default: 0.97)")
    g.add_argument("--decay-after", type=int, metavar="N", help="step: epoch (default: 10)")
    g.add_argument("--warmup", type=int, metavar="N", help="steps (default: 0)")
    g.add_argument("--clip", type=float, help="norm of the gradients (default: 5; 0: none)")
    g.add_argument("--weight-decay", type=float, metavar="X", help="(default: 0)")
    g.add_argument("--validation", "--val", type=_share_or_file, metavar="P|FILE",
                   help="share of each FILE, at its end, kept for validation, or a file of its own "
                        "(default: 0.05)")
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


def _share_or_file(given):
    try:
        return float(given)
    except ValueError:
        return pathlib.Path(given)


def run(args):
    """Train, save, write a sample; under an MPI launcher with all its processes."""
    from lstmcore import distributed

    if (comm := distributed.launched()) is None:
        return _train(args, distributed.ALONE)
    processes = distributed.Processes(comm, own=True)
    if processes.rank:                  # rank 0 alone speaks
        args.json = False
        args.log = args.tensorboard = args.plot = args.sample_every = None
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
    from lstmcore import LanguageModel, scalars
    from lstmcore.formats.disk import check_writable
    from lstmcore.models import curves
    from lstmcore.models.training import Budget, Settings

    def asked(names):
        return {name: value for name in names if (value := getattr(args, name, None)) is not None}

    kept = args.checkpoint or args.resume
    out = args.out or (kept if args.resume else DEFAULT_OUT)
    run = kept or out               # the file that has the run meanwhile

    def check_places():
        for path in filter(None, (out, run, args.log)):
            check_writable(path)
        if args.plot:
            terminal.check_picture(args.plot)
        if args.tensorboard:
            curves.TensorBoard.writer()
            os.makedirs(args.tensorboard, exist_ok=True)
        if isinstance(args.validation, os.PathLike):
            terminal.existing([os.fspath(args.validation)])
        return terminal.existing(args.files)
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
        callbacks.append(_Samples(scalars.size("sample_every", args.sample_every), args))
    Settings(**{name: value for name, value in settings.items() if not isinstance(value, os.PathLike)})
    Budget(**budget)
    if not args.json:
        replaced = f"; {out} will be replaced" if os.path.exists(out) and not args.resume else ""
        terminal.say(f"training {model} on "
                     + (", ".join(args.files) or "Python's documentation of its own language") + replaced)
    done = model.history[-1]["step"] if model.history else None
    with contextlib.ExitStack() as stack:
        if args.tensorboard:
            callbacks.append(curves.TensorBoard(args.tensorboard))
            stack.callback(callbacks[-1].close)
        if args.log:
            callbacks.append(curves.table(stack.enter_context(open(args.log, "a" if args.resume else "w"))))
        model.fit(files or None, checkpoint=run, resume=args.resume, callbacks=callbacks, progress=bar,
                  encoding=args.encoding, comm=processes, **budget, **settings)
    if args.resume and model.history and model.history[-1]["step"] == done:
        terminal.say(f"nothing to do: the run was at its end, after {done} steps; more --epochs, --minutes "
                     "or --steps continue it")
    if args.plot:
        curves.plot_history(model, args.plot)
    if processes.rank == 0:
        if run != out or kept is None and model.outcome not in EXIT_OF:
            model.save(out)
        _conclude(model, out, run, args)
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
            terminal.say(f"step {record['step']} writes:\n{text}\n")


def _conclude(model, out, run, args):
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
        bits, perplexity = _bits(model, record), math.exp(min(record["validation"], 700))
        terminal.say(f"best validation loss: {record['validation']:.4f} nats per {terminal.token(model)}"
                     + (f" = {bits:.3f} bits per character" if bits else f" = perplexity {perplexity:.2f}")
                     + f" (epoch {record['epoch']:.4g}, step {record['step']})")
    if finished:
        terminal.say(f"saved {out}; write more: lstmcore sample {out}")
    else:
        terminal.say(f"{model.outcome}: saved {run}; continue: lstmcore train "
                     + " ".join([*args.files, "--resume", run]))
    if sample is not None:
        print(sample)


def _bits(model, record):
    if model.level != "char" or not record or record["validation"] is None:
        return None
    return record["validation"] / math.log(2)


def _print_record(model, record):
    parts = [f"{name} {record[name]:.4f}" for name in ("loss", "validation")
             if record[name] is not None]
    terminal.say(f"epoch {record['epoch']:7.2f}  step {record['step']:6}  " + "  ".join(parts)
                 + f"  {record['tokens_per_second']:,} tokens/s  {record['seconds']:.0f} s")


def _print_json(model, record):
    print(json.dumps(record), flush=True)
