"""Training by several processes: `python -m bench.distributed`, about ten minutes; needs lstmcore[mpi].

What a step takes with threads, with processes, and with as many processes that do not talk; where a
step's time goes; what the links here carry, one of them slowed down by `tc` in a network namespace of
its own; a cost model of these constants, held against the measured steps, and what it says of up to
1,024 processes; and what gradients in bfloat16 do to the loss. Writes bench/results/distributed.json,
from which bench.pages makes the tables of docs/distributed.md. Every figure is the median over
rounds, the rows in turn.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from bench import record

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "bench" / "results" / "distributed.json"
# V tokens, H units, L layers, E width of the table, T steps, B streams
CASES = {"char-rnn": (65, 128, 2, 64, 50, 64), "ptb-medium": (10_000, 650, 2, 650, 35, 20),
         "big": (10_000, 1024, 1, 1024, 50, 128)}
STEPS = {"char-rnn": 30, "ptb-medium": 6, "big": 2}
ROWS = [  # name, processes, threads of each, settings; "apart": they do not talk
    ("1 process, 2 threads", 1, 2, {}),
    ("1 process, 2 threads, 2 shards", 1, 2, {"shards": 2}),
    ("1 process, 2 threads, 8 shards", 1, 2, {"shards": 8}),
    ("2 processes that do not talk", 2, 1, {"apart": True}),
    ("2 processes, 2 shards", 2, 1, {"shards": 2}),
    ("2 processes, 8 shards", 2, 1, {"shards": 8}),
    ("2 processes, allreduce", 2, 1, {"reduction": "allreduce"}),
    ("2 processes, 2 shards, bfloat16", 2, 1, {"shards": 2, "wire": "bfloat16"}),
    ("4 processes that do not talk", 4, 1, {"apart": True}),
    ("4 processes, 4 shards", 4, 1, {"shards": 4}),
]
TCP = {"MPIR_CVAR_CH4_NETMOD": "ofi", "MPIR_CVAR_NOLOCAL": "1", "FI_PROVIDER": "tcp", "FI_TCP_IFACE": "lo"}
LINKS = {  # name: environment, rate in both directions together
    "shared memory": ({}, None), "TCP, loopback": (TCP, None), "TCP, 2 Gbit/s": (TCP, "4gbit"),
    "TCP, 0.5 Gbit/s": (TCP, "1gbit")}
NOMINAL = {"10 Gbit/s Ethernet": (20e-6, 1.1e9), "100 Gbit/s, RDMA": (2e-6, 11e9)}     # s, bytes/s
RANKS = (2, 8, 64, 256, 1024)


# ---- in a process --------------------------------------------------------------------------------

def trainer_of(case, processes, settings):
    """A run on random tokens, and its shards."""
    from lstmcore.models.network import Network
    from lstmcore.models.sources import Streams
    from lstmcore.models.training import Budget, Settings, Trainer

    V, H, L, E, T, B = CASES[case]
    settings = Settings(seq_length=T, batch_size=B, validation=0, **settings)
    shards = settings.divide(processes)
    network = Network(V, cell="lstm", hidden_size=H, num_layers=L, embed_size=E, seed=0).train()
    tokens = np.random.default_rng(0).integers(0, V, B * T * 40 + 1).astype(np.int32)
    source = Streams(tokens, None, B, T, shards)
    return Trainer(network, source, settings, Budget(steps=10**6), shards=shards)


def measure(case, threads, settings):
    """Seconds of steps, the times inside the last one, the numbers of each stage."""
    import lstmcore
    from lstmcore import distributed

    lstmcore.set_num_threads(threads)
    comm, settings = distributed.launched(), dict(settings)
    apart = settings.pop("apart", False)
    with distributed.training(comm) as processes:
        if apart:
            V, H, L, E, T, B = CASES[case]
            CASES[case] = V, H, L, E, T, B // processes.size
        trainer = trainer_of(case, distributed.ALONE if apart else processes, settings)
        trainer._clock = time.perf_counter()
        seconds, shards = [], trainer.shards
        for _ in range(STEPS[case] + 2):
            if shards and not apart:
                shards.times = []
            if apart and processes.size > 1:
                processes.comm.Barrier()
            start = time.perf_counter()
            trainer._advance()
            seconds.append(time.perf_counter() - start)
        noted = [(what, at - start) for what, at in shards.times or ()] if shards else []
        return processes.rank, {
            "seconds": statistics.median(seconds[2:]), "noted": [*noted, ("step", seconds[-1])],
            "stages": [sum(trainer.gradients[name].size for name in names)
                       for names in trainer.network.stages()]}


def link():
    """Seconds of a message of 8 bytes there and one back at once, and bytes/s of a large one; bytes/s
    of the sum of two arrays."""
    from lstmcore import distributed

    comm = distributed.launched()
    found = []
    for size, repeats in (8, 200), (1 << 23, 8):
        out, back, seconds = np.ones(size, np.uint8), np.empty(size, np.uint8), []
        for _ in range(repeats):
            comm.Barrier()
            start = time.perf_counter()
            comm.Sendrecv(out, 1 - comm.rank, recvbuf=back, source=1 - comm.rank)
            seconds.append(time.perf_counter() - start)
        found.append(statistics.median(seconds))
    a, b, seconds = np.ones(1 << 21, np.float32), np.ones(1 << 21, np.float32), []
    for _ in range(9):
        start = time.perf_counter()
        a += b
        seconds.append(time.perf_counter() - start)
    return comm.rank, {"latency": found[0], "bandwidth": (1 << 23) / (found[1] - found[0]),
                       "sums": a.nbytes / statistics.median(seconds)}


def losses(seeds, steps):
    """Validation losses of a character model on Python's documentation: {wire: [of each seed]}."""
    from lstmcore import LanguageModel

    found = {}
    for wire in None, "bfloat16":
        found[wire or "float32"] = [
            LanguageModel(hidden_size=128, seed=seed).fit(
                steps=steps, seq_length=50, batch_size=32, lr=5e-3, progress=False, shards=8,
                wire=wire).history[-1]["validation"] for seed in range(seeds)]
    return found


# ---- the processes -------------------------------------------------------------------------------

def run(P, job, environment=None, rate=None):
    """What rank 0 of P processes says of a job, on a link of its own if it has a rate."""
    command = [sys.executable, "-m", "bench.distributed", "--job", json.dumps(job)]
    if P > 1:
        command = [shutil.which("mpiexec", path=os.pathsep.join(
            (str(Path(sys.executable).parent), os.environ["PATH"]))), "-n", str(P), *command]
    if rate:
        inside = (f"ip link set lo up && tc qdisc add dev lo root tbf rate {rate} burst 512kb latency 200ms"
                  ' && exec "$@"')
        command = ["unshare", "-rn", "sh", "-c", inside, "sh", *command]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True,
                          env={**os.environ, **(environment or {})})
    return json.loads(done.stdout)


def quiet(limit):
    """Wait until other programs leave the CPUs alone, or so many seconds; whether they do."""
    def idle():
        fields = [int(n) for n in Path("/proc/stat").read_text().split()[1:9]]
        return fields[3] + fields[4], sum(fields)

    end, before = time.monotonic() + limit, idle()
    while time.monotonic() < end:
        time.sleep(0.7)
        now = idle()
        if now[0] - before[0] > 0.93 * (now[1] - before[1]):
            return True
        before = now
    return False


def in_turn(rows, rounds, limit, short=()):
    """{key: the answer with the median of its seconds}, each round all of the rows; those of a case in
    `short` in three times as many rounds."""
    found, loud = {}, 0
    for n in range(3 * rounds):
        for key, call in rows.items():
            if n >= rounds and not key.startswith(tuple(short)):
                continue
            loud += not quiet(limit)
            found.setdefault(key, []).append(call())
            print(key, *(f"{one.get('seconds', 0) * 1e3:.1f}" for one in found[key]), flush=True)
    middle = {key: sorted(answers, key=lambda one: one.get("seconds", one.get("bandwidth", 0)))[
        (len(answers) - 1) // 2] for key, answers in found.items()}
    return middle, loud


def main(argv=None):
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(prog="python -m bench.distributed",
                                     description="Measure training by several processes.")
    parser.add_argument("--rounds", type=int, default=5, help="processes per figure (default: 5)")
    parser.add_argument("--seeds", type=int, default=3, help="of the losses (default: 3)")
    parser.add_argument("--keep-losses", action="store_true", help="leave those of the record as they are")
    parser.add_argument("--wait", type=float, default=60, metavar="S",
                        help="most seconds to wait for quiet CPUs before a figure (default: 60)")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="JSON")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.job:
        job = json.loads(options.job)
        what = job.pop("what")
        rank, answer = {"measure": measure, "link": link, "losses": lambda **of: (0, losses(**of))}[what](
            **job)
        if rank == 0:
            print(json.dumps(answer))
        return
    here = record.machine(2, os.getloadavg()[0])
    runs = {f"{case}; {name}": lambda P=P, job=dict(what="measure", case=case, threads=threads,
                                                    settings=settings): run(P, job)
            for case in ("char-rnn", "ptb-medium") for name, P, threads, settings in ROWS}
    runs, loud = in_turn(runs, options.rounds, options.wait, ["char-rnn"])
    links = {name: lambda env=env, rate=rate: run(2, {"what": "link"}, env, rate)
             for name, (env, rate) in LINKS.items()}
    links, _ = in_turn(links, options.rounds, options.wait)
    slow = {f"{case}; {name}": lambda case=case, env=env, rate=rate, wire=wire: run(
        2, {"what": "measure", "case": case, "threads": 1, "settings": {"shards": 2, **wire}}, env, rate)
        for case in ("char-rnn", "ptb-medium") for link, (env, rate) in LINKS.items() if env
        for name, wire in ((link, {}), (link + ", bfloat16", {"wire": "bfloat16"}))}
    slow, more = in_turn(slow, max(1, options.rounds // 2), options.wait)
    big, _ = in_turn({"big; 1 process, 2 threads": lambda: run(1, {
        "what": "measure", "case": "big", "threads": 2, "settings": {"shards": 1}})}, 1, options.wait)
    wire = json.loads(options.output.read_text())["losses"] if options.keep_losses else \
        run(1, {"what": "losses", "seeds": options.seeds, "steps": 600})
    versions = {name: __import__(name).__version__ for name in ("lstmcore", "numpy", "mpi4py")}
    from mpi4py import MPI
    versions["MPI"] = MPI.Get_library_version().split("\n")[0].replace("\t", " ").strip(" \0")
    options.output.write_text(json.dumps({
        "machine": here, "date": record.today(), "command": "python -m bench.distributed",
        "versions": versions, "rounds": options.rounds, "loud": loud + more,
        "figures": options.rounds * sum(3 if key.startswith("char-rnn") else 1 for key in runs)
        + max(1, options.rounds // 2) * len(slow),
        "runs": {**runs, **big},
        "links": links, "slow": slow, "losses": wire}, indent=1) + "\n")


# ---- the cost model ------------------------------------------------------------------------------

def exchange(stages, P, latency, bandwidth, sums, ready=None, end=0.0, number=4):
    """Seconds by which the exchange ends after the backward pass, which ends at `end`.

    stages : numbers of each; ready : when each is complete, if what has been sent travels meanwhile
    For M bytes a process sends P - 1 messages of M / P, twice, and adds P - 1 parts of M / P up:
        2 (P - 1) (latency + M / P / bandwidth) + M (P - 1) / P / sums
    What goes back are sums in bfloat16, or the parameters that a process has updated.
    """
    there, back = -math.inf if ready else 0.0, 0.0
    for n, numbers in enumerate(stages):
        phase = (P - 1) * (latency + numbers * number / P / bandwidth)
        there = max(there, ready[n] - end if ready else there) + phase
        back += phase + numbers * 4 * (P - 1) / P / sums
    return max(there, 0.0) + back


def expected(found, case, P, link, apart, number=4, overlap=False):
    """Seconds of a step of P processes, from that of as many that do not talk, and the constants."""
    talked = found["runs"][f"{case}; {P} processes, {P} shards"]
    end, ready = ready_times(talked)
    ready = ready if overlap else None
    saved = 0 if number == 2 else (P - 1) * updating(talked)
    return apart - saved + exchange(talked["stages"], P, link["latency"], link["bandwidth"],
                                    found["links"]["shared memory"]["sums"], ready, end, number)


def updating(run):
    """Seconds in which a process clips gradients and updates its part of the parameters."""
    at = dict((what, when) for what, when in run["noted"])
    return at["updated"] - at["done"]


def ready_times(run):
    """When a backward pass ends, and when each stage is complete."""
    at = dict((what, when) for what, when in run["noted"])
    end = at["wait"]
    return end, [at.get(f"stage {n}", end) for n in range(len(run["stages"]))]


# ---- tables --------------------------------------------------------------------------------------

def source(found):
    """Where the figures come from."""
    cpu, named = found["machine"], {**found["versions"]}
    mpi = " ".join(named.pop("MPI").replace("Version:", "").split())
    versions = ", ".join([*(f"{name} {version}" for name, version in named.items()), mpi])
    return (f"`{found['command']}`, {found['date']}: {cpu['cpu']}, {cpu['cores']} cores, {versions}; "
            f"medians of {found['rounds']} rounds in turn, of char-rnn three times as many, "
            f"{found['loud']} of {found['figures']} figures beside other programs that took CPU time.")


def tokens_per_second(case, run):
    V, H, L, E, T, B = CASES[case]
    return T * B / run["seconds"]


def runs_table(found):
    """Tokens per second, and the share of what threads reach."""
    cases = ("char-rnn", "ptb-medium")
    lines = [source(found), "", "| on 2 cores | " + " | ".join(f"{case}, tokens/s | " for case in cases)
             + " |", "|---|" + "--:|--:|" * len(cases)]
    for name, *_, settings in ROWS:
        if settings.get("apart"):
            continue
        cells = []
        for case in cases:
            speed = tokens_per_second(case, found["runs"][f"{case}; {name}"])
            base = tokens_per_second(case, found["runs"][f"{case}; {ROWS[0][0]}"])
            cells.append(f"{speed:,.0f} | {speed / base:.2f}×")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def check_table(found):
    """Measured steps and what the model says of them."""
    lines = ["| case | processes | link | measured, ms | model, ms | model with overlap, ms |",
             "|---|--:|---|--:|--:|--:|"]

    def line(case, P, name, measured, number=4):
        link = found["links"][name.removesuffix(", bfloat16")]
        apart = found["runs"][f"{case}; {P} processes that do not talk"]["seconds"]
        model, best = (expected(found, case, P, link, apart, number, overlap) for overlap in (False, True))
        lines.append(f"| {case} | {P} | {name} | {measured['seconds'] * 1e3:.1f} | {model * 1e3:.1f} | "
                     f"{best * 1e3:.1f} |")

    for case in ("char-rnn", "ptb-medium"):
        for P in 2, 4:
            line(case, P, "shared memory", found["runs"][f"{case}; {P} processes, {P} shards"])
        for key, measured in found["slow"].items():
            its, _, name = key.partition("; ")
            if its == case:
                line(case, 2, name, measured, 2 if "bfloat16" in name else 4)
    return "\n".join(lines)


def links_table(found):
    """The constants."""
    lines = ["| link | latency, µs | bandwidth, GB/s |", "|---|--:|--:|"]
    lines += [f"| {name}, measured | {link['latency'] * 1e6:.1f} | {link['bandwidth'] / 1e9:.2f} |"
              for name, link in found["links"].items()]
    lines += [f"| {name}, assumed | {latency * 1e6:.1f} | {bandwidth / 1e9:.2f} |"
              for name, (latency, bandwidth) in NOMINAL.items()]
    sums = found["links"]["shared memory"]["sums"]
    return "\n".join([*lines, "", f"Sums of gradients: {sums / 1e9:.1f} GB/s."])


def scale_table(found):
    """Weak scaling: each process has the case's batch, 2 cores and a link."""
    lines = ["| case | gradients, MB | step alone, ms | link | " +
             " | ".join(f"{P:,}" for P in RANKS) + " |", "|---|--:|--:|---|" + "--:|" * len(RANKS)]
    sums = found["links"]["shared memory"]["sums"]
    for case in CASES:
        run = found["runs"][f"{case}; 1 process, 2 threads"]
        for name, (latency, bandwidth) in NOMINAL.items():
            update = updating(found["runs"].get(f"{case}; 1 process, 2 threads, 2 shards", run))
            steps = [run["seconds"] - update * (1 - 1 / P)
                     + exchange(run["stages"], P, latency, bandwidth, sums) for P in RANKS]
            lines.append(f"| {case} | {sum(run['stages']) * 4 / 1e6:.1f} | {run['seconds'] * 1e3:.0f} | "
                         f"{name} | " + " | ".join(f"{run['seconds'] / step:.2f}" for step in steps) + " |")
    return "\n".join(lines)


def trace_table(found):
    """What happens when in a step of two processes."""
    lines = ["| ms from the start of the step | char-rnn | ptb-medium |", "|---|--:|--:|"]
    runs = [dict(found["runs"][f"{case}; 2 processes, 2 shards"]["noted"])
            for case in ("char-rnn", "ptb-medium")]
    names = {"stage 0": "the head's gradients are sent", "backward": "the loss is known, backward begins",
             "stage 1": "those of the upper layer", "stage 2": "of the lower layer",
             "wait": "backward has ended, the last ones are sent", "parts of 0": "the head's have come",
             "parts of 1": "the upper layer's", "parts of 2": "the lower layer's",
             "parts of 3": "the table's",
             "done": "a process has its part of the sums",
             "updated": "the parameters of this part are updated",
             "step": "those of all parts are everywhere"}
    lines += [f"| {said} | " + " | ".join(f"{run[what] * 1e3:.1f}" for run in runs) + " |"
              for what, said in names.items() if all(what in run for run in runs)]
    return "\n".join(lines)


def losses_table(found):
    """Validation losses with gradients of both formats."""
    rows = found["losses"]
    lines = ["| gradients | " + " | ".join(f"seed {n}" for n in range(len(rows["float32"]))) + " | mean |",
             "|---|" + "--:|" * (len(rows["float32"]) + 1)]
    lines += [f"| {wire} | " + " | ".join(f"{loss:.4f}" for loss in values)
              + f" | {statistics.mean(values):.4f} |" for wire, values in rows.items()]
    return "\n".join(lines)


def table(name):
    """The table of a page by its name, from the record."""
    found = json.loads(OUTPUT.read_text())
    return {"runs": runs_table, "check": check_table, "links": links_table, "scale": scale_table,
            "trace": trace_table, "losses": losses_table}[name](found)


if __name__ == "__main__":
    main()
