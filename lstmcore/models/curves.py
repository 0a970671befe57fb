"""The course of a training as a picture."""


def plot_history(history, path=None, *, title="Training"):
    """Draw the losses of a `LanguageModel.history` against steps; written to `path` if given.

    Returns the matplotlib figure.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_history needs matplotlib: pip install 'lstmcore[plot]'") from error
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    best = [record for record in history if record["best"] and record["validation"] is not None]
    labels = {"loss": "training", "validation": "validation"}
    if best:
        step, loss = best[-1]["step"], best[-1]["validation"]
        axes.plot(step, loss, "o", color="#0b6bcb")
        labels["validation"] += f", best {loss:.3f} at step {step:,}"
    for name, color in (("loss", "#8a8f98"), ("validation", "#0b6bcb")):
        points = [(record["step"], record[name]) for record in history if record[name] is not None]
        if points:
            axes.plot(*zip(*points), color=color, linewidth=2, marker=".", label=labels[name])
    axes.set(xlabel="steps", ylabel="nats per token", title=title)
    axes.set_xlim(left=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
