"""From a record to a page: the Markdown tables and the chart of bench.compare.

A result is library -> Timing (seconds), or the reason why there is none. Nothing is measured here,
and nothing is left out: what was not measured is listed with its reason, and so is every case in
which lstmcore is not the fastest. Below float32 lstmcore is held against the libraries that compute
in the same format; those in float32 stand beside them.
"""

import itertools
import math

import numpy as np

FORMATS = {"train-bf16": "bfloat16", "infer-bf16": "bfloat16", "infer-int8": "int8"}  # of sections
OURS = {"float32": "lstmcore", "bfloat16": "lstmcore bf16", "int8": "lstmcore int8"}
SHORT = ("ptb-medium", "char-512", "small", "big", "seq-b1", "tiny", "ragged")  # the README's
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


def limit(case, job, record):
    """The seconds below which this machine cannot do a case: all products at the measured peak; of
    one sequence, whose weights are read again in every step, the reads from the last cache and the
    other products at the peak. None where the record lacks the figures."""
    peak, reads = record.peaks.get(case.dtype), record.reads.get("l3")
    if not peak or case.B == 1 and not reads:
        return None
    flops, seconds = case.flops(job), 0
    if case.B == 1:
        passes = case.T * (2 if job == "train" else 1)
        weights = sum(4 * case.H * case.D * (case.H + (case.inputs(at) if case.T == 1 else 0))
                      for at in range(case.L))
        seconds = passes * weights * np.dtype(case.dtype).itemsize / reads / 1e9
        flops -= 2 * passes * weights
    return seconds + flops / peak / 1e9


def limits(record):
    """How far lstmcore and the others are from what the machine can do, in float32."""
    rows = []
    for contest, result in record.results:
        bound, ratio = limit(contest.case, contest.job, record), advantage(
            contest, result, record.libraries)
        if bound and ratio and contest.section in ("train", "infer"):
            own = result["lstmcore"].median
            rows.append([f"{contest.case.name}, {contest.job}", digits(bound * 1e3),
                         milliseconds(result["lstmcore"]), f"{digits(ratio * own / bound)}×",
                         f"{digits(ratio)}×"])
    if not rows:
        return []
    head = ["case", "the machine's limit, ms", "lstmcore, ms",
            "fastest other against the limit", "against lstmcore"]
    return ["### Where the limit is, float32", "", table(head, rows), "",
            "The limit is all products at the measured peak; with one sequence it is the weights, "
            "read from the last cache in every step"
            + (f" at {record.reads['l3']:.0f} GB/s" if record.reads else "")
            + ", and the other products at the peak.", ""]


def setting(record):
    """One line: where, with what and when the record was made."""
    machine = record.machine
    busy = f" **The machine was busy: load average {machine['load']:.1f}.**" \
        if (machine["load"] or 0) > 0.5 else ""
    return (f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads for every "
            f"library, {record.date}, `{record.command}`.{busy}")


def short(record):
    """The README's table: lstmcore beside the fastest other, and a line for each section."""
    found = {}
    for contest, result in record.results:
        if contest.case.name in SHORT and contest.section in ("train", "infer", "ragged"):
            others = peers_times(contest, result, record.libraries)
            ratio = advantage(contest, result, record.libraries)
            found.setdefault(contest.case, {})[contest.job] = [
                milliseconds(result.get("lstmcore", "")),
                digits(min(others.values()) * 1e3) if others else "–",
                f"{digits(ratio)}×" if ratio else "–"]
    rows = [[f"{case.name} ({case.sizes})", *cells.get("train", ["–"] * 3),
             *cells.get("infer", ["–"] * 3)] for case, cells in found.items()]
    head = ["case (T, B, I, H, L)", "training", "fastest other", "", "inference", "fastest other", ""]
    text = ["Milliseconds in float32 beside the fastest other library: " + setting(record), "",
            table(head, rows), ""]
    return "\n".join([*text, "Against the fastest other library, in all cases that were measured:", "",
                      standing(record)])


def short_below(record):
    """The README's lines on what is below float32."""
    return "\n".join([f"Below float32, beside the fastest other library in the format: {setting(record)}",
                      "", standing(record)])


def forced(record):
    """What is below float32 where libraries were told to leave instructions aside."""
    gain = below_float32(record)[2]
    return "\n\n".join([setting(record), standing(record), "Times as fast as lstmcore in float32:", gain])


def standing(record):
    """The geometric mean of each section against the fastest other, and where lstmcore is slower."""
    rows = []
    for name in HEADINGS:
        pairs = [(contest.case.name, ratio) for contest, result in record.results
                 if contest.section == name
                 and (ratio := advantage(contest, result, record.libraries))]
        if pairs:
            behind = [f"{case} {digits(ratio)}×" for case, ratio in pairs if ratio < 1]
            rows.append([HEADINGS[name].split(":")[0].removesuffix(", milliseconds"), len(pairs),
                         f"{digits(geometric_mean([ratio for _, ratio in pairs]))}×",
                         ", ".join(behind) or "–"])
    return table(["", "cases", "geometric mean", "slower in"], rows)


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
    peak = ", ".join(f"{value:.0f} in {name}" for name, value in record.peaks.items())
    flags = " ".join(record.machine["flags"])
    head = [setting(record) + (f" The processor's flags that matter: {flags}." if flags else "")
            + (f" Measured peak of products, 1e9 operations/s: {peak}." if peak else ""),
            f"Python {record.machine['python']}, {installed(record.libraries)}.",
            "One process per library, taking turns, medians; all results verified first. The "
            "fastest is bold.", ""]
    tables = [line for name in HEADINGS for line in section(name, record)]
    return "\n".join([*head, *tables, *below_float32(record), *latency(record.results),
                      *versus_table(record.versus), *process_table(record.processes),
                      *limits(record), *losses(record)])


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
