"""The commands for a model that is there: several samples, talk, facts, cards, comparisons."""

import io
import json
import os
import subprocess
import sys

import pytest
from test_cli import ENVIRONMENT, SMALL, STORY, run, trained      # noqa: F401

from lstmcore import LSTM, LanguageModel

FIXTURES = run, trained


# ---- sample --count ------------------------------------------------------------------------------------

def test_several_samples_are_those_of_the_next_seeds(run, trained):            # noqa: F811
    asked = ("sample", "m", "--length", 30, "--json", "--prime", "one")
    code, out, _ = run(*asked, "--seed", 5, "--count", 3)
    texts = [json.loads(line)["text"] for line in out.splitlines()]
    assert code == 0 and len(set(texts)) == 3
    assert texts == [json.loads(run(*asked, "--seed", seed)[1])["text"] for seed in (5, 6, 7)]


def test_samples_of_a_line_are_a_list_and_longer_ones_stand_apart(run, trained, monkeypatch):     # noqa: F811
    lines = iter(["ab\n", "c\n", "d"])
    monkeypatch.setattr(LanguageModel, "generate", lambda self, *args, **options: iter([next(lines)]))
    assert run("sample", "m", "--count", 3)[1] == "ab\nc\nd\n"
    lines = iter(["a\nb", "c\nd\n"])
    assert run("sample", "m", "--count", 2)[1] == "a\nb\n\nc\nd\n"


def test_stop_knows_a_line_end(run, trained):                                  # noqa: F811
    asked = ("sample", "m", "--seed", 1, "--length", 300)
    whole = run(*asked)[1]
    assert run(*asked, "--stop", r"\n")[1] == whole[:whole.index("\n") + 1] + "\n"
    assert run(*asked, "--stop", r"\\")[1] == whole


# ---- chat ----------------------------------------------------------------------------------------------

def test_chat_answers_line_by_line_with_what_was_said(run, trained):           # noqa: F811
    code, out, err = run("chat", "m", "--seed", 3, "--length", 30, stdin=b"one two\nfive\n")
    lines = out.splitlines()
    assert code == 0 and err == "" and len(lines) == 2
    from lstmcore.models import generation
    model = LanguageModel.load("m")
    writer, draw = (generation.Writer(model.network, model.vocabulary),
                    generation.drawing(temperature=0.7, seed=3))
    for heard, answer in zip(("one two\n", "five\n"), lines):
        writer.read(model.vocabulary.encode(heard))
        said = "".join(writer.write(30, draw, ("\n",)))
        assert said.removesuffix("\n") == answer
        if not said.endswith("\n"):
            writer.read(model.vocabulary.encode("\n"))
    alone = run("chat", "m", "--seed", 3, "--length", 30, "--no-history", "--temperature", 0,
                stdin=b"one two\nfive\none two\n")[1].splitlines()
    assert alone[0] == alone[2] != alone[1]


def test_a_writer_that_reads_on_has_read_the_whole():
    from lstmcore.models import generation
    model = LanguageModel(hidden_size=9, seed=1).fit(STORY, steps=5, seq_length=9, batch_size=5,
                                                     progress=False)
    draw = generation.drawing(temperature=0)
    writer = generation.Writer(model.network, model.vocabulary)
    writer.read(model.vocabulary.encode("one"))
    first = "".join(writer.write(7, draw, ()))
    writer.read(model.vocabulary.encode(" two"))
    assert "".join(writer.write(9, draw, ())) == model.sample("one" + first + " two", 9, temperature=0)


def test_orders_of_a_chat(run, trained):                                       # noqa: F811
    said = b"one\n/history\n/reset\n/history\n/temperature 0\n/top-k 3\n/top-k none\n/length 2\ntwo\n" \
           b"/fly\n/temperature hot\n/temperature -1\n//x\n/quit\nnot read\n"
    code, out, err = run("chat", "m", "--length", 9, "--seed", 1, "--prime", "five.\n", stdin=said)
    lines = out.split("\n")
    assert code == 0 and lines[1:3] == ["five.", "one"] and lines[3] == lines[0]
    assert lines[4] == "five." and len(lines[5]) <= 2 and len(lines[6]) <= 2 and lines[7:] == [""]
    wrong = [line for line in err.splitlines() if not line.startswith("warning")]
    assert wrong[0].startswith("no order '/fly'") and len(wrong) == 3
    assert "temperature must be at least 0 and finite, got -1.0" in wrong[2]


@pytest.mark.parametrize("args, message", [
    (("chat", "none"), "none: No such file"), (("chat", "m", "--temperature", "-1"), "--temperature must be"),
    (("chat", "m", "--length", "-1"), "--length must be"), (("chat", "m", "--top-k", "0"), "--top-k must be"),
    (("sample", "m", "--count", "0"), "--count must be at least 1"),
    (("sample", "m", "--count", "2", "--beam", "3"), "--count must be 1 with --beam"),
    (("info", "none"), "none: No such file"), (("info", "story.txt"), "story.txt is no model"),
    (("info", "--card"), "--card needs a model"), (("info", "m", "--card", "--json"), "not allowed with"),
    (("compare", "m", "story.txt"), "compare needs two models"),
    (("compare", "m", "m", "none"), "none: No such file"),
    (("compare", "m", "none", "story.txt"), "none: No such file")])
def test_mistakes_are_one_line(run, trained, args, message):                   # noqa: F811
    code, out, err = run(*args, stdin=b"one\n")
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_a_closed_standard_input_is_said(run, trained, monkeypatch):           # noqa: F811
    monkeypatch.setattr(sys, "stdin", None)
    assert run("chat", "m")[2] == "lstmcore: standard input is closed\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_chat_in_a_terminal_has_a_prompt_and_ends_with_ctrl_d(trained):        # noqa: F811
    import pty
    parent, child = pty.openpty()
    asked = [sys.executable, "-m", "lstmcore", "chat", "m", "--length", "5", "--seed", "1"]
    process = subprocess.Popen(asked, stdin=child, stdout=child, stderr=child, cwd=trained, close_fds=True,
                               env={**ENVIRONMENT, "TERM": "dumb"})
    os.close(child)

    def read_to(end):
        seen = b""
        while not seen.rstrip().endswith(end):
            seen += os.read(parent, 1024)
        return seen.decode()
    assert "/help says what can be ordered" in read_to(b">")
    os.write(parent, b"one two\n")
    answer = read_to(b">")
    assert "one two" in answer and len(answer.splitlines()) >= 3
    os.write(parent, b"\x04")
    assert process.wait(30) == 0
    os.close(parent)


# ---- info ----------------------------------------------------------------------------------------------

def test_info_tells_of_a_model(run, trained):                                  # noqa: F811
    found = json.loads(run("info", "m", "--json")[1])
    model = LanguageModel.load("m")
    assert found["hidden_size"] == 11 and found["steps"] == 20 and found["holds_a_run_to_resume"]
    assert found["parameters"] == sum(p.size for p in model.network.parameters().values())
    assert found["tokens"] == model.vocabulary.tokens and found["vocabulary"] == len(model.vocabulary)
    assert found["best_validation"] == min(r["validation"] for r in model.history)
    assert found["settings"]["seq_length"] == 9 and found["budget"] == {"steps": 20}
    assert found["text_characters"] == len(STORY)
    out = run("info", "m")[1]
    assert "hidden size" in out and r"\n" in out and "yes" in out
    assert run("convert", "m", "q.safetensors", "--precision", "int8")[0] == 0
    assert json.loads(run("info", "q.safetensors", "--json")[1])["frozen"] == "int8"


def test_info_tells_of_layers(run, tmp_path):                                  # noqa: F811
    LSTM(3, 5, seed=1).save("a.safetensors")
    assert json.loads(run("info", "a.safetensors", "--json")[1])["holds"] == "LSTM(3, 5)"
    code, _, err = run("info", "a.safetensors", "--card")
    assert code == 2 and "no language model to write a card of" in err


@pytest.mark.parametrize("level", ["char", "byte", "word", "whitespace"])
def test_a_card_says_what_the_model_is(run, tmp_path, level):                  # noqa: F811
    (tmp_path / "a.txt").write_text(STORY)
    assert run("train", "a.txt", "--level", level, "--steps", 3, "--out", "m", *SMALL)[0] == 0
    code, card, err = run("info", "m", "--card")
    assert code == 0 and err == "" and card.startswith("---\nlibrary_name: lstmcore\n")
    model = LanguageModel.load("m")
    for said in (f"| Vocabulary | {len(model.vocabulary)} ", "| Layers x units | 1 x 11 |",
                 "2,160 characters", "## What it writes", "lstmcore sample m",
                 f"{model.history[-1]['validation']:.4f} nats"):
        assert said in card
    assert all(line.count("|") - line.count("\\|") == 3 for line in card.splitlines() if line[:2] == "| "
               and line != "| | |")


def test_a_file_of_before_has_facts_and_a_card(run, trained):                  # noqa: F811
    from lstmcore.formats import safetensors
    arrays, metadata = safetensors.read("m")
    saved = json.loads(metadata["lstmcore.language_model"])
    del saved["training"]
    safetensors.write("old", arrays, {"lstmcore.language_model": json.dumps(saved)})
    assert run("info", "old")[0] == 0 and "Best validation loss" in run("info", "old", "--card")[1]


# ---- compare -------------------------------------------------------------------------------------------

def test_compare_ranks_models_of_any_level(run, trained):                      # noqa: F811
    asked = ("train", "story.txt", "--level", "word", "--steps", 90, "--out", "w", "--no-sample", *SMALL)
    assert run(*asked)[0] == 0
    found = json.loads(run("compare", "m", "w", "story.txt", "--json")[1])
    assert [row["model"] for row in found["models"]] == ["w", "m"]
    for row in found["models"]:
        want = LanguageModel.load(row["model"]).evaluate(STORY)
        assert row["bits_per_char"] == want.bits_per_char and row["perplexity"] == want.perplexity
    lead, = found["leads"]
    assert lead["bits"] == found["models"][1]["bits_per_char"] - found["models"][0]["bits_per_char"]
    assert 0 < lead["error"] < lead["bits"]
    out = run("compare", "m", "w", "story.txt")[1]
    assert out.splitlines()[-1].startswith("w is better than m by ") and "±" in out
    same = run("compare", "m", "m", "story.txt")[1].splitlines()[-1]
    assert same.endswith("by 0.0000 ± 0.0000 bits per character: no more than chance may give")


def test_compare_of_strange_texts_is_not_said_to_mean_much(run, trained):      # noqa: F811
    code, out, err = run("compare", "m", "m", "-", stdin="ωω one ψψ\n".encode() * 40)
    assert code == 0 and "cannot be compared" in out and "not in its vocabulary" in err
    code, out, err = run("compare", "m", "m", "-", stdin=b"one two")
    assert code == 0 and "±" not in out


def test_what_is_piped_is_read_as_text(run, trained, monkeypatch):             # noqa: F811
    """A text of the name of a file is a text."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"story.txt")))
    assert json.loads(run("compare", "m", "m", "-", "--json")[1])["models"][0]["tokens"] == 8
