"""Random models through the exporters of PyTorch and Keras, loaded here and compared.

    python tests/exported_models.py torch 500       a count of what was equal and of each refusal

A model has layers before the recurrent one, and a head behind it; what those in front compute is
given to both sides, so the recurrent layer is compared alone.
"""

import collections
import importlib.util
import os
import pathlib
import re
import sys
import tempfile
import warnings

import numpy as np

import lstmcore

BEFORE = ("nothing", "linear", "conv", "norm", "embedding", "transpose")


def torch_model(torch, rng):
    """A module whose `front` feeds its `rnn`, the x and lengths it takes, and what was drawn."""
    kind = rng.choice(["LSTM", "GRU", "RNN"], p=[.5, .35, .15])
    before, I, H = rng.choice(BEFORE), int(rng.integers(2, 6)), int(rng.integers(1, 7))
    drawn = dict(kind=str(kind), before=str(before), layers=int(rng.integers(1, 4)),
                 both=bool(rng.integers(2)), batch_first=bool(rng.integers(2)),
                 packed=str(rng.choice(["", "sorted", "unsorted"], p=[.7, .15, .15])))
    more = {"nonlinearity": str(rng.choice(["tanh", "relu"]))} if kind == "RNN" else {}
    nn = torch.nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = getattr(nn, kind)(I, H, drawn["layers"], bidirectional=drawn["both"],
                                         batch_first=drawn["batch_first"], **more)
            self.head = nn.Linear(H * (1 + drawn["both"]), 2)
            self.before = {"linear": lambda: nn.Linear(3, I), "norm": lambda: nn.LayerNorm(I),
                           "conv": lambda: nn.Conv1d(3, I, 3, padding=1),
                           "embedding": lambda: nn.Embedding(9, I)}.get(before, nn.Identity)()

        def front(self, x):
            if before == "conv":
                return self.before(x.transpose(1, 2)).transpose(1, 2)
            return x.transpose(0, 1) if before == "transpose" else self.before(x)

        def forward(self, x, lengths=None):
            return self.head(self.sequences(self.front(x), lengths))

        def sequences(self, x, lengths=None):
            if lengths is None:
                return self.rnn(x)[0]
            pack, pad = nn.utils.rnn.pack_padded_sequence, nn.utils.rnn.pad_packed_sequence
            first = drawn["batch_first"]
            y = self.rnn(pack(x, lengths, first, drawn["packed"] == "sorted"))[0]
            return pad(y, first)[0]

    T, B = int(rng.integers(3, 7)), int(rng.integers(2, 5))
    width = 3 if before in ("linear", "conv") else I
    x = torch.tensor(rng.normal(size=(B, T, width)), dtype=torch.float32)
    if before == "embedding":
        x = torch.tensor(rng.integers(0, 9, (B, T)))
    net, lengths = Net().eval(), None
    if drawn["packed"]:
        count, most = (net.front(x).shape[k] for k in ((0, 1) if drawn["batch_first"] else (1, 0)))
        lengths = torch.tensor([most, *rng.integers(1, most + 1, count - 1)])
        lengths = lengths.sort(descending=True)[0] if drawn["packed"] == "sorted" else lengths
    return net, x, lengths, drawn


def check_torch(rng, path):
    """Export a random model by either exporter and load it: "equal", or why not."""
    import torch
    model, x, lengths, drawn = torch_model(torch, rng)
    dynamo, dynamic = bool(rng.integers(2)), bool(rng.integers(2))
    # torch.export has no packed sequences
    dynamo = dynamo and not drawn["packed"] and importlib.util.find_spec("onnxscript") is not None
    names = {0: "b", 1: "t"}
    options = {"dynamo": dynamo, "verbose": False}
    if not dynamo:
        options.update(opset_version=int(rng.integers(11, 18)))
        options.update({"dynamic_axes": {"x": names}} if dynamic else {})
    elif dynamic:
        options["dynamic_shapes"] = ({0: torch.export.Dim("b"), 1: torch.export.Dim("t")},)
    given = (x,) if lengths is None else (x, lengths)
    try:
        torch.onnx.export(model, given, path, input_names=["x", "lengths"][:len(given)], **options)
    except Exception as error:          # the exporter's own refusals have no common base
        return f"not exported (dynamo={dynamo}): {type(error).__name__}", drawn
    with torch.no_grad():
        fed = model.front(x)
        want = model.sequences(fed, lengths).numpy()
    try:
        m = lstmcore.load(path)
        m.batch_first = drawn["batch_first"]
    except ValueError as error:
        said = re.sub(r"'[^']*'|[\d/]\S*", "", str(error).partition(".onnx")[2])
        return f"refused (dynamo={dynamo}): {said[:100]}", drawn
    got = m(fed.numpy(), lengths=None if lengths is None else lengths.numpy())[0]
    off = np.abs(got - want).max() if got.shape == want.shape else np.inf
    return ("equal" if off < 1e-5 else f"WRONG by {off:.2g} (dynamo={dynamo})"), drawn


def keras_model(keras, rng):
    """A model whose layer "rnn" is recurrent, its input, and what that layer gives."""
    L, H, I = keras.layers, int(rng.integers(1, 7)), int(rng.integers(2, 6))
    kind = rng.choice(["LSTM", "GRU", "SimpleRNN", "RNN"], p=[.4, .25, .2, .15])
    options = dict(return_sequences=bool(rng.integers(2)), use_bias=bool(rng.integers(2)))
    if kind == "RNN":
        options.pop("use_bias")
        layer = L.RNN(L.LSTMCell(H), name="rnn", **options)
    else:
        more = {"activation": str(rng.choice(["tanh", "relu"]))} if kind == "SimpleRNN" else {}
        more.update({"reset_after": bool(rng.integers(2))} if kind == "GRU" else {})
        layer = getattr(L, kind)(H, **options, **more,
                                 go_backwards=bool(rng.integers(8) == 0),
                                 **({} if rng.integers(3) else {"name": "rnn"}))
        if layer.name != "rnn":
            merge = str(rng.choice(["concat", "concat", "concat", "sum", "ave", "mul"]))
            layer = L.Bidirectional(layer, name="rnn", merge_mode=merge) \
                if not layer.go_backwards else L.Bidirectional(L.LSTM(H, **options), name="rnn")
    inside = [layer]
    if rng.integers(3) == 0:            # a model in the model
        inside = [keras.Sequential([keras.Input((None, I)), layer], name="inner")]
    model = keras.Sequential([keras.Input((None, I)), *inside, L.Dense(2, name="head")])
    x = rng.normal(size=(3, 6, I)).astype("float32")
    want = keras.ops.convert_to_numpy(layer(keras.ops.convert_to_tensor(x)))
    return model, x, want


def check_keras(rng, path):
    import keras
    model, x, want = keras_model(keras, rng)
    path = path + str(rng.choice([".keras", ".h5"]))
    model.save(path)
    try:
        m = lstmcore.load(path)
    except ValueError as error:
        said = re.search(r"asks for .*|holds .*|has .*", str(error))
        return f"refused: {(said[0] if said else str(error))[:90]}", {}
    got = m(x)[0]
    off = np.abs(got - want).max() if got.shape == want.shape else np.inf
    return ("equal" if off < 1e-5 else f"WRONG by {off:.2g}"), {}


def main():
    which, count = sys.argv[1], int(sys.argv[2])
    check = {"torch": check_torch, "keras": check_keras}[which]
    warnings.simplefilter("ignore")
    os.environ.setdefault("KERAS_BACKEND", "torch")
    said = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(count):
            path = os.path.join(folder, "m.onnx" if which == "torch" else "m")
            for old in pathlib.Path(folder).iterdir():
                old.unlink()
            found, drawn = check(np.random.default_rng(seed), path)
            said[found] += 1
            if found.startswith(("WRONG", "refused")):
                print(seed, found, drawn, flush=True)
    for found, times in said.most_common():
        print(f"{times:5} {found}")


if __name__ == "__main__":
    main()
