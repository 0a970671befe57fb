"""lstmcore chat: a line in, a line out, with all that was said before in mind."""

import sys

from lstmcore.commands import terminal

HELP = "talk with a model, line by line, in a terminal or a pipe"
EXAMPLE = "lstmcore chat m.safetensors --temperature 0.5"
ORDERS = """/temperature X, /top-k K, /top-p P, /length N    how it draws (K and P: none for no limit)
/reset      forget what was said
/history    show what was said
/quit       the end, as Ctrl-D
//...       a line that begins with /"""
LIMITS = {"temperature": float, "top_k": int, "top_p": float, "length": int}


def options(p):
    """Add the arguments."""
    p.add_argument("model", metavar="M")
    p.add_argument("--prime", default="", metavar="TEXT", help="what was said before the first line")
    p.add_argument("--length", type=int, default=400, metavar="N",
                   help="tokens of an answer, at most (default: 400)")
    terminal.add_drawing(p, temperature=0.7)
    p.add_argument("--no-history", action="store_true", help="answer each line by itself")
    terminal.add_precision(p)


def run(args):
    """Answer lines until there are no more."""
    args.stop = terminal.stops(args) or ["\n"]
    talk = Talk(terminal.model_to_use(args), args)
    seen = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    if seen:
        terminal.say(f"{args.model}: {talk.model.sizes()}. /help says what can be ordered, Ctrl-D ends.")
    for line in _lines(seen):
        if line.startswith("/") and not line.startswith("//"):
            if line.split() in (["/quit"], ["/exit"]):
                return
            _obey(talk, line)
            continue
        try:
            for piece in talk.answer(line[1:] if line.startswith("//") else line):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:       # ends an answer that is too long
            if not seen:
                raise
        if not talk.said.endswith("\n"):
            print(flush=True)
            talk.end_line()


def _lines(seen):
    """The lines of a terminal, or of a pipe in any encoding that continues ASCII."""
    if seen:
        try:
            import readline     # noqa: F401  so that input() edits lines and remembers them
        except ImportError:
            pass
        while True:
            try:
                yield input("> ")
            except EOFError:
                print()
                return
    if sys.stdin is None:
        raise ValueError("standard input is closed")
    from lstmcore.models.corpus import decode
    for line in iter(sys.stdin.buffer.readline, b""):
        yield decode(line).removesuffix("\n")


def _obey(talk, line):
    """Do what a line with / orders; a mistake is said, and changes nothing."""
    order, *given = line[1:].split()
    name = order.replace("-", "_")
    try:
        if name in LIMITS and len(given) == 1:
            none = given[0] == "none" and name.startswith("top")
            talk.change(name, None if none else LIMITS[name](given[0]))
        elif line == "/reset":
            talk.reset()
        elif line == "/history":
            print(talk.said.removesuffix("\n"))
        elif line == "/help":
            terminal.say(ORDERS)
        else:
            raise ValueError(f"no order {line!r:.60}: /help lists them")
    except ValueError as error:
        terminal.say(str(error))


class Talk:
    """A model, how it draws, and what was said so far."""

    def __init__(self, model, args):
        from lstmcore.models import generation

        self.model, self.args, self.generation = model, args, generation
        generation.check_stop(args.stop)
        args.prime = terminal.argument(args.prime)
        self.change("length", args.length)
        self.reset()

    def change(self, name, value):
        """Draw in another way from now on."""
        from lstmcore import scalars

        now = {limit: getattr(self.args, limit) for limit in LIMITS} | {name: value}
        scalars.size("length", now.pop("length"), 0)
        self.draw = self.generation.drawing(**now, seed=self.args.seed)
        setattr(self.args, name, value)

    def reset(self):
        """Forget what was said."""
        self.writer = self.generation.Writer(self.model.network.eval(), self.model.vocabulary)
        self.said = self.args.prime

    def answer(self, line):
        """The answer to a line, in pieces."""
        if self.args.no_history:
            self.reset()
        first = self.said == self.args.prime
        if self.said and not self.said.endswith("\n"):
            self.said += "\n"
        heard = (self.said if first else "") + line + "\n"
        self.said += line + "\n"
        self.writer.read(self.generation.ids_of(self.model.vocabulary, heard))
        for piece in self.writer.write(self.args.length, self.draw, self.args.stop):
            self.said += piece
            yield piece

    def end_line(self):
        """Let the next line begin as one."""
        self.said += "\n"
        if self.model.vocabulary.decode([self.model.vocabulary.start]) == "\n":
            self.writer.read([self.model.vocabulary.start])
