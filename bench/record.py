"""The record of a comparison: what was measured, where and how, as JSON.

`bench.compare` writes it and `bench.report` makes its tables from nothing else, `bench.pages` puts
them into the manual. A figure that is
missing stands there with its reason.
"""

import json
import os
import platform
import re
import time
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path

from bench.cases import Case

Timing = namedtuple("Timing", "median p99 largest rms")  # s, s, and the Errors against float64
Contest = namedtuple("Contest", "section case job libraries")
Versus = namedtuple("Versus", "title case job threads other other_job other_threads")
Library = namedtuple("Library", "version precision packages")
# peaks: 1e9 operations/s of each number format; reads: GB/s of each cache, all threads together
Record = namedtuple(
    "Record", "machine command date libraries peaks reads results versus processes")

FLAGS = (  # what decides the speed of products, as /proc/cpuinfo names it
    "sse2", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "asimddp", "bf16", "i8mm", "sve")


def machine(threads, load):
    """The processor, its flags that matter, and the load average before the first measurement."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    name = re.search(r"model name\s*:\s*(.*)", info)
    flags = re.search(r"(?:flags|Features)\s*:\s*(.*)", info)
    flags = flags.group(1).split() if flags else []
    return {"cpu": name.group(1) if name else platform.processor() or platform.machine(),
            "flags": [flag for flag in FLAGS if flag in flags], "cores": os.cpu_count(),
            "threads": threads, "load": round(load, 2), "python": platform.python_version()}


def today():
    """The date of a record."""
    return time.strftime("%Y-%m-%d")


def read(path):
    """The record of a file."""
    return from_json(json.loads(Path(path).read_text()))


def write(record, path):
    """The record into a file."""
    Path(path).write_text(json.dumps(to_json(record), indent=1) + "\n")


def to_json(record):
    """The record as what json.dumps takes."""
    def results(result):
        return {name: value if isinstance(value, str) else value._asdict()
                for name, value in result.items()}

    return record._asdict() | {
        "libraries": {name: library._asdict() for name, library in record.libraries.items()},
        "results": [contest._asdict() | {"case": asdict(contest.case), "results": results(result)}
                    for contest, result in record.results],
        "versus": [line._asdict() | {"case": asdict(line.case), "other": asdict(line.other),
                                     "ratio": ratio} for line, ratio in record.versus]}


def from_json(data):
    """The record that `to_json` gave."""
    def case(fields):
        return Case(**{**fields, "lengths": fields["lengths"] and tuple(fields["lengths"])})

    def result(values):
        return {name: value if isinstance(value, str) else Timing(**value)
                for name, value in values.items()}

    results = [(Contest(line["section"], case(line["case"]), line["job"],
                        tuple(line["libraries"])), result(line["results"]))
               for line in data["results"]]
    versus = [(Versus(line["title"], case(line["case"]), line["job"], line["threads"],
                      case(line["other"]), line["other_job"], line["other_threads"]),
               line["ratio"]) for line in data["versus"]]
    libraries = {name: Library(fields["version"], fields["precision"], tuple(fields["packages"]))
                 for name, fields in data["libraries"].items()}
    return Record(**data | {"libraries": libraries, "results": results, "versus": versus})
