"""The modules of lstmcore.torch against torch.nn's and lstmcore itself: `python -m bench.torch_dropin`.

The processes, turns, data and proofs are those of bench.compare; the record goes to
bench/results/torch_dropin.json, and bench.pages writes the tables from it. Five questions, the first
three for the GRU and the vanilla RNN too:
    train   a training step of the layer, all gradients, dx included; lstmcore's own is beside it
    infer   the forward pass in inference_mode, our weights frozen; `call` is one step
    packed  a training step from PackedSequence to PackedSequence
    padded  the same from padded batch to padded batch, with PyTorch's packing and padding around it
    model   tokens per second of embedding, LSTM, linear, cross-entropy and Adam, before and after
            `lstmcore.torch.accelerate`
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from bench import record, report
from bench.cases import DENSE, RAGGED, STREAM, WORDLM, Case
from bench.compare import Arena, Contest, progress
from bench.peers import PEERS, Torch
from bench.record import Library, Record
from bench.worker import SERVE, Worker, serve  # noqa: F401  the processes call serve


class TorchModel(Torch):
    """A PyTorch user's training loop, Adam and all."""

    name, jobs = "torch model", ("train",)

    def _language_model(self, case, data):
        nn, tensor = self.lib.nn, self.lib.from_numpy
        model = nn.ModuleDict({"rnn": self._layer(case, data),
                               "linear": nn.Linear(case.H, case.V),
                               "embedding": nn.Embedding(case.V, case.I)})
        with self.lib.no_grad():
            for part, name in (("linear", "weight"), ("linear", "bias"), ("embedding", "weight")):
                source = "embedding" if part == "embedding" else f"linear_{name}"
                getattr(model[part], name).copy_(tensor(data[source]))
        adam = self.lib.optim.Adam(model.parameters(), lr=1e-4)
        tokens, targets = tensor(data["tokens"]), tensor(data["targets"]).flatten()

        def run():
            adam.zero_grad()
            logits = model["linear"](model["rnn"](model["embedding"](tokens))[0])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets)
            loss.backward()
            adam.step()
            return loss

        def collect(loss):
            gradients = {"loss": loss.detach(), "dembedding": model["embedding"].weight.grad}
            gradients |= {"dlinear_" + k: p.grad for k, p in model["linear"].named_parameters()}
            gradients |= {"d" + k.replace("bias_ih", "bias"): p.grad
                          for k, p in model["rnn"].named_parameters()}
            return {name: g.numpy() for name, g in gradients.items()}

        return run, collect


class TorchPacked(Torch):
    """Packed outside of what is timed, and never padded."""

    name, jobs = "torch packed", ("train",)

    def prepare(self, case, job, data):
        _, collect_padded = super().prepare(case, job, data)
        pack, _ = self._packing(data["lengths"], case.T)
        pad, tensor = self.lib.nn.utils.rnn.pad_packed_sequence, self.lib.from_numpy
        m, x, dy = self._layer(case, data), pack(tensor(data["x"])), pack(tensor(data["dy"])).data

        def run():
            leaf = x.data.detach().requires_grad_()
            y, state = m(x._replace(data=leaf))
            return y, state, self.lib.autograd.grad(y.data, [leaf, *m.parameters()], dy)

        def collect(result):
            y, state, (dx, *gradients) = result
            y, dx = (pad(p, total_length=case.T)[0] for p in (y, x._replace(data=dx)))
            return collect_padded((y, state, (dx, *gradients)))

        return run, collect


class DropIn(Torch):
    """The same code around an accelerated layer."""

    name, jobs, packages = "lstmcore.torch", ("train", "infer"), ("lstmcore", "torch")

    def prepare(self, case, job, data):
        self.job = job
        return super().prepare(case, job, data)

    def _layer(self, case, data):
        import lstmcore.torch

        m = super()._layer(case, data)
        assert lstmcore.torch.accelerate(m).replaced
        return m.freeze(compare=False) if self.job == "infer" else m


class DropInPacked(DropIn, TorchPacked):
    name, jobs = "lstmcore.torch packed", ("train",)


class DropInModel(DropIn, TorchModel):
    name, jobs = "lstmcore.torch model", ("train",)


PEERS |= {peer.name: peer for peer in (TorchModel, TorchPacked, DropIn, DropInPacked, DropInModel)}
LAYERS = ("lstmcore", "lstmcore.torch", "torch")
CALL = replace(STREAM, name="call", origin="a call for every step")
MODELS = (
    Case("char-2x128", 50, 50, 64, 128, 2, "a small character model", V=65),
    Case("char-2x512", 50, 50, 64, 512, 2, "a large character model", V=65),
    WORDLM,
)


class ArenaWithOurs(Arena):
    """An Arena whose processes know the peers above."""

    def worker(self, library, threads=None, role=""):
        key = library, threads or self.threads, role
        if key not in self._workers:
            worker = Worker(library, key[1], self.python(library))
            worker._command[2] = SERVE.replace("bench.worker", "bench.torch_dropin")
            self._workers[key] = self._stack.enter_context(worker)
        return self._workers[key]


CELLS = {"lstm": "LSTM", "gru": "GRU", "tanh": "RNN"}
SECTIONS = {"train": "training step", "infer": "inference, frozen",
            "packed": "packed in, packed out, training", "padded": "the same between padded batches",
            "model": "whole model"}
RESULTS = Path(__file__).resolve().parent / "results" / "torch_dropin.json"


def contests():
    """The lines of the tables."""
    lines = []
    for cell in CELLS:
        layers = LAYERS if cell == "lstm" else LAYERS[1:]
        dense, ragged, (call,) = ([replace(case, cell=cell) for case in cases]
                                  for cases in (DENSE, RAGGED, (CALL,)))
        lines += [Contest("train", case, "train", layers) for case in dense]
        lines += [Contest("infer", case, "infer", layers) for case in (*dense, call)]
        for section, ending in (("packed", " packed"), ("padded", "")):
            names = ("lstmcore", "lstmcore.torch" + ending, "torch" + ending)
            lines += [Contest(section, case, "train", names[-len(layers):]) for case in ragged
                      if cell == "lstm" or section == "packed"]
    names = ("lstmcore.torch model", "torch model")
    return lines + [Contest("model", case, "train", names) for case in MODELS]


def table(found):
    """The Markdown of a record: a table of layers for each cell, the means, and one of models."""
    machine, text = found.machine, []
    text.append(f"`{found.command}`, {found.date}: {machine['cpu']}, {machine['threads']} threads, load "
                f"{machine['load']} before; milliseconds, one process per variant, taking turns.")
    for cell, title in CELLS.items():
        if part := [line for line in found.results
                    if line[0].case.cell == cell and line[0].section != "model"]:
            text += ["", f"{title}:", "", *_layers(part)]
    if part := [line for line in found.results if line[0].section == "model"]:
        text += ["", "A whole model (embedding, two LSTM layers, linear, cross-entropy, Adam), tokens per "
                 "second before and after `accelerate`:", "", _models(part)]
    return "\n".join(text)


def _gain(contest, result):
    """How many times as fast as torch, or None where one has no time."""
    ours, torchs = (result[name] for name in contest.libraries[-2:])
    return None if isinstance(ours, str) or isinstance(torchs, str) else torchs.median / ours.median


def _layers(lines):
    own = "lstmcore" in lines[0][0].libraries
    rows, gains = [], {}
    for contest, result in lines:
        gain = _gain(contest, result)
        gains.setdefault(contest.section, []).append((contest.case.name, gain))
        times = [report.milliseconds(result[name]) for name in contest.libraries]
        rows.append([SECTIONS[contest.section], f"{contest.case.name} ({contest.case.sizes})", *times,
                     f"{report.digits(gain)}×" if gain else "–"])
    head = ["", "case (T, B, I, H, L)", *["lstmcore"] * own, "lstmcore.torch", "torch",
            "as fast as torch"]
    means = "; ".join(f"{SECTIONS[section]} {report.mean_and_least(pairs)}"
                      for section, pairs in gains.items() if all(gain for _, gain in pairs))
    return [report.table(head, rows), "", f"Geometric means against torch: {means}."]


def _models(lines):
    rows = []
    for contest, result in lines:
        gain, case = _gain(contest, result), contest.case
        ours, torchs = (result[name] if isinstance(result[name], str) else
                        f"{case.tokens() / result[name].median:,.0f}" for name in contest.libraries)
        rows.append([f"V = {case.V:,}, {case.L} × {case.H}", torchs, ours,
                     f"{gain:.2f}×" if gain else "–"])
    return report.table(["model", "torch.nn", "after `accelerate`", ""], rows)


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.torch_dropin",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("--section", action="append", choices=SECTIONS)
    parser.add_argument("--cell", action="append", choices=CELLS)
    parser.add_argument("--case", action="append", metavar="NAME",
                        choices=sorted({line.case.name for line in contests()}))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE",
                        help="where the record goes (default: bench/results/torch_dropin.json)")
    options = parser.parse_args()
    lines = [line for line in contests() if line.section in (options.section or [line.section])
             and line.case.cell in (options.cell or [line.case.cell])
             and line.case.name in (options.case or [line.case.name])]
    load, results, libraries = os.getloadavg()[0], [], {}
    with ArenaWithOurs(options.threads, {}, options.rounds) as arena:
        for contest in lines:
            results.append((contest, arena.hold(contest)))
            progress(f"{contest.case.cell} {contest.section} {contest.case.name}", results[-1][1])
        for name in dict.fromkeys(name for line in lines for name in line.libraries):
            version = arena.worker(name).ask("about")["version"]
            libraries[name] = Library(version, PEERS[name].precision, PEERS[name].packages)
    command = " ".join(["python -m bench.torch_dropin", *sys.argv[1:]])
    found = Record(record.machine(options.threads, load), command, record.today(), libraries, {}, {},
                   results, [], {})
    record.write(found, options.output)
    print(table(found))


if __name__ == "__main__":
    main()
