"""`curvature_summary`: a table in the manner of `model.summary()`."""

import rich.box
import rich.console
import rich.table

from keras_curvature import record as records
from keras_curvature.analysis import operator_for, subspace_looks
from keras_curvature.diagonal import diagonal_moments
from keras_curvature.progress import Progress


def curvature_summary(
    model,
    x=None,
    y=None,
    *,
    method: str = "auto",
    num_matvecs: int = 32,
    seed: int = 0,
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

    Args:
        model: a compiled Keras model, or a `HessianOperator`.
        x: inputs, or a data set; see `HessianOperator`.
        y: targets.
        method: of the diagonal, as for `hessian_diagonal`.
        num_matvecs: products for norm, eigenvalue and shares; when the diagonal is
            sampled, a quarter of the number as samples besides.
        seed: seed of the random directions.
        print_fn: takes the table as text, line by line. Defaults to printing it to
            the console; `False` prints nothing.
        verbose: whether to show progress; `"auto"` does if it takes long.
        **options: further arguments of `HessianOperator`.

    Returns:
        A list of dictionaries, one for each layer, and a last one with the name
        `"total"` that also holds `hessian_trace`, `hessian_frobenius_norm`,
        `hessian_max_eigenvalue`, their errors, `off_diagonal_share` (the share of
        the squared norm outside of the layers' diagonal blocks), and `mode`: how the
        layers ran.

    Raises:
        ValueError: for an unknown method or inconsistent data.
    """
    operator = operator_for(model, x, y, options)
    with operator.still(), Progress(operator.evaluation, verbose) as progress:
        diagonal = diagonal_moments(
            operator,
            method,
            seed=seed,
            progress=progress,
            samples=max(2, num_matvecs // 4),
        )
        # The first look finds the subspace, the second one uses it.
        first = max(2, num_matvecs // 2)
        *_, (figures, spent) = subspace_looks(
            operator, first, num_matvecs, seed, progress
        )
    variables = records.variable_figures(operator, diagonal, figures)
    layers = records.layer_figures(variables)
    names: dict = {}
    for variable in variables:
        last = variable["path"].rpartition("/")[2]
        names.setdefault(variable["layer"], []).append(last)
    for layer in layers:
        layer["variables"] = ", ".join(names[layer["name"]])
    total = {"name": "total", "size": operator.shape[0]}
    total["mode"] = operator.mode
    total.update(records.scalar_figures(diagonal, figures))
    total["off_diagonal_share"] = 1 - sum(layer["block_share"] for layer in layers)
    errors = [layer["block_share_standard_error"] for layer in layers]
    total["off_diagonal_share_standard_error"] = None if None in errors else sum(errors)
    total["num_matvecs"] = diagonal.num_matvecs + spent
    summary = CurvatureSummary([*layers, total], printed=print_fn is not False)
    if print_fn is None:
        print(summary.table())
    elif print_fn is not False:
        for line in summary.table().split("\n"):
            print_fn(line)
    return summary


class CurvatureSummary(list):
    """The figures of `curvature_summary`: a list of dictionaries that shows itself.

    Its `repr` is the table, so that a notebook shows it; or one line if the table was
    printed before, so that it is not shown twice.
    """

    def __init__(self, records, printed):
        super().__init__(records)
        self._printed = printed

    def __repr__(self):
        if not self._printed:
            return self.table()
        *layers, total = self
        return f"<curvature of {len(layers)} layers, {total['size']:,} parameters>"

    def table(self) -> str:
        """The table as text."""
        *layers, total = self
        return _table(layers, total)


def _table(layers, total):
    table = rich.table.Table(
        title="Curvature of the training loss",
        box=rich.box.SQUARE,
        title_style="bold",
        header_style="bold",
    )
    table.add_column("Layer", overflow="fold")
    for column in (
        "Params",
        "Mean diag.",
        "Max diag.",
        "< 0",
        "Trace",
        "of trace",
        "of ‖H‖²",
        "in own block",
    ):
        table.add_column(column, justify="right")
    whole = total["hessian_trace"]
    for layer in layers:
        table.add_row(
            layer["name"],
            f"{layer['size']:,}",
            _with_error(layer["diagonal_mean"], layer["diagonal_mean_standard_error"]),
            f"{layer['diagonal_max']:.3g}",
            f"{layer['negative_share']:.0%}",
            _with_error(layer["trace"], layer["trace_standard_error"]),
            f"{layer['trace'] / whole:.0%}" if whole else "-",
            f"{layer['frobenius_share']:.0%}",
            f"{layer['block_share']:.0%}",
        )
    lines = [
        ("trace", "hessian_trace", "hessian_trace_standard_error"),
        (
            "Frobenius norm",
            "hessian_frobenius_norm",
            "hessian_frobenius_norm_standard_error",
        ),
        (
            "largest eigenvalue",
            "hessian_max_eigenvalue",
            "hessian_max_eigenvalue_error",
        ),
    ]
    summary = [f"Parameters: {total['size']:,}"] + [
        f"{label[0].upper()}{label[1:]}: {_with_error(total[value], total[error])}"
        for label, value, error in lines
    ]
    off, error = (total[f"off_diagonal_share{key}"] for key in ("", "_standard_error"))
    summary.append(
        f"Between layers: {off:.0%} of ‖H‖²" + (f" ± {error:.0%}" if error else "")
    )
    if total["mode"]:
        summary.append(f"Layers ran as in {total['mode']}")
    console = rich.console.Console(highlight=False)
    with console.capture() as capture:
        console.print(table)
        for line in summary:
            console.print(f" {line}")
    return capture.get().rstrip("\n")


def _with_error(value, error):
    """`1.23 ± 0.05`, with an error of two digits and the value as precise."""
    if value is None:
        return "not known"
    return f"{value:.3g}" + (f" ± {error:.1g}" if error else "")
