"""`accelerate`: turn the LSTMs of a model that exists into ours, or say why not."""

from typing import NamedTuple

import torch

from lstmcore.torch.module import LSTM


class Report(NamedTuple):
    """What `accelerate` did: names of modules replaced; names refused, each with its reason."""

    replaced: list
    refused: dict

    def __str__(self):
        lines = [f"replaced {len(self.replaced)} torch.nn.LSTM"]
        lines += [f"  {name or '(the model itself)'}" for name in self.replaced]
        lines += [f"  kept {name or '(the model itself)'}: {why}"
                  for name, why in self.refused.items()]
        return "\n".join(lines)


def accelerate(model):
    """Turn every torch.nn.LSTM inside a model into an `lstmcore.torch.LSTM`, in place.

    The modules stay the same objects with the same parameters: optimizers, hooks, shared modules
    and weights, and torch.nn.utils parametrizations go on working. A module is left as it is,
    and the report says why, if it is a subclass with code of its own, has had its forward
    replaced, or is not float32 or float64 on the CPU.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    Report
        .replaced, a list of module names; .refused, a dict of module name to reason; print it.

    Examples
    --------
    >>> import torch, lstmcore.torch
    >>> model = torch.nn.ModuleDict({"rnn": torch.nn.LSTM(3, 5), "out": torch.nn.Linear(5, 2)})
    >>> print(lstmcore.torch.accelerate(model))
    replaced 1 torch.nn.LSTM
      rnn
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report = Report([], {})
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.LSTM) or isinstance(module, LSTM):
            continue
        why = _reason_to_keep(module)
        if why:
            report.refused[name] = why
        else:
            module.__class__ = _counterpart(type(module))
            report.replaced.append(name)
    return report


def _reason_to_keep(module):
    cls = type(module)
    if cls is not torch.nn.LSTM and not _is_parametrized(module):
        return f"{cls.__module__}.{cls.__qualname__} is a subclass with code of its own"
    if "forward" in vars(module):
        return "its forward has been replaced"
    for name, p in module.named_parameters():
        if p.device.type != "cpu":
            return f"{name} is on {p.device}, lstmcore runs on the CPU"
        if p.dtype not in (torch.float32, torch.float64):
            return f"{name} is {p.dtype}, lstmcore computes in float32 and float64"
    return None


def _is_parametrized(module):
    """Whether the class is the one that torch.nn.utils.parametrize makes of a torch.nn.LSTM."""
    return (torch.nn.utils.parametrize.is_parametrized(module)
            and type(module).__bases__ == (torch.nn.LSTM,))


def _counterpart(cls):
    if cls is torch.nn.LSTM:
        return LSTM
    own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, (LSTM,), own)
