"""Looking inside: the signals are the model's, a planted neuron is found, pages hold it all."""

import base64
import json
import re

import numpy as np
import pytest

from lstmcore import LanguageModel, inspect
from lstmcore.inspect import Activations

TEXT = ('He said "go (now) to 12 Main Street," and went.\n'
        '  "No," she said; "I will [not] go before 7."\n') * 3


@pytest.fixture(scope="module")
def model():
    made = LanguageModel("char", hidden_size=6, num_layers=2, seed=1)
    return made.fit(TEXT * 4, steps=3, progress=False, batch_size=2, seq_length=16)


def planted(values, signal="h", neuron=2, H=5):
    """Noise, and one neuron that does what `values` say."""
    noise = 0.3 * np.random.default_rng(0).uniform(-1, 1, (len(values), H))
    noise[:, neuron] = values
    return Activations(list(TEXT), ["layer 1"], [{signal: noise}])


def test_activations_are_those_of_the_network(model):
    found = inspect.activations(model, TEXT)
    assert "".join(found.tokens) == TEXT and found.places == ["layer 1", "layer 2"]
    ids = model.vocabulary.encode(TEXT)[:, None]
    trace = model.network.recurrent.trace(model.network.inputs(ids))
    for signals, want in zip(found.signals, trace):
        assert set(signals) == set("hcifog")
        for name in "hifog":
            np.testing.assert_array_equal(signals[name], getattr(want, name)[:, 0])
        np.testing.assert_allclose(signals["o"] * signals["c"], signals["h"], atol=1e-6)


def test_activations_of_a_vanilla_rnn_and_of_bytes():
    made = LanguageModel("byte", cell="rnn", hidden_size=4, num_layers=1, seed=1)
    made.fit(TEXT * 4, steps=1, progress=False, batch_size=2, seq_length=16)
    found = inspect.activations(made, "naïve")
    assert "".join(found.tokens) == "naïve" and len(found.tokens) == 6
    assert [set(signals) for signals in found.signals] == [{"h"}]
    made = LanguageModel(cell="gru", hidden_size=4, num_layers=2, seed=1)
    made.fit(TEXT * 4, steps=1, progress=False, batch_size=2, seq_length=16)
    found = inspect.activations(made, "tree")
    assert [set(signals) for signals in found.signals] == [set("hrzn")] * 2
    r, h = found.signals[0]["r"], found.signals[0]["h"]
    assert r.shape == (4, 4) and (0 < r).all() and (r < 1).all() and (h < 0).any()


@pytest.mark.parametrize("level, count", [("char", 23), ("word", 6), ("byte", 32)])
def test_tokens_are_shown_as_they_stand_in_the_text(level, count):
    made = LanguageModel(level, hidden_size=4, num_layers=1, seed=1)
    made.fit(TEXT * 4, steps=1, progress=False, batch_size=2, seq_length=16)
    text = "Never seen: 日本語 – naïve"
    tokens = inspect.activations(made, text).tokens
    assert "".join(tokens) == text and len(tokens) == count


def test_activations_of_a_classifier_of_words():
    pytest.importorskip("sklearn")
    from lstmcore import LSTMClassifier
    made = LSTMClassifier(4, tokenizer="word", bidirectional=True, epochs=1, random_state=0)
    made.fit(["a good film", "a bad film"], ["pos", "neg"])
    found = inspect.activations(made, "A good bad film")
    assert found.tokens == ["a ", "good ", "bad ", "film "]
    assert found.places == ["layer 1", "layer 1, backward"]
    assert found.signals[1]["f"].shape == (4, 4)


@pytest.mark.parametrize("feature, values", [
    ("inside quotes", np.cumsum([c == '"' for c in TEXT]) % 2),
    ("a digit", [c.isdigit() for c in TEXT]),
    ("a capital", [c.isupper() for c in TEXT]),
    ("depth of brackets", np.cumsum([(c in "([") - (c in ")]") for c in TEXT])),
    ("place in the line", [len(TEXT[:n].split("\n")[-1]) for n in range(len(TEXT))]),
    ("the token 'o'", [c == "o" for c in TEXT])])
def test_rank_finds_and_names_a_planted_neuron(feature, values):
    for sign in (1, -1):
        best = inspect.rank(planted(sign * np.asarray(values, float)))[0]
        assert (best.neuron, best.feature) == (2, feature)
        assert best.r == pytest.approx(sign)
    assert len(inspect.rank(planted(values), count=3)) == 3


def test_rank_is_quiet_about_neurons_that_never_change_and_tiny_texts():
    assert all(entry.r == 0 for entry in inspect.rank(planted(np.ones(len(TEXT)), H=5))
               if entry.neuron == 2)
    tiny = Activations(["a", "b"], ["layer 1"], [{"h": np.eye(2)}])
    assert inspect.rank(tiny) == []


def test_page_holds_the_signals_and_needs_no_network(model, tmp_path):
    path = tmp_path / "page.html"
    text = TEXT + "</script><b>&amp;"
    inspect.page(model, text, path, title="a <title>")
    source = path.read_text("utf-8")
    assert not re.search(r"https?:|src=|url\(|@[A-Z]+@", source)
    assert "<title>a &lt;title&gt;</title>" in source and source.count("</script>") == 2
    data = json.loads(re.search(r'application/json">(.*?)</script>', source, re.S)[1])
    found = inspect.activations(model, text)
    assert data["tokens"] == found.tokens
    for place, signals in zip(data["places"], found.signals):
        for name, values in signals.items():
            stored = np.frombuffer(base64.b64decode(place["signals"][name]["bytes"]), np.uint8)
            share = stored.reshape(values.shape) / 254
            got = share if name in "ifo" else 2 * share - 1
            np.testing.assert_allclose(got, values, atol=1 / 254 + 1e-6)    # a byte each
    best = inspect.rank(found)[0]
    assert data["places"][0]["signals"]["h"]["ranked"][0][:2] == [best.neuron, best.feature]


def test_page_shows_as_much_as_the_limit_says(model, tmp_path):
    inspect.page(model, TEXT, tmp_path / "page.html", limit=10)
    data = re.search(r'application/json">(.*?)</script>', (tmp_path / "page.html").read_text(),
                     re.S)[1]
    assert json.loads(data)["tokens"] == list(TEXT[:10])


def test_picture_colors_every_token(model, tmp_path):
    pytest.importorskip("matplotlib")
    found = inspect.activations(model, TEXT)
    figure = inspect.picture(found, None, tmp_path / "neuron.png", neuron=3, place=1, signal="c")
    axes = figure.axes[0]
    assert len(axes.patches) == len(TEXT)
    value = float(found.signals[1]["c"][5, 3])
    red, _, blue = axes.patches[5].get_facecolor()[:3]
    assert (red > blue) == (value > 0)
    assert "layer 2, neuron 3" in axes.get_title()
    assert (tmp_path / "neuron.png").read_bytes()[:4] == b"\x89PNG"


def test_mistakes_are_named(model):
    found = inspect.activations(model, TEXT)
    with pytest.raises(ValueError, match="not empty"):
        inspect.activations(model, "")
    with pytest.raises(TypeError, match="got dict"):
        inspect.activations({}, TEXT)
    with pytest.raises(ValueError, match="signal must be one of h, c"):
        inspect.rank(found, 0, "x")
    with pytest.raises(ValueError, match=r"place must be in 0\.\.1"):
        inspect.rank(found, 2)
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"neuron must be in 0\.\.5"):
        inspect.picture(found, None, neuron=6)
