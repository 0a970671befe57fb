"""What a user trains: LanguageModel, LSTMClassifier, LSTMRegressor, Forecaster."""

import lstmcore


def __getattr__(name):
    if not lstmcore._HOME.get(name, "").startswith("lstmcore.models."):
        raise AttributeError(f"module 'lstmcore.models' has no attribute {name!r}")
    return getattr(lstmcore, name)
