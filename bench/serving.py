"""The server of docs/serving.md against itself on torch: `python -m bench.serving`.

Each model is a process with the app of the page under uvicorn, and they take turns. The clients are
one more process, on the same CPUs: each sends ragged sequences one after the other over a connection
of its own, as many as --requests in all and no longer than --seconds. Before anything counts, every
server's answers are held against the reference in float64. Writes serving.json into --output;
`bench.pages` puts its table into the page. The int8 model is the same app over weights packed in int8.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from bench import record, report
from bench.worker import ROOT

PAGE = ROOT / "docs" / "serving.md"
UNITS, STEPS, SEED = 256, (10, 100), 0
NAMES = {"lstmcore": 1e-5, "lstmcore int8": 0.1, "torch": 1e-5}    # the largest error that is right


def page():
    """What the example of the page defines, its own app included."""
    (source,) = re.findall(r"^```python\n(import asyncio\n.*?)^```$", PAGE.read_text(), re.M | re.S)
    names = {"__name__": "server"}
    exec(compile(source, str(PAGE), "exec"), names)
    return names


def weights(inputs):
    """W_ih, W_hh, b of the model that all of them serve."""
    import lstmcore

    layer = lstmcore.LSTM(inputs, UNITS, seed=SEED).parameters()
    return [layer[name + "_l0"] for name in ("weight_ih", "weight_hh", "bias")]


def model(name, names):
    """The function of a batch of sequences that the app calls, and the library's version."""
    W_ih, W_hh, b = weights(names["INPUTS"])
    padded = names["padded"]
    if name == "torch":
        import torch

        lstm = torch.nn.LSTM(names["INPUTS"], UNITS)
        with torch.no_grad():
            for to, values in zip(lstm.parameters(), (W_ih, W_hh, b, 0 * b)):
                to.copy_(torch.from_numpy(values))

        def answer(sequences):
            batch, lengths = padded(sequences)
            with torch.inference_mode():
                given = torch.nn.utils.rnn.pack_padded_sequence(
                    torch.from_numpy(batch), lengths, enforce_sorted=False)
                return lstm(given)[1][0][-1].numpy()

        return answer, torch.__version__
    import lstmcore
    from lstmcore.functional import pack

    if name == "lstmcore":
        return names["frozen"](lstmcore.LSTM(names["INPUTS"], UNITS, seed=SEED)), lstmcore.__version__
    packed = pack("lstm", W_ih, W_hh, precision="int8")

    def answer(sequences):
        batch, lengths = padded(sequences)
        _, (h_n, _), _ = lstmcore.lstm_forward(batch, W_ih, W_hh, b, lengths=lengths,
                                               keep_tape=False, packed=packed)
        return h_n

    return answer, lstmcore.__version__


def serve(name):
    """One server on a free port, which it prints after its version; ends with its input."""
    import socket
    import threading

    import uvicorn

    names = page()
    answer, version = model(name, names)
    free = socket.socket(proto=socket.IPPROTO_TCP)     # named: else asyncio leaves TCP's 40 ms delay on
    free.bind(("127.0.0.1", 0))
    free.listen(128)
    print(json.dumps([version, free.getsockname()[1]]), flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    server = uvicorn.Server(uvicorn.Config(names["application"](answer), access_log=False, ws="none",
                                           log_level="warning"))
    server.run(sockets=[free])


async def ask(connection, x):
    """One request over an open connection: the row."""
    reader, writer = connection
    body = x.tobytes()
    writer.write(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    answer = await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
    if b" 200 " not in head.splitlines()[0]:
        raise ValueError(f"{head.splitlines()[0].decode()}: {answer.decode(errors='replace')}")
    return np.frombuffer(answer, "<f4")


async def turn(port, sequences, clients, requests, seconds):
    """Latencies of the answers and the seconds that they took all together."""
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(clients)]
    end, latencies, left = time.perf_counter() + seconds, [], iter(range(requests))

    async def client(connection):
        for at in left:
            begin = time.perf_counter()
            if begin > end:
                return
            await ask(connection, sequences[at % len(sequences)])
            latencies.append(time.perf_counter() - begin)

    begin = time.perf_counter()
    await asyncio.gather(*map(client, connections))
    taken = time.perf_counter() - begin
    for _, writer in connections:
        writer.close()
    return latencies, taken


async def errors(port, sequences, right):
    """The largest difference of the answers, asked for all at once, from the right ones."""
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in sequences]
    rows = await asyncio.gather(*map(ask, connections, sequences))
    for _, writer in connections:
        writer.close()
    return max(float(np.abs(row - want).max()) for row, want in zip(rows, right))


def reference(sequences, W_ih, W_hh, b):
    """The last states in float64."""
    from lstmcore import reference

    return [reference.lstm_forward(x[:, None].astype(float), *(a.astype(float) for a in (W_ih, W_hh, b))
                                   )[1][0][0] for x in sequences]


def measure(options):
    """The record: a dict that json.dumps takes."""
    names, rng = page(), np.random.default_rng(SEED)
    load = os.getloadavg()[0]
    sequences = [rng.standard_normal((n, names["INPUTS"]), dtype="float32")
                 for n in rng.integers(STEPS[0], STEPS[1] + 1, 64)]
    right = reference(sequences[:16], *weights(names["INPUTS"]))
    servers, rows, reasons = {}, {}, {}
    with contextlib.ExitStack() as stack:       # a server ends with its input
        for name in NAMES:
            if name == "torch" and find_spec(name) is None:
                reasons[name] = "not installed"
                continue
            process = stack.enter_context(subprocess.Popen(
                [sys.executable, "-m", "bench.serving", "--serve", name],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT))
            said = process.stdout.readline()
            if not said:
                reasons[name] = "does not start: see above"
                continue
            version, port = json.loads(said)
            off = asyncio.run(errors(port, sequences[:16], right))
            if off <= NAMES[name]:
                servers[name] = version, port
            else:
                reasons[name] = f"wrong: off by {off:.2g}"
        for clients in options.clients:
            taken = {name: ([], []) for name in servers}
            for _ in range(options.rounds):
                for name, (_, port) in servers.items():
                    latencies, seconds = asyncio.run(turn(
                        port, sequences, clients, options.requests, options.seconds))
                    taken[name][0].extend(latencies)
                    taken[name][1].append(len(latencies) / seconds)
            for name, (latencies, rates) in taken.items():
                p50, p99 = np.quantile(latencies, [0.5, 0.99])
                rows.setdefault(name, []).append(
                    {"clients": clients, "requests": len(latencies), "per_second": float(np.median(rates)),
                     "p50": float(p50), "p99": float(p99)})
                print(f"{name}, {clients} clients: {np.median(rates):.0f}/s", file=sys.stderr, flush=True)
    return {"machine": record.machine(len(os.sched_getaffinity(0)), load), "date": record.today(),
            "command": " ".join(["python -m bench.serving", *options.argv]),
            "model": {"inputs": names["INPUTS"], "units": UNITS, "steps": STEPS},
            "versions": {name: version for name, (version, _) in servers.items()},
            "rows": rows, "reasons": reasons}


def table(found):
    """The record as Markdown."""
    machine, model = found["machine"], found["model"]
    rows = [[str(row["clients"]), name, f"{row['per_second']:.0f}",
             report.digits(row["p50"] * 1e3), report.digits(row["p99"] * 1e3),
             f"{row['per_second'] / other['per_second']:.2f}×" if other else "–"]
            for at in range(max(map(len, found["rows"].values())))
            for name, lines in found["rows"].items() for row in [lines[at]]
            for other in [found["rows"]["torch"][at] if "torch" in found["rows"] else None]]
    busy = f" **The machine was busy: load average {machine['load']:.1f}.**" * (machine["load"] > 0.5)
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return "\n".join([
        f"{machine['cpu']}, {machine['cores']} cores that server and clients share, {found['date']}, "
        f"`{found['command']}`. {model['units']} units, sequences of {model['steps'][0]} to "
        f"{model['steps'][1]} steps; {versions}.{busy}", "",
        report.table(["clients", "model", "requests/s", "p50, ms", "p99, ms", "requests against torch"],
                     rows), *(f"- {name}: {reason}" for name, reason in found["reasons"].items())])


def main(argv=None):
    """Measure, write the record, print the table."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=1000, help="of one turn, at most (1000)")
    parser.add_argument("--seconds", type=float, default=5, help="of one turn, at most (5)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each server (3)")
    parser.add_argument("--output", type=Path, default=Path("bench/results"), metavar="FOLDER")
    parser.add_argument("--serve", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve:
        serve(options.serve)
        return
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        parser.error(f"the server needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    options.argv = argv
    options.output.mkdir(parents=True, exist_ok=True)
    found = measure(options)
    (options.output / "serving.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
