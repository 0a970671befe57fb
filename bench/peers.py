"""How each library runs a case: one class per library, its own imports inside it.

A class has `name`, `jobs` (what it can do), `packages` (whose installed size counts) and
`load` (what a user has to import); `Peer(threads)` imports and sets up the library, and
`prepare(case, job, data)` returns `run` and `collect`: run() does the work once, as that library's
users would at best (arguments converted and bound beforehand), and collect(run()) gives the
results as `cases.expected` names them. Jobs: "train" is forward and backward with all gradients,
dx included; "infer" is forward alone; "stream" is the next step with the state carried over.
`precision` is that of the products a user asks for: "float32" (then the case's dtype counts),
"bfloat16" or "int8". What a CPU makes of it is the library's affair, and its error shows it.

Not here: ONNX Runtime has no bfloat16 LSTM on CPU, OpenVINO's int8 LSTM needs NNCF and a set of
examples to calibrate with, and ncnn keeps an LSTM in float32 when asked for bfloat16 on x86.
"""

import contextlib
import inspect
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from bench.cases import STREAM_STEPS
from bench.graphs import litert_model, ncnn_model, onnx_model


class Unsupported(Exception):
    """The library cannot do this job; the message says why and goes into the table."""


def _refuse(case, **reasons):
    for attribute, reason in reasons.items():
        if getattr(case, attribute):
            raise Unsupported(reason)


class Lstmcore:
    """lstmcore: the functions for one layer, the LSTM class for stacks and both directions."""

    name, jobs, packages = "lstmcore", ("train", "infer", "stream"), ("lstmcore",)
    precision = "float32"
    load = "import lstmcore; lstmcore.lstm_forward"  # names are lazy: ask for the kernels

    def __init__(self, threads):
        import lstmcore

        self.lib, self.threads = lstmcore, threads
        lstmcore.lstm_forward  # noqa: B018  names are lazy
        self.version = lstmcore.__version__

    def prepare(self, case, job, data):
        if case.V:
            return self._language_model(case, job, data)
        if job == "stream":
            return self._stream(case, data)
        if case.L == case.D == 1 and self.precision == "float32":
            return self._functions(job, data)
        m = self._layer(case, job, data)
        x, dy, lengths = data["x"], data["dy"], data.get("lengths")

        def run():
            y, state = m(x, lengths=lengths)
            return y, state, m.backward(dy)[0] if job == "train" else None

        def collect(result):
            y, (h_n, c_n), dx = result
            gradients = {"d" + name: g.copy() for name, g in m.gradients().items()}
            return {"y": y, "h_n": h_n, "c_n": c_n, "dx": dx, **gradients}

        return run, collect

    def _layer(self, case, job, data):
        lstm = self.lib.LSTM
        m = lstm(case.I, case.H, case.L, bidirectional=case.D == 2, dtype=case.dtype,
                 **(self._format(lstm, "compute") if job == "train" else {}))
        m.load_state_dict({name: data[name] for name in m.parameters()})
        m.n_threads = self.threads
        return m.train() if job == "train" else m.freeze(**self._format(lstm.freeze, "precision"))

    def _format(self, function, parameter):
        """The keyword that asks for the format; Unsupported if this lstmcore does not know it."""
        if self.precision == "float32":
            return {}
        if parameter not in inspect.signature(function).parameters:
            raise Unsupported(f'{function.__name__} of this lstmcore has no '
                              f'{parameter}="{self.precision}"')
        return {parameter: self.precision}

    def _functions(self, job, data):
        forward, backward = self.lib.lstm_forward, self.lib.lstm_backward
        x, dy = data["x"], data["dy"]
        weights = data["weight_ih_l0"], data["weight_hh_l0"], data["bias_l0"]
        options = dict(lengths=data.get("lengths"), peepholes=data.get("weight_peephole_l0"),
                       keep_tape=job == "train", n_threads=self.threads)
        if job == "infer":
            options["packed"] = self.lib.functional.pack("lstm", *weights[:2])

        def run():
            y, state, tape = forward(x, *weights, **options)
            return y, state, backward(tape, dy, n_threads=self.threads) if job == "train" else None

        def collect(result):
            y, (h_n, c_n), g = result
            found = {"y": y, "h_n": h_n[None], "c_n": c_n[None]}
            if g:
                found |= {"dx": g.dx, "dweight_ih_l0": g.dW_ih, "dweight_hh_l0": g.dW_hh,
                          "dbias_l0": g.db, "dweight_peephole_l0": g.dpeepholes}
            return found

        return run, collect

    def _stream(self, case, data):
        s = self._layer(case, "infer", data).stream(case.B)
        out = np.empty((case.B, case.H), case.dtype)
        xs = itertools.cycle(list(data["x"]))

        def collect(first):
            steps = [first.copy(), *(s.step(next(xs), out=out).copy()
                                     for _ in range(STREAM_STEPS - 1))]
            h, c = s.state
            return {"y": np.stack(steps), "h_n": h, "c_n": c}

        return lambda: s.step(next(xs), out=out), collect

    def _language_model(self, case, job, data):
        embedding = self.lib.Embedding(case.V, case.I, dtype=case.dtype)
        embedding.load_state_dict({"weight": data["embedding"]})
        linear = self.lib.Linear(case.H, case.V, dtype=case.dtype)
        linear.load_state_dict({"weight": data["linear_weight"], "bias": data["linear_bias"]})
        m, tokens, targets = self._layer(case, job, data), data["tokens"], data["targets"]

        def run():
            y, _ = m(embedding(tokens))
            loss, dy = self.lib.linear_cross_entropy(linear, y, targets)
            embedding.backward(m.backward(dy)[0])
            return loss

        def collect(loss):
            found = {"loss": loss, "dembedding": embedding.gradients()["weight"].copy()}
            found |= {"dlinear_" + name: g.copy() for name, g in linear.gradients().items()}
            return found | {"d" + name: g.copy() for name, g in m.gradients().items()}

        return run, collect


class LstmcoreBfloat16(Lstmcore):
    """lstmcore with bfloat16 products."""

    name, precision = "lstmcore bf16", "bfloat16"


class LstmcoreInt8(Lstmcore):
    """lstmcore with int8 weights and int8 products."""

    name, precision, jobs = "lstmcore int8", "int8", ("infer", "stream")


class Torch:
    """torch.nn.LSTM: torch.autograd.grad in training, torch.inference_mode() in inference."""

    name, jobs, packages = "torch", ("train", "infer", "stream"), ("torch",)
    precision = "float32"
    load = "import torch"

    def __init__(self, threads):
        import torch

        torch.set_num_threads(threads)
        torch.set_num_interop_threads(1)
        self.lib, self.version = torch, torch.__version__

    def prepare(self, case, job, data):
        _refuse(case, peepholes="torch.nn.LSTM has no peepholes")
        if case.V:
            return self._language_model(case, data)
        m = self._layer(case, data)
        if job == "stream":
            return self._stream(m, data)
        names = [name for name, _ in m.named_parameters()]
        parameters, call = list(m.parameters()), self._call(m)
        x, dy = self._tensor(data["x"]), self._upstream(data["dy"])
        pack, unpack = self._packing(data.get("lengths"), case.T)

        def train():
            leaf = x.detach().requires_grad_()
            with self._context():
                y, state = call(pack(leaf))
            y = unpack(y)
            return y, state, self.lib.autograd.grad(y, [leaf, *parameters], dy)

        def infer():
            with self.lib.inference_mode(), self._context():
                y, state = call(pack(x))
                return unpack(y), state, ()

        def collect(result):
            y, state, gradients = result
            found = {"y": y, **dict(zip(("h_n", "c_n"), state if case.cell == "lstm" else [state]))}
            found |= dict(zip(["dx", *("d" + name for name in names)], gradients))
            found |= {name.replace("_ih", ""): g for name, g in found.items()
                      if name.startswith("dbias_ih")}
            return {name: self._array(a) for name, a in found.items()}

        return train if job == "train" else infer, collect

    def _call(self, m):
        return m

    def _context(self):
        return contextlib.nullcontext()

    def _tensor(self, a):
        return self.lib.from_numpy(a)

    _upstream = _tensor  # dy, in the dtype of y

    def _array(self, tensor):
        a = tensor.detach()
        return (a.float() if a.dtype == self.lib.bfloat16 else a).numpy()

    def _layer(self, case, data):
        cls, options = {"lstm": ("LSTM", {}), "gru": ("GRU", {})}.get(
            case.cell, ("RNN", dict(nonlinearity=case.cell)))
        m = getattr(self.lib.nn, cls)(case.I, case.H, case.L, bidirectional=case.D == 2,
                                      dtype=getattr(self.lib, case.dtype), **options)
        state = {}
        for name, p in m.named_parameters():  # the second bias is one too many: zero
            state[name] = (self.lib.zeros_like(p) if name.startswith("bias_hh") else
                           self.lib.from_numpy(data[name.replace("bias_ih", "bias")]))
        m.load_state_dict(state)
        return m

    def _packing(self, lengths, T):
        if lengths is None:
            return (lambda x: x), (lambda y: y)
        rnn, lengths = self.lib.nn.utils.rnn, self.lib.from_numpy(lengths)
        return (lambda x: rnn.pack_padded_sequence(x, lengths, enforce_sorted=False),
                lambda y: rnn.pad_packed_sequence(y, total_length=T)[0])

    def _stream(self, m, data):
        xs = itertools.cycle(list(self._tensor(data["x"]).unsqueeze(1)))
        call, state = self._call(m), None

        def run():
            nonlocal state
            with self.lib.inference_mode(), self._context():
                y, state = call(next(xs), state)
            return y

        def collect(first):
            y = self.lib.cat([first, *(run() for _ in range(STREAM_STEPS - 1))])
            return {name: self._array(a) for name, a in zip(("y", "h_n", "c_n"), (y, *state))}

        return run, collect

    def _language_model(self, case, data):
        nn, tensor = self.lib.nn, self.lib.from_numpy
        embedding = nn.Embedding.from_pretrained(tensor(data["embedding"]), freeze=False)
        linear = nn.Linear(case.H, case.V, dtype=getattr(self.lib, case.dtype))
        linear.load_state_dict({"weight": tensor(data["linear_weight"]),
                                "bias": tensor(data["linear_bias"])})
        m, tokens, targets = self._layer(case, data), tensor(data["tokens"]), data["targets"]
        targets = tensor(targets).flatten()
        leaves = {"embedding": embedding.weight, "linear_weight": linear.weight,
                  "linear_bias": linear.bias} | dict(m.named_parameters())

        def run():
            logits = linear(m(embedding(tokens))[0])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets)
            return loss.detach(), self.lib.autograd.grad(loss, list(leaves.values()))

        def collect(result):
            loss, gradients = result
            return {"loss": loss.numpy()} | {
                "d" + name.replace("bias_ih", "bias"): g.numpy()
                for name, g in zip(leaves, gradients)}

        return run, collect


class TorchCompile(Torch):
    """The same layer through torch.compile with its defaults."""

    name, jobs = "torch.compile", ("train", "infer")

    def prepare(self, case, job, data):
        _refuse(case, V="the layer alone is compared", lengths="the dense cases are compared")
        return super().prepare(case, job, data)

    def _call(self, m):
        return self.lib.compile(m)


class TorchBfloat16(Torch):
    """The module, its input and its gradients in bfloat16."""

    name, precision = "torch bf16", "bfloat16"

    def _tensor(self, a):
        return super()._tensor(a).bfloat16()

    _upstream = _tensor

    def _layer(self, case, data):
        return super()._layer(case, data).bfloat16()


class TorchAutocast(Torch):
    """A float32 module under autocast to bfloat16."""

    name, precision = "torch autocast", "bfloat16"

    def _context(self):
        return self.lib.autocast("cpu", dtype=self.lib.bfloat16)

    def _upstream(self, a):
        return super()._tensor(a).bfloat16()


class TorchOneDnnBfloat16(Torch):
    """A float32 module whose products oneDNN may compute in bfloat16."""

    name, precision = "torch mkldnn bf16", "bfloat16"

    def __init__(self, threads):
        super().__init__(threads)
        self.lib.backends.mkldnn.rnn.fp32_precision = "bf16"


class TorchInt8(Torch):
    """torch.ao.quantization.quantize_dynamic with its defaults."""

    name, precision, jobs = "torch int8", "int8", ("infer", "stream")

    def _layer(self, case, data):
        whole = self.lib.nn.Sequential(super()._layer(case, data).eval())  # it replaces parts only
        lstm = {self.lib.nn.LSTM}
        return self.lib.ao.quantization.quantize_dynamic(whole, lstm, self.lib.qint8)[0]


class OnnxRuntime:
    """ONNX Runtime: the graph built with the onnx package, all arrays bound before the run."""

    name, jobs, packages = "onnxruntime", ("infer", "stream"), ("onnxruntime",)
    precision = "float32"
    load = "import onnxruntime"

    def __init__(self, threads):
        import onnxruntime

        onnxruntime.set_default_logger_severity(3)
        self.lib, self.threads, self.version = onnxruntime, threads, onnxruntime.__version__

    def prepare(self, case, job, data):
        _refuse(case, V="the layer alone is compared")
        if case.dtype != "float32":
            raise Unsupported("its CPU kernels are float32 only")
        options = self.lib.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        session = self.lib.InferenceSession(
            self._model(case, data, job == "stream").SerializeToString(), options,
            providers=["CPUExecutionProvider"])
        if job == "stream":
            return self._stream(case, session, data)
        feed = {"x": data["x"]}
        if "lengths" in data:
            feed["lengths"] = data["lengths"].astype(np.int32)
        binding, bound = self._bind(session, feed, {
            "y": np.zeros((case.T, case.B, case.D * case.H), np.float32),
            **{name: np.zeros((case.L * case.D, case.B, case.H), np.float32)
               for name in ("h_n", "c_n")}})

        def run():
            session.run_with_iobinding(binding)
            return bound

        return run, lambda bound: {name: bound[name].numpy() for name in ("y", "h_n", "c_n")}

    def _model(self, case, data, state):
        return onnx_model(case, data, state)

    def _bind(self, session, feed, outputs):
        """A binding, and by name the OrtValues that it reads and writes but does not keep alive."""
        def values(arrays):
            return {name: self.lib.OrtValue.ortvalue_from_numpy(a)
                    if isinstance(a, np.ndarray) else a for name, a in arrays.items()}

        binding, feed, outputs = session.io_binding(), values(feed), values(outputs)
        for name, value in feed.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        return binding, feed | outputs

    def _stream(self, case, session, data):
        """Two state buffers, read and written in turn, and one binding for each step's x."""
        states = [{name: self.lib.OrtValue.ortvalue_from_numpy(
            np.zeros((1, case.B, case.H), np.float32)) for name in "hc"} for _ in range(2)]
        bound = [self._bind(session, {"x": x[None], "h0": old["h"], "c0": old["c"]},
                            {"y": np.zeros((1, case.B, case.H), np.float32),
                             "h_n": new["h"], "c_n": new["c"]})
                 for x, old, new in zip(data["x"], itertools.cycle(states),
                                        itertools.cycle(states[::-1]))]
        turns = itertools.cycle(bound)

        def run():
            binding, values = next(turns)
            session.run_with_iobinding(binding)
            return values["y"]

        def collect(first):
            steps = [first.numpy().copy(),
                     *(run().numpy().copy() for _ in range(STREAM_STEPS - 1))]
            last = bound[-1][1]
            return {"y": np.concatenate(steps), "h_n": last["h_n"].numpy(),
                    "c_n": last["c_n"].numpy()}

        return run, collect


class OnnxRuntimeInt8(OnnxRuntime):
    """onnxruntime.quantization.quantize_dynamic with its defaults: a scale for each weight."""

    name, precision, per_channel = "onnxruntime int8", "int8", False
    reduce_range = False

    def _model(self, case, data, state):
        import onnx
        from onnxruntime.quantization import quantize_dynamic

        _refuse(case, lengths="the dense cases are compared",
                peepholes="the plain cell is compared")
        with tempfile.TemporaryDirectory() as folder:
            source, target = str(Path(folder, "f32.onnx")), str(Path(folder, "int8.onnx"))
            onnx.save(super()._model(case, data, state), source)
            quantize_dynamic(source, target, per_channel=self.per_channel,
                             reduce_range=self.reduce_range)
            return onnx.load(target)


class OnnxRuntimeInt8PerChannel(OnnxRuntimeInt8):
    """The same with a scale for each row of a weight."""

    name, per_channel = "onnxruntime int8 per channel", True


class OnnxRuntimeInt7(OnnxRuntimeInt8PerChannel):
    """The same with weights of 7 bits: its 8 bits saturate the sums of pairs on AVX2."""

    name, reduce_range = "onnxruntime int7 per channel", True


class OpenVINO:
    """OpenVINO on the same ONNX graph, in latency mode, kept to float32 by a hint."""

    name, jobs, packages = "openvino", ("infer", "stream"), ("openvino",)
    precision, hint = "float32", {"INFERENCE_PRECISION_HINT": "f32"}
    load = "import openvino"

    def __init__(self, threads):
        import openvino

        self.lib, self.version = openvino, openvino.__version__.split("-")[0]
        self.options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1,
                        "PERFORMANCE_HINT": "LATENCY", **self.hint}

    def prepare(self, case, job, data):
        _refuse(case, V="the layer alone is compared", lengths="the dense cases are compared",
                peepholes="the plain cell is compared")
        if case.dtype != "float32":
            raise Unsupported("its CPU kernels are float32 only")
        core = self.lib.Core()
        model = core.read_model(model=onnx_model(case, data, job == "stream").SerializeToString())
        request = core.compile_model(model, "CPU", self.options).create_infer_request()
        if job == "stream":
            return self._stream(case, request, data)
        request.get_tensor("x").data[...] = data["x"]

        def collect(_):
            return {name: request.get_tensor(name).data for name in ("y", "h_n", "c_n")}

        return request.infer, collect

    def _stream(self, case, request, data):
        xs = itertools.cycle(list(data["x"][:, None]))
        x, h, c, y, h_n, c_n = (request.get_tensor(name).data
                                for name in ("x", "h0", "c0", "y", "h_n", "c_n"))
        h[...], c[...] = 0, 0

        def run():
            x[...] = next(xs)
            request.infer()
            h[...], c[...] = h_n, c_n
            return y

        def collect(first):
            steps = [first.copy(), *(run().copy() for _ in range(STREAM_STEPS - 1))]
            return {"y": np.concatenate(steps), "h_n": h_n, "c_n": c_n}

        return run, collect


class OpenVINODefault(OpenVINO):
    """OpenVINO as it is without a hint: bfloat16 where the CPU has it."""

    name, precision, hint = "openvino default", "bfloat16", {}

    def __init__(self, threads):
        super().__init__(threads)
        found = self.lib.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()
        self.version += f" (computes in {found} here)"


class Jax:
    """JAX: the input products in one, lax.scan over time, jit around all, vjp in training."""

    name, jobs, packages = "jax", ("train", "infer", "stream"), ("jax", "jaxlib")
    precision = "float32"
    load = "import jax.numpy"

    def __init__(self, threads):
        import jax

        jax.config.update("jax_enable_x64", True)  # float32 arrays stay float32
        jax.config.update("jax_platforms", "cpu")
        self.lib, self.version = jax, jax.__version__

    def prepare(self, case, job, data):
        _refuse(case, V="the layer alone is compared", lengths="no ragged batches in lax.scan",
                peepholes="the plain cell is compared")
        jax, parts = self.lib, case.parts()
        weights = {name: jax.device_put(a) for name, a in data.items() if name not in ("x", "dy")}
        zero = jax.device_put(np.zeros((case.L, 2, case.B, case.H), case.dtype))

        def forward(weights, x, states):
            last = []
            for (_, suffix, _), state in zip(parts, states):
                x, state = self._layer(weights, suffix, x, state)
                last.append(state)
            return x, jax.numpy.stack(last)

        if job == "stream":
            return self._stream(jax.jit(forward), weights, zero, data)

        def train(weights, x, dy):
            y, vjp, last = jax.vjp(lambda w, x: forward(w, x, zero), weights, x, has_aux=True)
            return y, last, *vjp(dy)

        step = jax.jit(train if job == "train" else forward)
        arguments = weights, jax.device_put(data["x"]), \
            jax.device_put(data["dy"]) if job == "train" else zero

        def collect(result):
            y, last, *gradients = result
            found = {"y": y, "h_n": last[:, 0], "c_n": last[:, 1]}
            if gradients:
                found |= {"d" + name: g for name, g in gradients[0].items()}
                found["dx"] = gradients[1]
            return {name: np.asarray(a) for name, a in found.items()}

        return (lambda: jax.block_until_ready(step(*arguments))), collect

    def _layer(self, weights, suffix, x, state):
        jax = self.lib
        a_x = x @ weights["weight_ih" + suffix].T + weights["bias" + suffix]
        W_hh = weights["weight_hh" + suffix].T

        def cell(carry, a):
            h, c = carry
            i, f, g, o = jax.numpy.split(a + h @ W_hh, 4, axis=1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jax.numpy.tanh(g)
            h = jax.nn.sigmoid(o) * jax.numpy.tanh(c)
            return (h, c), h

        last, y = jax.lax.scan(cell, (state[0], state[1]), a_x)
        return y, jax.numpy.stack(last)

    def _stream(self, step, weights, state, data):
        xs = itertools.cycle([self.lib.device_put(x[None]) for x in data["x"]])

        def run():
            nonlocal state
            y, state = self.lib.block_until_ready(step(weights, next(xs), state))
            return y

        def collect(first):
            y = np.concatenate([first, *(run() for _ in range(STREAM_STEPS - 1))])
            return {"y": y, "h_n": np.asarray(state[:, 0]), "c_n": np.asarray(state[:, 1])}

        return run, collect


def _one_sequence(case):
    """Refuse all but one float32 sequence through one plain layer."""
    plain = case.B == case.L == case.D == 1 and not (case.V or case.lengths or case.peepholes)
    if not plain or case.dtype != "float32":
        raise Unsupported("one sequence through one plain layer is compared")


class Ncnn:
    """ncnn: one layer written as its .param and .bin, the states as inputs and outputs."""

    name, jobs, packages, precision = "ncnn", ("infer", "stream"), ("ncnn",), "float32"
    load = "import ncnn"

    def __init__(self, threads):
        import ncnn

        self.lib, self.threads, self.version = ncnn, threads, ncnn.__version__

    def prepare(self, case, job, data):
        _one_sequence(case)
        text, weights = ncnn_model(case, data, self.precision == "int8")
        self.net = net = self.lib.Net()
        net.opt.num_threads, net.opt.use_vulkan_compute = self.threads, False
        with tempfile.TemporaryDirectory() as folder:
            for name, content in ("param", text.encode()), ("bin", weights):
                Path(folder, name).write_bytes(content)
            if net.load_param(str(Path(folder, "param"))) or \
                    net.load_model(str(Path(folder, "bin"))):
                raise Unsupported("ncnn does not load the layer")
        x, zero = data["x"][:, 0], np.zeros((1, case.H), np.float32)

        def step(x, h, c):
            extractor = net.create_extractor()
            for name, value in ("x", x), ("h0", h), ("c0", c):
                extractor.input(name, value)
            return [extractor.extract(name)[1] for name in ("y", "h_n", "c_n")]

        xs = [self.lib.Mat(np.ascontiguousarray(part)).clone()
              for part in (x[:, None] if job == "stream" else [x])]
        zero = self.lib.Mat(zero).clone()
        return _steps(step, xs, (zero, zero), lambda a: np.array(a)[:, None])


class NcnnInt8(Ncnn):
    """ncnn with int8 weights, a scale for each row, and activations quantized as they come."""

    name, precision = "ncnn int8", "int8"


class Tract:
    """tract on the ONNX graph; one thread, for its Python package has no setting of them."""

    name, jobs, packages, precision = "tract", ("infer", "stream"), ("tract",), "float32"
    load = "import tract"

    def __init__(self, threads):
        import tract

        self.lib, self.version = tract, tract.version()

    def prepare(self, case, job, data):
        _one_sequence(case)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            path.write_bytes(onnx_model(case, data, job == "stream").SerializeToString())
            run = self.lib.onnx().load(str(path)).into_model().into_runnable().run
        tensor = self.lib.Tensor.from_numpy
        if job == "stream":
            zero = tensor(np.zeros((1, 1, case.H), np.float32))
            return _steps(lambda *given: run(list(given)), [tensor(x[None]) for x in data["x"]],
                          (zero, zero), lambda a: a.to_numpy())
        return _steps(lambda x: run([x]), [tensor(data["x"])], None, lambda a: a.to_numpy())


class Mnn:
    """MNN on the ONNX graph, converted by mnnconvert with the faster of its two ways."""

    name, jobs, packages, precision = "mnn", ("infer", "stream"), ("mnn",), "float32"
    load = "import MNN"
    options = ("--useOriginRNNImpl",)  # seq-b1: 13 ms, as a loop 18 ms

    def __init__(self, threads):
        import MNN
        import MNN.nn

        self.lib, self.threads, self.version = MNN, threads, MNN.version()

    def prepare(self, case, job, data):
        _one_sequence(case)
        state = ["h0", "c0"] if job == "stream" else []
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "model.onnx"), Path(folder, "model.mnn")
            source.write_bytes(onnx_model(case, data, bool(state)).SerializeToString())
            subprocess.run([sys.executable, "-m", "MNN.tools.mnnconvert", "-f", "ONNX",
                            "--modelFile", source, "--MNNModel", target, "--bizCode", "bench",
                            *self.options], check=True, cwd=folder,
                           capture_output=True)
            manager = self.lib.nn.create_runtime_manager(
                ({"backend": 0, "numThread": self.threads, "precision": "high"},))
            net = self.lib.nn.load_module_from_file(
                str(target), ["x", *state], ["y", "h_n", "c_n"], runtime_manager=manager)
        self.manager = manager  # the network does not keep it alive

        def constant(a):
            expr = self.lib.expr
            return expr.const(a.ravel().tolist(), list(a.shape), expr.NCHW)

        def array(a):
            return np.array(a.read()).reshape(-1, 1, case.H)

        def step(*given):
            found = net.forward(list(given))
            found[0].read()  # nothing is computed before somebody reads
            return found

        if not state:
            return _steps(step, [constant(data["x"])], None, array)
        zero = constant(np.zeros((1, 1, case.H), np.float32))
        return _steps(step, [constant(x[None]) for x in data["x"]], (zero, zero), array)


class MnnInt8(Mnn):
    """MNN with weights stored in int8, as a loop: its other way leaves the weights in float32."""

    name, precision, options = "mnn int8", "int8", ("--weightQuantBits", "8")


class LiteRT:
    """LiteRT (TensorFlow Lite): one UNIDIRECTIONAL_SEQUENCE_LSTM that keeps its own states."""

    name, jobs, packages, precision = "litert", ("infer", "stream"), ("ai-edge-litert",), "float32"
    load = "from ai_edge_litert.interpreter import Interpreter"

    def __init__(self, threads):
        from importlib import metadata

        from ai_edge_litert.interpreter import Interpreter

        self.lib, self.threads = Interpreter, threads
        self.version = metadata.version("ai-edge-litert")

    def prepare(self, case, job, data):
        _one_sequence(case)
        content, at = litert_model(case, data, 1 if job == "stream" else case.T,
                                   self.precision == "int8")
        interpreter = self.lib(model_content=content, num_threads=self.threads)
        interpreter.allocate_tensors()
        xs = itertools.cycle(data["x"][:, None] if job == "stream" else [data["x"]])

        def run():
            if job == "infer":
                interpreter.reset_all_variables()
            interpreter.set_tensor(at["x"], next(xs))
            interpreter.invoke()
            return interpreter.get_tensor(at["y"])

        def collect(y):
            if job == "stream":
                y = np.concatenate([y, *(run() for _ in range(STREAM_STEPS - 1))])
            return {"y": y} | {name: interpreter.get_tensor(at[name])[None]
                               for name in ("h_n", "c_n")}

        return run, collect


class LiteRTInt8(LiteRT):
    """LiteRT with int8 weights, a scale for each gate, and its hybrid kernel."""

    name, precision = "litert int8", "int8"


def _steps(step, xs, states, array):
    """run and collect of a function x, h, c -> y, h_n, c_n whose states, if any, are carried."""
    turns, given, last = itertools.cycle(xs), states or (), None

    def run():
        nonlocal given, last
        last = step(next(turns), *given)
        if states:
            given = last[1:]
        return last[0]

    def collect(first):
        y = [array(first).copy(), *(array(run()).copy() for _ in range(len(xs) - 1))]
        return {"y": np.concatenate(y)} | {
            name: array(a) for name, a in zip(("h_n", "c_n"), last[1:])}

    return run, collect


PEERS = {peer.name: peer for peer in (
    Lstmcore, LstmcoreBfloat16, LstmcoreInt8, Torch, TorchCompile, TorchBfloat16, TorchAutocast,
    TorchOneDnnBfloat16, TorchInt8, OnnxRuntime, OnnxRuntimeInt8, OnnxRuntimeInt8PerChannel,
    OnnxRuntimeInt7, OpenVINO, OpenVINODefault, Jax, Ncnn, NcnnInt8, Tract, Mnn, MnnInt8, LiteRT,
    LiteRTInt8)}
