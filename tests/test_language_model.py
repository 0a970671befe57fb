"""The language model: its text, its gradients, its training loop, its files, what it writes."""

import codecs
import gzip
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lstmcore
from lstmcore import LanguageModel
from lstmcore.formats import safetensors
from lstmcore.losses import softmax_cross_entropy
from lstmcore.models import corpus, generation, sequences, text
from lstmcore.models.corpus import Corpus
from lstmcore.models.network import Network
from lstmcore.models.sources import streams, total_nats
from lstmcore.models.training import Budget

WORDS = "the quick brown fox jumps over a lazy dog and runs away from it".split()


def story(n, seed=3):
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, n)) + "\n"


def small(**options):
    return LanguageModel(**{"hidden_size": 13, "num_layers": 2, "seed": 5, **options})


def fit(model, data, **options):
    return model.fit(data, **{"seq_length": 11, "batch_size": 7, "lr": 0.01, "progress": False,
                              **options})


# ---- text and vocabulary -------------------------------------------------------------------------

@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be",
                                      "utf-32", "cp1252"])
def test_decode_finds_the_encoding(encoding):
    assert corpus.decode("déjà vu\r\nnaïve\rend".encode(encoding)) == "déjà vu\nnaïve\nend"


def test_decode_takes_any_bytes_and_a_named_encoding():
    everything = bytes(range(1, 256))
    assert len(corpus.decode(everything)) == 255
    assert corpus.decode("привет".encode("koi8-r"), "koi8-r") == "привет"
    with pytest.raises(ValueError, match="is not ascii: .* at byte 1"):
        corpus.decode("né".encode(), "ascii")
    with pytest.raises(ValueError, match="unknown encoding 'utf-9'"):
        corpus.decode(b"x", "utf-9")


def test_load_reads_files_gzip_stdin_and_lists(tmp_path, monkeypatch):
    plain, packed = tmp_path / "a.txt", tmp_path / "b"
    plain.write_bytes(codecs.BOM_UTF16_LE + "eins ".encode("utf-16-le"))
    packed.write_bytes(gzip.compress(b"zwei\n"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"drei")))
    assert Corpus([plain, packed, Path("-")]).read() == "eins zwei\ndrei"
    assert Corpus(str(packed)).read() == "zwei\n"
    assert Corpus(packed, "byte").read() == b"zwei\n"
    assert Corpus("no file", "byte").read() == b"no file"
    packed.write_bytes(gzip.compress(b"much" * 99)[:-9])
    with pytest.raises(ValueError, match="damaged gzip"):
        Corpus(packed).read()


def test_default_text_repeats_no_paragraph():
    found = corpus.default_text()
    paragraphs = found.strip("\n").split("\n\n")
    assert len(found) > 300_000 and len(set(paragraphs)) == len(paragraphs)


@pytest.mark.parametrize("level", text.LEVELS)
@settings(max_examples=60, deadline=None)
@given(data=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_vocabulary_gives_the_text_back(level, data):
    vocabulary = text.Vocabulary.of(data, level)
    ids = vocabulary.encode(data)
    if level == "whitespace":
        data = "\n".join(" ".join(line.split()) for line in data.split("\n"))
    assert vocabulary.decode(ids) == data
    assert ids.dtype == np.int32 and (ids < len(vocabulary)).all()


def test_vocabulary_keeps_the_most_frequent():
    vocabulary = text.Vocabulary.of("a b b c c c", "word", max_size=3)
    assert vocabulary.tokens == [" <unk>", " b", " c"]
    assert vocabulary.decode(vocabulary.encode("c d")) == " <unk> <unk>"
    assert text.Vocabulary.of("aabc", "char", min_count=2).tokens == ["\ufffd", "a"]


def test_vocabulary_of_many_texts_has_the_most_frequent_first():
    vocabulary = text.Vocabulary.of_many(["Oh, b a", "A b c A", "<unk>"], text.words, min_count=2)
    assert vocabulary.tokens == ["<unk>", "a", "b"] and vocabulary.split("No, b!") == ["no", ",", "b", "!"]
    assert vocabulary.encode("b Z a").tolist() == [2, 0, 1]
    texts = ["ba", "", "bac"]
    letters = text.Vocabulary.of_many(texts, "char")
    ids = sequences.from_texts(texts, letters)
    assert letters.tokens == ["<unk>", "b", "a", "c"] and list(ids.lengths) == [2, 0, 3]
    assert ids.values.tolist() == [1, 2, 1, 2, 3]
    same = sequences.from_texts(texts, text.Vocabulary.of_many(texts, list))
    assert (same.values == ids.values).all()


def test_bytes_are_decoded_when_a_character_is_complete():
    decode = text.Vocabulary("byte").decoder()
    assert [decode(b) for b in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    assert decode(0xC3) == "" and decode(None) == "\ufffd"


# ---- network -------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [
    dict(cell="lstm", embed_size=0, peepholes=True),
    dict(cell="lstm", embed_size=3, peepholes=False),
    dict(cell="gru", embed_size=3, peepholes=False),
    dict(cell="rnn", embed_size=0, peepholes=False)])
def test_network_gradients_match_differences(options):
    V = 6
    network = Network(V, hidden_size=5, num_layers=2, dropout=0.0, dtype="float64", seed=1,
                      **options)
    rng = np.random.default_rng(2)
    tokens, targets = rng.integers(0, V, (2, 7, 3))
    _, state = network(rng.integers(0, V, (4, 3)))

    def loss():
        return softmax_cross_entropy(network(tokens, state)[0], targets)

    network.zero_grad()
    network.backward(loss()[1])
    for name, p in network.parameters().items():
        direction = rng.standard_normal(p.shape)
        want = sum(weight * _moved(p, step * 1e-4 * direction, loss)
                   for weight, step in ((-1, 2), (8, 1), (-8, -1), (1, -2))) / 12e-4
        got = (network.gradients()[name] * direction).sum()
        assert abs(got - want) < 1e-8 * max(1, abs(want)), name


def _moved(p, by, loss):
    before = p.copy()
    p += by
    value = loss()[0]
    p[...] = before
    return value


# ---- evaluation ----------------------------------------------------------------------------------

def test_streams_are_successive_and_shifted():
    x, targets = streams(np.arange(23), 3, 2)
    assert x.T.tolist() == [list(range(0, 7)), list(range(7, 14)), list(range(14, 21))]
    assert (targets == x + 1).all()
    assert streams(np.arange(23), 50, 10)[0].shape == (11, 2)


@pytest.mark.parametrize("compute", [None, "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_network_loss_has_the_bits_of_logits_and_their_loss(dropout, compute):
    one, other = (Network(600, cell="lstm", hidden_size=9, num_layers=2, embed_size=5, peepholes=False,
                          dropout=dropout, dtype="float32", compute=compute, seed=1)
                  for _ in range(2))
    tokens, targets = np.random.default_rng(2).integers(0, 600, (2, 40, 8))
    logits, state = one(tokens)
    loss, dlogits = softmax_cross_entropy(logits, targets)
    one.backward(dlogits)
    got, dy, new = other.loss(tokens, targets)
    other.backward_below(dy)
    assert got == loss and all((a == b).all() for a, b in zip(state, new))
    for name, g in one.gradients().items():
        assert g.any() and (other.gradients()[name] == g).all(), name
    options = dict(mask=targets > 300, reduction="sum")
    loss, _ = softmax_cross_entropy(one.eval()(tokens)[0], targets, **options)
    assert other.eval().loss(tokens, targets, **options)[:2] == (loss, None)


def test_total_nats_is_the_sum_over_every_token_but_the_first():
    network = Network(9, cell="lstm", hidden_size=4, num_layers=1, embed_size=0, peepholes=False,
                      dropout=0.0, dtype="float64", seed=3).eval()
    tokens = np.random.default_rng(4).integers(0, 9, 5321).astype(np.int32)
    for n, tolerance in ((2, 1e-12), (1500, 1e-12), (5321, 1e-6)):
        logits, _ = network(tokens[:n - 1, None])
        want = softmax_cross_entropy(logits[:, 0], tokens[1:n], reduction="sum")[0]
        assert abs(total_nats(network, tokens[:n]) - want) <= tolerance * want


@pytest.mark.parametrize("level, tokens", [("char", 4), ("byte", 5), ("word", 1)])
def test_evaluation_counts_tokens_and_characters(level, tokens):
    model = fit(small(level=level, min_count=1), "né go " * 40, steps=3)
    found = model.evaluate("né go")
    assert found.tokens == tokens
    chars = 3 if level == "word" else 4
    assert math.isclose(found.bits_per_char * chars * math.log(2), found.nats * tokens)
    assert math.isclose(found.perplexity, math.exp(found.nats))
    assert model.evaluate("né zz").unknown == dict(char=2, byte=0, word=1)[level]


# ---- training ------------------------------------------------------------------------------------

@pytest.mark.parametrize("level", text.LEVELS)
@pytest.mark.parametrize("cell", ["lstm", "rnn"])
def test_training_learns_what_can_be_known(level, cell):
    model = small(level=level, cell=cell, hidden_size=24, num_layers=1)
    fit(model, "one two three four five six. " * 120, steps=200, lr=0.02)
    assert model.perplexity("one two three four five six. " * 9) < 1.3


@pytest.mark.parametrize("options", [
    dict(optimizer="adam", epochs=3), dict(optimizer="sgd", lr=0.5, schedule="plateau", epochs=3),
    dict(optimizer="rmsprop", evaluate_every=5, steps=41, schedule="constant", warmup=9)])
def test_resumed_run_equals_uninterrupted_bit_for_bit(tmp_path, options):
    data, model = story(700), dict(dropout=0.25)
    whole = fit(small(**model), data, checkpoint=tmp_path / "whole", **options)
    budget = {name: options[name] for name in ("epochs", "steps") if name in options}
    part = {**options, **{name: 1 if name == "epochs" else 17 for name in budget}}
    fit(small(**model), data, checkpoint=tmp_path / "part", **part)
    resumed = LanguageModel.load(tmp_path / "part")
    resumed.fit(data, resume=tmp_path / "part", checkpoint=tmp_path / "part", progress=False,
                **budget)
    a, b = (safetensors.read(tmp_path / name) for name in ("whole", "part"))
    assert a[0].keys() == b[0].keys() and len(a[0]) > 20
    for name in a[0]:
        assert a[0][name].tobytes() == b[0][name].tobytes(), name
    runs = [json.loads(metadata["lstmcore.training"]) for _, metadata in (a, b)]
    for run in runs:
        for record in run["history"]:
            del record["seconds"], record["tokens_per_second"]
        del run["seconds"]
    assert runs[0] == runs[1]
    assert whole.sample(seed=1) == resumed.sample(seed=1)


def test_a_callback_stops_and_the_plan_is_resumed(tmp_path):
    data = story(400)
    seen = []
    stopped = fit(small(), data, epochs=4, checkpoint=tmp_path / "m",
                  callbacks=[lambda model, record: seen.append(record) or len(seen) == 2])
    assert stopped.outcome == "stopped by a callback" and len(seen) == 2
    assert {"step", "epoch", "loss", "validation", "lr", "seconds", "tokens_per_second",
            "best"} == seen[0].keys()
    resumed = small().fit(data, resume=tmp_path / "m", progress=False)
    whole = fit(small(), data, epochs=4)
    assert [r["validation"] for r in resumed.history] == [r["validation"] for r in whole.history]


def test_resume_refuses_another_text_model_or_setting(tmp_path):
    data, path = story(300), tmp_path / "m"
    fit(small(), data, epochs=1, checkpoint=path)
    with pytest.raises(ValueError, match="not the text"):
        small().fit(data.replace("fox", "dog"), resume=path, epochs=2, progress=False)
    with pytest.raises(ValueError, match="cannot change hidden_size from 13 to 14"):
        small(hidden_size=14).fit(data, resume=path, epochs=2, progress=False)
    with pytest.raises(ValueError, match="cannot change batch_size from 7 to 8"):
        small().fit(data, resume=path, epochs=2, batch_size=8, progress=False)
    small().fit(data, epochs=1, progress=False).save(path)
    with pytest.raises(ValueError, match="no training run to resume"):
        small().fit(data, resume=path, progress=False)


def test_all_parameters_may_be_drawn_uniformly(tmp_path):
    model = fit(small(init_uniform=0.05, peepholes=True), story(50), steps=0, optimizer="sgd")
    for name, p in model.network.parameters().items():
        assert 0.02 < abs(p).max() <= 0.05, name
    # deviations are 0.05/√3; so many numbers are within a tenth of that
    everything = np.concatenate([p.ravel() for p in model.network.parameters().values()])
    assert abs(everything.std() - 0.05 / 3**0.5) < 0.003
    model.save(tmp_path / "m")
    assert LanguageModel.load(tmp_path / "m").init_uniform == 0.05 and "init_uniform=0.05" in repr(model)
    saved = json.loads(safetensors.read(tmp_path / "m")[1]["lstmcore.language_model"])["config"]
    assert saved["init_uniform"] == 0.05
    fit(small(), story(50), steps=1).save(tmp_path / "m")
    saved = json.loads(safetensors.read(tmp_path / "m")[1]["lstmcore.language_model"])["config"]
    assert "init_uniform" not in saved                  # an older lstmcore reads the file
    with pytest.raises(ValueError, match="init_uniform must be at least 0"):
        small(init_uniform=-1)


def test_the_published_recipe_is_that_of_sums_over_steps():
    """lr 1 and clip 5 on a loss summed over the steps of a window, as lr · T and clip / T on its mean."""
    T, data = 10, story(101)
    options = dict(epochs=2, seq_length=T, batch_size=5, validation=0, optimizer="sgd", momentum=0.0,
                   schedule="step", decay=0.5, decay_after=1)
    model = LanguageModel("whitespace", hidden_size=6, dtype="float64", init_uniform=0.5, seed=3)
    fit(model, data, **options, lr=0.5 * T, clip=0.2 / T)
    other = LanguageModel("whitespace", hidden_size=6, dtype="float64", init_uniform=0.5, seed=3)
    fit(other, data, steps=0, seq_length=T, batch_size=5)
    network = other.network.train()
    x, targets = streams(other.vocabulary.encode(data), 5, T)
    parameters, gradients = network.parameters(), network.gradients()
    assert len(x) % T == 0
    for lr in 0.5, 0.25:
        state = None
        for start in range(0, len(x), T):
            network.zero_grad()
            window = slice(start, start + T)
            _, dy, state = network.loss(x[window], targets[window], state, reduction="sum",
                                        mask=np.full((T, 5), 1 / 5))
            network.backward_below(dy)
            norm = math.sqrt(sum((g ** 2).sum() for g in gradients.values()))
            for name, p in parameters.items():
                p -= lr * min(1, 0.2 / norm) * gradients[name]
    for name, p in model.network.parameters().items():
        np.testing.assert_allclose(p, parameters[name], rtol=1e-9, atol=1e-12)   # float64, other roundings


def test_the_best_weights_win_and_patience_ends():
    data = "ab" * 400
    model = fit(small(), data, validation="ba" + "bbaa" * 20, epochs=60, lr=0.05, patience=2)
    losses = [record["validation"] for record in model.history]
    assert model.outcome == "no progress" and np.argmin(losses) == len(losses) - 3
    assert math.isclose(model.evaluate("ba" + "bbaa" * 20).nats, min(losses), rel_tol=1e-6)


def test_learning_rates_follow_their_schedules():
    def rates(**options):
        model = fit(small(), story(150), evaluate_every=1, steps=20, lr=0.01, **options)
        return np.array([record["lr"] for record in model.history])

    assert np.allclose(rates(schedule="constant"), 0.01)
    cosine = rates(schedule="cosine")
    assert cosine[0] == 0.01 and (np.diff(cosine) < 0).all() and cosine[-1] < 3e-4
    assert np.allclose(rates(schedule="constant", warmup=4)[:5],
                       [0.0025, 0.005, 0.0075, 0.01, 0.01])
    stepped = rates(schedule="step", decay=0.5, decay_after=1)
    assert sorted(set(np.round(np.log2(0.01 / stepped), 9))) == [0.0, 1.0, 2.0]   # epochs 1, 2, 3


def test_what_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path):
    path, data = tmp_path / "m", story(300)

    def poison(model, record):
        saved.append(path.read_bytes())
        model.network.parameters()["head.bias"][:] = np.nan
    saved = []
    with pytest.raises(FloatingPointError, match=r"loss is nan at step \d+ \(epoch 2, .*keeps"):
        model = small()
        fit(model, data, epochs=5, checkpoint=path, callbacks=[poison])
    assert path.read_bytes() == saved[0]
    assert np.isfinite(model.network.parameters()["head.bias"]).all()
    assert math.isclose(LanguageModel.load(path).perplexity(data), model.perplexity(data))


INTERRUPTED = """
import sys
from lstmcore import LanguageModel
m = LanguageModel(hidden_size=13, num_layers=2, seed=5, dropout=0.2)
m.fit(sys.argv[1], epochs=100000, evaluate_every=20, seq_length=11, batch_size=7, progress=False,
      checkpoint=sys.argv[2], callbacks=[lambda m, r: print(r["step"], flush=True)])
print(m.outcome, flush=True)
"""


def _started(code, *args):
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, text=True,
        cwd=Path(args[0]).parent,           # not beside the sources, which may not be built
        env={**os.environ, "PYTHONPATH": str(Path(lstmcore.__file__).parents[1])})
    assert process.stdout.readline()
    return process


def test_interrupt_saves_and_returns(tmp_path):
    (tmp_path / "text").write_text(story(400))
    process = _started(INTERRUPTED, tmp_path / "text", tmp_path / "m")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and out.endswith("SIGINT\n")
    run = json.loads(safetensors.read(tmp_path / "m")[1]["lstmcore.training"])
    small(dropout=0.2).fit(tmp_path / "text", resume=tmp_path / "m", steps=run["step"] + 3,
                           progress=False)


def test_kill_never_leaves_an_unreadable_model(tmp_path):
    (tmp_path / "text").write_text(story(400))
    code = INTERRUPTED.replace("evaluate_every=20", "evaluate_every=1, validation=0")
    for wait in (0.0, 0.013, 0.041):
        process = _started(code, tmp_path / "text", tmp_path / "m")
        time.sleep(wait)
        process.kill()
        process.communicate()
        LanguageModel.load(tmp_path / "m").sample(length=3)


def test_two_runs_and_any_threads_agree():
    import lstmcore
    states = []
    for n in (1, 2):
        with lstmcore.threads(n):
            states.append(fit(small(dropout=0.1), story(300), steps=20).network.state_dict())
    assert all(states[0][name].tobytes() == states[1][name].tobytes() for name in states[0])


def test_a_fitted_model_goes_on_from_its_weights():
    data = story(500)
    model = fit(small(), data, steps=60)
    before = model.history[-1]["validation"]
    fit(model, data, steps=20)
    assert model.history[-1]["validation"] < before


# ---- files ---------------------------------------------------------------------------------------

def test_save_and_load_give_the_same_model(tmp_path):
    for level in text.LEVELS:
        model = small(level=level, peepholes=True, embed_size=4)
        fit(model, "né go " + story(90), steps=4)
        model.save(tmp_path / "m")
        loaded = LanguageModel.load(tmp_path / "m")
        assert repr(loaded) == repr(model) and loaded.history == model.history
        assert loaded.sample(seed=4, length=50) == model.sample(seed=4, length=50)


def test_load_refuses_what_it_did_not_write(tmp_path):
    path = tmp_path / "m"
    with pytest.raises(FileNotFoundError):
        LanguageModel.load(path)
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match="m is no model that can be read"):
        LanguageModel.load(path)
    safetensors.write(path, {"a": np.zeros(3)})
    with pytest.raises(ValueError, match="not of a language model"):
        LanguageModel.load(path)
    for saved in ("[]", "{", json.dumps({"config": {"lines": 3}})):
        safetensors.write(path, {"a": np.zeros(3)}, {"lstmcore.language_model": saved})
        with pytest.raises(ValueError, match="cannot read"):
            LanguageModel.load(path)


# ---- what it writes ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def counting():
    return fit(LanguageModel(hidden_size=24, num_layers=1, seed=0), "one two three four.\n" * 150,
               steps=150, lr=0.02)


def test_sample_follows_seed_length_and_stop(counting):
    assert counting.sample("one ", 15, temperature=0) == "two three four."
    assert counting.sample(length=40, seed=3) == counting.sample(length=40, seed=3)
    assert len(counting.sample(length=40, temperature=3.0, seed=1)) == 40
    assert counting.sample(length=40, temperature=3.0, seed=1) \
        != counting.sample(length=40, temperature=3.0, seed=2)
    assert counting.sample("one", 99, temperature=0, stop=["three", "zzz"]) == " two three"
    assert counting.sample("one", 99, temperature=0, stop="t") == " t"
    assert list(counting.generate("on", 4, temperature=0)) == ["e", " ", "t", "w"]
    assert counting.sample("one", 0) == ""
    assert counting.beam_search("one", 20, width=3) == " two three four.\none"
    assert counting.beam_search("one", 20, width=3, stop=".").endswith("four.")


def test_beam_search_of_full_width_finds_the_best():
    model = fit(small(hidden_size=5), "abcab" * 60, steps=6)
    vocabulary, network = model.vocabulary, model.network
    best = max((-total_nats(network, vocabulary.encode("a" + x + y + z)), x + y + z)
               for x in "abc" for y in "abc" for z in "abc")[1]
    assert model.beam_search("a", 3, width=27) == best


def test_drawing_keeps_to_top_k_and_top_p():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    counts = np.bincount([generation.drawing(seed=n)(logits) for n in range(4000)], minlength=4)
    assert np.abs(counts / 4000 - np.exp(logits)).max() < 0.03        # 4 standard deviations
    assert {generation.drawing(top_k=2, seed=n)(logits) for n in range(200)} == {0, 1}
    assert {generation.drawing(top_p=0.79, seed=n)(logits) for n in range(200)} == {0, 1}
    assert {generation.drawing(top_p=0.81, seed=n)(logits) for n in range(300)} == {0, 1, 2}
    hot = generation.drawing(temperature=0.25, seed=0)
    counts = np.bincount([hot(logits) for _ in range(3000)], minlength=4) / 3000
    want = np.exp(4 * logits) / np.exp(4 * logits).sum()
    assert np.abs(counts - want).max() < 0.04


def test_the_unknown_is_never_written():
    model = fit(small(level="word", vocab_size=5), story(300), steps=5)
    assert "<unk>" not in model.sample(length=200, temperature=5.0, seed=0)


@pytest.mark.parametrize("call, message", [
    (lambda m: m.sample(temperature=-1), "temperature"), (lambda m: m.sample(top_k=0), "top_k"),
    (lambda m: m.sample(top_p=0), "top_p"),
    (lambda m: m.sample(stop=""), "stop"), (lambda m: m.sample(length=-1), "length"),
    (lambda m: m.beam_search(width=0), "width"), (lambda m: m.evaluate("o"), "2 tokens"),
    (lambda m: small().sample(), "fit first"), (lambda m: small(level="line"), "level"),
    (lambda m: small(cell="rnn", peepholes=True), "peepholes"),
    (lambda m: small(dropout=1.5), "dropout"), (lambda m: fit(small(), ""), "empty"),
    (lambda m: fit(small(), "missing.txt"[:1]), "is that a file"),
    (lambda m: fit(small(), story(50), lr=-1), "lr"),
    (lambda m: fit(small(), story(50), epochs=-1), "epochs"),
    (lambda m: fit(small(), story(50), validation=1.0), "validation"),
    (lambda m: fit(small(), story(50), optimizer="best"), "optimizer must be one of sgd"),
])
def test_mistakes_are_named(counting, call, message):
    with pytest.raises(ValueError, match=message):
        call(counting)


def test_mistaken_types_are_named(counting):
    with pytest.raises(TypeError, match="no setting rate; it has seq_length"):
        fit(small(), story(50), rate=3)
    with pytest.raises(TypeError, match="must be str, bytes or a path, got int"):
        fit(small(), 5)
    with pytest.raises(TypeError, match="prime must be a str"):
        counting.sample(5)
    with pytest.raises(TypeError, match="temperature must be a number, got 'hot'"):
        counting.sample(temperature="hot")
    for settings_ in (dict(epochs="3"), dict(validation=True), dict(lr="fast")):
        with pytest.raises(TypeError, match="must be a number"):
            fit(small(), story(50), **settings_)


def test_a_name_of_a_file_that_is_not_there_is_no_text():
    for source in (dict(source="book.txt"), dict(source=story(50), validation="a/b.txt.gz")):
        with pytest.raises(FileNotFoundError, match="book.txt|b.txt.gz"):
            small().fit(**source, steps=1, progress=False)
    assert Corpus("end.").read() == "end." and Corpus("no such.txt").read() == "no such.txt"


def test_callbacks_may_use_the_model_and_change_no_bit():
    def use(model, record):
        texts.append(model.sample(length=9, seed=record["step"]))
        next(model.generate(length=9))              # and is left alone
        assert model.perplexity("the quick") > 1 and model.beam_search(length=3, width=2)
        model.network.eval()
    texts, runs = [], []
    for callbacks in ((), use):
        runs.append(fit(small(dropout=0.3), story(200), steps=21, evaluate_every=4, callbacks=callbacks))
    one, other = (run.network.state_dict() for run in runs)
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    assert len(texts) == 6 and [r["validation"] for r in runs[0].history] \
        == [r["validation"] for r in runs[1].history]


def test_one_callback_needs_no_list():
    seen = []
    fit(small(), story(50), steps=2, callbacks=lambda model, record: seen.append(record["step"]))
    assert seen[-1] == 2


@pytest.mark.parametrize("path", ["m.onnx", "m.weights.h5", "m.pt"])
def test_a_model_is_not_saved_under_the_name_of_another_kind(counting, path, tmp_path):
    with pytest.raises(ValueError, match="saved as .safetensors"):
        counting.save(tmp_path / path)
    assert os.listdir(tmp_path) == []


def test_unwritable_checkpoints_are_found_before_training(tmp_path):
    for path in (tmp_path, tmp_path / "none" / "m"):
        with pytest.raises(OSError):
            fit(small(), story(50), checkpoint=path,
                callbacks=[lambda model, record: pytest.fail("trained")])
    assert os.listdir(tmp_path) == []


def test_budget_counts_what_comes_first():
    assert Budget(epochs=4, steps=10).spent(1, 0, 5) == 0.5
    assert Budget(minutes=2).spent(9, 30, 9) == 0.25
    assert Budget(epochs=0).spent(0, 0, 0) == 1
    assert Budget().epochs == 10


def test_training_curve_shows_what_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    from lstmcore.models.curves import plot_history
    record = dict(step=30, loss=2.5, validation=2.25, best=True)
    history = [record, {**record, "step": 60, "validation": 2.5, "best": False}]
    axes = plot_history(history, tmp_path / "curve.png").axes[0]
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["training"] == [[30, 2.5], [60, 2.5]]
    assert lines["validation, best 2.250 at step 30"] == [[30, 2.25], [60, 2.5]]
    alone = plot_history([{**record, "validation": None}]).axes[0]
    assert [text.get_text() for text in alone.get_legend().get_texts()] == ["training"]
    assert plot_history([]).axes[0].get_legend() is None


def test_progress_ends_at_the_end_with_the_last_losses(capsys):
    model = small().fit(story(80), steps=4, batch_size=3, seq_length=8, evaluate_every=2)
    last = capsys.readouterr().err.split("\r")[-1]
    want = f"loss {model.history[-1]['loss']:.3f}, validation {model.history[-1]['validation']:.3f}"
    assert last.startswith("100%") and want in last
