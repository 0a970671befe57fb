"""What an LSTM may do otherwise: activations, clipping, coupled gates, zoneout, a mask on the recurrence.

Names and numbers alone: the equations are in `lstmcore.reference`, the kernel in csrc/cell_varied.h.
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

from lstmcore import scalars
from lstmcore._types import Floats

# A name, or a name with alpha, or with alpha and beta.
Activation: TypeAlias = str | tuple[str, float] | tuple[str, float, float]

# name: (kind in csrc/lstm.h, alpha, beta, how many of these may be given)
ACTIVATIONS = {
    "sigmoid": (0, 0.0, 0.0, 0),
    "tanh": (1, 1.0, 1.0, 2),
    "linear": (2, 1.0, 0.0, 2),
    "hard_sigmoid": (3, 1 / 6, 0.5, 2),
    "relu": (4, 0.0, 0.0, 0),
    "leaky_relu": (4, 0.01, 0.0, 1),
    "thresholded_relu": (5, 1.0, 0.0, 1),
    "softsign": (6, 0.0, 0.0, 0),
    "elu": (7, 1.0, 1.0, 2),
    "selu": (7, 1.6732632423543772, 1.0507009873554805, 0),
}


def activation(name: str, given: Activation) -> tuple[int, float, float]:
    """The kind, alpha and beta of an activation.

    >>> activation("activation", ("hard_sigmoid", 0.2))
    (3, 0.2, 0.5)
    """
    word, *numbers = (given,) if isinstance(given, str) else given
    kind, alpha, beta, most = ACTIVATIONS[scalars.choice(name, word, ACTIVATIONS)]
    if len(numbers) > most:
        raise ValueError(f"{name} {word!r} takes {most or 'no'} numbers, got {len(numbers)}")
    alpha, beta = *(scalars.number(f"a number of {name}", n) for n in numbers), *(alpha, beta)[len(numbers):]
    if kind == ACTIVATIONS["tanh"][0] and not alpha:
        raise ValueError(f"{name} 'tanh' needs an alpha above 0")
    return kind, alpha, beta


# What `layer_norm` names: a cell, and the rows of its gammas and betas.
LAYER_NORMS = {"products": ("lstm_norm", 10), "gates": ("lstm_norm_gates", 6)}


@dataclasses.dataclass(frozen=True)
class Variant:
    """In what an LSTM differs from the usual one. What is left out is as ever.

    Parameters
    ----------
    recurrent_activation : of the gates i, f and o: "sigmoid", "tanh", "linear", "relu", "softsign" or "selu";
        or, with numbers that may be left out, ("hard_sigmoid", 1/6, 0.5): alpha x + beta in 0..1;
        ("tanh", alpha, beta): alpha tanh(beta x); ("linear", alpha, beta); ("leaky_relu", alpha);
        ("thresholded_relu", alpha): 0 up to alpha; ("elu", alpha, beta): beta x or, below 0,
        beta alpha (e^x - 1). No number is negative
    activation : of the candidate g, likewise
    cell_activation : of c before o multiplies it, likewise; by default as `activation`
    clip : limits what goes into the activations of i, f, g, o to -clip..clip
    coupled : f = 1 - i (CIFG; Greff et al. 2017). W and b keep their rows for f, which are not read
    zoneout : z or (z_h, z_c): so much of its last value h, and c, keeps (Krueger et al. 2017): in the mean
    zone_masks : (T, B, 2, H) in place of these numbers, for training: 1 where h and c keep it, else 0
    h_mask : (B, H): what h is multiplied by where it enters the next step's product, the same at
        every step (Gal and Ghahramani 2016)
    """

    recurrent_activation: Activation = "sigmoid"
    activation: Activation = "tanh"
    cell_activation: Activation | None = None
    clip: float | None = None
    coupled: bool = False
    zoneout: float | tuple[float, float] = 0.0
    zone_masks: Floats | None = None
    h_mask: Floats | None = None

    def __post_init__(self) -> None:
        self.activations()
        if self.clip is not None and not scalars.number("clip", self.clip):
            raise ValueError("clip must be above 0, or None for no limit")
        self.zones()

    def activations(self) -> tuple[tuple[int, float, float], ...]:
        """Kind, alpha and beta of the three."""
        cell = self.activation if self.cell_activation is None else self.cell_activation
        return (activation("recurrent_activation", self.recurrent_activation),
                activation("activation", self.activation), activation("cell_activation", cell))

    def zones(self) -> tuple[float, ...]:
        """z_h and z_c."""
        pair = (self.zoneout,) * 2 if isinstance(self.zoneout, (int, float)) else tuple(self.zoneout)
        if len(pair) != 2:
            raise ValueError(f"zoneout must be z or (z_h, z_c), got {self.zoneout!r}")
        return tuple(scalars.fraction("zoneout", z) for z in pair)

    def is_usual(self) -> bool:
        """Whether it differs from the usual LSTM in nothing, masks aside."""
        usual = tuple(activation("", name) for name in ("sigmoid", "tanh", "tanh"))
        return (self.activations() == usual and self.clip is None and not self.coupled
                and not any(self.zones()))
