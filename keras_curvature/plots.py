"""Pictures of what was found, with matplotlib: `pip install keras_curvature[plot]`.

Knows records and densities as plain numbers, nothing of models. matplotlib is only
imported when a picture is asked for, and not at all when axes are passed.

```python
from keras_curvature import plots

plots.plot_history(monitor)                        # curves over the steps
plots.plot_diagonal(monitor.history[-1]["layers"]) # where the model is stiff
plots.plot_spectral_density(kc.hessian_spectral_density(model, x, y))
```
"""

import types

import numpy as np

#: Blue, orange, green and a grey that people with colour blindness tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#808080"

#: Name of a figure: title, key of its error, and how many errors make the band.
_FIGURES = {
    "loss": ("Loss on the probe data", None, 0),
    "trace": ("Trace of the Hessian", "hessian_trace_standard_error", 2),
    "frobenius_norm": (
        "Frobenius norm of the Hessian",
        "hessian_frobenius_norm_standard_error",
        2,
    ),
    # The norm of a residual is a bound, not a standard error.
    "max_eigenvalue": (
        "Largest eigenvalue of the Hessian",
        "hessian_max_eigenvalue_error",
        1,
    ),
}

#: A limit this many times the largest eigenvalue would flatten the curve.
_FAR = 4

#: More layers than this are drawn in narrower rows.
_FEW = 16


def plot_history(
    monitor_or_history,
    figures=("trace", "frobenius_norm", "max_eigenvalue"),
    ax=None,
    **options,
):
    """Draws figures over the steps of training, with bands for their errors.

    The band is two standard errors wide on either side for trace and norm, and the
    bound from the residual for the eigenvalue. Where training is plain gradient
    descent, the eigenvalue is drawn against 2 / learning rate, below which it is
    stable. A limit far above the curve is named in the legend and left out of view.

    Args:
        monitor_or_history: a `CurvatureMonitor`, or its `history`.
        figures: names among `"loss"`, `"trace"`, `"frobenius_norm"` and
            `"max_eigenvalue"`, or a single one; a picture each.
        ax: matplotlib axes to draw on, as many as figures (a single one for a single
            figure). Defaults to new ones, side by side. Pass those of an earlier call
            to compare runs.
        **options: passed on to `ax.plot`, such as `label` and `color`.

    Returns:
        NumPy array of the axes, or the axes themselves for a single name.

    Raises:
        ImportError: if matplotlib is needed and not installed.
        ValueError: for a history without records, an unknown figure, or one that the
            records do not have.
    """
    records = getattr(monitor_or_history, "history", monitor_or_history)
    if not isinstance(records, (list, tuple)) or not records:
        raise ValueError(
            "A history has at least one record: pass a `CurvatureMonitor` after "
            "training, or its `history`. Received: "
            f"monitor_or_history={monitor_or_history!r}."
        )
    names = [figures] if isinstance(figures, str) else list(figures)
    for name in names:
        if name not in _FIGURES or _key(name) not in records[-1]:
            raise ValueError(
                f"`figures` must be among {', '.join(map(repr, _FIGURES))}, and "
                f"measured by the monitor. Received: figures={figures!r}."
            )
    if ax is None:
        size = (4.2 * len(names), 3.2)
        shape = {"ncols": len(names), "squeeze": False}
        ax = _pyplot().subplots(figsize=size, layout="constrained", **shape)[1][0]
    axes = np.atleast_1d(np.asarray(ax, dtype=object)).ravel()
    if len(axes) != len(names):
        raise ValueError(
            f"`ax` must hold one of matplotlib's axes for each of the {len(names)} "
            f"figures. Received: ax={ax!r}."
        )
    for name, each in zip(names, axes, strict=True):
        _draw_figure(each, name, records, options)
    return axes[0] if isinstance(figures, str) else axes


def plot_diagonal(records, ax=None):
    """Draws the diagonal of the Hessian by layer, on a logarithmic scale.

    A bar reaches to the mean size of a layer's diagonal entries, a mark shows the
    largest of them, and the share of negative ones is written beside it.

    Args:
        records: list of dictionaries, one for each layer, as `curvature_summary`
            returns them or `monitor.history[-1]["layers"]` holds them. A last one
            named `"total"` is left out.
        ax: matplotlib axes to draw on. Defaults to new ones.

    Returns:
        The axes.

    Raises:
        ImportError: if matplotlib is needed and not installed.
        ValueError: for records without figures of a diagonal.
    """
    layers = [r for r in records if "diagonal_mean_abs" in r]
    if not layers:
        raise ValueError(
            "`records` must hold figures of the diagonal by layer, as those of "
            f"`curvature_summary` do. Received: records={records!r}."
        )
    if ax is None:
        size = (6.4, 1.1 + (0.32 if len(layers) <= _FEW else 0.2) * len(layers))
        ax = _pyplot().subplots(figsize=size, layout="constrained")[1]
    means = np.array([r["diagonal_mean_abs"] for r in layers])
    largest = np.array([r["diagonal_max"] for r in layers])
    # Logarithms have no zero: such bars and marks stay away.
    shown = np.concatenate([means[means > 0], largest[largest > 0], [1e-12]])
    low = 0.3 * np.min(shown[:-1], initial=1.0)
    high = np.max(shown)
    rows = np.arange(len(layers))
    ax.barh(rows, np.maximum(means - low, 0), left=low, color=BLUE, label="mean |h|")
    ax.plot(
        np.where(largest > 0, largest, np.nan), rows, "D", color=ORANGE, label="max h"
    )
    for row, layer in zip(rows, layers, strict=True):
        ax.annotate(
            f"{layer['negative_share']:.0%} negative",
            (1.01, row),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color=GREY,
        )
    ax.set_xscale("log")
    ax.set_xlim(low, max(2 * high, 10 * low))
    ax.set_yticks(rows, [r["name"] for r in layers])
    if len(layers) > _FEW:
        ax.tick_params(axis="y", labelsize=8)
    ax.set_ylim(len(layers) - 0.5, -0.5)  # In the order of the model, from above.
    ax.set_xlabel("diagonal of the Hessian, h")
    ax.set_title("Curvature by layer", fontsize=10.5, loc="left")
    _plain(ax)
    # Beside the title: below, its distance would depend on the figure's height.
    _legend(ax, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1, ncols=2)
    return ax


def plot_spectral_density(density, ax=None, **options):
    """Draws the density of the eigenvalues and a band of two standard errors.

    Marks on the axis show the smallest and the largest eigenvalue that were found (the
    extreme Ritz values of the Lanczos iterations): there may be a single one, where the
    density is too low to be seen.

    Args:
        density: a `SpectralDensity`, from `hessian_spectral_density`, or the
            `"spectral_density"` of a monitor's record.
        ax: matplotlib axes to draw on. Defaults to new ones.
        **options: passed on to `ax.plot`.

    Returns:
        The axes.

    Raises:
        ImportError: if matplotlib is needed and not installed.
    """
    if ax is None:
        ax = _pyplot().subplots(figsize=(6, 3.6), layout="constrained")[1]
    if isinstance(density, dict):
        density = types.SimpleNamespace(
            **{k: np.array(v) if isinstance(v, list) else v for k, v in density.items()}
        )
    shared = bool(ax.lines)
    # The floor is a tenth of what a single eigenvalue looks like.
    floor = 0.1 / density.size / (density.sigma * np.sqrt(2 * np.pi))
    (line,) = ax.plot(density.grid, density.density, **{"color": BLUE, **options})
    upper = density.density
    if density.standard_error is not None:
        upper = upper + 2 * density.standard_error
        ax.fill_between(
            density.grid,
            np.maximum(density.density - 2 * density.standard_error, 0.1 * floor),
            upper,
            color=line.get_color(),
            alpha=0.3,
            linewidth=0,
        )
    # Most eigenvalues of a network are near zero; the interesting ones are few.
    ax.set_yscale("log")
    # Its tails, which are anything but zero, would take all of a logarithmic axis.
    highest = max(3 * np.max(upper), 10 * floor)
    bottom, top = ax.get_ylim() if shared else (floor, highest)
    ax.set_ylim(min(bottom, floor), max(top, highest))
    for extreme in _extremes(density):
        mark = {"color": line.get_color(), "clip_on": False, "zorder": 3}
        ax.plot(extreme, 0, "^", transform=ax.get_xaxis_transform(), **mark)
        ax.annotate(
            f"{extreme:.3g}",
            (extreme, 0),
            xycoords=ax.get_xaxis_transform(),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=line.get_color(),
            bbox={"color": ax.get_facecolor(), "alpha": 0.8, "pad": 1},
        )
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("density")
    _plain(ax)
    return ax


def _extremes(density):
    """The smallest and the largest Ritz value."""
    nodes = getattr(density, "nodes", None)
    if nodes is None:
        # A record holds none; its grid ends six deviations beyond them.
        beyond = 6 * density.sigma
        return density.grid[0] + beyond, density.grid[-1] - beyond
    return min(x.min() for x in nodes), max(x.max() for x in nodes)


def _draw_figure(ax, name, records, options):
    title, error_key, factor = _FIGURES[name]
    step = np.array([r["step"] for r in records])
    value = _column(records, _key(name))
    (line,) = ax.plot(step, value, **options)
    if error_key is not None:
        error = factor * np.nan_to_num(_column(records, error_key))
        if error.any():
            title += ", ± 2 standard errors" if factor == 2 else ", ± error bound"
        band = {"color": line.get_color(), "alpha": 0.2, "linewidth": 0}
        ax.fill_between(step, value - error, value + error, **band)
    if name == "max_eigenvalue":
        _draw_limit(ax, line, step, value, _column(records, "two_over_learning_rate"))
    ax.set_title(title, fontsize=10.5, loc="left")
    ax.set_xlabel("step")
    _plain(ax)
    if ax.get_legend_handles_labels()[1]:
        _legend(ax)


def _draw_limit(ax, line, step, value, limit):
    if not np.isfinite(limit).any():
        return
    style = {"linestyle": "--", "color": line.get_color(), "linewidth": 1}
    far = np.nanmin(limit) > _FAR * np.nanmax(np.append(np.abs(value), 0))
    if far:
        # In the legend alone: a curve without points.
        label = f"2 / learning rate: {np.nanmin(limit):,.4g}, above the picture"
        ax.plot([], [], label=label, **style)
    else:
        ax.plot(step, limit, label="2 / learning rate", **style)


def _key(name):
    return name if name == "loss" else f"hessian_{name}"


def _column(records, key):
    """A figure over all records, not a number where one does not know it."""
    values = [r.get(key) for r in records]
    return np.array([np.nan if v is None else v for v in values], float)


def _plain(ax):
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _legend(ax, **place):
    ax.legend(frameon=False, fontsize=9, **place)


def _pyplot():
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib: pip install keras_curvature[plot]"
        ) from error
    return pyplot
