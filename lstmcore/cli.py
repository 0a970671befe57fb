"""The command `lstmcore`: a row of COMMANDS for each of its commands.

Results go to standard output, everything else to standard error. A mistake is one line there and
exit code 2; an interrupted training is saved and ends with 130 (Ctrl-C) or 143 (SIGTERM).
"""

import argparse
import os
import re
import sys
import time
import warnings

from lstmcore import __version__
from lstmcore.commands import (chat, compare, convert, evaluate, gradflow, info, look_inside, sample,
                               search, train)
from lstmcore.commands.terminal import say

COMMANDS = {"train": train, "sample": sample, "chat": chat, "eval": evaluate, "compare": compare,
            "search": search, "info": info, "inspect": look_inside, "gradflow": gradflow, "convert": convert}

RANKS = "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"       # as MPI launchers name them

EXAMPLES = """examples:
  lstmcore train                                 a minute on Python's own documentation
  lstmcore train book.txt --hidden 256 --epochs 20 --dropout 0.3 --out book.safetensors
  zcat *.gz | lstmcore train - --level byte --minutes 10
  lstmcore train book.txt --out book.safetensors --checkpoint book.run
  lstmcore train book.txt --resume book.run --epochs 40
  lstmcore sample book.safetensors --prime "It was" --length 500 --temperature 0.7
  lstmcore chat book.safetensors
  lstmcore eval book.safetensors other.txt
  lstmcore search book.txt --hidden 64,128,256 --layers 1,2,3 --minutes 10
"""


def main(argv=None):
    """Run the command with these arguments, by default those of the process; the exit code."""
    _open_streams()
    args = build_parser().parse_args(argv)
    try:
        if args.threads is not None:
            from lstmcore import scalars, set_num_threads
            set_num_threads(scalars.size("threads", args.threads))
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *rest, **more: say(f"warning: {message}")
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
    """A parser that says what is wrong in one line, and of several processes once."""

    def error(self, message):
        if any(os.environ.get(name, "0") != "0" for name in RANKS):
            time.sleep(1)           # else the launcher may end rank 0 before it has spoken
            self.exit(2)
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser():
    """The parser of all commands."""
    parser = _Parser(
        prog="lstmcore", description="Train LSTM language models on the CPU and use them.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"lstmcore {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        p = commands.add_parser(
            name, help=command.HELP, description=command.HELP[0].upper() + command.HELP[1:] + ".",
            epilog="example:\n  " + command.EXAMPLE,
            formatter_class=argparse.RawDescriptionHelpFormatter)
        p.set_defaults(run=command.run, parser=p)
        p.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
        command.options(p)
    return parser


def _in_options(message, parser):
    """A message about an argument in Python, about the option that gave it."""
    options = {action.dest: action.option_strings[0] for action in parser._actions
               if action.option_strings}
    before, name, rest = re.fullmatch(r"(a resumed run cannot change )?(\w*)(.*)", message,
                                      re.DOTALL).groups("")
    return f"{before}{options.get(name, name)}{rest}"


def _mistake(line):
    say("lstmcore: " + " ".join(line.split()))
    return 2
