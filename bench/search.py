"""What `lstmcore search` found on one text, as a record and as the table of docs/language.md.

    lstmcore search FILE --hidden 64,128,256 --layers 1,2,3 --out DIR --plot .github/search.png
    python -m bench.search DIR

Alone, because it measures models and no library; it knows the state that a search keeps.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

from bench import record

PLACE = Path(__file__).parent / "results" / "search.json"


def noted(state):
    """The record of a search that has ended, given what it keeps in search.json."""
    trials = [{**trial["options"], "rounds": [{key: value for key, value in r.items() if key != "course"}
                                              for r in trial["rounds"]]}
              for trial in state["trials"].values() if trial["rounds"]]
    return {"machine": record.machine(1, os.getloadavg()[0]), "date": record.today(),
            "minutes": state["asked"]["minutes"], "trials": trials}


def table(found):
    """The table: the best first, after the first round, which all had, and at the end."""
    first = found["trials"][0]["rounds"][0]
    load = found["machine"]["load"]
    lines = [f"{found['machine']['cpu']}, {found['machine']['cores']} cores, a process on each, "
             f"{found['date']}; {found['minutes']:g} minutes in all, {first['minutes']:.2g} each in the "
             "first round." + (f" **The machine was busy: load average {load}.**" if load > 1 else ""), "",
             "| units | layers | parameters | bits per character, first round | at its end "
             "| minutes | epochs |",
             "|--:|--:|--:|--:|--:|--:|--:|"]
    for trial in sorted(found["trials"], key=lambda trial: trial["rounds"][-1]["validation"]):
        first, last = trial["rounds"][0], trial["rounds"][-1]
        bits = [r["validation"] / math.log(2) for r in (first, last)]
        lines.append(f"| {trial['hidden_size']} | {trial['num_layers']} | {last['parameters']:,} "
                     f"| {bits[0]:.3f} | {bits[1]:.3f} | {last['minutes']:.2f} | {last['epochs']:.2f} |")
    return "\n".join(lines)


def main(argv=None):
    """Write the record."""
    parser = argparse.ArgumentParser(prog="python -m bench.search", description="Record a search.")
    parser.add_argument("folder", metavar="DIR", help="of lstmcore search")
    state = json.loads((Path(parser.parse_args(argv).folder) / "search.json").read_text())
    PLACE.write_text(json.dumps(noted(state), indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
