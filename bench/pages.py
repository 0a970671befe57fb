"""The tables of README and docs, from the records in bench/results: `python -m bench.pages`.

A page says where a table goes by two comments, `<!-- bench: NAME -->` and `<!-- end -->`; what is
between them is written here and never by hand. --check writes nothing and exits with 1 if a page
differs from its records. The picture is made by bench.compare.
"""

import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path

from bench import (accuracy, distributed, record, report, search, serving, story, torch_dropin,
                   variants)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BLOCK = re.compile(r"(<!-- bench: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLES = {  # name in a page -> the text
    "compare": lambda: report.markdown(record.read(RESULTS / "compare.json")),
    "serving": lambda: serving.table(json.loads((RESULTS / "serving.json").read_text())),
    "search": lambda: search.table(json.loads((RESULTS / "search.json").read_text())),
    "torch": lambda: torch_dropin.table(record.read(RESULTS / "torch_dropin.json")),
    **{f"distributed-{name}": partial(distributed.table, name)
       for name in ("runs", "trace", "links", "check", "scale", "losses")},
    "story": lambda: story.page_block(json.loads((RESULTS / "story.json").read_text())),
    "variants": lambda: variants.table(json.loads((RESULTS / "variants.json").read_text())),
    "variants-losses": lambda: variants.losses_table(json.loads((RESULTS / "variants.json").read_text())),
    **{f"accuracy-{name}": partial(accuracy.page_table, name) for name in accuracy.TABLES},
    "below": lambda: report.markdown(record.read(RESULTS / "below.json")),
    "below-avx512": lambda: report.forced(record.read(RESULTS / "below_avx512.json")),
    "below-avx2": lambda: report.forced(record.read(RESULTS / "below_avx2.json")),
    "below-short": lambda: report.short_below(record.read(RESULTS / "below.json")),
    "compare-short": lambda: report.short(record.read(RESULTS / "compare.json")),
}


def filled(text):
    """The page with what the records say in its blocks; a name that is not known is a KeyError."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{TABLES[block[2]]().strip()}\n\n{block[3]}", text)


def pages():
    """The pages that have blocks."""
    return [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
            if path.exists() and BLOCK.search(path.read_text(encoding="utf-8"))]


def main(argv=None):
    """Write or compare."""
    parser = argparse.ArgumentParser(prog="python -m bench.pages",
                                     description="Write the tables of README and docs.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 says stale")
    check, stale = parser.parse_args(argv).check, False
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            stale = True
            print(f"{path.name}: {'not what the records say' if check else 'written'}")
            if not check:
                path.write_text(new, encoding="utf-8")
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
