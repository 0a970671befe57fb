"""The course of a training: as a picture, as a table, as a log for TensorBoard.

`table` and `TensorBoard` make callbacks for `LanguageModel.fit`; `plot_history` draws what was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any

from lstmcore._types import Path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]


def plot_history(history: Sequence[Record] | Any, path: Path | None = None, *,
                 title: str = "Training") -> Figure:
    """Draw the losses of a training against steps; written to `path` if given.

    history : a `LanguageModel`, a fitted estimator, or what their `history` and `history_` hold

    Returns the matplotlib figure.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_history needs matplotlib: pip install 'lstmcore[plot]'") from error
    records = getattr(history, "history_", getattr(history, "history", history))
    if isinstance(records, str) or not hasattr(records, "__iter__"):
        raise TypeError("history must be a trained model, or its history, got "
                        f"{type(history).__name__}")
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    best = [record for record in records if record["best"] and record["validation"] is not None]
    labels = {"loss": "training", "validation": "validation"}
    if best:
        step, loss = best[-1]["step"], best[-1]["validation"]
        axes.plot(step, loss, "o", color="#0b6bcb")
        labels["validation"] += f", best {loss:.3f} at step {step:,}"
    for name, color in (("loss", "#8a8f98"), ("validation", "#0b6bcb")):
        points = [(record["step"], record[name]) for record in records if record[name] is not None]
        if points:
            axes.plot(*zip(*points), color=color, linewidth=2, marker=".", label=labels[name])
    of_sequences = any("sequences_per_second" in record for record in records)
    axes.set(xlabel="steps", ylabel="loss per sequence" if of_sequences else "nats per token", title=title)
    axes.set_xlim(left=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def table(file: IO[str]) -> Callable[[Any, Record], None]:
    """A callback that writes each record to an open file, as a line of comma-separated values.

    >>> import io
    >>> file = io.StringIO()
    >>> note = table(file)
    >>> note(None, {"step": 10, "loss": 2.5, "validation": None})
    >>> file.getvalue()
    'step,loss,validation\\n10,2.5,\\n'
    """
    def note(model, record):
        if not file.tell():
            print(*record, sep=",", file=file)
        print(*("" if value is None else value for value in record.values()), sep=",", file=file,
              flush=True)
    return note


class TensorBoard:
    """A callback that writes each record for TensorBoard: the losses, the learning rate, the speed.

    folder : of the log, made if it is not there; a resumed run goes on in the same one
    """

    def __init__(self, folder: Path) -> None:
        self._writer = self.writer()(str(folder))

    def __call__(self, model: Any, record: Record) -> None:
        for name, value in record.items():
            tag = {"loss": "loss/training", "validation": "loss/validation"}.get(name, name)
            if value is not None and name not in ("step", "best"):
                self._writer.add_scalar(tag, float(value), record["step"])
        self._writer.flush()

    @staticmethod
    def writer() -> Any:
        """The class that writes; ImportError where the package is missing."""
        try:
            from tensorboard.summary import Writer
        except ImportError as error:
            raise ImportError("a log for TensorBoard needs it: pip install "
                              "'lstmcore[tensorboard]'") from error
        return Writer

    def close(self) -> None:
        """End the log."""
        self._writer.close()
