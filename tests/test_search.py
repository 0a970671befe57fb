"""The search for sizes: rounds that halve, equal budgets, failures, what an end leaves, the picture."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from test_cli import ENVIRONMENT, STORY, run      # noqa: F401

from lstmcore import LanguageModel
from lstmcore.commands import search

QUICK = ("--seq-length", 9, "--batch-size", 5)


@pytest.fixture
def story(run, tmp_path):                                       # noqa: F811
    (tmp_path / "a.txt").write_text(STORY)
    return tmp_path


def test_halves_are_left_after_each_round_and_all_have_equal_budgets(run, story, monkeypatch):       # noqa: F811
    calls = []

    def train(self, name, minutes, threads, cpus):
        calls.append((len(self.trials[name]["rounds"]), name, minutes, threads))
        loss = 3 - int(name[1:].split("-")[0]) / 100 - len(self.trials[name]["rounds"])
        self.trials[name]["rounds"].append({
            "minutes": minutes, "steps": 1, "epochs": 1, "validation": loss, "parameters": 7,
            "course": [[1, loss]]})
    monkeypatch.setattr(search.Search, "_train", train)
    monkeypatch.setattr(search, "_cpus", lambda: 4)
    code, out, err = run("search", "a.txt", "--hidden", "10,20,30", "--layers", "1,2", "--minutes", 12,
                         "--jobs", 2)
    assert code == 0
    rounds = [sorted(calls_of) for _, calls_of in itertools.groupby(sorted(calls), key=lambda call: call[0])]
    assert [len(some) for some in rounds] == [6, 3, 2, 1]
    assert {name for _, name, *_ in rounds[1]} >= {"h30-l1", "h30-l2"} and rounds[3][0][1].startswith("h30")
    # 12 minutes in 4 rounds: 3 at a time waves of 2
    assert [{minutes for _, _, minutes, _ in some} for some in rounds] == [{1.0}, {2.5}, {5.5}, {8.5}]
    assert [{threads for *_, threads in some} for some in rounds] == [{2}, {2}, {2}, {4}]
    lines = out.splitlines()
    assert lines[0].split() == ["bits/char", "parameters", "minutes", "steps", "epochs"] and len(lines) == 7
    assert lines[1].startswith("h30-l") and "--resume lstmcore-search/h30" in err.splitlines()[-1]


def test_a_search_trains_and_goes_on_where_it_was(run, story):                   # noqa: F811
    asked = ("search", "a.txt", "--hidden", "5,9", "--layers", "1", "--minutes", 0.02, "--lr", "0.01",
             "--out", "s", "--json", *QUICK)
    code, out, err = run(*asked)
    assert code == 0, err
    found = json.loads(out)
    assert found["finished"]
    assert {trial["name"] for trial in found["trials"]} == {"h5-l1-lr0.01", "h9-l1-lr0.01"}
    best = found["trials"][0]
    model = LanguageModel.load(best["run"])
    assert best["rounds"] == 2 and model.hidden_size == best["hidden_size"] and model.num_layers == 1
    assert best["parameters"] == sum(p.size for p in model.network.parameters().values())
    assert model.training["settings"]["lr"] == 0.01 and model.training["settings"]["seq_length"] == 9
    before = os.stat(best["run"]).st_mtime_ns
    assert json.loads(run(*asked)[1]) == found and os.stat(best["run"]).st_mtime_ns == before
    code, _, err = run(*asked, "--minutes", 3)
    assert code == 2 and "s holds a search with other minutes: 0.02; choose another --out" in err


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_an_interrupted_search_saves_what_runs(run, story):                      # noqa: F811
    asked = ["search", "a.txt", "--hidden", "5,6", "--layers", "1", "--minutes", "4", "--out", "s",
             "--jobs", "2", *map(str, QUICK)]
    process = subprocess.Popen([sys.executable, "-m", "lstmcore", *asked], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stderr.readline().startswith("round 1 of 2: 2 candidates")
    end = time.monotonic() + 60
    while not os.path.exists("s/h5-l1.safetensors"):
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130 and "the same command goes on, in s" in err
    assert "h5-l1  not trained yet" in out and LanguageModel.load("s/h5-l1.safetensors").outcome == "SIGINT"


def test_a_candidate_that_fails_is_left_out(run, story, monkeypatch):            # noqa: F811
    code, out, err = run("search", "a.txt", "--hidden", "5", "--layers", "1", "--minutes", 0.02,
                         "--lr", "1e300,0.01", "--optimizer", "sgd", "--out", "s", *QUICK)
    assert code == 0 and "h5-l1-lr1e+300: lstmcore: the loss is nan" in err
    assert out.splitlines()[1].startswith("h5-l1-lr0.01 ") and "the loss is" in out.splitlines()[2]


def test_the_picture_has_a_curve_for_each_candidate(run, story):                 # noqa: F811
    pytest.importorskip("matplotlib")
    code, _, err = run("search", "a.txt", "--hidden", "5,7", "--layers", "1,2", "--minutes", 0.04,
                       "--plot", "s.png", "--level", "word", *QUICK)
    assert code == 0 and (story / "s.png").read_bytes().startswith(b"\x89PNG"), err


@pytest.mark.parametrize("args, message", [
    ("none.txt", "none.txt: No such file"), ("-", "cannot be standard input"),
    ("a.txt --minutes 0", "--minutes must be above 0"),
    ("a.txt --hidden 5,x", "--hidden-size must be numbers"),
    ("a.txt --hidden 0", "hidden-size must be at least 1"), ("a.txt --cell lstm,cnn", "--cell must be"),
    ("a.txt --val 0", "--validation must be above 0"), ("a.txt --jobs 0", "--jobs must be at least 1"),
    ("a.txt --dropout 2", "--dropout must be in 0..1")])
def test_mistakes_are_one_line_before_anything_runs(run, story, args, message):  # noqa: F811
    code, out, err = run("search", *args.split())
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_a_folder_that_is_no_search_is_said(run, story):                         # noqa: F811
    os.mkdir("s")
    (story / "s" / "search.json").write_text("[]")
    code, _, err = run("search", "a.txt", "--out", "s")
    assert code == 2 and "is no search that can be read" in err
