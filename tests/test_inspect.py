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
    return Activations(list(TEXT), ["l0"], [{signal: noise}])


def test_activations_are_those_of_the_network(model):
    found = inspect.activations(model, TEXT)
    assert "".join(found.tokens) == TEXT and found.places == ["l0", "l1"]
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
    assert found.places == ["l0", "l0_reverse"]
    assert found.guesses is None
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


def test_rank_is_measured_in_the_half_that_it_was_not_chosen_in():
    rng = np.random.default_rng(1)
    noise = Activations(list(TEXT), ["l0"], [{"h": rng.standard_normal((len(TEXT), 200))}])
    ranked = inspect.rank(noise, count=200)
    again = [abs(entry.r) for entry in ranked]
    half = Activations(noise.tokens[:len(TEXT) // 2], ["l0"], [{"h": noise.signals[0]["h"][:len(TEXT) // 2]}])
    values, seen = half.signals[0]["h"], list(inspect.features(half.tokens).values())
    best = [max(abs(np.corrcoef(values[:, n], f)[0, 1]) for f in seen) for n in range(200)]
    assert np.mean(again) < 0.5 * np.mean(best)              # which was but the best of many
    level = inspect.chance(noise)
    assert 0.5 * level < np.quantile(again, 0.95) < 2 * level
    # in the second half the other way round: last
    sign = np.where(np.arange(len(TEXT)) < len(TEXT) // 2, 1, -1)
    flips = planted(sign * np.array([c.isdigit() for c in TEXT]), neuron=2)
    assert inspect.rank(flips)[-1].neuron == 2


def test_rank_tells_what_is_beyond_the_token():
    inside = np.cumsum([c == '"' for c in TEXT]) % 2
    for values, low, high in (([c == "o" for c in TEXT], 0, 1e-6), (inside, 0.5, 1.0)):
        best = inspect.rank(planted(np.asarray(values, float)))[0]
        assert best.neuron == 2 and low <= best.beyond <= high + 1e-9
    assert inspect.rank(planted(-inside.astype(float)))[0].beyond < -0.5


def test_saturation_is_the_share_of_time_a_gate_is_shut_and_open(model):
    gate = np.array([[0.05, 0.5], [0.95, 0.05], [0.99, 0.5], [0.5, 0.5]])
    found = Activations(list("abcd"), ["l0"], [{"h": gate, "f": gate}])
    shares, = inspect.saturation(found).items()
    assert shares[0] == "f" and shares[1].tolist() == [[0.25, 0.5], [0.25, 0.0]]
    assert list(inspect.saturation(inspect.activations(model, TEXT), "l1")) == list("ifo")


def test_guesses_are_the_model_s_predictions(model):
    found = inspect.activations(model, TEXT)
    logits, _ = model.network(model.vocabulary.encode(TEXT)[:, None])
    for t in 0, 57, len(TEXT) - 1:
        p = np.exp(logits[t, 0].astype(float))
        p /= p.sum()
        best = np.argsort(-p, kind="stable")[:5]
        assert [token for token, _ in found.guesses[t]] == [model.vocabulary.tokens[k] for k in best]
        np.testing.assert_allclose([share for _, share in found.guesses[t]], p[best], rtol=1e-5)
    made = LanguageModel("byte", hidden_size=4, num_layers=1, seed=1)
    made.fit(TEXT * 4, steps=1, progress=False, batch_size=2, seq_length=16)
    assert all(len(token) in (1, 4) for some in inspect.activations(made, "hé").guesses for token, _ in some)


def test_whitespace_tokens_are_shown_with_their_lines():
    made = LanguageModel("whitespace", hidden_size=4, num_layers=1, seed=1)
    made.fit("a b\nc d\n" * 40, steps=1, progress=False, batch_size=2, seq_length=16)
    assert inspect.activations(made, "a  c\nx").tokens == ["a ", "c ", "\n", "x "]


def test_rank_is_quiet_about_neurons_that_never_change_and_tiny_texts():
    assert all(entry.r == 0 for entry in inspect.rank(planted(np.ones(len(TEXT)), H=5))
               if entry.neuron == 2)
    tiny = Activations(["a", "b"], ["l0"], [{"h": np.eye(2)}])
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
    assert [len(some) for some in data["guesses"]] == [5] * len(found.tokens)
    assert {gate: len(shares) for gate, shares in data["places"][1]["saturation"].items()} \
        == dict.fromkeys("ifo", 6)
    place, signal, neuron = data["opening"]
    worth = {(n, name, entry.neuron): abs(entry.beyond) for n in (0, 1) for name in "hc"
             for entry in inspect.rank(found, n, name, 40)}
    assert signal in "hc" and worth[place, signal, neuron] == max(worth.values())


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
    assert "l1, neuron 3" in axes.get_title()
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
    with pytest.raises(ValueError, match="place must be one of l0, l1, got 'layer 1'"):
        inspect.rank(found, "layer 1")
    assert inspect.rank(found, "l1") == inspect.rank(found, 1)
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"neuron must be in 0\.\.5"):
        inspect.picture(found, None, neuron=6)
