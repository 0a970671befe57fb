"""What a training says while it runs: its beginning, lines, logs, pictures, warnings."""

import csv
import io
import json
import re
import sys
import types

import numpy as np
import pytest

from lstmcore import LanguageModel
from lstmcore.models import progress
from lstmcore.models.curves import TensorBoard, plot_history, table

STORY = "one two three four.\nfive six seven.\n" * 60
SMALL = dict(seq_length=9, batch_size=5, lr=0.02)


def trained(**options):
    options = {**SMALL, "steps": 20, "progress": "lines", **options}
    return LanguageModel(hidden_size=11, num_layers=1).fit(STORY, **options)


def test_the_beginning_says_what_is_trained_on_what(capsys, tmp_path):
    trained()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "text: 2,160 characters; 2,052 tokens to train on, 108 held out"
    model = trained(progress=False)
    count = sum(p.size for p in model.network.parameters().values())
    assert lines[1] == f"model: lstm, 1 x 11, {count:,} parameters, a vocabulary of " \
                       f"{len(model.vocabulary)} characters"
    assert capsys.readouterr().err == ""
    (tmp_path / "a.txt").write_bytes((STORY + "é").encode("cp1252"))
    (tmp_path / "b.txt").write_text(STORY + "é", encoding="utf-8")
    LanguageModel(hidden_size=3).fit([tmp_path / "a.txt", tmp_path / "b.txt"], **SMALL, steps=1,
                                     progress="lines")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"{tmp_path / 'a.txt'}: encoding cp1252 is a guess"
    assert lines[1].startswith("text: 4,322 characters, cp1252, utf-8; ")
    LanguageModel("byte", hidden_size=3).fit(STORY.encode(), **SMALL, steps=1, progress="lines", validation=0)
    assert capsys.readouterr().err.startswith("text: 2,160 bytes; 2,160 tokens to train on, 0 held out\n")


def trainer(seconds, share, epochs):
    return types.SimpleNamespace(seconds=seconds, share=share, epochs=epochs, seen=epochs * 1000,
                                 source=types.SimpleNamespace(size=1000))


def test_the_expected_time_is_that_of_the_whole_run(capsys):
    said = progress.expectation(trainer(30.0, 0.25, 2.5), (0.0, 0.0))
    assert said == "expected: 10 epochs of 1,000 tokens in 2 minutes at 83 tokens/s"
    # resumed after 100 s and half of the run, whose rest takes as long as it now does
    said = progress.expectation(trainer(110.0, 0.6, 6.0), (100.0, 0.5))
    assert said.startswith("expected: 8.18 epochs of 1,000 tokens in 2.5 minutes")
    lines = progress.Lines()
    lines.begin(trainer(0.0, 0.0, 0.0), ["text"])
    for seconds in 1.0, 2.5, 3.0:
        lines.expect(trainer(seconds, seconds / 10, seconds))
    assert re.findall("(?m)^expected: .*", capsys.readouterr().err) == [
        "expected: 10 epochs of 1,000 tokens in 10 seconds at 1,000 tokens/s"]
    assert progress._time(89) == "89 seconds" and progress._time(5400) == "1.5 hours"
    assert progress._time(3e5) == "3.47 days"


def test_a_bar_leaves_the_lines_above_it(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SOON", 0.0)
    trained(progress=True)
    err = capsys.readouterr().err
    assert err.startswith("text: 2,160") and err.count("expected: ") == 1 and "100%" in err


def test_records_become_a_table():
    file = io.StringIO()
    model = trained(evaluate_every=5, callbacks=table(file), progress=False)
    rows = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert [float(row["loss"]) for row in rows] == [record["loss"] for record in model.history]


def test_records_go_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray
    log = TensorBoard(tmp_path / "run")
    model = trained(evaluate_every=5, callbacks=log, progress=False)
    log.close()
    found = EventAccumulator(str(tmp_path / "run"))
    found.Reload()
    assert {"loss/training", "loss/validation", "lr", "tokens_per_second"} <= set(found.Tags()["tensors"])
    got = [(event.step, float(make_ndarray(event.tensor_proto)))
           for event in found.Tensors("loss/validation")]
    assert got == [(r["step"], float(np.float32(r["validation"]))) for r in model.history]


def test_without_tensorboard_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    with pytest.raises(ImportError, match=r"pip install 'lstmcore\[tensorboard\]'"):
        TensorBoard(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_curves_are_of_models_and_estimators(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    from lstmcore import LSTMRegressor
    x = np.random.default_rng(0).standard_normal((40, 5))
    estimator = LSTMRegressor(3, epochs=4, validation=0.2, random_state=0).fit(x, x.sum(1))
    axes = plot_history(estimator, tmp_path / "a.png").axes[0]
    assert axes.get_ylabel() == "loss per sequence" and (tmp_path / "a.png").stat().st_size > 1000
    lines = {line.get_label().split(",")[0]: line.get_ydata().tolist() for line in axes.lines}
    assert lines["training"] == [r["loss"] for r in estimator.history_] and len(lines["validation"]) == 4
    model = trained(evaluate_every=10, progress=False)
    for given in model, model.history:
        assert plot_history(given).axes[0].get_ylabel() == "nats per token"
    with pytest.raises(TypeError, match="a trained model, or its history, got int"):
        plot_history(3)


@pytest.mark.parametrize("evaluate_every", [None, 3])
def test_a_loss_that_runs_away_is_said_wherever_the_evaluations_lie(evaluate_every):
    options = dict(optimizer="sgd", clip=0, lr=60, momentum=0.0, steps=40, evaluate_every=evaluate_every,
                   progress=False)
    with pytest.warns(UserWarning, match="the loss runs away: .* at step .*a lower lr or clip") as seen:
        LanguageModel(hidden_size=11).fit(STORY, **{**SMALL, **options})
    assert len(seen) == 1


def test_a_loss_that_falls_is_not_warned_of():
    trained(steps=60, progress=False)           # warnings are errors here


def test_what_was_trained_stays_with_the_model(tmp_path):
    model = trained(progress=False)
    model.save(tmp_path / "m")
    found = LanguageModel.load(tmp_path / "m").training
    assert found == json.loads(json.dumps(model.training))
    (tmp_path / "secret.txt").write_bytes((STORY + "é").encode("cp1252"))
    LanguageModel(hidden_size=3).fit(tmp_path / "secret.txt", **SMALL, steps=1, progress=False,
                                     validation=tmp_path / "secret.txt").save(tmp_path / "n")
    assert b"secret" not in (tmp_path / "n").read_bytes()           # files are shared
    assert LanguageModel.load(tmp_path / "n").training["encodings"] == ["cp1252"]
    assert found["characters"] == 2160 and found["settings"]["lr"] == 0.02 and found["budget"]["steps"] == 20
