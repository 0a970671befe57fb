"""A case as the files that other runtimes read: an ONNX graph, ncnn's pair, a LiteRT flatbuffer.

The gates stand in each format's own order. Nothing here runs anything.
"""

import numpy as np

NCNN_MAGIC = 7767517  # the first line of every .param file
NCNN_INT8 = 0x000D4B38  # the word before weights that are stored in int8


def quantized(a, axis):
    """(int8 array, float32 scales) of a symmetric quantization, one scale along `axis` or, with
    None, for all: a is about the integers times their scale."""
    scale = np.abs(a).max(axis=axis, keepdims=True) / np.float32(127)
    return np.rint(a / scale).astype(np.int8), scale


def ncnn_model(case, data, int8):
    """One layer with its states as inputs and outputs: the text of .param, the bytes of .bin."""
    W, R, b = (np.concatenate([i, f, o, g]) for i, f, g, o in (
        np.split(data[name + "_l0"], 4) for name in ("weight_ih", "weight_hh", "bias")))
    options = f"0={case.H} 1={W.size} 2=0 3={case.H}" + " 8=2" * int8
    text = (f"{NCNN_MAGIC}\n4 6\nInput x 0 1 x\nInput h0 0 1 h0\nInput c0 0 1 c0\n"
            f"LSTM lstm 3 3 x h0 c0 y h_n c_n {options}\n")
    if not int8:
        tag = np.uint32(0).tobytes()
        return text, tag + W.tobytes() + tag + b.tobytes() + tag + R.tobytes()
    (W, W_scale), (R, R_scale), tag = quantized(W, 1), quantized(R, 1), np.uint32(NCNN_INT8)
    weights = [tag.tobytes() + a.tobytes() for a in (W, R)]  # whole words: 4H rows
    scales = b"".join((1 / scale).astype(np.float32).tobytes() for scale in (W_scale, R_scale))
    return text, weights[0] + np.uint32(0).tobytes() + b.tobytes() + weights[1] + scales


def litert_model(case, data, T, int8):
    """One layer over T steps whose states stay in the interpreter, as (bytes, tensor indices)."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    tensors, buffers = [], [schema.BufferT()]

    def tensor(shape, a=None, variable=False):
        t = schema.TensorT()
        t.name, t.shape, t.isVariable = f"t{len(tensors)}", list(shape), variable
        t.type, t.buffer = schema.TensorType.FLOAT32, 0
        if a is not None:
            if int8 and a.ndim == 2:
                a, scale = quantized(a, None)
                t.type, t.quantization = schema.TensorType.INT8, schema.QuantizationParametersT()
                t.quantization.scale, t.quantization.zeroPoint = [float(scale.item())], [0]
            t.buffer = len(buffers)
            buffers.append(schema.BufferT())
            buffers[-1].data = np.frombuffer(np.ascontiguousarray(a).tobytes(), np.uint8)
        tensors.append(t)
        return len(tensors) - 1

    x = tensor((T, 1, case.I))
    W, R, b = ([tensor(part.shape, part) for part in np.split(data[name + "_l0"], 4)]
               for name in ("weight_ih", "weight_hh", "bias"))
    h, c = (tensor((1, case.H), variable=True) for _ in "hc")
    y = tensor((T, 1, case.H))
    options = schema.UnidirectionalSequenceLSTMOptionsT()
    options.fusedActivationFunction, options.timeMajor = schema.ActivationFunctionType.TANH, True
    node, code = schema.OperatorT(), schema.OperatorCodeT()
    node.opcodeIndex, node.builtinOptions = 0, options
    node.builtinOptionsType = schema.BuiltinOptions.UnidirectionalSequenceLSTMOptions
    absent = [-1]  # peepholes, projection, layer normalization
    node.inputs = [x, *W, *R, *absent * 3, *b, *absent * 2, h, c, *absent * 4]
    node.outputs = [y]
    code.builtinCode = code.deprecatedBuiltinCode = \
        schema.BuiltinOperator.UNIDIRECTIONAL_SEQUENCE_LSTM
    code.version = 3 if int8 else 2
    graph, model = schema.SubGraphT(), schema.ModelT()
    graph.tensors, graph.inputs, graph.outputs, graph.operators = tensors, [x], [y], [node]
    model.version, model.operatorCodes = 3, [code]
    model.subgraphs, model.buffers = [graph], buffers
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output()), {"x": x, "h_n": h, "c_n": c, "y": y}


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
