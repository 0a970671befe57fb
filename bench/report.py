"""From a record to a page: the Markdown tables and the chart of bench.compare.

A result is library -> Timing (seconds), or the reason why there is none. Nothing is measured here,
and nothing is left out: what was not measured is listed with its reason, and so is every case in
which lstmcore is not the fastest. Below float32 lstmcore is held against the libraries that compute
in the same format; those in float32 stand beside them.
"""

import itertools
import math

FORMATS = {"train-bf16": "bfloat16", "infer-bf16": "bfloat16", "infer-int8": "int8"}  # of sections
OURS = {"float32": "lstmcore", "bfloat16": "lstmcore bf16", "int8": "lstmcore int8"}
HEADINGS = {
    "train": "Training, float32: forward + backward, all gradients, milliseconds",
    "infer": "Inference, float32, milliseconds",
    "float64": "Training, float64, milliseconds",
    "ragged": "Ragged batches, float32, milliseconds",
    "train-bf16": "Training, bfloat16 products: forward + backward, all gradients, milliseconds",
    "infer-bf16": "Inference, bfloat16 products, milliseconds",
    "infer-int8": "Inference, int8, milliseconds",
    "one": "Runtimes for one sequence at a time, float32, milliseconds",
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


def ours(contest):
    """The name under which lstmcore takes part in a contest."""
    return OURS[FORMATS.get(contest.section, "float32")]


def peers_times(contest, result, libraries):
    """library -> seconds of the others that compute in the contest's format and are right."""
    precision = FORMATS.get(contest.section, "float32")
    return {name: value.median for name, value in result.items() if not isinstance(value, str)
            and name not in OURS.values() and libraries[name].precision == precision}


def advantage(contest, result, libraries):
    """How many times as fast as the fastest other library lstmcore is; None without either."""
    others, own = peers_times(contest, result, libraries), result.get(ours(contest), "")
    return min(others.values()) / own.median if others and not isinstance(own, str) else None


def mean_and_least(ratios):
    """What is said of [(case, ratio)]: the geometric mean and the worst."""
    worst, least = min(ratios, key=lambda pair: pair[1])
    return f"{digits(geometric_mean([ratio for _, ratio in ratios]))}×, " \
           f"least {digits(least)}× ({worst})"


def geometric_mean(values):
    """The geometric mean of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


def table(head, rows):
    """A Markdown table, the first column to the left, numbers to the right."""
    lines = [head, [":--"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def section(name, record):
    """One table of cases against libraries, with what was not measured under it."""
    results = [(contest, result) for contest, result in record.results if contest.section == name]
    if not results:
        return []
    own, below = ours(results[0][0]), name in FORMATS or name == "one"
    libraries = list(dict.fromkeys(library for contest, _ in results
                                   for library in contest.libraries))
    shown = [library for library in libraries
             if any(not isinstance(result.get(library, ""), str) for _, result in results)]
    rows, ratios = [], []
    for contest, result in results:
        times = {library: value.median for library, value in result.items()
                 if not isinstance(value, str)}
        best = min(times, key=times.get, default=None)
        cells = [f"**{milliseconds(result[library])}**" if library == best
                 else milliseconds(result.get(library, "")) for library in shown]
        if below:
            cells = [cell + error_cell(result.get(library, ""))
                     for cell, library in zip(cells, shown)]
        ratio = advantage(contest, result, record.libraries)
        ratios += [(contest.case.name, ratio)] if ratio else []
        peak = record.peaks.get(FORMATS.get(name, contest.case.dtype))
        share = f"{contest.case.flops(contest.job) / times[own] / peak / 1e7:.0f} %" \
            if own in times and peak else "–"
        job = f", {contest.job}" if name == "ragged" else ""
        rows.append([f"{contest.case.name}{job} ({contest.case.sizes})", *cells,
                     f"{digits(ratio)}×" if ratio else "–", share])
    kind = f"other in {FORMATS[name]}" if name in FORMATS else "other"
    head = ["case (T, B, I, H, L)", *shown, f"{own} against the fastest {kind}",
            "of the format's peak" if name in FORMATS else "of FMA peak"]
    text = [f"### {HEADINGS[name]}", "", table(head, rows)]
    if below:
        text += ["", "In parentheses the error against float64, of the worst array: the largest "
                 "relative to the largest magnitude, and the root mean square relative to the "
                 "array's. Weights are random but like trained ones (`cases.trained_weights`)."]
    if ratios:
        text += ["", f"Geometric mean against the fastest {kind}: {mean_and_least(ratios)}."]
    return [*text, *failures(results), ""]


def error_cell(value):
    """The errors of a Timing, in parentheses."""
    if isinstance(value, str):
        return ""
    largest, rms = (f"{error:.1e}".replace("e-0", "e-") for error in (value.largest, value.rms))
    return f" ({largest}, {rms})"


def below_float32(record):
    """What the formats below float32 give: lstmcore's own float32 time by theirs, in one run."""
    ratios = {name: [(contest.case.name, result["lstmcore"].median / result[ours(contest)].median)
                     for contest, result in record.results if contest.section == name
                     and not any(isinstance(result.get(library, ""), str)
                                 for library in ("lstmcore", ours(contest)))]
              for name in FORMATS}
    if not any(ratios.values()):
        return []
    cases = dict.fromkeys(case for pairs in ratios.values() for case, _ in pairs)
    rows = [[case, *(f"{digits(dict(pairs)[case])}×" if case in dict(pairs) else "–"
                     for pairs in ratios.values())] for case in cases]
    means = [mean_and_least(pairs) if pairs else "–" for pairs in ratios.values()]
    head = ["case", *(HEADINGS[name].split(":")[0].removesuffix(", milliseconds")
                      for name in ratios)]
    return ["### lstmcore below float32, times as fast as lstmcore in float32", "",
            table(head, [*rows, ["geometric mean", *means]]), ""]


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
    steps = {}
    for contest, result in results:
        for library, value in result.items() if contest.job == "stream" else ():
            if not isinstance(value, str):
                steps.setdefault(library, value)
    if not steps:
        return []
    rows = [[library, digits(value.median * 1e6), digits(value.p99 * 1e6)]
            for library, value in sorted(steps.items(), key=lambda item: item[1].median)]
    return ["### One streaming step, B = 1, I = H = 256, microseconds", "",
            table(["library", "median", "99th percentile"], rows), ""]


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


def losses(record):
    """Every case in which another library is faster."""
    found = []
    for contest, result in record.results:
        ratio, own = advantage(contest, result, record.libraries), ours(contest)
        kind = FORMATS.get(contest.section, contest.case.dtype)
        if ratio is not None and ratio < 1:
            others = peers_times(contest, result, record.libraries)
            found.append(f"- {contest.case.name}, {contest.job}, {kind}: "
                         f"{min(others, key=others.get)} takes {digits(ratio)} of {own}'s time")
        elif isinstance(result.get(own), str):
            found.append(f"- {contest.case.name}, {contest.job}, {kind}: "
                         f"{own} has no figure ({result[own]})")
    return ["### Where lstmcore is not the fastest", "",
            *(found or ["In none of the cases of this run."]), ""]


def installed(libraries):
    """Names and versions; a way of using a library only where its version says more."""
    first, shown = {}, []
    for name, library in libraries.items():
        if first.setdefault(library.packages, library.version) != library.version or \
                library not in shown and name.split()[0] == name:
            shown.append(name)
    return ", ".join(f"{name} {libraries[name].version}" for name in shown)


def markdown(record):
    """The whole page."""
    machine = record.machine
    peak = ", ".join(f"{value:.0f} in {name}" for name, value in record.peaks.items())
    busy = f" **The machine was busy: load average {machine['load']:.1f}.**" \
        if machine["load"] > 0.5 else ""
    head = [f"{machine['cpu']} ({' '.join(machine['flags'])}), {machine['cores']} cores, "
            f"{machine['threads']} threads for every library"
            + (f", measured peak of products, 1e9 operations/s: {peak}" if peak else "") + ".",
            f"Python {machine['python']}, {installed(record.libraries)}.",
            f"{record.date}, `{record.command}`. One process per library, taking turns, medians; "
            "all results verified first. The fastest is bold." + busy, ""]
    tables = [line for name in HEADINGS for line in section(name, record)]
    return "\n".join([*head, *tables, *below_float32(record), *latency(record.results),
                      *versus_table(record.versus), *process_table(record.processes),
                      *losses(record)])


def chart(record, path):
    """How many times as long each library takes as lstmcore, by case, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [(name, rows) for name in HEADINGS
              if (rows := [(contest, result) for contest, result in record.results
                           if contest.section == name
                           and advantage(contest, result, record.libraries)])]
    if not panels:
        return
    libraries = list(dict.fromkeys(library for _, rows in panels
                                   for contest, _ in rows for library in contest.libraries))
    markers = dict(zip(libraries, itertools.cycle("osD^vP*X<>pdh")))
    colors = dict(zip(libraries, itertools.cycle(plt.get_cmap("tab10").colors)))
    heights = [len(rows) for _, rows in panels]
    fig, axes = plt.subplots(
        len(panels), 1, figsize=(8.5, 1.2 + 0.5 * len(panels) + 0.3 * sum(heights)), sharex=True,
        squeeze=False, layout="constrained", gridspec_kw={"height_ratios": heights})
    for ax, (name, rows) in zip(axes[:, 0], panels):
        for at, (contest, result) in enumerate(rows):
            for library, value in result.items():
                if library != ours(contest) and not isinstance(value, str):
                    ax.plot(value.median / result[ours(contest)].median, at, markers[library],
                            color=colors[library], markersize=7, alpha=0.85)
        labels = [contest.case.name + f" ({contest.job})" * (name == "ragged")
                  for contest, _ in rows]
        ax.set_yticks(range(len(rows)), labels)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_title(HEADINGS[name].split(":")[0].removesuffix(", milliseconds"),
                     loc="left", fontsize=10, fontweight="bold")
        ax.axvline(1, color="black", linewidth=1.5)
        ax.grid(axis="x", which="both", alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_xscale("log")
    axes[-1, 0].xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
    axes[-1, 0].set_xlabel(f"time divided by lstmcore's, {record.machine['threads']} threads; "
                           "right of the line lstmcore is faster")
    shown = {library for _, rows in panels for _, result in rows
             for library, value in result.items() if not isinstance(value, str)}
    handles = [plt.Line2D([], [], marker=markers[library], color=colors[library], linestyle="",
                          label=library) for library in libraries if library in shown]
    fig.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 5),
               frameon=False)
    fig.savefig(path, dpi=150)
    plt.close(fig)
