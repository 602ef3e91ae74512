"""`curvature_summary`: a table in the manner of `model.summary()`."""

import textwrap
import warnings

import rich.console

from keras_curvature import record as records
from keras_curvature.analysis import operator_for
from keras_curvature.deflated import deflated
from keras_curvature.diagonal import diagonal_moments, keeps, with_subspace
from keras_curvature.learning_rate import LearningRate, find_largest, suggestion
from keras_curvature.progress import Progress
from keras_curvature.table import table_of
from keras_curvature.text import percent, with_error

_SUGGESTED = ("suggested_learning_rate", "learning_rate_reason")

#: Of the eigenvalue that an optimizer sees, for the learning rate.
TOLERANCE = 0.05


def curvature_summary(
    model,
    x=None,
    y=None,
    *,
    method: str = "auto",
    num_matvecs: int = 32,
    seed: int = 0,
    top: int | None = 20,
    print_fn=None,
    verbose: bool | str = "auto",
    **options,
) -> list:
    """Prints where the loss of a model is curved, layer by layer; returns the figures.

    ```python
    layers = kc.curvature_summary(model, x, y)
    pandas.DataFrame(layers)
    ```

    A layer with a large mean diagonal is stiff: its weights tolerate little rounding
    or pruning. The shares say how much of the trace and of the squared Frobenius norm
    lies in a layer's rows of H, and how much of the norm in its own diagonal block:
    what is left couples it with other layers.

    The table fits the console it is printed on. It begins with the layers that have
    most of the squared norm; where it is narrow, columns are left out and names lose
    their beginnings. Below it stands a learning rate, as `suggest_learning_rate` gives
    it.

    Args:
        model: a compiled Keras model, or a `HessianOperator`.
        x: inputs, or a data set; see `HessianOperator`.
        y: targets.
        method: of the diagonal, as for `hessian_diagonal`.
        num_matvecs: products for norm, eigenvalue and shares; when the diagonal is
            sampled, a quarter of the number as samples besides.
        seed: seed of the random directions.
        top: number of layers that are shown; the others are put together in one line.
            `None` shows all. What is returned holds every layer.
        print_fn: takes the table as text, line by line. Defaults to printing it to
            the console; `False` prints nothing.
        verbose: whether to show progress; `"auto"` does if it takes long.
        **options: further arguments of `HessianOperator`.

    Returns:
        A list of dictionaries, one for each layer in the order of the model, and a
        last one with the name `"total"` that also holds `hessian_trace`,
        `hessian_frobenius_norm`, `hessian_max_eigenvalue`, their errors,
        `off_diagonal_share` (the share of the squared norm outside of the layers'
        diagonal blocks), `mode`: how the layers ran, `suggested_learning_rate` and
        `learning_rate_reason`, the latter `None` without an optimizer.

    Raises:
        ValueError: for an unknown method, inconsistent data, or a `top` below one.
    """
    if top is not None and (int(top) != top or top < 1):
        raise ValueError(
            "`top` must be a number of layers, at least one, or None for all. "
            f"Received: top={top!r}."
        )
    operator = operator_for(model, x, y, options)
    with operator.still(), Progress(operator.evaluation, verbose) as progress:
        progress.place(after=num_matvecs)
        diagonal = diagonal_moments(
            operator,
            method,
            seed=seed,
            progress=progress,
            samples=max(2, num_matvecs // 4),
        )
        spent = diagonal.num_matvecs
        progress.place(before=spent)
        both = method == "auto" and keeps(operator, num_matvecs)
        wanted = "diagonal" if both else "frobenius_norm"
        figures = deflated(
            operator, wanted, num_matvecs, None, seed, operator.sizes, progress
        )
        spent += figures.num_matvecs
        if both:
            diagonal = with_subspace(operator, diagonal, figures)
        total = {"name": "total", "size": operator.shape[0]}
        total["mode"] = operator.mode
        total.update(records.scalar_figures(diagonal, figures))
        progress.place(before=spent)
        rate = _learning_rate(operator, total, num_matvecs, seed, progress)
    variables = records.variable_figures(operator, diagonal, figures)
    layers = records.layer_figures(variables)
    names: dict = {}
    for variable in variables:
        last = variable["path"].rpartition("/")[2]
        names.setdefault(variable["layer"], []).append(last)
    for layer in layers:
        layer["variables"] = ", ".join(names[layer["name"]])
    total["off_diagonal_share"] = 1 - sum(layer["block_share"] for layer in layers)
    errors = [layer["block_share_standard_error"] for layer in layers]
    total["off_diagonal_share_standard_error"] = None if None in errors else sum(errors)
    total["suggested_learning_rate"] = total["learning_rate_reason"] = None
    total["num_matvecs"] = spent
    if rate is not None:
        total["suggested_learning_rate"] = rate.value
        total["learning_rate_reason"] = rate.reason
        total["num_matvecs"] += rate.num_matvecs
    summary = CurvatureSummary([*layers, total], printed=print_fn is not False, top=top)
    if print_fn is None:
        print(summary.table())
    elif print_fn is not False:
        for line in summary.table().split("\n"):
            print_fn(line)
    return summary


def _learning_rate(operator, figures, num_matvecs, seed, progress):
    """The suggestion, of the eigenvalue that is known where the optimizer sees H."""
    model = getattr(operator.evaluation.loss, "model", None)
    if getattr(model, "optimizer", None) is None:
        return None

    def largest(seen):
        if seen is operator:
            key = "hessian_max_eigenvalue"
            return figures[key], figures[f"{key}_error"], 0
        with warnings.catch_warnings():
            # One that has not converged has a wide bound, which is what counts here.
            warnings.simplefilter("ignore")
            return find_largest(seen, TOLERANCE, num_matvecs, seed, counted)

    def counted(done, _):
        return progress(done, max(done, num_matvecs))

    return suggestion(operator, largest)


class CurvatureSummary(list):
    """The figures of `curvature_summary`: a list of dictionaries that shows itself.

    Its `repr` is the table, so that a notebook shows it; or one line if the table was
    printed before, so that it is not shown twice.
    """

    def __init__(self, records, printed, top=None):
        super().__init__(records)
        self._printed = printed
        self._top = top

    def __repr__(self):
        if not self._printed:
            return self.table()
        *layers, total = self
        return f"<curvature of {len(layers)} layers, {total['size']:,} parameters>"

    def table(self) -> str:
        """The table as text, as wide as the console."""
        *layers, total = self
        # In a notebook it would show itself, besides being returned.
        console = rich.console.Console(highlight=False, force_jupyter=False)
        with console.capture() as capture:
            console.print(
                table_of(layers, total["hessian_trace"], self._top, console.width)
            )
        wrapper = textwrap.TextWrapper(
            console.width, initial_indent=" ", subsequent_indent="   "
        )
        return capture.get() + "\n".join(map(wrapper.fill, _lines(total)))


def _lines(total):
    """What is said below the table, line by line."""
    yield f"Parameters: {total['size']:,}"
    for label, key, error in (
        ("Trace", "hessian_trace", "_standard_error"),
        ("Frobenius norm", "hessian_frobenius_norm", "_standard_error"),
        ("Largest eigenvalue", "hessian_max_eigenvalue", "_error"),
    ):
        yield f"{label}: {with_error(total[key], total[key + error])}"
    off, error = (total[f"off_diagonal_share{key}"] for key in ("", "_standard_error"))
    between = f"Between layers: {percent(off)} of ‖H‖²"
    yield between + (f" ± {percent(error)}" if error else "")
    if total["mode"]:
        yield f"Layers ran as in {total['mode']}"
    if total["learning_rate_reason"]:
        rate = LearningRate(*map(total.get, _SUGGESTED))
        yield f"Learning rate suggested: {rate}"
