"""Names that have changed: whoever uses an old one is told the new one."""

import numpy as np
import pytest

import lstmcore
from lstmcore import renames

ROWS = [(kind, old, new) for kind, table in renames.RENAMED.items() for old, new in table.items()]


@pytest.mark.parametrize("kind, old, new", ROWS)
def test_an_old_name_is_answered_with_the_new_one(kind, old, new):
    if kind.startswith("LSTM"):
        pytest.importorskip("sklearn")
    make = getattr(lstmcore, kind)
    Own = type("Own", (make,), {})
    for called in make, Own:
        with pytest.raises(TypeError, match=f"^{called.__name__} takes {new}, which was called {old}$"):
            called(**{old: 3})
    if kind.startswith("LSTM"):
        assert new in make().get_params() and old not in make().get_params()
        with pytest.raises(TypeError, match=f"takes {new}, which was called {old}"):
            make().set_params(**{old: 3})
        assert make().set_params(**{new: 3}).get_params()[new] == 3


def test_a_language_model_s_fit_says_what_settings_are_called():
    for old, new in renames._ESTIMATOR.items():
        with pytest.raises(TypeError, match=f"^fit takes {new}, not {old}$"):
            lstmcore.LanguageModel().fit("one two " * 50, **{old: 0.1}, progress=False)


def test_new_names_and_strangers_are_python_s():
    assert lstmcore.Embedding(vocab_size=3, embed_size=2).embed_size == 2
    with pytest.raises(TypeError, match="unexpected keyword argument 'width'"):
        lstmcore.Embedding(3, width=2)


def test_the_state_of_an_old_pickle_has_the_new_names():
    table = lstmcore.Embedding(4, 3, seed=0)
    state = table.__getstate__()
    state["num_embeddings"], state["embedding_dim"] = state.pop("vocab_size"), state.pop("embed_size")
    old = lstmcore.Embedding.__new__(lstmcore.Embedding)
    old.__setstate__(state)
    assert repr(old) == "Embedding(4, 3)" and (old(np.arange(4)) == table(np.arange(4))).all()
