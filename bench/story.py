"""The pictures, the notebook and the texts of docs/story.md.

    python -m bench.story                       runs the page; writes docs/pictures and docs/story.ipynb
    python -m bench.story --text KIND FILE ...  trains a character model of each file for two minutes and
                                                notes what it writes, for the page's block

Needs matplotlib and scikit-learn, the first also nbclient and ipykernel. Alone, because it shows models
and measures no library.
"""

import argparse
import doctest
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from bench import record

ROOT = Path(__file__).resolve().parent.parent
PAGE, NOTEBOOK, PICTURES = (ROOT / "docs" / name for name in ("story.md", "story.ipynb", "pictures"))
OUTPUT = ROOT / "bench" / "results" / "story.json"
MINUTES, HIDDEN = 2.0, 256
PARTS = re.compile(r"^```python\n(.*?)^```\n|^!\[.*?\]\(pictures/(.*?)\)\n|^<!-- .*? -->\n", re.M | re.S)


def cells(text):
    """("markdown" or "code", source) of the page, in order; a cell ends where the page shows an answer.

    A picture is the figure that was drawn last; those of pyplot show themselves.
    """
    found, at = [], 0
    for part in PARTS.finditer(text):
        found.append(("markdown", text[at:part.start()].strip()))
        at = part.end()
        if part[1]:
            source = ""
            for example in doctest.DocTestParser().get_examples(part[1]):
                source += example.source
                if example.want:
                    found.append(("code", source.rstrip()))
                    source = ""
            found.append(("code", source.rstrip()))
        elif part[2] and "plt.subplots" not in source:
            found.append(("code", "figure"))
    found.append(("markdown", text[at:].strip()))
    return [(kind, source) for kind, source in found if source]


def run(text, folder):
    """The page as a notebook that has run in `folder`, without what differs from run to run."""
    import nbformat
    from nbclient import NotebookClient
    new = nbformat.v4
    notebook = new.new_notebook(cells=[getattr(new, f"new_{kind}_cell")(source, id=f"cell-{n}")
                                       for n, (kind, source) in enumerate(cells(text))])
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}},
                   record_timing=False).execute()
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
                         "language_info": {"name": "python"}}
    return nbformat.writes(notebook) + "\n"


def written(kind, path):
    """What a model of one text says after two minutes, and how good it is."""
    from lstmcore import LanguageModel
    from lstmcore.models import corpus
    text = corpus.decode(Path(path).read_bytes())
    model = LanguageModel("char", hidden_size=HIDDEN, num_layers=1, seed=0)
    model.fit(text, minutes=MINUTES, progress=False)
    return {"kind": kind, "characters": len(text),
            "loss": min(point["validation"] for point in model.history),
            "sample": model.sample("\n", length=700, temperature=0.6, seed=0)}


def page_block(found):
    """The block of the page: each kind's loss and what it wrote, the first lines of it."""
    machine = found["machine"]
    lines = [f"{machine['cpu']}, {machine['cores']} cores, {found['date']}; one layer of {HIDDEN} units, "
             f"{MINUTES:g} minutes each."]
    for each in found["texts"]:
        shown = "\n".join(each["sample"].strip("\n").splitlines()[:9])[:480].rstrip()
        lines += ["", f"**{each['kind']}**, {each['characters'] / 1e6:.2f} million characters, "
                  f"{each['loss']:.2f} nats on what it has not read:", "", "```text", shown, "```"]
    return "\n".join(lines)


def main(argv=None):
    """Write what the page needs."""
    parser = argparse.ArgumentParser(prog="python -m bench.story", description="Run docs/story.md.")
    parser.add_argument("--text", nargs=2, action="append", metavar=("KIND", "FILE"), default=[],
                        help="train on this and note what is written; may be repeated")
    texts = parser.parse_args(argv).text
    if texts:
        found = {"machine": record.machine(os.cpu_count(), os.getloadavg()[0]), "date": record.today(),
                 "texts": [written(*each) for each in texts]}
        OUTPUT.write_text(json.dumps(found, indent=1) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        NOTEBOOK.write_text(run(PAGE.read_text(), folder))
        PICTURES.mkdir(exist_ok=True)
        for path in Path(folder).glob("*.png"):
            shutil.copyfile(path, PICTURES / path.name)


if __name__ == "__main__":
    sys.exit(main())
