"""From measurements to a page: the Markdown tables and the chart of bench.compare.

A result is library -> Timing (seconds), or the reason why there is none. Nothing is measured here,
and nothing is left out: what was not measured is listed with its reason, and so is every case in
which lstmcore is not the fastest.
"""

import math
import os
import platform
import re
import time
from pathlib import Path

INEXACT = "onnxruntime int8"
HEADINGS = {
    "train": "Training, float32: forward + backward, all gradients, milliseconds",
    "infer": "Inference, float32, milliseconds",
    "float64": "Training, float64, milliseconds",
    "ragged": "Ragged batches, float32, milliseconds",
}


def milliseconds(value):
    """Three digits of a Timing in milliseconds; a dash for a reason."""
    return "–" if isinstance(value, str) else digits(value.median * 1e3)


def digits(value):
    """Three significant digits, without an exponent."""
    if value <= 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(value)))
    return f"{value:.{places}f}"


def peers_times(result):
    """library -> seconds of the other libraries that gave right results."""
    return {name: value.median for name, value in result.items()
            if not isinstance(value, str) and name not in ("lstmcore", INEXACT)}


def advantage(result):
    """How many times as fast as the fastest other library lstmcore is; None without either."""
    others, ours = peers_times(result), result.get("lstmcore", "")
    return min(others.values()) / ours.median if others and not isinstance(ours, str) else None


def geometric_mean(values):
    """The geometric mean of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


def table(head, rows):
    """A Markdown table, the first column to the left, numbers to the right."""
    lines = [head, [":--"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def section(name, results, peaks):
    """One table of cases against libraries, with what was not measured under it."""
    results = [(contest, result) for contest, result in results if contest.section == name]
    if not results:
        return []
    libraries = list(dict.fromkeys(library for contest, _ in results
                                   for library in contest.libraries))
    shown = [library for library in libraries
             if any(not isinstance(result.get(library, ""), str) for _, result in results)]
    rows, ratios = [], []
    for contest, result in results:
        times = {library: value.median for library, value in result.items()
                 if not isinstance(value, str) and library != INEXACT}
        best = min(times, key=times.get, default=None)
        cells = [f"**{milliseconds(result[library])}**" if library == best
                 else milliseconds(result.get(library, "")) for library in shown]
        ratio, ours = advantage(result), times.get("lstmcore")
        ratios += [ratio] if ratio else []
        peak = peaks.get(contest.case.dtype)
        share = f"{contest.case.flops(contest.job) / ours / peak / 1e7:.0f} %" \
            if ours and peak else "–"
        job = f", {contest.job}" if name == "ragged" else ""
        rows.append([f"{contest.case.name}{job} ({contest.case.sizes})", *cells,
                     f"{digits(ratio)}×" if ratio else "–", share])
    head = ["case (T, B, I, H, L)", *shown, "lstmcore against the fastest other", "of FMA peak"]
    text = [f"### {HEADINGS[name]}", "", table(head, rows)]
    if ratios:
        text += ["", f"Geometric mean against the fastest other: "
                 f"{digits(geometric_mean(ratios))}×, least {digits(min(ratios))}×."]
    return [*text, *failures(results), ""]


def failures(results):
    """A line for every reason why a library has no figure, with its cases."""
    reasons = {}
    for contest, result in results:
        for library, value in result.items():
            if isinstance(value, str):
                reasons.setdefault((library, value), []).append(contest.case.name)
    return [f"- {library}, {', '.join(dict.fromkeys(cases))}: {reason}"
            for (library, reason), cases in reasons.items()]


def latency(results):
    """The table of the streaming step: median and 99th percentile, in microseconds."""
    for contest, result in results:
        if contest.job == "stream":
            rows = [[library, digits(value.median * 1e6), digits(value.p99 * 1e6)]
                    for library, value in result.items() if not isinstance(value, str)]
            return ["### One streaming step, B = 1, I = H = 256, microseconds", "",
                    table(["library", "median", "99th percentile"], rows), ""]
    return []


def process_table(processes):
    """The table of what having a library costs."""
    def cell(value, scale=1.0):
        return "–" if value is None or isinstance(value, str) else digits(value * scale)

    if not processes:
        return []
    rows = [[library, cell(row.get("ptb-medium")), cell(row.get("char-512")),
             cell(row["import"], 1e3), cell(row["alone"]), cell(row["with_requirements"])]
            for library, row in processes.items() if not isinstance(row, str)]
    head = ["library", "peak growth of ptb-medium training, MB", "of char-512 training, MB",
            "import beyond NumPy, ms", "installed, MB", "with all it requires, MB"]
    reasons = [f"- {library}: {row}" for library, row in processes.items() if isinstance(row, str)]
    return ["### Memory, import and size", "", table(head, rows), *reasons, ""]


def versus_table(versus):
    """lstmcore against itself."""
    if not versus:
        return []
    rows = [[line.title, line.case.name,
             value if isinstance(value, str) else f"{value:.2f}"] for line, value in versus]
    return ["### lstmcore against itself, training time", "",
            table(["ratio", "case", "time / time"], rows), ""]


def losses(results):
    """Every case in which another library is faster."""
    found = []
    for contest, result in results:
        ratio = advantage(result)
        if ratio is not None and ratio < 1:
            others = peers_times(result)
            found.append(f"- {contest.case.name}, {contest.job}, {contest.case.dtype}: "
                         f"{min(others, key=others.get)} takes {digits(ratio)} of lstmcore's time")
        elif isinstance(result.get("lstmcore"), str):
            found.append(f"- {contest.case.name}, {contest.job}, {contest.case.dtype}: "
                         f"lstmcore has no figure ({result['lstmcore']})")
    return ["### Where lstmcore is not the fastest", "",
            *(found or ["In none of the cases of this run."]), ""]


def cpu():
    """The processor's name."""
    try:
        names = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def markdown(results, versus, processes, versions, peaks, threads, command, load):
    """The whole page; `load` is the load average before the first measurement."""
    peak = ", ".join(f"{value:.0f} GFLOP/s in {dtype}" for dtype, value in peaks.items())
    installed = ", ".join(f"{library} {version}" for library, version in versions.items())
    head = [f"{cpu()}, {os.cpu_count()} cores, {threads} threads for every library"
            + (f", measured FMA peak {peak}" if peak else "") + ".",
            f"Python {platform.python_version()}, {installed}.",
            f"{time.strftime('%Y-%m-%d')}, `{command.strip()}`. One process per library, "
            "taking turns, medians; all results verified first. The fastest is bold; int8 "
            "computes other numbers and is shown for information."
            + (f" **The machine was busy: load average {load:.1f}.**" if load > 0.5 else ""), ""]
    tables = [line for name in HEADINGS for line in section(name, results, peaks)]
    return "\n".join([*head, *tables, *latency(results), *versus_table(versus),
                      *process_table(processes), *losses(results)])


def chart(results, threads, path):
    """How many times as long each library takes as lstmcore, by case, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [(name, rows) for name in HEADINGS
              if (rows := [(contest, result) for contest, result in results
                           if contest.section == name and advantage(result)])]
    if not panels:
        return
    libraries = list(dict.fromkeys(library for _, rows in panels
                                   for contest, _ in rows for library in contest.libraries))
    markers = dict(zip(libraries, "osD^vP*X"))
    colors = dict(zip(libraries, plt.get_cmap("tab10").colors))
    heights = [len(rows) for _, rows in panels]
    fig, axes = plt.subplots(
        len(panels), 1, figsize=(8.5, 1.2 + 0.5 * len(panels) + 0.3 * sum(heights)), sharex=True,
        squeeze=False, layout="constrained", gridspec_kw={"height_ratios": heights})
    for ax, (name, rows) in zip(axes[:, 0], panels):
        for at, (contest, result) in enumerate(rows):
            for library, value in result.items():
                if library != "lstmcore" and not isinstance(value, str):
                    ax.plot(value.median / result["lstmcore"].median, at, markers[library],
                            color=colors[library], markersize=7, alpha=0.85,
                            fillstyle="none" if library == INEXACT else "full")
        labels = [contest.case.name + f" ({contest.job})" * (name == "ragged")
                  for contest, _ in rows]
        ax.set_yticks(range(len(rows)), labels)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_title(HEADINGS[name].split(",")[0] + (", float64" if name == "float64" else ""),
                     loc="left", fontsize=10, fontweight="bold")
        ax.axvline(1, color="black", linewidth=1.5)
        ax.grid(axis="x", which="both", alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_xscale("log")
    axes[-1, 0].xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
    axes[-1, 0].set_xlabel(f"time divided by lstmcore's, {threads} threads; "
                           "right of the line lstmcore is faster")
    shown = {library for _, rows in panels for _, result in rows
             for library, value in result.items() if not isinstance(value, str)}
    handles = [plt.Line2D([], [], marker=markers[library], color=colors[library], linestyle="",
                          fillstyle="none" if library == INEXACT else "full", label=library)
               for library in libraries if library in shown - {"lstmcore"}]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    fig.savefig(path, dpi=150)
    plt.close(fig)
