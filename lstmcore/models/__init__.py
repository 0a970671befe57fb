"""What a user trains: LanguageModel, LSTMClassifier, LSTMRegressor, Forecaster."""

import importlib

_HOME = {"LanguageModel": "language", "LSTMClassifier": "estimators",
         "LSTMRegressor": "estimators", "Forecaster": "forecasting"}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'lstmcore.models' has no attribute {name!r}")
    return getattr(importlib.import_module("lstmcore.models." + _HOME[name]), name)
