"""The pictures show the numbers that they were given."""

import sys

import numpy as np
import pytest

from keras_curvature import estimators, plots

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

STEPS = (0, 10, 20)


def record(step, rate=0.1):
    return {
        "step": step,
        "loss": 1 / (1 + step),
        "two_over_learning_rate": rate and 2 / rate,
        "hessian_trace": 5.0 + step,
        "hessian_trace_standard_error": 0.5,
        "hessian_frobenius_norm": 3.0 + step,
        "hessian_frobenius_norm_standard_error": None,
        "hessian_max_eigenvalue": 1.0 + step,
        "hessian_max_eigenvalue_error": 0.25,
    }


def layer(name, mean, largest):
    return {
        "name": name,
        "diagonal_mean_abs": mean,
        "diagonal_max": largest,
        "negative_share": 0.25,
    }


HISTORY = [record(step) for step in STEPS]


@pytest.fixture(autouse=True)
def closed():
    yield
    from matplotlib import pyplot

    pyplot.close("all")


def curve(ax, number=0):
    return ax.lines[number].get_ydata()


def band(ax):
    vertices = ax.collections[0].get_paths()[0].vertices
    at_ten = vertices[vertices[:, 0] == 10][:, 1]
    return at_ten.min(), at_ten.max()


def test_history_draws_each_figure_with_its_band():
    trace, norm, eigenvalue = plots.plot_history(HISTORY)
    np.testing.assert_array_equal(curve(trace), [5, 15, 25])
    np.testing.assert_array_equal(curve(norm), [3, 13, 23])
    np.testing.assert_array_equal(curve(eigenvalue), [1, 11, 21])
    assert band(trace) == (14, 16)  # Two standard errors.
    assert band(norm) == (13, 13)  # No error is known.
    assert band(eigenvalue) == (10.75, 11.25)  # One bound.
    assert "2 standard errors" in trace.get_title("left")
    assert norm.get_title("left") == "Frobenius norm of the Hessian"
    assert "error bound" in eigenvalue.get_title("left")
    np.testing.assert_array_equal(curve(eigenvalue, 1), [20, 20, 20])


def test_history_takes_a_monitor_a_single_name_and_axes():
    class Monitor:
        history = HISTORY

    ax = plots.plot_history(Monitor(), "loss", label="one")
    np.testing.assert_array_equal(curve(ax), [1, 1 / 11, 1 / 21])
    assert plots.plot_history(HISTORY, "loss", ax, label="two") is ax
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["one", "two"]


def test_history_names_a_limit_that_is_far_above():
    ax = plots.plot_history([record(s, 1e-3) for s in STEPS], "max_eigenvalue")
    assert ax.get_ylim()[1] < 30
    (label,) = (t.get_text() for t in ax.get_legend().get_texts())
    assert label == "2 / learning rate: 2,000, above the picture"


def test_history_leaves_gaps_where_nothing_is_known():
    first = {**record(0, None), "hessian_max_eigenvalue": None}
    ax = plots.plot_history([first, record(10)], "max_eigenvalue")
    np.testing.assert_array_equal(curve(ax), [np.nan, 11])
    np.testing.assert_array_equal(curve(ax, 1), [np.nan, 20])
    # Another optimizer than gradient descent has a learning rate, but not this limit.
    adam = [{**record(s, None), "learning_rate": 0.1} for s in STEPS]
    ax = plots.plot_history(adam, "max_eigenvalue")
    assert len(ax.lines) == 1 and ax.get_legend() is None


def test_history_checks_its_arguments():
    with pytest.raises(ValueError, match="at least one record"):
        plots.plot_history([])
    with pytest.raises(ValueError, match="figures='sharpness'"):
        plots.plot_history(HISTORY, "sharpness")
    without = [{k: v for k, v in HISTORY[0].items() if "norm" not in k}]
    with pytest.raises(ValueError, match="measured by the monitor"):
        plots.plot_history(without)
    ax = plots.plot_history(HISTORY, "trace")
    with pytest.raises(ValueError, match="each of the 2 figures"):
        plots.plot_history(HISTORY, ("trace", "loss"), ax)


def test_diagonal_draws_bars_in_the_order_of_the_layers():
    records = [layer("conv", 1e-3, 1.0), layer("dead", 0.0, 0.0), layer("top", 0.1, 2)]
    ax = plots.plot_diagonal([*records, {"name": "total", "hessian_trace": 3.0}])
    ends = [bar.get_x() + bar.get_width() for bar in ax.patches]
    np.testing.assert_allclose([ends[0], ends[2]], [1e-3, 0.1])
    assert ax.patches[1].get_width() == 0
    assert [t.get_text() for t in ax.get_yticklabels()] == ["conv", "dead", "top"]
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [1.0, np.nan, 2.0])
    assert ax.get_ylim() == (2.5, -0.5) and ax.get_xscale() == "log"
    assert ax.texts[0].get_text() == "25% negative"
    assert plots.plot_diagonal(records, ax) is ax


@pytest.mark.parametrize("count", [2, 67])
def test_diagonal_wastes_no_space_and_covers_nothing(count):
    """The axes take the height, and the legend has a place of its own."""
    ax = plots.plot_diagonal([layer(f"layer_{i}", 0.1, 1.0) for i in range(count)])
    figure = ax.figure
    figure.draw_without_rendering()
    height = figure.get_size_inches()[1] * figure.dpi
    box, legend = ax.get_window_extent(), ax.get_legend().get_window_extent()
    # All but a title and an axis with its label.
    assert height - box.height < 1.1 * figure.dpi
    for other in (box, ax.xaxis.label.get_window_extent()):
        assert not legend.overlaps(other)
    title = ax._left_title.get_window_extent()
    assert not legend.overlaps(title)


def test_diagonal_of_zeros_and_without_figures():
    ax = plots.plot_diagonal([layer("dead", 0.0, 0.0)])
    assert np.isfinite(ax.get_xlim()).all()
    with pytest.raises(ValueError, match="records=\\[\\]"):
        plots.plot_diagonal([])


@pytest.mark.parametrize("vectors", [1, 3])
def test_spectral_density(vectors):
    density = estimators.spectral_density(np.diag([0.0, 1.0, 5.0]), 3, vectors)
    ax = plots.plot_spectral_density(density, label="H")
    np.testing.assert_array_equal(curve(ax), density.density)
    assert len(ax.collections) == (vectors > 1)
    assert ax.get_yscale() == "log" and ax.get_xlabel() == "eigenvalue"
    assert plots.plot_spectral_density(density, ax) is ax


def test_spectral_density_has_no_empty_decades_and_marks_its_ends():
    density = estimators.spectral_density(np.diag([-1.0, *[0.0] * 50, 5.0]), 3, 2)
    ax = plots.plot_spectral_density(density)
    bottom, top = ax.get_ylim()
    upper = density.density + 2 * density.standard_error
    assert upper.max() < top <= 3 * upper.max()
    # One eigenvalue alone is ten times as high as the bottom.
    alone = 1 / 52 / (density.sigma * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(bottom, alone / 10)
    marks = [line.get_xdata()[0] for line in ax.lines[1:]]
    np.testing.assert_allclose(marks, [-1, 5], atol=1e-5)
    assert [text.get_text() for text in ax.texts] == ["-1", "5"]
    # A second one, lower, leaves the first in view.
    wider = estimators.spectral_density(np.diag([0.0] * 9 + [50.0]), 3, 2)
    plots.plot_spectral_density(wider, ax)
    assert ax.get_ylim()[1] >= top and ax.get_ylim()[0] <= bottom


def test_spectral_density_of_a_record():
    density = estimators.spectral_density(np.diag([0.0, 1.0, 5.0]), 3, 2)
    record = {
        "grid": density.grid.tolist(),
        "density": density.density.tolist(),
        "standard_error": density.standard_error.tolist(),
        "sigma": density.sigma,
        "size": density.size,
    }
    ax = plots.plot_spectral_density(record)
    np.testing.assert_array_equal(curve(ax), density.density)
    assert len(ax.collections) == 1
    marks = [line.get_xdata()[0] for line in ax.lines[1:]]
    np.testing.assert_allclose(marks, [0, 5], atol=1e-5)


def test_missing_matplotlib_is_named(monkeypatch):
    density = estimators.spectral_density(np.diag([0.0, 1.0]), 2, 2)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (
        lambda: plots.plot_history(HISTORY),
        lambda: plots.plot_diagonal([layer("a", 1.0, 1.0)]),
        lambda: plots.plot_spectral_density(density),
    ):
        with pytest.raises(ImportError, match=r"pip install keras_curvature\[plot\]"):
            draw()
