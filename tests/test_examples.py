"""Every example in docstrings, README and docs runs as printed, and every link leads somewhere."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

import lstmcore

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {"lstmcore.torch": "torch", "lstmcore.models.estimators": "sklearn",
         "lstmcore.models.supervised": "sklearn", "lstmcore.models.forecasting": "sklearn",
         "lstmcore.gradflow": "matplotlib", "lstmcore.inspect": "matplotlib", "lstmcore.keras": "keras",
         "lstmcore.formats.keras": "h5py", "lstmcore.formats.hdf5": "h5py",
         **{f"lstmcore.formats.onnx{part}": "onnx" for part in ("", "_export", "_graph", "_operators",
                                                                "_variants")}}
MODULES = sorted(m.name for m in pkgutil.walk_packages(lstmcore.__path__, "lstmcore.")
                 if not m.name.endswith("__main__") and "-" not in m.name)   # - : PyInstaller's


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name, tmp_path, monkeypatch):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed == 0


SECTION_NEEDS = {"Classify": "sklearn", "What y may be": "sklearn", "What happens by itself": "sklearn",
                 "Forecast": "sklearn", "Look inside": "matplotlib",
                 "See the gradient vanish": "matplotlib", "Files, without": "h5py onnx torch"}
PAGE_NEEDS = {"story.md": "matplotlib sklearn"}
apart = pytest.mark.skipif(not PAGES[0].exists(),
                           reason="the tests of an installed wheel may lie without README and docs")


@apart
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_of_a_page_run(page, tmp_path, monkeypatch):
    """Section by section, each with the names of those before it, where its extras are there."""
    for need in PAGE_NEEDS.get(page.name, "").split():
        pytest.importorskip(need)
    monkeypatch.chdir(tmp_path)
    names, runner = {}, doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    text = page.read_text(encoding="utf-8")
    for section in re.split("^#+ ", text, flags=re.MULTILINE):
        title = section.partition("\n")[0]
        needs = " ".join(n for start, n in SECTION_NEEDS.items() if title.startswith(start)).split()
        if all(map(importlib.util.find_spec, needs)):
            test = doctest.DocTestParser().get_doctest(section, names, title, str(page), 0)
            runner.run(test, clear_globs=False)
            names.update(test.globs)
    assert runner.failures == 0


@apart
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http:", "https:")):
            file, _, anchor = target.partition("#")
            at = page.parent / file if file else page
            assert at.exists(), target
            titles = re.findall("^#+ (.*)$", at.read_text(encoding="utf-8"), re.M) if anchor else ()
            assert not anchor or anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
                                            for title in titles}, target


@apart
def test_the_front_page_is_short():
    assert PAGES[0].read_text(encoding="utf-8").count("\n") <= 250


@apart
def test_every_public_name_is_in_the_reference():
    """By its own name, or as a member of a module that is shown whole."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    whole = re.findall(r"automodule:: (\S+)\n   :members:\n", page)
    names = {name for line in re.findall(r":members: (.*)", page) for name in line.split(", ")}
    names |= set(re.findall(r"autoclass:: (\w+)", page))
    for name in lstmcore.__all__:
        value = getattr(lstmcore, name)
        if callable(value):
            assert name in names or value.__module__ in whole, name
