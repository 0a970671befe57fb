"""Do two builds compute the same bits? `python -m bench.bits BASE [HEAD]`; exit code 1 says no.

    python -m bench.bits BASE                         BASE against the working tree
    python -m bench.bits BASE --save FILE             write down what BASE computes
    python -m bench.bits --against FILE [HEAD]        HEAD, or the working tree, against that
    python -m bench.bits --against FILE --installed   the lstmcore that Python finds against that

BASE and HEAD are git revisions, built as bench.gate builds them. A fixed list of cases runs in a
process per build and instruction set (bench.outputs): outputs and gradients of all that is public,
in both precisions, on 1 to 3 threads, and again with each plan that can be forced. Compared are
hashes of dtype, shape and bytes. The plan "blas" stands last, and fails only with --blas: how a
product is cut up for BLAS may change its bits. A case is missing if it could not run on one of the
sides, which fails as well, or on both, which does not.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from bench.builds import build
from bench.report import table
from bench.worker import ROOT, Failure

# The tree comes last: the build, or an lstmcore that is installed, is found before the tree's.
SERVE = ("import sys; sys.path.append(sys.argv[1]); from bench.outputs import serve; "
         "serve(sys.argv[2])")
SHOWN = 16      # groups of which a case is named


def ask(do, path=(), isa=None):
    """What bench.outputs says of the lstmcore that comes first on `path`, or else is installed."""
    environment = {**os.environ, "LSTMCORE_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"}
    if isa:
        environment["LSTMCORE_ISA"] = isa
    path = [*path, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, path))
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run([sys.executable, "-c", SERVE, str(ROOT), do], cwd=home, text=True,
                              capture_output=True, env=environment)
    if done.returncode:
        raise Failure(f"the process ended with exit code {done.returncode}:\n{done.stderr.strip()}")
    print(done.stderr, end="", file=sys.stderr)
    return json.loads(done.stdout)


def record(title, path=()):
    """What one lstmcore is ("about") and computes: isa -> plan -> group -> case -> hashes."""
    about, results = ask("about", path), {}
    print(f"{title}: lstmcore {about['version']} in {about['file']}", file=sys.stderr)
    for isa in about["isas"]:
        begin = time.monotonic()
        results[isa] = ask("everything", path, isa)
        cases = sum(len(cases) for groups in results[isa].values() for cases in groups.values())
        print(f"{title}: {isa}, {cases} cases in {time.monotonic() - begin:.0f} s", file=sys.stderr)
    return {"about": about, "results": results}


def compare(base, head):
    """(isa, plan, group, case) -> "" where equal, "missing on both", or what differs."""
    base, head = flat(base), flat(head)
    verdicts = {}
    for key in dict.fromkeys([*base, *head]):
        b, h = (side.get(key, {"missing": "no such case"}) for side in (base, head))
        if "missing" in b and "missing" in h:
            verdicts[key] = f"missing on both: {h['missing']}"
        elif "missing" in b:
            verdicts[key] = f"missing on BASE: {b['missing']}"
        elif "missing" in h:
            verdicts[key] = f"missing on HEAD: {h['missing']}"
        else:
            verdicts[key] = ", ".join(name for name in dict.fromkeys([*b, *h])
                                      if b.get(name, "") != h.get(name, ""))
    return verdicts


def flat(results):
    """(isa, plan, group, case) -> hashes."""
    return {(isa, plan, group, case): hashes for isa, plans in results.items()
            for plan, groups in plans.items() for group, cases in groups.items()
            for case, hashes in cases.items()}


def report(verdicts):
    """The table of all groups, and the first case that differs of each."""
    counts = {}
    for key, verdict in verdicts.items():
        what = "equal" if not verdict else "missing" if verdict.startswith("missing") else "differ"
        counts.setdefault(key[:3], Counter())[what] += 1
    rows = [[isa, plan, group, *(str(n[what] or "") for what in ("equal", "differ", "missing"))]
            for (isa, plan, group), n in counts.items()]
    rows.sort(key=lambda row: row[1] == "blas")
    lines = [table(["isa", "plan", "group", "equal", "different", "missing"], rows)]
    first = {}      # of each group
    for key, verdict in verdicts.items():
        if verdict:
            first.setdefault((key[1] == "blas", *key[:3]), f"{' / '.join(key)}: {verdict}")
    lines += ["", *(first[group] for group in sorted(first)[:SHOWN])]
    return "\n".join(lines)


def parse(argv):
    """The command line; `left` and `right` are revisions, "" the working tree, None for neither."""
    parser = argparse.ArgumentParser(prog="python -m bench.bits",
                                     description="Fail if two builds compute different bits.")
    parser.add_argument("revisions", metavar="REVISION", nargs="*",
                        help="BASE and HEAD (default: the working tree), or HEAD with --against")
    parser.add_argument("--installed", action="store_true",
                        help="HEAD is the lstmcore that Python finds: nothing is built for it")
    parser.add_argument("--save", type=Path, metavar="FILE",
                        help="only write down what one build computes")
    parser.add_argument("--against", type=Path, metavar="FILE", help="BASE is what --save wrote")
    parser.add_argument("--blas", action="store_true", help="differences of the plan blas fail too")
    options = parser.parse_args(argv)
    sides = [] if options.against or options.save else ["BASE"]
    sides += [] if options.installed else ["HEAD"]
    if options.save and options.against:
        parser.error("--save and --against exclude each other")
    if len(options.revisions) > len(sides) or ("BASE" in sides and not options.revisions):
        parser.error(f"expected {' and '.join(sides) or 'no revision'}, got {options.revisions}")
    revisions = iter(options.revisions)
    options.left = next(revisions) if "BASE" in sides else None
    options.right = next(revisions, "") if "HEAD" in sides else None
    return options


def recorded(title, revision, folder):
    """The record of a revision, "" for the working tree, None for what is installed."""
    if revision is None:
        return record(title)
    return record(f"{title} {revision or 'the working tree'}", [build(revision, folder / title)])


def main(argv=None):
    """Build, run, compare, print; return the exit code."""
    options = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            if options.save:
                options.save.write_text(json.dumps(
                    recorded("BASE", options.right, Path(folder)), indent=0))
                return 0
            base = (json.loads(options.against.read_text()) if options.against
                    else recorded("BASE", options.left, Path(folder)))
            head = recorded("HEAD", options.right, Path(folder))
        except (Failure, OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
    for name, value in base["about"]["beside"].items():
        if value != head["about"]["beside"][name]:
            print(f"{name} is {value} on BASE and {head['about']['beside'][name]} on HEAD: that "
                  "alone may change bits")
    if base["about"]["isas"] != head["about"]["isas"]:
        print(f"instruction sets of BASE: {base['about']['isas']}, of HEAD: "
              f"{head['about']['isas']}", file=sys.stderr)
        return 2
    verdicts = compare(base["results"], head["results"])
    print(report(verdicts))
    failed = [key for key, verdict in verdicts.items()
              if verdict and not verdict.startswith("missing on both")
              and (options.blas or key[1] != "blas")]
    said = f"{len(failed)} of {len(verdicts)} cases differ" if failed else \
        f"no bit differs in {len(verdicts)} cases"
    print(said if options.blas else said + ", the plan blas left out")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
