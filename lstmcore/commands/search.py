"""lstmcore search: which sizes are worth their time on this text, by successive halving.

All candidates train for equally long; the better half goes on, and again, until one is left (Jamieson and
Talwalkar 2016). Each is a process `lstmcore train` of its own, on CPUs of its own, that keeps its run:
a search that was ended goes on where it was.
"""

import contextlib
import itertools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading

from lstmcore.commands import terminal

HELP = "find out which sizes are worth their time on a text"
EXAMPLE = "lstmcore search book.txt --hidden 64,128,256 --layers 1,2,3 --minutes 10 --plot search.png"
GRID = {"hidden_size": (int, "128"), "num_layers": (int, "1,2"), "embed_size": (int, None),
        "dropout": (float, None), "lr": (float, None), "cell": (str, None)}
SHORT = {"hidden_size": "h", "num_layers": "l", "embed_size": "e", "dropout": "d", "lr": "lr", "cell": ""}
PASSED = ("level", "vocab_size", "min_count", "seq_length", "batch_size", "optimizer", "clip", "validation",
          "encoding", "seed", "compute")
STATE = "search.json"


def options(p):
    """Add the arguments."""
    p.add_argument("files", nargs="+", metavar="FILE", help="text in any encoding, also .gz")
    p.add_argument("--minutes", type=float, default=10.0, metavar="M",
                   help="of the whole search (default: 10)")
    p.add_argument("--out", default="lstmcore-search", metavar="DIR",
                   help="folder of the runs; of a search that was ended, to go on (default: lstmcore-search)")
    p.add_argument("--jobs", type=int, metavar="N", help="processes at a time (default: one for each CPU)")
    p.add_argument("--plot", metavar="PNG", help="draw loss against parameters and time (needs matplotlib)")
    p.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    g = p.add_argument_group("what is tried, every combination: values with commas between")
    g.add_argument("--hidden-size", "--hidden", metavar="N,N", help="(default: 128)")
    g.add_argument("--num-layers", "--layers", metavar="N,N", help="(default: 1,2)")
    g.add_argument("--embed-size", "--embed", metavar="N,N")
    g.add_argument("--dropout", metavar="P,P")
    g.add_argument("--lr", metavar="X,X")
    g.add_argument("--cell", metavar="lstm,gru,rnn")
    g = p.add_argument_group("the same for all, as train has it")
    g.add_argument("--level", "--tokens", choices=("char", "byte", "word", "whitespace"))
    for name, kind in (("vocab-size", int), ("min-count", int), ("seq-length", int), ("batch-size", int),
                       ("clip", float), ("seed", int)):
        g.add_argument("--" + name, type=kind, metavar="X")
    g.add_argument("--optimizer", choices=("adam", "adamw", "rmsprop", "adagrad", "sgd"))
    g.add_argument("--validation", "--val", metavar="P|FILE")
    g.add_argument("--encoding")
    g.add_argument("--compute", choices=("float32", "bfloat16"))


def run(args):
    """Search, say who is left after each round, print a table of all."""
    from lstmcore import scalars

    if scalars.number("minutes", args.minutes) == 0:
        raise ValueError("minutes must be above 0, got 0")
    if "-" in args.files:
        raise ValueError("search reads FILE once for each candidate, so it cannot be standard input")
    terminal.existing(args.files)
    if args.validation is not None and re.fullmatch(r"0*\.?0*", args.validation):
        raise ValueError("validation must be above 0: what is held out decides")
    if args.plot:
        terminal.check_picture(args.plot)
    cpus = _cpus()
    jobs = cpus if args.jobs is None else min(scalars.size("jobs", args.jobs), cpus)
    search = Search(args, [dict(zip(GRID, values)) for values in itertools.product(*map(_values, GRID, (
        getattr(args, name) for name in GRID)))], jobs, cpus)
    ended = search.run()
    rows = search.rows()
    if args.plot and any(row["validation"] is not None for row in rows):
        _draw(search, args.plot)
    if args.json:
        print(json.dumps({"finished": not ended, "trials": rows}))
    else:
        _print(rows, args.level or "char")
        best = next((row for row in rows if row["validation"] is not None), None)
        if ended:
            terminal.say(f"ended before its end; the same command goes on, in {args.out}")
        elif best:
            terminal.say("go on with the best: lstmcore train " + " ".join([
                *args.files, "--resume", best["run"], "--minutes", f"{best['minutes'] + 10:.3g}"]))
    return 130 if ended else 0 if any(row["validation"] is not None for row in rows) else 2


def _cpus():
    from lstmcore.threads import cpus
    return cpus()


def _values(name, given):
    """The values of one option."""
    kind, default = GRID[name]
    given = given or default
    if given is None:
        return [None]
    try:
        found = [kind(value) for value in given.split(",")]
    except ValueError:
        raise ValueError(f"{name} must be numbers with commas between, got {given!r}") from None
    return list(dict.fromkeys(found))


class Search:
    """Candidates, what each has reached, and the rounds that are left."""

    def __init__(self, args, candidates, jobs, cpus):
        self.args, self.jobs, self.cpus = args, jobs, cpus
        self.passed = {name: value for name in PASSED if (value := getattr(args, name)) is not None}
        self.asked = {"files": args.files, "minutes": args.minutes, "candidates": candidates,
                      "passed": self.passed}
        self.trials = {_name(some): {"options": some, "rounds": [], "failed": None} for some in candidates}
        os.makedirs(args.out, exist_ok=True)
        self._check_options()
        self._load()
        self._running, self._ended, self._lock = set(), False, threading.Lock()

    def run(self):
        """All rounds; whether it was ended before."""
        alive, sizes = list(self.trials), []
        while not sizes or sizes[-1] > 1:
            sizes.append(-(-sizes[-1] // 2) if sizes else len(alive))
        minutes = 0.0
        for number, size in enumerate(sizes):
            alive = sorted((name for name in alive if self.trials[name]["failed"] is None),
                           key=self._loss_before(number))[:size]
            if not alive:
                break
            together = min(self.jobs, len(alive))
            minutes += self.args.minutes / len(sizes) / -(-len(alive) // together)
            waiting = [name for name in alive if len(self.trials[name]["rounds"]) <= number]
            if waiting:
                terminal.say(f"round {number + 1} of {len(sizes)}: {len(alive)} candidates, {together} at a "
                             f"time, {minutes:.3g} minutes of training each in all")
            self._round(waiting, minutes, together)
            if self._ended:
                return True
        return False

    def rows(self):
        """What is known of each candidate, the best first."""
        found = []
        for name, trial in self.trials.items():
            last = trial["rounds"][-1] if trial["rounds"] else {}
            found.append({"name": name, **{key: value for key, value in trial["options"].items()
                                           if value is not None},
                          "parameters": last.get("parameters"), "rounds": len(trial["rounds"]),
                          **{key: last.get(key) for key in ("minutes", "steps", "epochs", "validation")},
                          "failed": trial["failed"], "run": self._path(name)})
        return sorted(found, key=lambda row: (row["validation"] is None, row["validation"]))

    def _loss_before(self, number):
        """What candidates are ranked by for a round: the best loss in the rounds before it."""
        def loss(name):
            before = self.trials[name]["rounds"][:number]
            return before[-1]["validation"] if before else 0.0
        return loss

    def _round(self, names, minutes, together):
        """Train these for so many minutes in all, some at a time, each on CPUs of its own."""
        work = queue.SimpleQueue()
        for name in names:
            work.put(name)
        each = self.cpus // together
        places = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        errors = []

        def serve(slot):
            own = None if places is None or len(places) < self.cpus else \
                places[slot * each:(slot + 1) * each]
            with contextlib.suppress(queue.Empty):
                while not self._ended:
                    name = work.get_nowait()
                    try:
                        self._train(name, minutes, each, own)
                    except Exception as error:      # of this program, not of a candidate
                        errors.append(error)
                        self._ended = True
        crew = [threading.Thread(target=serve, args=(slot,)) for slot in range(together)]
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        for member in crew:
            member.start()
        try:
            for member in crew:
                member.join()
        except KeyboardInterrupt:
            terminal.say("ending: what runs is saved")
            with self._lock:
                self._ended = True
                for process in self._running:
                    process.send_signal(signal.SIGINT)
            for member in crew:
                member.join()
        finally:
            signal.signal(signal.SIGTERM, before)
        if errors:
            raise errors[0]

    def _train(self, name, minutes, threads, cpus):
        """One candidate, to its end; what it reached is noted and kept."""
        path = self._path(name)
        command = [sys.executable, "-m", "lstmcore", "train", *self.args.files, "--json", "--no-sample",
                   "--threads", str(threads), "--minutes", repr(minutes), "--schedule", "constant"]
        if os.path.exists(path):
            again = {name: value for name, value in self.passed.items() if name in ("validation", "encoding")}
            command += ["--resume", path, *_options(again)]
        else:
            command += ["--out", path, "--checkpoint", path,
                        *_options(self.trials[name]["options"] | self.passed)]
        with self._lock:
            if self._ended:
                return
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE, text=True, encoding="utf-8",
                                       start_new_session=True)      # Ctrl-C reaches it once, through us
            self._running.add(process)
        if cpus and hasattr(os, "sched_setaffinity"):
            with contextlib.suppress(OSError):      # it has ended already
                os.sched_setaffinity(process.pid, cpus)
        _, said = process.communicate()
        with self._lock:
            self._running.discard(process)
            if process.returncode == 130 or self._ended:
                return
            if process.returncode:
                self.trials[name]["failed"] = (said.strip().splitlines() or ["it died"])[-1]
                terminal.say(f"{name}: {self.trials[name]['failed']}")
            else:
                self.trials[name]["rounds"].append(self._reached(name, minutes))
                reached = self.trials[name]["rounds"][-1]
                terminal.say(f"{name}: validation {reached['validation']:.4f} after {reached['steps']:,} "
                             f"steps, {reached['epochs']:.3g} epochs")
            self._save()

    def _reached(self, name, minutes):
        from lstmcore import LanguageModel
        model = LanguageModel.load(self._path(name))
        last, before = model.history[-1], self.trials[name]["rounds"][-1:]
        # An evaluation at the end of a round is not part of the run that goes on.
        course = [point for r in before for point in r["course"]]
        since = course[-1][0] if course else -1.0
        course += [[r["seconds"], r["validation"]] for r in model.history
                   if r["validation"] is not None and r["seconds"] > since]
        return {"minutes": minutes, "steps": last["step"], "epochs": last["epoch"],
                "validation": min(loss for _, loss in course), "course": course,
                "parameters": sum(p.size for p in model.network.parameters().values())}

    def _path(self, name):
        return os.path.join(self.args.out, name + ".safetensors")

    def _check_options(self):
        """The mistakes in sizes and settings that `train` would find, before the first of many processes."""
        from lstmcore import LanguageModel
        from lstmcore.models.training import Settings

        model = ("level", "vocab_size", "min_count", "seed", "compute")
        for trial in self.trials.values():
            asked = {name: value for name, value in trial["options"].items() if value is not None}
            settings = {name: value for name, value in self.passed.items()
                        if name not in (*model, "validation", "encoding")}
            if "lr" in asked:
                settings["lr"] = asked.pop("lr")
            LanguageModel(**asked, **{name: self.passed[name] for name in model if name in self.passed})
            Settings(**settings)

    def _load(self):
        path = os.path.join(self.args.out, STATE)
        if not os.path.exists(path):
            return
        try:
            with open(path, encoding="utf-8") as file:
                saved = json.load(file)
            asked, trials = saved["asked"], saved["trials"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is no search that can be read; choose another --out") from None
        for name, value in self.asked.items():
            if asked.get(name) != value:
                raise ValueError(f"{self.args.out} holds a search with other {name}: "
                                 f"{asked.get(name)!r:.100}; choose another --out")
        self.trials = trials

    def _save(self):
        from lstmcore.formats import disk
        with disk.written(os.path.join(self.args.out, STATE)) as file:
            file.write(json.dumps({"asked": self.asked, "trials": self.trials}, indent=1).encode())


def _name(options):
    """A name for files: h128-l2."""
    return "-".join(f"{SHORT[key]}{value}" for key, value in options.items() if value is not None)


def _options(options):
    return [part for name, value in options.items() if value is not None
            for part in ("--" + name.replace("_", "-"), str(value))]


def _print(rows, level):
    names = max(4, *(len(row["name"]) for row in rows))
    unit = "bits/char" if level == "char" else "nats"
    print(f"{'':{names}}  {unit:>9}  {'parameters':>11}  {'minutes':>7}  {'steps':>8}  {'epochs':>7}")
    for row in rows:
        if row["validation"] is None:
            print(f"{row['name']:{names}}  {row['failed'] or 'not trained yet'}")
            continue
        loss = row["validation"] / 0.6931471805599453 if level == "char" else row["validation"]
        print(f"{row['name']:{names}}  {loss:9.4f}  {row['parameters']:11,}  {row['minutes']:7.2f}  "
              f"{row['steps']:8,}  {row['epochs']:7.2f}")


def _draw(search, path):
    """Loss against parameters, after the first round, which all had, and at the end; and against time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    sizes, times = figure.subplots(1, 2, sharey=True)
    layers = sorted({trial["options"]["num_layers"] for trial in search.trials.values()})
    colors = {n: f"C{at % 10}" for at, n in enumerate(layers)}
    for n in layers:
        some = {name: trial for name, trial in search.trials.items()
                if trial["options"]["num_layers"] == n and trial["rounds"]}
        name_of = f"{n} layer{'s' * (n > 1)}, "
        first = sorted((trial["rounds"][0]["parameters"], trial["rounds"][0]["validation"])
                       for trial in some.values())
        if first:
            sizes.plot(*zip(*first), "o--", color=colors[n], alpha=0.6, label=name_of + "first round")
        longer = [trial["rounds"][-1] for trial in some.values() if len(trial["rounds"]) > 1]
        if longer:
            sizes.plot([r["parameters"] for r in longer], [r["validation"] for r in longer], "o",
                       color=colors[n], label=name_of + "at its end")
        for name, trial in some.items():
            course = trial["rounds"][-1]["course"]
            times.plot([s / 60 for s, _ in course], [loss for _, loss in course], ".-", color=colors[n],
                       linewidth=1 + len(trial["rounds"]) / 2)
            times.annotate(name, (course[-1][0] / 60, course[-1][1]), fontsize=7, xytext=(3, 0),
                           textcoords="offset points")
    sizes.set(xscale="log", xlabel="parameters", ylabel="validation loss, nats per token")
    times.set(xlabel="minutes of training")
    sizes.legend(fontsize=8)
    for axes in sizes, times:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
