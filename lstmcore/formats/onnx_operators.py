"""The operations of an ONNX graph that stand around its recurrent nodes: what moves numbers, what
computes shapes, and of all other layers the shape of their result. Needs the package onnx.

An operation is a function of (attributes, budget, *arrays) and a row of MOVING or ARITHMETIC; a
layer that is not computed is a function of (attributes, *shapes) and a row of SHAPES.
"""

import functools
import math

import numpy as np

try:
    from onnx import TensorProto
except ImportError:
    raise ImportError("ONNX files need the package onnx: pip install 'lstmcore[onnx]'") from None

DTYPES = {TensorProto.FLOAT: "f4", TensorProto.DOUBLE: "f8", TensorProto.FLOAT16: "f2",
           TensorProto.BFLOAT16: "u2", TensorProto.INT64: "i8", TensorProto.INT32: "i4",
           TensorProto.INT16: "i2", TensorProto.INT8: "i1", TensorProto.UINT8: "u1",
           TensorProto.UINT16: "u2", TensorProto.UINT32: "u4", TensorProto.UINT64: "u8",
           TensorProto.BOOL: "?"}


def plumb(node, arguments, budget):
    """The outputs of a node that only moves numbers, or computes shapes."""
    if node.op not in PLUMBING:
        raise ValueError(f"{node.name} is the operation {node.op}; run here are LSTM, GRU, RNN, "
                         f"{', '.join(PLUMBING)}")
    try:
        with np.errstate(all="ignore"):
            result = PLUMBING[node.op](node.attributes, budget, *arguments)
    except (TypeError, IndexError, KeyError, AttributeError, OverflowError, ValueError) as error:
        if budget.left < 0:
            raise
        raise ValueError(f"{node.name} ({node.op}) of the ONNX graph: {error}") from None
    results = result if isinstance(result, list) else [result]
    for result in results:
        if result is None:
            raise ValueError(f"{node.name} ({node.op}) of the ONNX graph lacks an input")
        budget.pay(result.shape)
    return results


def string(value):
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _axes(attributes, axes):
    axes = attributes.get("axes") if axes is None else axes
    return None if axes is None else tuple(int(n) for n in np.ravel(axes))


def _reshape(attributes, budget, data, shape=None):
    shape = [int(n) for n in np.ravel(attributes["shape"] if shape is None else shape)]
    if not attributes.get("allowzero", 0):
        shape = [data.shape[n] if size == 0 else size for n, size in enumerate(shape)]
    return data.reshape(shape)


def _slice(attributes, budget, data, starts=None, ends=None, axes=None, steps=None):
    starts, ends, steps = (
        [int(n) for n in np.ravel(attributes.get(name, default) if value is None else value)]
        for name, value, default in (("starts", starts, None), ("ends", ends, None),
                                     ("steps", steps, [1] * np.size(starts))))
    axes = range(len(starts)) if (found := _axes(attributes, axes)) is None else found
    cut = [slice(None)] * data.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        # Going backwards, an end before the first element cannot be written as -1.
        cut[axis] = slice(start, None if step < 0 and end < -data.shape[axis] else end, step)
    return data[tuple(cut)]


def _gather(attributes, budget, data, indices):
    axis = attributes.get("axis", 0)
    budget.pay((*indices.shape, *np.delete(data.shape, axis)))
    return np.take(data, indices, axis=axis)


def _concat(attributes, budget, *parts):
    budget.pay((sum(part.size for part in parts),))
    return np.concatenate(parts, axis=attributes["axis"])


def _broadcast(data, shape, budget):
    budget.pay(shape)
    return np.broadcast_to(data, shape)


def _expand(attributes, budget, data, shape):
    return _broadcast(data, np.broadcast_shapes(data.shape, tuple(int(n) for n in shape)), budget)


def _constant_of_shape(attributes, budget, shape):
    value = attributes.get("value", np.zeros(1, "float32"))
    return _broadcast(value.reshape(()), tuple(int(n) for n in shape), budget)


def _constant(attributes, budget):
    ((name, value),) = attributes.items()
    return np.asarray(value, {"value_int": "i8", "value_ints": "i8", "value_float": "f4",
                              "value_floats": "f4"}.get(name))


def _tile(attributes, budget, data, repeats):
    repeats = tuple(int(n) for n in np.ravel(repeats))
    if min(repeats, default=0) < 0:
        raise ValueError(f"repeats must not be negative, got {list(repeats)}")
    budget.pay([n * k for n, k in zip(data.shape, repeats, strict=True)])
    return np.tile(data, repeats)


def _split(attributes, budget, data, sizes=None):
    axis = attributes.get("axis", 0)
    sizes = attributes.get("split") if sizes is None else np.ravel(sizes).tolist()
    if sizes is None:
        count = attributes["num_outputs"]
        each = -(-data.shape[axis] // count)
        sizes = [each] * (count - 1) + [data.shape[axis] - each * (count - 1)]
    if min(sizes, default=0) < 0 or sum(sizes) != data.shape[axis]:
        raise ValueError(f"{sizes} do not make up {data.shape[axis]}")
    return np.split(data, np.cumsum(sizes)[:-1], axis=axis)


def _range(attributes, budget, start, limit, delta):
    budget.pay((max(0, math.ceil((limit.item() - start.item()) / delta.item())),))
    return np.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _div(a, b):
    """C's division of integers, towards zero."""
    if a.dtype.kind not in "iu":
        return a / b
    if not np.all(b):
        raise ValueError("division by zero")
    return (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(np.result_type(a, b))


def _elementwise(function):
    def run(attributes, budget, *parts):
        budget.pay(np.broadcast_shapes(*(part.shape for part in parts)))
        return np.asarray(functools.reduce(function, parts) if len(parts) > 2
                          else function(*parts))
    return run


def _reduced(function):
    def run(attributes, budget, data, axes=None):
        return np.asarray(function(data, axis=_axes(attributes, axes),
                                   keepdims=bool(attributes.get("keepdims", 1))))
    return run


def _where(attributes, budget, mask, x, y):
    budget.pay(np.broadcast_shapes(mask.shape, x.shape, y.shape))
    return np.where(mask, x, y)


def _dequantize(attributes, budget, x, scale, zero=None):
    if attributes.get("block_size", 0):
        raise ValueError("blocks")
    budget.pay(x.shape)
    # one number for all, or one for each place on an axis
    shape = [-1 if k == attributes.get("axis", 1) % x.ndim else 1 for k in range(x.ndim)]
    scale, zero = (a.reshape(shape if a.size > 1 else ()) for a in
                   (scale, np.zeros((), "i4") if zero is None else zero))
    return (x.astype("i4") - zero.astype("i4")).astype(scale.dtype) * scale


# What is computed: of integers, which stand for shapes; of floats, in `Graph.run` alone.
ARITHMETIC = {
    **{name: _elementwise(function) for name, function in {
        "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": _div, "Mod": np.mod,
        "Min": np.minimum, "Max": np.maximum, "Equal": np.equal, "Less": np.less,
        "Greater": np.greater, "LessOrEqual": np.less_equal, "GreaterOrEqual": np.greater_equal,
        "And": np.logical_and, "Or": np.logical_or, "Not": np.logical_not, "Neg": np.negative,
        "Abs": np.abs, "Floor": np.floor, "Ceil": np.ceil, "Sign": np.sign}.items()},
    **{name: _reduced(function) for name, function in {
        "ReduceProd": np.prod, "ReduceSum": np.sum, "ReduceMax": np.max,
        "ReduceMin": np.min}.items()},
    "DequantizeLinear": _dequantize,
    "Where": _where,
    "Range": _range,
}


MOVING = {
    "Identity": lambda a, budget, x: x,
    "Dropout": lambda a, budget, x, *training: x,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Shape": lambda a, budget, x: np.array(x.shape[a.get("start", 0):a.get("end")], "i8"),
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Cast": lambda a, budget, x: x.astype(DTYPES[a["to"]]),
    "Squeeze": lambda a, budget, x, axes=None: np.squeeze(x, _axes(a, axes)),
    "Unsqueeze": lambda a, budget, x, axes=None: np.expand_dims(x, _axes(a, axes)),
    "Transpose": lambda a, budget, x: np.transpose(x, a.get("perm")),
    "Reshape": _reshape,
    "Flatten": lambda a, budget, x: x.reshape(math.prod(x.shape[:a.get("axis", 1)]), -1),
    "Tile": _tile,
    "Split": _split,
    "Size": lambda a, budget, x: np.array(x.size, "i8"),
    "CastLike": lambda a, budget, x, like: x.astype(like.dtype),
}
PLUMBING = {**MOVING, **ARITHMETIC}
# The same number everywhere stays that, whatever the shape, which may be unknown.
KEEPING_FILL = {"Identity", "Expand", "Tile", "Slice", "Reshape", "Transpose", "Squeeze",
                 "Unsqueeze", "Gather", "Flatten", "Split", "Dropout", "Cast", "CastLike"}


# ---- shapes of what is not computed -------------------------------------------------------------


def _matmul_shape(a, x, w, *_):
    if min(len(x), len(w)) < 2:
        raise ValueError("vectors")
    return (*np.broadcast_shapes(x[:-2], w[:-2]), x[-2], w[-1])


def _gemm_shape(a, x, w, *_):
    return x[1 if a.get("transA", 0) else 0], w[0 if a.get("transB", 0) else 1]


def _conv_shape(a, x, w, *_):
    n = len(x) - 2
    auto, pads = string(a.get("auto_pad", b"NOTSET")), a.get("pads", [0] * 2 * n)
    sizes = []
    for k in range(n):
        stride, dilation = (a.get(name, [1] * n)[k] for name in ("strides", "dilations"))
        if auto.startswith("SAME"):
            sizes.append(-(-x[2 + k] // stride))
        else:
            there = x[2 + k] + (0 if auto == "VALID" else pads[k] + pads[k + n])
            sizes.append((there - dilation * (w[2 + k] - 1) - 1) // stride + 1)
    return (x[0], w[0], *sizes)


def reduced_shape(a, x, *axes):
    axes = a.get("axes")
    if axes is None:
        raise ValueError("axes that are computed")
    axes = [k % len(x) for k in axes]
    return tuple(1 if k in axes else n for k, n in enumerate(x)
                 if k not in axes or a.get("keepdims", 1))


def _same(a, x, *_):
    return x


# Where a row is of several results, a list of their shapes.
SHAPES = {
    "DynamicQuantizeLinear": lambda a, x, *_: [x, (), ()],
    **dict.fromkeys(("MatMul", "MatMulInteger", "com.microsoft.MatMulIntegerToFloat"),
                    _matmul_shape),
    "Gemm": _gemm_shape, "Conv": _conv_shape,
    "ReduceMean": reduced_shape, "Pow": lambda a, *shapes: np.broadcast_shapes(*shapes),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _same),
    **dict.fromkeys(("Relu", "Tanh", "Sigmoid", "Gelu", "Erf", "Exp", "Log", "Sqrt", "LeakyRelu",
                     "Elu", "Selu", "Celu", "Softmax", "LogSoftmax", "LayerNormalization", "Clip",
                     "BatchNormalization", "InstanceNormalization", "GroupNormalization",
                     "HardSwish", "HardSigmoid", "Softplus", "Softsign", "PRelu", "Reciprocal",
                     "Mish"), _same),
}
