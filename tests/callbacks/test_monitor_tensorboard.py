"""What a run with the monitor leaves for TensorBoard, beside Keras' own callback."""

import keras
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator, event_multiplexer
from tensorboard.util import tensor_util
from training import data, fit, monitor, network, steps

import keras_curvature as kc
from keras_curvature.tensorboard import tags


def tensors(directory):
    """Every tag of a run, with its events."""
    events = event_accumulator.EventAccumulator(
        str(directory), size_guidance={event_accumulator.TENSORS: 0}
    ).Reload()
    return {t: events.Tensors(t) for t in events.Tags()["tensors"]}


def values(events):
    return [(e.step, float(e.tensor_proto.float_val[0])) for e in events]


def watch(log_dir, **arguments):
    return monitor(probe_data=data(), update_freq=5, log_dir=log_dir, **arguments)


@pytest.mark.parametrize(
    "order, update_freq", [("monitor first", "epoch"), ("monitor last", 1)]
)
def test_beside_the_tensorboard_callback(order, update_freq, tmp_path):
    """Each writes its own run; Keras' turns recording off between its writes."""
    pytest.importorskip("tensorflow", reason="Keras' own callback needs it.")
    curvature = watch(tmp_path)
    board = keras.callbacks.TensorBoard(
        tmp_path, update_freq=update_freq, write_graph=False
    )
    callbacks = [curvature, board] if order == "monitor first" else [board, curvature]
    fit(network(), *callbacks, epochs=2, validation_data=data())
    runs = event_multiplexer.EventMultiplexer()
    runs.AddRunsFromDirectory(str(tmp_path)).Reload()
    assert set(runs.Runs()) == {"curvature", "train", "validation"}
    found = tensors(tmp_path / "curvature")
    assert [s for s, _ in values(found["hessian/trace"])] == [0, 5, 10, 15, 20]
    # Listed later, Keras' callback reads the figures from the logs.
    train = tensors(tmp_path / "train")
    assert ("epoch_hessian_trace" in train) == (order == "monitor first")


def test_the_whole_set_of_tags(tmp_path):
    curvature = kc.CurvatureMonitor(data(), 5, tmp_path, num_matvecs=12)
    model = network(optimizer=kc.DiagonalNewton())
    fit(model, curvature)
    layers = [layer["name"] for layer in curvature.history[0]["layers"]]
    assert len(layers) == 2
    last = curvature.history[-1]
    expected = {
        *(figure.tag for figure in tags.GLOBAL_FIGURES),
        *(end for band in tags.BANDS for end in (band.value, band.lower, band.upper)),
        *(f"{tags.OPTIMIZER}/{x}" for x in last["optimizer"]),
        *(f"{tags.PAGE_FIGURES}/0", f"{tags.PAGE_LAYERS}/0"),
        *(tags.LAYER_TABLE, tags.MODE),
        "custom_scalars__config__",
    }
    for layer in layers:
        expected |= {f.of(layer) for f in tags.LAYER_FIGURES}
    for histogram in (tags.LAYER_HISTOGRAM, tags.GRADIENT_HISTOGRAM):
        expected |= {f"{histogram}/{x}" for x in (*layers, tags.WHOLE_MODEL)}
    # The limit of plain gradient descent, which this is not; and what is on request.
    expected -= {tags.TWO_OVER_LEARNING_RATE.tag, tags.CRITICAL_SHARPNESS.tag}
    found = tensors(tmp_path / "curvature")
    assert set(found) == expected
    for name in ("trace", "frobenius_norm", "max_eigenvalue"):
        written = values(found[f"hessian/{name}"])
        recorded = [(r["step"], r[f"hessian_{name}"]) for r in curvature.history]
        np.testing.assert_allclose(written, recorded, rtol=1e-6)


def test_per_variable_and_without_histograms(tmp_path):
    model, diagonal = network(), {"diagonal": "gauss_newton"}
    both = watch(tmp_path / "a", per_variable=True, **diagonal)
    without = watch(tmp_path / "b", histograms=False, **diagonal)
    fit(model, both, without)
    found = set(tensors(tmp_path / "a" / "curvature"))
    assert sum(t.startswith("variable_trace/") for t in found) == 4
    assert sum(t.startswith(f"{tags.VARIABLE_HISTOGRAM}/") for t in found) == 4
    found = set(tensors(tmp_path / "b" / "curvature"))
    assert not any("signed_log10" in t or t.startswith("variable_") for t in found)


def test_spectral_density_is_recorded_and_written(tmp_path):
    curvature = watch(tmp_path, spectral_density=2)
    fit(network(), curvature)
    plain, dense = [
        [r for r in curvature.history if ("spectral_density" in r) is with_it]
        for with_it in (False, True)
    ]
    assert [r["step"] for r in dense] == [0, 10]
    density = dense[0]["spectral_density"]
    # A density integrates to one.
    grid, value = np.array(density["grid"]), np.array(density["density"])
    np.testing.assert_allclose(value.sum() * (grid[1] - grid[0]), 1, rtol=1e-3)
    assert density["size"] == 31 and len(density["standard_error"]) == len(grid)
    # Two vectors, each with a Lanczos step per weight at most.
    assert 31 < dense[1]["num_matvecs"] - plain[0]["num_matvecs"] <= 2 * 31
    found = tensors(tmp_path / "curvature")[f"{tags.PAGE_DENSITY}/0"]
    assert [e.step for e in found] == [0, 10]
    written = tensor_util.make_ndarray(found[0].tensor_proto)
    np.testing.assert_allclose(written[1], value, rtol=1e-6)


def test_density_can_be_all_there_is():
    curvature = monitor(num_matvecs=0, spectral_density=True)
    curvature.set_model(network())
    assert "spectral_density" in curvature.probe(0)


@pytest.mark.parametrize("often", [-1, 0.5, "always"])
def test_density_needs_a_number_of_probes(often):
    with pytest.raises(ValueError, match="`spectral_density` must be True.*Received"):
        kc.CurvatureMonitor(data(), spectral_density=often)


def test_several_fits_are_one_run(tmp_path):
    curvature, model = watch(tmp_path), network()
    for _ in range(2):
        fit(model, curvature)
    written = values(tensors(tmp_path / "curvature")["hessian/trace"])
    assert [step for step, _ in written] == steps(curvature) == [0, 5, 10, 15, 20]


def test_no_directory_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(network(), monitor())
    assert list(tmp_path.iterdir()) == []
