"""The comparison's own logic: data, errors, the record, and what the tables say of it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import accuracy, cases, compare, distributed, pages, record, report, serving, story
from bench.record import Contest, Library, Record, Timing, Versus

TINY, SMALL = (replace(cases.CASES[name], weights="trained") for name in ("tiny", "small"))
LIBRARIES = {"lstmcore": Library("1", "float32", ("lstmcore",)),
             "lstmcore int8": Library("1", "int8", ("lstmcore",)),
             "a int8": Library("2", "int8", ("a",)), "b int8": Library("3", "int8", ("b",)),
             "a": Library("2", "float32", ("a",))}


def timing(seconds):
    return Timing(seconds, 2 * seconds, 0.012, 0.0034)


def made(*results, section="infer-int8"):
    lines = [(Contest(section, case, "infer", tuple(result)), result) for case, result in results]
    plain = cases.RAGGED[0]
    return Record({"cpu": "a processor", "flags": ["avx2"], "cores": 2, "threads": 2, "load": 0.1,
                   "python": "3"}, "python -m bench.compare", "2026-01-02", LIBRARIES,
                  {"float32": 100.0, "int8": 200.0}, {"l3": 50.0}, lines,
                  [(Versus("half", plain, "train", 1, plain, "train", 2), 1.5)], {})


TWO = made((TINY, {"lstmcore": timing(0.008), "lstmcore int8": timing(0.002),
                   "a int8": timing(0.003), "b int8": "no such layer", "a": timing(0.001)}),
           (SMALL, {"lstmcore": timing(0.003), "lstmcore int8": timing(0.003),
                    "a int8": timing(0.009), "b int8": timing(0.018)}))


def test_record_survives_json():
    assert record.from_json(json.loads(json.dumps(record.to_json(TWO)))) == TWO


def test_only_others_of_the_format_are_rivals():
    (contest, tiny), (_, small) = TWO.results
    assert report.peers_times(contest, tiny, LIBRARIES) == {"a int8": 0.003}
    assert report.advantage(contest, tiny, LIBRARIES) == pytest.approx(1.5)
    assert report.advantage(contest, small, LIBRARIES) == pytest.approx(3)
    assert report.advantage(contest, tiny | {"lstmcore int8": "absent"}, LIBRARIES) is None


def test_page_has_mean_worst_errors_reasons_and_gain():
    page = report.markdown(TWO)
    assert "fastest other in int8: 2.12×, least 1.50× (tiny)." in page  # sqrt(1.5 * 3)
    assert "3.00 (1.2e-2, 3.4e-3)" in page
    assert "- b int8, tiny: no such layer" in page
    assert "| tiny | – | – | 4.00× |" in page and "| 2.00×, least 1.00× (small) |" in page
    assert "of FMA peak" not in page


def test_the_exchange_of_many_processes_costs_what_its_terms_say():
    link = dict(latency=1e-5, bandwidth=1e9, sums=1e10)
    assert distributed.exchange([1000, 2000], 1, **link) == 0
    # two stages there and back: 4 messages of latency; 12,000 bytes, half of them twice; half added up
    want = 4 * 1e-5 + 2 * 6000 / 1e9 + 6000 / 1e10
    assert distributed.exchange([1000, 2000], 2, **link) == pytest.approx(want)
    # what was ready long before the end has travelled there; back it travels afterwards
    hidden = distributed.exchange([1000, 2000], 2, **link, ready=[0, 0], end=1.0)
    assert hidden == pytest.approx(2 * 1e-5 + 6000 / 1e9 + 6000 / 1e10)
    assert distributed.exchange([1000, 2000], 2, **link, ready=[1, 1], end=1.0) == pytest.approx(want)
    assert distributed.exchange([10**6], 2, **link, number=2) < distributed.exchange([10**6], 2, **link)


def test_losses_name_the_faster():
    slow = made((TINY, {"lstmcore int8": timing(0.004), "a int8": timing(0.003)}))
    assert "a int8 takes 0.750 of lstmcore int8's time" in report.markdown(slow)
    none = made((TINY, {"lstmcore int8": "too old", "a int8": timing(0.003)}))
    assert "lstmcore int8 has no figure (too old)" in report.markdown(none)


def test_errors_are_of_the_worst_array():
    right = {"y": np.array([3.0, 4.0]), "h": np.array([10.0, 0.0])}
    found = cases.errors({"y": np.array([3.0, 4.5]), "h": np.array([10.0, 0.2])}, right)
    assert found == pytest.approx((0.125, 0.1))
    with pytest.raises(ValueError, match="NaN"):
        cases.errors(right | {"h": np.array([np.nan, 0.0])}, right)
    with pytest.raises(ValueError, match="missing results: \\['y'\\]"):
        cases.errors({"h": right["h"]}, right)


@pytest.mark.parametrize("precision, fine, wrong", [
    ("float32", (2e-4, 1.0), (4e-4, 0.0)), ("bfloat16", (1.0, 0.05), (0.0, 0.2)),
    ("int8", (1.0, 0.2), (0.0, 0.5))])
def test_wrong_results_are_refused(precision, fine, wrong):
    assert cases.refusal(cases.Errors(*fine), precision, "float32") is None
    assert cases.refusal(cases.Errors(*wrong), precision, "float32").startswith("wrong: ")


@pytest.mark.parametrize("case", [TINY, SMALL], ids=lambda case: case.name)
def test_trained_weights_are_hard_but_not_chaotic(case):
    data = cases.make_data(case, "infer")
    W = data["weight_hh_l0"].astype(float)
    assert (W**4).mean() > 4.5 * (W**2).mean()**2  # normal numbers have 3
    rows = np.abs(W).max(axis=1)
    assert rows.max() > 4 * rows.min()
    y = cases.expected(case, "infer", data)["y"]
    assert 0.9 < np.abs(y).max() < 1
    off = {name: a * (1 + 1e-6) if name == "weight_hh_l0" else a for name, a in
           ((name, a.astype(float)) for name, a in data.items())}
    assert np.abs(cases.expected(case, "infer", off)["y"] - y).max() < 1e-5
    again = cases.make_data(replace(case, weights="uniform"), "infer")
    assert np.abs(again["weight_hh_l0"]).max() <= case.H**-0.5


def test_every_contest_has_its_libraries_and_heading():
    for contest in compare.contests():
        assert contest.section in report.HEADINGS
        assert set(contest.libraries) <= set(compare.PEERS)
        assert contest.libraries[0] == report.ours(contest)
        named = report.FORMATS.get(contest.section)
        assert not named or any(compare.PEERS[name].precision == named
                                for name in contest.libraries[1:])
        assert contest.case.B == 1 or not set(compare.ONE) & {
            name.split()[0] for name in contest.libraries}


def test_limit_counts_products_and_reads():
    small, stream = cases.CASES["small"], cases.STREAM
    assert report.limit(small, "infer", TWO) == small.flops("infer") / 100e9
    read = 4 * 4 * stream.H * (stream.I + stream.H) / 50e9      # bytes of both weights, once
    assert report.limit(stream, "stream", TWO) == pytest.approx(read)
    one = cases.CASES["seq-b1"]
    hidden = 4 * one.H * one.H
    for job, passes in (("infer", 1), ("train", 2)):
        want = passes * one.T * 4 * hidden / 50e9
        want += (one.flops(job) - 2 * passes * one.T * hidden) / 100e9
        assert report.limit(one, job, TWO) == pytest.approx(want)
    assert report.limit(one, "infer", TWO._replace(reads={})) is None


def test_short_table_names_what_is_slower():
    slow = made((TINY, {"lstmcore": timing(0.004), "a": timing(0.003)}),
                (SMALL, {"lstmcore": timing(0.003), "a": timing(0.006)}), section="infer")
    page = report.short(slow)
    assert "| tiny (20, 8, 16, 32, 1) | – | – | – | 4.00 | 3.00 | 0.750× |" in page
    assert "| Inference, float32 | 2 | 1.22× | tiny 0.750× |" in page   # sqrt(0.75 * 2)


@pytest.mark.skipif(not pages.pages(), reason="needs README and docs beside bench")
def test_pages_say_what_the_records_say(monkeypatch, tmp_path, capsys):
    assert {path.name for path in pages.pages()} >= {"README.md", "benchmarks.md"}
    assert pages.main(["--check"]) == 0
    edited = tmp_path / "README.md"
    edited.write_text((pages.ROOT / "README.md").read_text().replace("1.08×", "9.08×"))
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    assert pages.main(["--check"]) == 1 and "9.08×" in edited.read_text()
    assert pages.main([]) == 0 and pages.main(["--check"]) == 0
    with pytest.raises(KeyError, match="nothing"):
        pages.filled("<!-- bench: nothing -->\n<!-- end -->")


def test_serving_record_has_every_server_right(tmp_path):
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    if not serving.PAGE.exists():
        pytest.skip("needs docs beside bench")
    serving.main(["--requests", "20", "--seconds", "1", "--rounds", "1", "--clients", "1", "3",
                  "--output", str(tmp_path)])
    found = json.loads((tmp_path / "serving.json").read_text())
    assert {"lstmcore", "lstmcore int8"} <= set(found["rows"])
    assert set(found["rows"]) | set(found["reasons"]) == set(serving.NAMES)
    for rows in found["rows"].values():
        assert [(row["clients"], row["requests"]) for row in rows] == [(1, 20), (3, 20)]
        assert all(0 < row["p50"] <= row["p99"] < 1 for row in rows)
    assert "| 3 | lstmcore int8 |" in serving.table(found)


def test_accuracy_of_formats_is_measured(monkeypatch, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 400)
    out = tmp_path / "accuracy.json"
    monkeypatch.setattr("sys.argv", ["accuracy", "--quick", "--seeds", "1", "--only", "text", "words", "char",
                                     "--text", str(text), "cats", "--out", str(out)])
    accuracy.main()
    found = json.loads(out.read_text())
    assert [len(task["figures"]) for task in found["tasks"]] == [len(accuracy.FORMATS)] * 3
    assert "cats" in accuracy.formats_table(found) and str(tmp_path) not in found["command"]


@pytest.mark.parametrize("name", sorted(path.stem for path in Path(__file__).parent.glob("*.py")
                                        if "def main(" in path.read_text("utf-8")))
def test_every_program_starts(name):
    done = subprocess.run([sys.executable, "-m", f"bench.{name}", "--help"], cwd=Path(__file__).parents[1],
                          capture_output=True, text=True)
    assert done.returncode == 0 or "No module named 'sklearn'" in done.stderr, done.stderr


@pytest.mark.skipif(not story.PAGE.exists(), reason="needs docs beside bench")
def test_the_notebook_is_the_page_and_has_run():
    notebook = json.loads(story.NOTEBOOK.read_text(encoding="utf-8"))
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert found == story.cells(story.PAGE.read_text(encoding="utf-8"))
    shown = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["execution_count"], cell["source"]
            shown += any("image/png" in output.get("data", {}) for output in cell["outputs"])
            assert not any(output["output_type"] == "error" for output in cell["outputs"])
    assert shown == len(list(story.PICTURES.glob("*.png")))
