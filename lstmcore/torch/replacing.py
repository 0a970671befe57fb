"""`accelerate` turns a model's recurrent modules into ours, or says why not; `restore` turns them back."""

from typing import NamedTuple

import torch

from lstmcore._types import Precision
from lstmcore.precision import check_precision
from lstmcore.torch.cells import GRUCell, LSTMCell, RNNCell
from lstmcore.torch.layers import GRU, LSTM, RNN
from lstmcore.torch.module import DTYPES, Kernels, reason_not_to_freeze

_OURS = {ours._theirs: ours for ours in (LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell)}


class Report(NamedTuple):
    """What `accelerate` did: names of modules replaced; names refused, each with its reason."""

    replaced: list[str]
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)} of torch.nn"]
        lines += [f"  {name or '(the model itself)'}" for name in self.replaced]
        lines += [f"  kept {name or '(the model itself)'}: {why}"
                  for name, why in self.refused.items()]
        return "\n".join(lines)


def accelerate(model: torch.nn.Module, freeze: bool = False, *,
               precision: Precision | None = None) -> Report:
    """Turn every torch.nn.LSTM, GRU, RNN and cell of these in a model into ours, in place.

    The modules stay the same objects with the same parameters: optimizers, hooks, shared modules
    and weights, and torch.nn.utils parametrizations go on working. A module is left as it is,
    and the report says why, if it is a subclass with code of its own, has had its forward
    replaced, or is not float32, float64 or bfloat16 on the CPU.

    Parameters
    ----------
    model : torch.nn.Module
    freeze : bool
        `LSTM.freeze` what is replaced: these modules are in eval mode then, until train().
    precision : "float32", "bfloat16" or "int8", with freeze=True
        The format of their products, as in `LSTM.freeze`; what cannot be frozen so is left alone.

    Returns
    -------
    Report
        .replaced, a list of module names; .refused, a dict of module name to reason; print it.

    Examples
    --------
    >>> import torch, lstmcore.torch
    >>> model = torch.nn.ModuleDict({"rnn": torch.nn.LSTM(3, 5), "out": torch.nn.Linear(5, 2)})
    >>> print(lstmcore.torch.accelerate(model))
    replaced 1 of torch.nn
      rnn
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_precision(precision)
    if precision is not None and not freeze:
        raise ValueError(f"precision={precision!r} needs freeze=True")
    report = Report([], {})
    for name, module in model.named_modules():
        if not isinstance(module, _RECURRENT) or isinstance(module, Kernels):
            continue
        why = _reason_to_keep(module) or reason_not_to_freeze(module, precision)
        if why:
            report.refused[name] = why
            continue
        module.__class__ = _counterpart(type(module), *_pair(module))
        report.replaced.append(name)
        if freeze:
            module.freeze(precision)
    return report


def restore(model: torch.nn.Module) -> Report:
    """Turn every module of ours in a model into torch.nn's again, in place.

    What torch.nn.LSTM cannot compute, peepholes, stays, and the report says so.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    Report
        As of `accelerate`.

    Examples
    --------
    >>> import torch, lstmcore.torch
    >>> model = torch.nn.ModuleDict({"rnn": lstmcore.torch.LSTM(input_size=3, hidden_size=5)})
    >>> lstmcore.torch.restore(model).replaced, type(model["rnn"]) is torch.nn.LSTM
    (['rnn'], True)
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report = Report([], {})
    for name, module in model.named_modules():
        if not isinstance(module, Kernels):
            continue
        theirs, ours = _pair(module)
        if module.peepholes:
            report.refused[name] = "torch.nn.LSTM has no peepholes"
        elif type(module) is not ours and not _is_parametrized(module, ours):
            report.refused[name] = _subclass(type(module))
        else:
            for extra in "_frozen", "_precision", "forget_bias":
                vars(module).pop(extra, None)
            module.__class__ = _counterpart(type(module), ours, theirs)
            report.replaced.append(name)
    return report


_RECURRENT = torch.nn.RNNBase, torch.nn.RNNCellBase


def _pair(module):
    """The class of torch.nn that a module is of, and ours; (None, None) for another recurrence."""
    return next((pair for pair in _OURS.items() if isinstance(module, pair[0])), (None, None))


def _reason_to_keep(module):
    cls, (theirs, _) = type(module), _pair(module)
    if theirs is None:
        return f"{cls.__qualname__} has no counterpart here"
    if cls is not theirs and not _is_parametrized(module, theirs):
        return _subclass(cls)
    if "forward" in vars(module):
        return "its forward has been replaced"
    for name, p in module.named_parameters():
        if p.device.type != "cpu":
            return f"{name} is on {p.device}, lstmcore runs on the CPU"
        if p.dtype not in DTYPES:
            return f"{name} is {p.dtype}, lstmcore computes in float32, float64 and bfloat16"
    return None


def _subclass(cls):
    return f"{cls.__module__}.{cls.__qualname__} is a subclass with code of its own"


def _is_parametrized(module, of):
    """Whether the class is the one that torch.nn.utils.parametrize makes of the class `of`."""
    return (torch.nn.utils.parametrize.is_parametrized(module)
            and type(module).__bases__ == (of,))


def _counterpart(cls, before, after):
    """`after` in place of the class `before`, or of a parametrization of it."""
    if cls is before:
        return after
    own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, (after,), own)
