"""How each library runs a case: one class per library, its own imports inside it.

A class has `name`, `jobs` (what it can do), `packages` (whose installed size counts) and
`load` (what a user has to import); `Peer(threads)` imports and sets up the library, and
`prepare(case, job, data)` returns `run` and `collect`: run() does the work once, as that library's
users would at best (arguments converted and bound beforehand), and collect(run()) gives the
results as `cases.expected` names them. Jobs: "train" is forward and backward with all gradients,
dx included; "infer" is forward alone; "stream" is the next step with the state carried over.
"""

import itertools

import numpy as np

from bench.cases import STREAM_STEPS


class Unsupported(Exception):
    """The library cannot do this job; the message says why and goes into the table."""


def _refuse(case, **reasons):
    for attribute, reason in reasons.items():
        if getattr(case, attribute):
            raise Unsupported(reason)


class Lstmcore:
    """lstmcore: the functions for one layer, the LSTM class for stacks and both directions."""

    name, jobs, packages = "lstmcore", ("train", "infer", "stream"), ("lstmcore",)
    load = "import lstmcore; lstmcore.lstm_forward"  # names are lazy: ask for the kernels

    def __init__(self, threads):
        import lstmcore

        self.lib, self.threads = lstmcore, threads
        lstmcore.lstm_forward
        self.version = lstmcore.__version__

    def prepare(self, case, job, data):
        if case.V:
            return self._language_model(case, job, data)
        if job == "stream":
            return self._stream(case, data)
        if case.L == case.D == 1:
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
        m = self.lib.LSTM(case.I, case.H, case.L, bidirectional=case.D == 2, dtype=case.dtype)
        m.load_state_dict({name: data[name] for name in m.parameters()})
        m.n_threads = self.threads
        return m.train() if job == "train" else m.freeze()

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


class Torch:
    """torch.nn.LSTM: torch.autograd.grad in training, torch.inference_mode() in inference."""

    name, jobs, packages = "torch", ("train", "infer", "stream"), ("torch",)
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
        x, dy = self.lib.from_numpy(data["x"]), self.lib.from_numpy(data["dy"])
        pack, unpack = self._packing(data.get("lengths"), case.T)

        def train():
            leaf = x.detach().requires_grad_()
            y, state = call(pack(leaf))
            y = unpack(y)
            return y, state, self.lib.autograd.grad(y, [leaf, *parameters], dy)

        def infer():
            with self.lib.inference_mode():
                y, state = call(pack(x))
                return unpack(y), state, ()

        def collect(result):
            y, (h_n, c_n), gradients = result
            found = {"y": y, "h_n": h_n, "c_n": c_n}
            found |= dict(zip(["dx", *("d" + name for name in names)], gradients))
            found |= {name.replace("_ih", ""): g for name, g in found.items()
                      if name.startswith("dbias_ih")}
            return {name: a.detach().numpy() for name, a in found.items()}

        return train if job == "train" else infer, collect

    def _call(self, m):
        return m

    def _layer(self, case, data):
        m = self.lib.nn.LSTM(case.I, case.H, case.L, bidirectional=case.D == 2,
                             dtype=getattr(self.lib, case.dtype))
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
        xs = itertools.cycle(list(self.lib.from_numpy(data["x"]).unsqueeze(1)))
        call, state = self._call(m), None

        def run():
            nonlocal state
            with self.lib.inference_mode():
                y, state = call(next(xs), state)
            return y

        def collect(first):
            y = self.lib.cat([first, *(run() for _ in range(STREAM_STEPS - 1))]).numpy()
            return {"y": y, "h_n": state[0].numpy(), "c_n": state[1].numpy()}

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


class OnnxRuntime:
    """ONNX Runtime: the graph built with the onnx package, all arrays bound before the run."""

    name, jobs, packages = "onnxruntime", ("infer", "stream"), ("onnxruntime",)
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
    """ONNX Runtime with weights quantized to int8: other numbers, for information."""

    name = "onnxruntime int8"

    def _model(self, case, data, state):
        import tempfile
        from pathlib import Path

        import onnx
        from onnxruntime.quantization import quantize_dynamic

        _refuse(case, lengths="the dense cases are compared",
                peepholes="the plain cell is compared")
        with tempfile.TemporaryDirectory() as folder:
            source, target = str(Path(folder, "f32.onnx")), str(Path(folder, "int8.onnx"))
            onnx.save(super()._model(case, data, state), source)
            quantize_dynamic(source, target)
            return onnx.load(target)


class OpenVINO:
    """OpenVINO on the same ONNX graph, float32, latency mode."""

    name, jobs, packages = "openvino", ("infer", "stream"), ("openvino",)
    load = "import openvino"

    def __init__(self, threads):
        import openvino

        self.lib, self.version = openvino, openvino.__version__.split("-")[0]
        self.options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1,
                        "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}

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


class Jax:
    """JAX: the input products in one, lax.scan over time, jit around all, vjp in training."""

    name, jobs, packages = "jax", ("train", "infer", "stream"), ("jax", "jaxlib")
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


PEERS = {peer.name: peer for peer in
         (Lstmcore, Torch, TorchCompile, OnnxRuntime, OnnxRuntimeInt8, OpenVINO, Jax)}


def onnx_model(case, data, state):
    """The case as an ONNX graph: x, lengths, h0, c0 (with `state`) -> y, h_n, c_n."""
    import onnx
    from onnx import helper, numpy_helper

    floats, nodes, constants = onnx.TensorProto.FLOAT, [], []
    H, D, T, B = case.H, case.D, 1 if state else case.T, case.B

    def constant(name, a):
        constants.append(numpy_helper.from_array(np.ascontiguousarray(a), name))
        return name

    def iofg(a):  # ONNX orders the gates i, o, f, g
        i, f, g, o = np.split(a, 4)
        return np.concatenate([i, o, f, g])

    def directions(letter, layer):
        suffixes = [suffix for at, suffix, _ in case.parts() if at == layer]
        return np.stack([iofg(data[letter + suffix]) for suffix in suffixes])

    constant("merged", np.array([T, B, D * H], np.int64))
    previous, lengths = "x", "lengths" if case.lengths else ""
    for layer in range(case.L):
        b = directions("bias", layer)
        inputs = [previous, constant(f"W{layer}", directions("weight_ih", layer)),
                  constant(f"R{layer}", directions("weight_hh", layer)),
                  constant(f"b{layer}", np.concatenate([b, 0 * b], axis=1)), lengths]
        inputs += ["h0", "c0"] if state else ["", ""]
        if case.peepholes:
            i, f, o = data[f"weight_peephole_l{layer}"]
            inputs.append(constant(f"P{layer}", np.concatenate([i, o, f])[None]))
        previous = "y" if layer == case.L - 1 else f"y{layer}"
        nodes.append(helper.make_node(
            "LSTM", inputs, [f"Y{layer}", f"h_n{layer}", f"c_n{layer}"], hidden_size=H,
            direction="bidirectional" if D == 2 else "forward"))
        nodes.append(helper.make_node("Transpose", [f"Y{layer}"], [f"t{layer}"],
                                      perm=[0, 2, 1, 3]))
        nodes.append(helper.make_node("Reshape", [f"t{layer}", "merged"], [previous]))
    for letter in "hc":
        nodes.append(helper.make_node(
            "Concat", [f"{letter}_n{layer}" for layer in range(case.L)], [letter + "_n"], axis=0))
    inputs = {"x": [T, B, case.I]}
    if state:
        inputs |= {"h0": [D, B, H], "c0": [D, B, H]}
    outputs = {"y": [T, B, D * H], "h_n": [case.L * D, B, H], "c_n": [case.L * D, B, H]}
    declare = helper.make_tensor_value_info
    declared = [declare(name, floats, shape) for name, shape in inputs.items()]
    if lengths:
        declared.append(declare("lengths", onnx.TensorProto.INT32, [B]))
    graph = helper.make_graph(
        nodes, case.name, declared,
        [declare(name, floats, shape) for name, shape in outputs.items()], constants)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 14)])
