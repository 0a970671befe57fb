"""What the processes run that tests/test_distributed.py starts: `mpiexec -n P python ranks.py JOB ...`.

Each rank prints one line of JSON. JOBS["fits"] is also called in the test's own process, without MPI.
"""

import hashlib
import json
import os
import sys
import time

import numpy as np

import lstmcore
from lstmcore import LanguageModel, distributed

WORDS = "the quick brown fox jumps over a lazy dog and runs away from it".split()


def story(n=2500, seed=3):
    return " ".join(np.random.default_rng(seed).choice(WORDS, n))


def bits(network):
    """A digest of the parameters."""
    return hashlib.sha256(b"".join(p.tobytes() for p in network.parameters().values())).hexdigest()


def char_model(comm, steps=200, **options):
    """Dropout, and streams that 8 shards do not divide: 3, 3, 3, 2, 2, 2, 2, 2."""
    model = LanguageModel(hidden_size=11, dropout=0.3, seed=5)
    return model.fit(story(), **{
        "steps": steps, "evaluate_every": 50, "seq_length": 9, "batch_size": 19, "lr": 0.02,
        "progress": False, "comm": comm, "shards": 8, **options})


def sequences():
    rng = np.random.default_rng(7)
    X = [rng.standard_normal((n, 2)) for n in rng.integers(1, 12, 101)]
    return X, np.array([x.sum() for x in X])


def fits(comm):
    """{what: [a digest of the parameters, the last losses]} of models of every kind."""
    options = {"steps": 200, "evaluate_every": 50, "seq_length": 7, "progress": False, "comm": comm,
               "shards": 8}
    models = {
        "char": char_model(comm),
        "char, bfloat16 on the wire": char_model(comm, 60, wire="bfloat16"),
        "word": LanguageModel("word", cell="gru", hidden_size=9, embed_size=6, dropout=0.2, seed=1).fit(
            story(), **{**options, "batch_size": 16, "clip": 0.5}),
        "one-hot float64, few streams": LanguageModel(hidden_size=7, num_layers=3, embed_size=0, seed=2,
                                                      dtype="float64").fit(
            story(20), **{**options, "steps": 60, "batch_size": 5, "validation": 0, "optimizer": "sgd",
                          "lr": 0.1}),
    }
    found = {name: [bits(m.network), m.history[-1]["loss"], m.history[-1]["validation"]]
             for name, m in models.items()}
    try:
        from lstmcore import Forecaster, LSTMClassifier, LSTMRegressor
    except ImportError:
        return found
    X, y = sequences()
    common = {"epochs": 8, "batch_size": 14, "dropout": 0.2, "random_state": 0}
    estimators = {
        "classifier": LSTMClassifier(7, bidirectional=True, validation=0.2, patience=50, **common).fit(
            X, y > 0, comm=comm, shards=8),
        "regressor": LSTMRegressor(7, num_layers=2, **common).fit(
            X, y, sample_weight=np.arange(len(y)) % 3, comm=comm, shards=8),
        "strings": LSTMClassifier(6, embed_size=5, **common).fit(
            ["ab" * (n % 5 + 1) for n in range(60)], np.arange(60) % 2, comm=comm, shards=8),
    }
    series = Forecaster(8, 2, regressor=LSTMRegressor(5, epochs=5, batch_size=30, random_state=0))
    estimators["series"] = series.fit(np.sin(np.arange(90) / 5), comm=comm, shards=8).regressor_
    found.update({name: [bits(m.network_), m.loss_curve_[-1], sum(m.validation_curve_)]
                  for name, m in estimators.items()})
    return found


def resumed(comm, path, steps, resume="", shards=8):
    """Part of a run, from one checkpoint to another, that ends inside an epoch."""
    model = char_model(comm, int(steps), checkpoint=path, resume=resume or None,
                       shards=int(shards))
    return bits(model.network)


def unlike(comm, what):
    """Rank 1 differs from the others in one thing."""
    odd, text, options = comm.rank == 1, story(), {}
    if what == "isa":
        from lstmcore import _kernels
        _kernels.use_isa(_kernels.available_isas()[-1 if odd else 0])
    elif what == "version":
        lstmcore.__version__ += "+other" * odd
    elif what == "text":
        text += " dog" * odd
    elif what == "setting":
        options["lr"] = 0.1 if odd else 0.2
    elif what == "data":
        from lstmcore import LSTMRegressor
        X, y = sequences()
        try:
            LSTMRegressor(3, epochs=1).fit(X, y + odd, comm=comm)
        except ValueError as error:
            return str(error)
    elif what == "weights":     # equal after all: rank 0's count
        return bits(LanguageModel(hidden_size=5, seed=None).fit(
            text, steps=3, progress=False, comm=comm, reduction="allreduce").network)
    try:
        LanguageModel(hidden_size=5).fit(text, steps=3, progress=False, comm=comm, **options)
    except ValueError as error:
        return str(error)


def failing(comm, how, path):
    """A fault of one rank in the middle of a run."""
    import signal

    model, seen = LanguageModel(hidden_size=7, seed=0), []

    def callback(model, record):
        seen.append(record["step"])
        if how == "callback" and len(seen) == 3:
            raise RuntimeError("no more of this")

    def fault(trainer):
        if trainer.step == 12 and comm.rank == 1:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif how == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            elif how == "exception":
                raise MemoryError("no memory on this machine")
            elif how == "replicas":
                trainer.network.parameters()["head.bias"][0] += 1e-6
        time.sleep(0.005)

    from lstmcore.models.training import Trainer
    init = Trainer.__init__
    Trainer.__init__ = lambda self, *args, **more: init(self, *args, **{**more, "tick": fault})
    try:
        model.fit(story(), steps=2000, evaluate_every=5, seq_length=7, batch_size=8, lr=0.01,
                  checkpoint=path, callbacks=callback, progress=False, comm=comm,
                  # with "tree" a parameter is that of the rank that updates it, whatever others did to theirs
                  reduction="allreduce" if how == "replicas" else "tree")
    except RuntimeError as error:
        return str(error)
    return model.outcome, model.history[-1]["step"]


def diverging(comm):
    """A loss that is not finite is the same exception everywhere."""
    def poison(model, record):      # of rank 0
        model.network.parameters()["head.bias"][:] = np.nan
    try:
        LanguageModel(hidden_size=5, seed=0).fit(story(), steps=50, evaluate_every=5, progress=False,
                                                 callbacks=poison, comm=comm)
    except FloatingPointError as error:
        return str(error)


def own_loop(comm):
    """The functions for people's own loops."""
    layer = lstmcore.Linear(5, 3, seed=comm.rank)
    distributed.broadcast(layer, comm)
    rows = distributed.share(8 * comm.size, comm)
    x = np.random.default_rng(0).standard_normal((8 * comm.size, 5)).astype("float32")
    found = {"rows": [rows.start, rows.stop], "weights": bits(layer)}
    for name, options in {"tree": {}, "allreduce": {"reduction": "allreduce"},
                          "bfloat16": {"wire": "bfloat16"}}.items():
        layer.zero_grad()
        y = layer(x[rows])
        layer.backward(2 * y / y.size)
        distributed.average_gradients(layer, comm, **options)
        found[name] = layer.gradients()["weight"].tolist()
    return found


def machine(comm):
    """Where a process runs meanwhile, and an array that all ranks of a node share."""
    processes = distributed.Processes(comm)
    before = sorted(os.sched_getaffinity(0))
    with processes.placed():
        inside = sorted(os.sched_getaffinity(0)), lstmcore.get_num_threads()
    array = processes.shared(np.arange(1000) if comm.rank == 0 else None)
    return {"before": before, "inside": inside[0], "threads": inside[1],
            "after": sorted(os.sched_getaffinity(0)), "sum": int(array.sum()),
            "writeable": array.flags.writeable, "none": processes.shared(None) is None,
            "empty": processes.shared(np.zeros(0) if comm.rank == 0 else None).shape}


def overlap(comm):
    """What happened when in the last step."""
    from lstmcore.models.network import Network

    network = Network(50, cell="lstm", hidden_size=64, num_layers=2, embed_size=16, seed=0).train()
    shards = distributed.Shards(comm, 4)
    shards.attach(network)
    tokens = np.random.default_rng(comm.rank).integers(0, 50, (20, 8))

    def loss_of(shard):
        loss, dy, _ = network.loss(tokens, tokens, reduction="sum")
        return loss, lambda: network.backward_below(dy)
    shards.times = []
    shards.differentiate(0, loss_of)
    return [what for what, _ in shards.times]


JOBS = {job.__name__: job for job in (fits, resumed, unlike, failing, diverging, own_loop, machine, overlap)}

if __name__ == "__main__":
    from mpi4py import MPI

    lstmcore.set_num_threads(1)
    result = JOBS[sys.argv[1]](MPI.COMM_WORLD, *sys.argv[2:])
    sys.stdout.write(json.dumps([MPI.COMM_WORLD.rank, result]) + "\n")
