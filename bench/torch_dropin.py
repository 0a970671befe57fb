"""lstmcore.torch.LSTM against torch.nn.LSTM and lstmcore itself: `python -m bench.torch_dropin`.

The processes, turns, data and proofs are those of bench.compare. Five questions:
    train   a training step of the layer, all gradients, dx included; lstmcore's own is beside it
    infer   the forward pass in inference_mode, our weights frozen; `call` is one step
    packed  a training step from PackedSequence to PackedSequence
    padded  the same from padded batch to padded batch, with PyTorch's packing and padding around it
    model   tokens per second of embedding, LSTM, linear, cross-entropy and Adam, before and after
            `lstmcore.torch.accelerate`
"""

import argparse
from dataclasses import replace

from bench import report
from bench.cases import DENSE, RAGGED, STREAM, WORDLM, Case
from bench.compare import Arena, Contest, progress
from bench.peers import PEERS, Torch
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


def contests():
    """The lines of the table."""
    lines = [Contest("train", case, "train", LAYERS) for case in DENSE]
    lines += [Contest("infer", case, "infer", LAYERS) for case in (*DENSE, CALL)]
    for section, ending in (("packed", " packed"), ("padded", "")):
        names = ("lstmcore", "lstmcore.torch" + ending, "torch" + ending)
        lines += [Contest(section, case, "train", names) for case in RAGGED]
    names = ("lstmcore.torch model", "torch model")
    return lines + [Contest("model", case, "train", names) for case in MODELS]


def row(contest, result):
    """One line: milliseconds, how many times as fast as torch, and what the drop-in costs."""
    times = [result.get(name) for name in contest.libraries]
    if any(isinstance(time, str) for time in times):
        times = [time if isinstance(time, str) else report.milliseconds(time) for time in times]
        return [contest.section, contest.case.name, *times, "–", "–"], None
    *own, ours, torchs = (time.median for time in times)
    shown = ["–" if not own else report.digits(own[0] * 1e3), report.digits(ours * 1e3),
             report.digits(torchs * 1e3), f"{torchs / ours:.2f}×",
             f"{ours / own[0]:.2f}" if own else f"{contest.case.tokens() / torchs:,.0f} → "
                                                f"{contest.case.tokens() / ours:,.0f} tokens/s"]
    return [contest.section, contest.case.name, *shown], torchs / ours


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.torch_dropin",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("--section", action="append",
                        choices=("train", "infer", "packed", "padded", "model"))
    parser.add_argument("--case", action="append", metavar="NAME",
                        choices=sorted({line.case.name for line in contests()}))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    lines = [line for line in contests() if line.section in (options.section or [line.section])
             and line.case.name in (options.case or [line.case.name])]
    rows, gains = [], {}
    with ArenaWithOurs(options.threads, {}, options.rounds) as arena:
        for contest in lines:
            result = arena.hold(contest)
            progress(f"{contest.section} {contest.case.name}", result)
            cells, gain = row(contest, result)
            rows.append(cells)
            if gain:
                gains.setdefault(contest.section, []).append(gain)
    print(report.table(["", "case", "lstmcore ms", "lstmcore.torch ms", "torch ms",
                        "as fast as torch", "of lstmcore"], rows))
    for section, values in gains.items():
        print(f"geometric mean, {section}: {report.geometric_mean(values):.2f}×")


if __name__ == "__main__":
    main()
