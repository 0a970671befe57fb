"""What an ONNX node says of an LSTM's variant: activations, clip, input_forget; read and written."""

from lstmcore.formats.onnx_operators import string
from lstmcore.variants import Variant, activation

# ONNX's name: ours, and the usual alpha, or alpha and beta, of those that have them.
# Of two that compute the same the one with fewer numbers stands first, and is written.
ACTIVATIONS = {
    "Sigmoid": ("sigmoid",), "Tanh": ("tanh",), "Relu": ("relu",), "Softsign": ("softsign",),
    "HardSigmoid": ("hard_sigmoid", 0.2, 0.5), "LeakyRelu": ("leaky_relu", 0.01),
    "ThresholdedRelu": ("thresholded_relu", 1.0), "Elu": ("elu", 1.0),
    "Affine": ("linear", None, None), "ScaledTanh": ("tanh", None, None)}
_LOWER = {name.lower(): row for name, row in ACTIVATIONS.items()}


def read(node, a, D):
    """The attributes of an LSTM node, taken out of `a`, as `lstmcore.LSTM` takes them."""
    wanted = a.pop("activations", [])
    if not isinstance(wanted, list) or len(wanted) not in (0, 3 * D):
        raise ValueError(f"{node.name} must have activations of {3 * D} functions, got {wanted!r:.100}")
    numbers = [list(a.pop(f"activation_{which}", [])) for which in ("alpha", "beta")]
    found = []
    for name in [string(s).lower() for s in wanted]:
        if name not in _LOWER:
            raise ValueError(f"{node.name} asks for the activation {name!r:.40}, lstmcore has "
                             f"{', '.join(ACTIVATIONS)}")
        word, *usual = _LOWER[name]
        # alpha, and beta, are those of the functions that have one, in their order
        given = [kept.pop(0) if kept else value for kept, value in zip(numbers, usual)]
        if None in given:
            raise ValueError(f"{node.name} has no alpha and beta for {name}")
        found.append((word, *given) if given else word)
    if found[:3] != found[3:] and D == 2:
        raise ValueError(f"{node.name} has other activations in its second direction, {wanted}: a layer "
                         "of lstmcore has the same in both")
    if any(numbers):
        raise ValueError(f"{node.name} has more of activation_alpha or activation_beta than its "
                         "activations take")
    variant = dict(zip(("recurrent_activation", "activation", "cell_activation"), found))
    if (clip := a.pop("clip", None)) is not None:
        variant["clip"] = clip
    if (coupled := a.pop("input_forget", 0)) not in (0, 1):
        raise ValueError(f"{node.name} has input_forget={coupled!r:.40}")
    if coupled:
        variant["coupled"] = True
    try:
        return {} if Variant(**variant).is_usual() else variant
    except (TypeError, ValueError) as error:
        raise ValueError(f"{node.name}: {error}") from None


def written(variant, D):
    """The attributes of a node for a `Variant`; ValueError for what ONNX does not have."""
    if any(variant.zones()):
        raise ValueError("ONNX has no LSTM with zoneout")
    options, names, numbers = {}, [], ([], [])
    for said in variant.activations():
        name, given = _named(said)
        names.append(name)
        for kept, value in zip(numbers, given):
            kept.append(value)
    if names != ["Sigmoid", "Tanh", "Tanh"]:
        options["activations"] = names * D
    for which, values in zip(("activation_alpha", "activation_beta"), numbers):
        if values:
            options[which] = values * D
    if variant.clip is not None:
        options["clip"] = float(variant.clip)
    if variant.coupled:
        options["input_forget"] = 1
    return options


def _named(said):
    """ONNX's name of a kind, alpha and beta, and those of its numbers that the node has to give."""
    for name, (word, *usual) in ACTIVATIONS.items():
        given = said[1:1 + len(usual)]
        if activation("activation", (word, *given)) == said:
            return name, given
    raise ValueError("ONNX has no LSTM with the activation 'selu', or 'elu' with a beta")
