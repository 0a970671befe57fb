"""The command: what it prints where, its exit codes, and one clear line for each mistake."""

import csv
import io
import json
import os
import signal
import subprocess
import sys

import pytest

from lstmcore import LanguageModel, cli
from lstmcore.formats import safetensors

STORY = "one two three four.\nfive six seven.\n" * 60
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
SMALL = "--hidden 11 --layers 1 --seq-length 9 --batch-size 5 --lr 0.02".split()


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """run("sample", "m", ...) in an empty directory -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*args, stdin=None):
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            code = cli.main(list(map(str, args)))
        except SystemExit as end:           # argparse's own way
            code = end.code
        out, err = capsys.readouterr()
        return code, out, err
    return call


@pytest.fixture
def trained(run, tmp_path):
    """A directory with `story.txt` and a model `m` of it."""
    (tmp_path / "story.txt").write_text(STORY)
    code, _, err = run("train", "story.txt", "--out", "m", "--checkpoint", "m", "--steps", 20, *SMALL)
    assert code == 0, err
    return tmp_path


def test_train_reports_saves_and_samples(run, tmp_path):
    (tmp_path / "a.txt").write_text(STORY)
    code, out, err = run("train", "a.txt", "--epochs", 2, "--dropout", 0.1, "--peepholes", *SMALL)
    assert code == 0 and len(out.rstrip("\n")) > 300
    assert err.count("validation") >= 3 and "lstmcore sample lstmcore-model.safetensors" in err
    model = LanguageModel.load(tmp_path / "lstmcore-model.safetensors")
    assert repr(model) == ("LanguageModel(hidden_size=11, num_layers=1, dropout=0.1, "
                           "peepholes=True)")


def test_train_says_that_it_replaces_a_model(run, trained):
    told = [run("train", "story.txt", "--out", out, "--steps", 1, *SMALL)[2].splitlines()[0]
            for out in ("new", "m")]
    assert not told[0].endswith("replaced") and told[1].endswith("story.txt; m will be replaced")
    assert "replaced" not in run("train", "story.txt", "--resume", "m", "--steps", 2)[2]


def test_train_without_file_reads_the_documentation(run):
    code, _, err = run("train", "--steps", 1, "--out", "m", "--no-sample", *SMALL)
    assert code == 0 and "Python's documentation" in err
    assert "\n" in LanguageModel.load("m").vocabulary.tokens


def test_train_json_is_one_object_per_line(run):
    code, out, err = run("train", "-", "--epochs", 2, "--json", "--level", "byte", "--out", "m",
                         *SMALL, stdin=STORY.encode())
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and err == "" and [line.get("epoch") for line in lines] == [1, 2, None]
    assert lines[-1]["outcome"] == "finished" and lines[-1]["model"] == "m"
    assert len(lines[-1]["sample"]) > 300


def test_train_writes_a_log_and_samples_on_the_way(run, tmp_path):
    (tmp_path / "a.txt").write_text(STORY)
    asked = ("train", "a.txt", "--evaluate-every", 5, "--sample-every", 10, "--log", "run.csv",
             "--checkpoint", "m", *SMALL)
    code, out, err = run(*asked, "--steps", 20)
    assert code == 0 and err.count("step 10 writes:") == err.count("step 20 writes:") == 1
    assert run(*asked, "--resume", "m", "--steps", 30, "--json")[0] == 0
    with open("run.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    history = LanguageModel.load("m").history
    assert [int(row["step"]) for row in rows] == [5, 10, 15, 20, 25, 30]
    assert [float(row["validation"]) for row in rows] == [record["validation"] for record in history]


def test_train_logs_for_tensorboard(run, trained, monkeypatch):
    asked = ("train", "story.txt", "--out", "n", "--steps", 2, "--no-sample", "--tensorboard", "run", *SMALL)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "tensorboard.summary", None)
        code, _, err = run(*asked)
        assert code == 2 and "pip install 'lstmcore[tensorboard]'" in err
    assert run(*asked[:-len(SMALL) - 1], "story.txt", *SMALL)[0] == 2        # a file is there
    pytest.importorskip("tensorboard")
    assert run(*asked)[0] == 0 and [name[:19] for name in os.listdir("run")] == ["events.out.tfevents"]


def test_validation_may_be_a_file_and_tokens_those_of_the_text(run, trained):
    (trained / "valid.txt").write_text("two three <unk>\nsix one\n" * 9)
    code, _, err = run("train", "story.txt", "--val", "valid.txt", "--tokens", "whitespace", "--out", "n",
                       "--steps", 3, "--no-sample", *SMALL)
    assert code == 0 and "63 held out" in err, err
    assert "= perplexity " in err.splitlines()[-2] and "per token" in err.splitlines()[-2]
    model = LanguageModel.load("n")
    assert model.vocabulary.tokens[:2] == ["<unk>", "<eos>"] and model.min_count == 1
    out, err = run("eval", "n", "valid.txt")[1:]
    assert "nats per token" in out and "9 of them are not in the model's vocabulary but <unk>" in err


def test_guesses_and_what_is_new_are_said_in_a_line(run, trained):
    (trained / "odd.txt").write_bytes((STORY + "naïve").encode("cp1252"))
    for args in ("eval", "m", "odd.txt"), ("inspect", "m", "odd.txt"):
        assert "odd.txt: encoding cp1252 is a guess; --encoding names another" in run(*args)[2]
    code, out, err = run("sample", "m", "--prime", "oné Ω", "--length", 5)
    assert code == 0 and out.startswith("oné Ω") and err.startswith("warning: ") and err.count("\n") == 1
    assert "'é' read as 'e', 'Ω' read as unknown" in err
    code, out, err = run("sample", "m", "--prime", "-", "--length", 5, stdin="oné".encode("cp1252"))
    assert code == 0 and out.startswith("oné") and "standard input: encoding cp1252 is a guess" in err


def test_an_epoch_longer_than_the_budget_tells_of_itself(run, tmp_path):
    (tmp_path / "a.txt").write_text(STORY)
    asked = ("train", "a.txt", "--out", "m", "--no-sample", "--steps", 20, *SMALL)
    lines = [line for line in run(*asked)[2].splitlines() if line.startswith("epoch ")]
    assert [int(line.split()[3]) for line in lines] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert all("loss" in line and "tokens/s" in line for line in lines) and "validation" in lines[-1]
    lines = [line for line in run(*asked, "--evaluate-every", 2)[2].splitlines() if line[:6] == "epoch "]
    assert all("validation" in line for line in lines)
    assert run(*asked, "--json")[2] == ""


def test_a_loss_that_runs_away_is_said_once(run, tmp_path):
    (tmp_path / "a.txt").write_text(STORY)
    asked = ("train", "a.txt", "--out", "m", "--steps", 30, "--evaluate-every", 3, *SMALL)
    code, _, err = run(*asked, "--optimizer", "sgd", "--clip", 0, "--lr", 60)
    assert code == 0 and err.count("warning: the loss runs away: ") == 1
    assert "may help" in err and "warning" not in run(*asked)[2]


@pytest.mark.parametrize("long, short, value", [("hidden-size", "hidden", 7), ("num-layers", "layers", 1),
                                                ("embed-size", "embed", 5), ("vocab-size", "vocab", 9)])
def test_options_have_python_s_names_and_short_ones(run, tmp_path, long, short, value):
    (tmp_path / "a.txt").write_text(STORY)
    for option in long, short:
        code, _, err = run("train", "a.txt", "--out", "m", "--steps", 1, "--" + option, value)
        assert code == 0, err
        assert LanguageModel.load("m").config[long.replace("-", "_")] == value


def test_train_resumes_to_the_same_model(run, trained):
    assert run("train", "story.txt", "--out", "whole", "--steps", 45, *SMALL)[0] == 0
    code, _, err = run("train", "story.txt", "--resume", "m", "--steps", 45)
    assert code == 0, err
    one, two = (LanguageModel.load(name).network.state_dict() for name in ("whole", "m"))
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)
    code, _, err = run("train", "story.txt", "--resume", "m", "--steps", 50, "--hidden", 12)
    assert code == 2 and "cannot change --hidden-size from 11 to 12" in err


def test_a_finished_model_is_slim_and_an_interrupted_one_keeps_its_run(run, trained):
    assert run("train", "story.txt", "--out", "n", "--steps", 20, "--no-sample", *SMALL)[0] == 0
    arrays, metadata = safetensors.read("n")
    assert arrays.keys() == LanguageModel.load("n").network.parameters().keys()
    assert "lstmcore.training" not in metadata and os.path.getsize("n") < os.path.getsize("m") / 2
    assert run("sample", "n", "--seed", 1) == run("sample", "m", "--seed", 1)
    code, _, err = run("train", "story.txt", "--resume", "n", "--steps", 40)
    assert code == 2 and "no training run to resume: a finished one is kept by" in err
    # a run of its own beside the model; resumed, it goes on there
    assert run("train", "story.txt", "--out", "a", "--checkpoint", "r", "--steps", 20, *SMALL)[0] == 0
    assert safetensors.read("a")[0].keys() == arrays.keys()
    before = (trained / "a").read_bytes()
    assert run("train", "story.txt", "--resume", "r", "--steps", 45, "--no-sample")[0] == 0
    assert (trained / "a").read_bytes() == before and LanguageModel.load("r").history[-1]["step"] == 45
    asked = ("--resume", "r", "--checkpoint", "s", "--out", "b", "--steps", 50)
    assert run("train", "story.txt", *asked)[0] == 0
    steps = {name: LanguageModel.load(name).training["budget"]["steps"] for name in "arsb"}
    assert steps == {"a": 20, "r": 45, "s": 50, "b": 50}
    assert ["lstmcore.training" in safetensors.read(name)[1] for name in "arsb"] == [False, True, True, False]


def test_train_plots(run, trained):
    pytest.importorskip("matplotlib")
    assert run("train", "story.txt", "--out", "n", "--steps", 20, "--plot", "curve.png",
               *SMALL)[0] == 0
    assert (trained / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_interrupted_training_is_saved_and_exits_130(trained):
    process = subprocess.Popen(
        [sys.executable, "-m", "lstmcore", "train", "story.txt", "--out", "k", "--json",
         "--epochs", "1000000", *SMALL], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=trained, env=ENVIRONMENT)
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == ""
    assert json.loads(out.splitlines()[-1])["outcome"] == "SIGINT"
    assert LanguageModel.load(trained / "k").outcome == "SIGINT"
    assert "lstmcore.training" in safetensors.read(trained / "k")[1]


def test_sample_writes_prime_and_text(run, trained):
    asked = ("sample", "m", "--prime", "one ", "--length", 30, "--seed", 3, "--top-k", 5,
             "--top-p", 0.9, "--temperature", 0.8)
    code, out, err = run(*asked)
    assert code == 0 and err == "" and out.startswith("one ") and len(out) == 35
    assert run(*asked)[1] == out
    assert json.loads(run(*asked, "--json")[1]) == {"prime": "one ", "text": out[4:-1]}
    assert run("sample", "m", "--prime", "-", "--beam", 4, "--length", 6, stdin=b"two")[0] == 0
    assert run("sample", "m", "--stop", "e", "--length", 999, "--seed", 1)[1].endswith("e\n")


def test_eval_agrees_with_the_model(run, trained):
    code, out, _ = run("eval", "m", "story.txt", "--json")
    want = LanguageModel.load("m").evaluate(STORY)
    assert code == 0 and json.loads(out) == pytest.approx(want._asdict(), rel=1e-12)
    out = run("eval", "m", "-", stdin=STORY.encode())[1]
    assert f"{want.perplexity:.4f} perplexity" in out
    (trained / "odd.txt").write_text("one Ω two")
    assert "1 of them are not in the model's vocabulary" in run("eval", "m", "odd.txt")[2]


def test_inspect_writes_a_page(run, trained):
    assert run("inspect", "m", "story.txt", "--out", "p.html", "--limit", 50)[0] == 0
    assert "<html" in (trained / "p.html").read_text()


def test_gradflow_prints_and_draws(run, tmp_path):
    code, out, _ = run("gradflow", "--hidden", 8, "--steps", 20)
    assert code == 0 and "RNN" in out and "k = 20" in out
    flows = json.loads(run("gradflow", "--hidden", 8, "--steps", 20, "--json")[1])
    assert len(flows["RNN"]) == 21 and flows["RNN"][20] < flows["LSTM, forget bias 3"][20]
    pytest.importorskip("matplotlib")
    assert run("gradflow", "--hidden", 8, "--steps", 9, "--out", "f.png")[0] == 0
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_convert_and_info(run, tmp_path):
    from lstmcore import LSTM, load
    layer = LSTM(3, 5, seed=1)
    layer.save(tmp_path / "a.safetensors")
    code, _, err = run("convert", "a.safetensors", "b.safetensors")
    assert code == 0 and "saved LSTM(3, 5) as b.safetensors" in err
    assert (load(tmp_path / "b.safetensors").parameters()["weight_hh_l0"]
            == layer.parameters()["weight_hh_l0"]).all()
    assert json.loads(run("info", "--json")[1])["version"] in run("info")[1]


def test_convert_is_told_what_weights_do_not_say(run, tmp_path):
    import numpy as np

    from lstmcore.formats import safetensors
    safetensors.write(tmp_path / "torch.safetensors", {
        "weight_ih_l0": np.ones((4, 3), "f4"), "weight_hh_l0": np.ones((4, 4), "f4")})
    assert run("convert", "torch.safetensors", "a.safetensors")[0] == 2
    code, _, err = run("convert", "torch.safetensors", "a.safetensors", "--batch-first",
                       "--nonlinearity", "relu")
    assert code == 0
    assert "RNN(3, 4, nonlinearity='relu', bias=False, batch_first=True)" in err


def test_convert_says_what_it_leaves_out(run, trained):
    pytest.importorskip("h5py")
    code, _, err = run("convert", "m", "m.weights.h5")
    lines = err.splitlines()
    assert code == 0 and len(lines) == 2
    assert "only the recurrent layers were converted; left out: 'embedding', 'head'" in lines[0]
    assert lines[1].startswith("saved LSTM(") and lines[1].endswith(" as m.weights.h5")


@pytest.mark.parametrize("args", ["train story.txt --plot x.png", "gradflow --out x.png"])
def test_a_picture_without_matplotlib_says_what_to_install(run, trained, args, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = run(*args.split())
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "drawing x.png needs matplotlib: pip install 'lstmcore[plot]'" in err


@pytest.mark.parametrize("args, message", [
    ("train none.txt", "none.txt: No such file or directory"),
    ("train empty.txt", "empty.txt is empty"),
    ("train short.txt", "needs at least 2 tokens"),
    ("train .", "Is a directory"),
    ("train bad.gz", "bad.gz is a damaged gzip file"),
    ("train story.txt --encoding ascii --out none/m", "none/m: No such file or directory"),
    ("train story.txt --out .", "is a directory"),
    ("train story.txt --encoding utf-99", "unknown encoding 'utf-99'"),
    ("train story.txt --hidden 0", "lstmcore: --hidden-size must be at least 1, got 0"),
    ("train story.txt --batch-size -3", "--batch-size must be at least 1, got -3"),
    ("train story.txt --lr nan", "--lr must be at least 0 and finite, got nan"),
    ("train story.txt --val 1.5", "--validation must be at least 0 and below 1, got 1.5"),
    ("train story.txt --dropout 2", "--dropout must be in 0..1, got 2.0"),
    ("train story.txt --minutes -1", "--minutes must be at least 0 and finite"),
    ("train story.txt --threads 0", "--threads must be at least 1, got 0"),
    ("train story.txt --resume none", "none: No such file or directory"),
    ("train story.txt --resume story.txt", "story.txt is no model that can be read"),
    ("train story.txt --level letters", "invalid choice: 'letters'"),
    ("train story.txt --resume m --steps 30 --batch-size 6", "cannot change --batch-size from 5"),
    ("sample none", "none: No such file or directory"),
    ("sample story.txt", "story.txt is no model that can be read"),
    ("sample m --temperature -1", "--temperature must be"),
    ("sample m --top-p 2", "--top-p must be"), ("sample m --length -4", "--length must be"),
    ("sample m --seed -1", "--seed must be at least 0"), ("sample m --beam 0", "--beam must be"),
    ("train story.txt --plot x.xyz", "x.xyz must end in one of"),
    ("train story.txt --plot none/x.png", "none/x.png: No such file"),
    ("train story.txt --seed -1", "--seed must be at least 0, got -1"),
    ("train story.txt --vocab 1", "--vocab-size must be at least 2"),
    ("train story.txt --epochs few", "argument --epochs: invalid float value: 'few'"),
    ("train tiny.txt", "needs at least 2 tokens, got 1: validation is 0.05 of 20 tokens"),
    ("convert m b.pt", "must end in .safetensors, .onnx, .weights.h5"),
    ("gradflow --out x.y", "x.y must end"),
    ("eval m none.txt", "none.txt: No such file or directory"),
    ("eval m empty.txt", "empty.txt is empty"),
    ("inspect m none.txt", "none.txt: No such file"), ("inspect m story.txt --limit 0", "--limit"),
    ("gradflow --steps 0", "--steps must be at least 1"),
    ("gradflow --out none/x.png", "none/x.png: No such file"),
    ("convert none b.onnx", "none: No such file"), ("convert story.txt b.onnx", "story.txt"),
    ("", "COMMAND"), ("fly", "invalid choice: 'fly'"),
])
def test_each_mistake_is_one_line_and_exit_2(run, trained, args, message):
    if "--plot" in args or "gradflow --out" in args:
        pytest.importorskip("matplotlib")
    for name, data in ("empty.txt", b""), ("short.txt", b"x"), ("tiny.txt", b"x" * 20), \
            ("bad.gz", b"\x1f\x8b\x08junk"):
        (trained / name).write_bytes(data)
    code, out, err = run(*args.split())
    lines = [line for line in err.splitlines() if not line.startswith("training Lang")]
    assert code == 2 and out == "" and message in err, err
    assert len(lines) == 1 and lines[0].startswith("lstmcore")
    assert sorted(os.listdir(trained)) == ["bad.gz", "empty.txt", "m", "short.txt", "story.txt",
                                           "tiny.txt"]


def test_resuming_a_run_at_its_end_says_so(run, trained):
    before = run("sample", "m", "--seed", 1)
    code, _, err = run("train", "story.txt", "--resume", "m", "--no-sample")
    assert code == 0 and "nothing to do: the run was at its end, after 20 steps" in err
    assert run("sample", "m", "--seed", 1) == before
    code, _, err = run("train", "story.txt", "--resume", "m", "--steps", 25, "--no-sample")
    assert code == 0 and "nothing to do" not in err


def test_diverging_training_is_a_mistake_that_names_the_step(run, trained):
    code, out, err = run("train", "story.txt", "--out", "d", "--steps", 99, *SMALL, "--lr", 1e300)
    assert code == 2 and out == "" and len(err.splitlines()) == 4 and err.startswith("training")
    assert "lstmcore: the loss is nan at step 2 (epoch 1, learning rate 1e+300)" in err
    assert err.endswith("nothing was saved yet\n") and not (trained / "d").exists()


def test_help_has_examples(run):
    assert "lstmcore train book.txt" in run("--help")[1]
    for command in "train sample eval inspect gradflow convert info".split():
        code, out, _ = run(command, "--help")
        assert code == 0 and f"example:\n  lstmcore {command}" in out


def test_a_closed_pipe_is_no_mistake(trained):
    code = ("import sys, lstmcore.cli; "
            "sys.exit(lstmcore.cli.main(['sample', 'm', '--length', '3000', '--seed', '1']))")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, cwd=trained, env=ENVIRONMENT)
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 0
    process.stderr.close()
