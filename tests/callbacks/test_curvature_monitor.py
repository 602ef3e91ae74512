"""The monitor during `fit`: it disturbs nothing, probes when it should, and tells."""

import csv
import gc
import re
import warnings

import keras
import numpy as np
import pytest
from keras import layers
from training import (
    BATCHES,
    CHEAP,
    assert_same,
    data,
    fit,
    monitor,
    network,
    several_steps,
    state,
    steps,
)

import keras_curvature as kc
from keras_curvature import backend

# Without a trace


def noisy_network(built):
    """Everything that draws random numbers or keeps statistics."""
    keras.utils.set_random_seed(0)
    return network(
        layers.Dense(8, "gelu"),
        layers.BatchNormalization(),
        layers.Dropout(0.3),
        layers.GaussianNoise(0.1),
        layers.Dense(3),
        built=built,
        optimizer="adam",
        metrics=["accuracy"],
    )


@pytest.mark.parametrize("built", [True, False], ids=["built", "unbuilt"])
def test_training_is_bit_for_bit_the_same(built, tmp_path):
    """Dropout, noise, moving statistics, shuffling, validation, and a second `fit`."""
    x, y = data()
    # All figures disturb nothing; a model not yet built is built before the first one.
    figures = {} if built else CHEAP
    results = []
    for watched in (False, True):
        model = noisy_network(built)
        callbacks = []
        if watched:
            watch = kc.CurvatureMonitor((x[:20], y[:20]), 3, tmp_path, **figures)
            callbacks = [watch]
        history = []
        keras.utils.set_random_seed(1)
        options = {"shuffle": True, "validation_data": (x, y)}
        with warnings.catch_warnings():
            # Such as that no figure is to be had this way.
            warnings.simplefilter("error", UserWarning)
            for epochs in (2, 1):
                history.append(fit(model, *callbacks, epochs=epochs, **options))
        draws = [np.random.random(), float(keras.random.uniform(()))]
        results.append((history, [*state(model), *draws]))
    assert steps(watch) == list(range(0, 31, 3))
    assert_same(*[numbers for _, numbers in results])
    plain, probed = [history for history, _ in results]
    for before, after in zip(plain, probed, strict=True):
        assert before == {k: v for k, v in after.items() if "hessian" not in k}


# When


@pytest.mark.parametrize(
    "per_execution, expected",
    [
        (
            1,
            {
                4: [0, 4, 8, 12, 16, 20],
                7: [0, 7, 14],
                1000: [0],
                "epoch": [0, 10, 20],
            },
        ),
        # Executions end at 4, 8, 10 and 14, 18, 20: when a multiple was passed.
        pytest.param(
            4, {4: [0, 4, 8, 14, 18, 20], "epoch": [0, 10, 20]}, marks=several_steps
        ),
    ],
)
def test_steps_of_probes(per_execution, expected):
    watches = [monitor(update_freq=freq) for freq in expected]
    model = network(steps_per_execution=per_execution)
    fit(model, *watches, epochs=4, initial_epoch=2)
    assert dict(zip(expected, map(steps, watches), strict=True)) == expected


def test_several_fits_count_on():
    """Where to probe is a function of the step, however it is cut into fits."""
    watch, model = monitor(), network()
    for _ in range(3):
        fit(model, watch)
    assert steps(watch) == [0, 4, 8, 12, 16, 20, 24, 28]


def test_epochs_of_probes():
    watch = monitor()
    fit(network(), watch, epochs=4, initial_epoch=2)
    assert [(r["step"], r["epoch"]) for r in watch.history] == [
        (0, 2),
        (4, 2),
        (8, 2),
        (12, 3),
        (16, 3),
        (20, 3),
    ]


def test_probes_at_the_weights_of_its_step():
    """Before the first step, and after weights that other callbacks bring along."""

    class Bring(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.model.layers[0].kernel.assign(self.model.layers[0].kernel + 1)

    x, y = data()
    model, watch = network(), monitor(update_freq="epoch")
    fit(model, watch, Bring())
    expected = network()
    expected.layers[0].kernel.assign(expected.layers[0].kernel + 1)
    for record, one in zip(watch.history, (expected, model), strict=True):
        loss = one.evaluate(x[:20], y[:20], verbose=0)
        np.testing.assert_allclose(record["loss"], loss, rtol=1e-6)


# What


def test_record():
    x, y = data()
    model = network()
    watch = kc.CurvatureMonitor((x, y), 5, num_matvecs=31, seed=3)
    fit(model, watch)
    record, op = watch.history[-1], kc.HessianOperator(model, x, y)
    h = op.to_dense()
    assert record.pop("seconds") > 0
    assert 0 <= record.pop("overhead") < 1
    assert record.pop("mode") == "training without noise"
    # All of P, and one for each logit: both are exact.
    assert record.pop("num_matvecs") == 31 + 3
    expected = {
        "step": 10,
        "epoch": 0,
        "learning_rate": 0.01,
        "loss": float(op.loss()),
        "hessian_trace": np.trace(h),
        "hessian_trace_standard_error": 0,
        "hessian_frobenius_norm": np.linalg.norm(h),
        "hessian_frobenius_norm_standard_error": 0,
        "hessian_max_eigenvalue": np.linalg.eigvalsh(h).max(),
        "hessian_max_eigenvalue_error": 0,
        # Of plain gradient descent.
        "stability_threshold": 2 / 0.01,
        "two_over_learning_rate": 2 / 0.01,
        "stability_ratio": np.linalg.eigvalsh(h).max() / (2 / 0.01),
        "gradient_norm": np.linalg.norm(op.value_and_gradient()[1]),
    }
    # tests/test_gradients.py compares these.
    for key in ("gradient_noise_scale", "update_ratio"):
        assert record.pop(key) > 0
    variables, parts = record.pop("variables"), record.pop("layers")
    assert record.pop("optimizer") == {}
    assert record.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(record[key], value, rtol=1e-4, atol=1e-5)
    paths = [f"{p}/{v}" for p in ("hidden", "dense") for v in ("kernel", "bias")]
    assert [re.sub(r"_\d+/", "/", v["path"]) for v in variables] == paths
    for v, part in zip(variables, op.split(np.diag(h)), strict=True):
        assert v["size"] == part.size
        np.testing.assert_allclose(v["diagonal_mean"], part.mean(), rtol=1e-4)
        np.testing.assert_allclose(v["trace"], part.sum(), rtol=1e-4)
    assert [p["size"] for p in parts] == [16, 15]
    np.testing.assert_allclose(sum(p["trace"] for p in parts), np.trace(h), rtol=1e-4)
    np.testing.assert_allclose(sum(p["frobenius_share"] for p in parts), 1, rtol=1e-5)


def test_batch_normalization_is_probed_as_it_trains():
    keras.utils.set_random_seed(0)
    x, y = data()
    model = network(layers.Dense(4), layers.BatchNormalization(), layers.Dense(3))
    watch = monitor(probe_data=(x, y), update_freq=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(model, watch)
    modes = {record["mode"] for record in watch.history}
    assert modes == {
        f"training without noise, BatchNormalization over {len(x)} samples"
    }
    y_pred = model(x, training=True)
    loss = keras.ops.convert_to_numpy(model.compute_loss(x, y, y_pred))
    np.testing.assert_allclose(watch.history[-1]["loss"], loss, rtol=1e-5)


def test_no_verdict_on_stability_where_the_probe_has_another_loss():
    x, y = data()
    model = network()
    # What looks at the optimizer's steps also knows its threshold.
    arguments = {"update_freq": 5, "preconditioned": True}
    watch = monitor(probe_data=(x, y), **arguments)
    elsewhere = monitor(probe_data=(10 + 20 * x, y), **arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, elsewhere, epochs=2)
    assert sum("last batches of training" in str(w.message) for w in caught) == 1
    # Before the first step there is nothing to compare with.
    told = ["stability_threshold" in record for record in elsewhere.history]
    assert told[0] and not any(told[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(network(), watch, epochs=2)
    assert all("stability_threshold" in record for record in watch.history)


def test_seed_and_step_decide_the_figures():
    """At the same weights: noise that stayed the same would look like a figure."""
    model = network(layers.Dense(3))

    def figures(seed):
        watch = monitor(
            num_matvecs=4, diagonal="hutchinson", diagonal_samples=1, seed=seed
        )
        watch.set_model(model)
        records = [watch.probe(step) for step in (0, 4, 8)]
        return np.array(
            [(r["hessian_trace"], r["hessian_frobenius_norm"]) for r in records]
        )

    first = figures(1)
    np.testing.assert_array_equal(figures(1), first)
    assert np.all(figures(2) != first)
    assert len(set(first[:, 0])) == 3


# Logs


class Logs(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.epochs = []

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(dict(logs))


def test_logs(tmp_path):
    """The last probe of each epoch, for all who read logs."""
    watch, logs = monitor(num_matvecs=3), Logs()
    path = tmp_path / "log.csv"
    stop = keras.callbacks.EarlyStopping("hessian_trace", 1e9, 2, mode="min")
    callbacks = [watch, keras.callbacks.CSVLogger(path), stop, logs]
    history = fit(network(), *callbacks, epochs=9)
    eigenvalue = "hessian_max_eigenvalue"
    names = ["hessian_trace", "hessian_frobenius_norm", eigenvalue]
    names.append(f"{eigenvalue}_error")
    assert list(history) == ["loss", *names]
    assert len(history["loss"]) == 3  # `EarlyStopping` found no improvement.
    rows = list(csv.DictReader(path.open()))
    for epoch, last in enumerate((8, 20, 28)):
        (record,) = [r for r in watch.history if r["step"] == last]
        for name in names:
            assert history[name][epoch] == record[name] == logs.epochs[epoch][name]
            assert float(rows[epoch][name]) == record[name]


# Over a long time


def live_graphs():
    """What TensorFlow and JAX have compiled and still keep."""
    # By name: `isinstance` makes lazy modules load.
    names = "ConcreteFunction", "MeshExecutable", "LoadedExecutable"
    return sum(type(o).__name__ in names for o in gc.get_objects())


def test_nothing_grows():
    """Neither graphs nor objects, from probe to probe and from fit to fit."""
    x, y = data()
    watch = kc.CurvatureMonitor((x, y), 1, num_matvecs=6)
    model = network()
    for _ in range(2):
        fit(model, watch)

    def count():
        watch.history.clear()
        gc.collect()
        return len(gc.get_objects())

    operator = watch.operator
    traces = backend.num_traces()
    count()  # What training left is gone after the second collection only.
    start, graphs = count(), live_graphs()
    for _ in range(20):
        watch.probe()
    probed = count()
    # Anything kept would be kept 20 times.
    assert probed - start < 20
    for _ in range(2):
        fit(model, watch)
    # TensorFlow keeps a weak reference here and there; 20 probes were made, and what
    # one leaves in its record alone is more than ten objects.
    assert count() - probed < 200
    assert live_graphs() == graphs
    assert watch.operator is operator
    assert backend.num_traces() == traces


# The line per probe


def screen(output):
    """What a terminal shows in the end."""
    lines, place = [""], 0
    for c in re.sub(r"\x1b\[[\d;]*m", "", output):
        if c == "\n":
            lines.append("")
            place = 0
        elif c == "\r":
            place = 0
        elif c == "\b":
            place = max(place - 1, 0)
        else:
            lines[-1] = lines[-1][:place] + c + lines[-1][place + 1 :]
            place += 1
    return [line.rstrip() for line in lines if line.strip()]


@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_lines_do_not_fight_the_progress_bar(verbose, capsys):
    watch = monitor(num_matvecs=3, verbose=1)
    fit(network(metrics=["accuracy"]), watch, epochs=2, verbose=verbose)
    output = capsys.readouterr().out
    lines = screen(output)
    told = [line for line in lines if line.startswith("curvature at step ")]
    assert len(told) == len(watch.history) == 6
    number = r"-?[\d.]+(e[-+]\d+)?"
    for line, step in zip(told, steps(watch), strict=True):
        assert re.fullmatch(
            rf"curvature at step {step} - trace {number}( ± {number})? - norm "
            rf"{number}( ± {number})?( - max eigenvalue {number} ± {number})? - "
            r"[\d.]+s - overhead \d+%",
            line,
        )
    assert lines[0].startswith("curvature: preparing the first probe (31 parameters)")
    rest = [line for line in lines[1:] if line not in told]
    assert all(re.match(rf"Epoch \d/2$|{BATCHES}/{BATCHES} ", x) for x in rest), rest
    assert len(rest) == (4 if verbose else 0)
    assert ("\r" in output) == (verbose == 1)


@pytest.mark.parametrize(
    ("verbose", "of_fit", "lines"), [("auto", 0, 0), ("auto", 2, 1), (0, 2, 0)]
)
def test_the_wait_for_the_first_probe_is_announced(verbose, of_fit, lines, capsys):
    """Before it compiles, once, with its cost; where `fit` prints something too."""
    watch, printed = monitor(num_matvecs=3, verbose=verbose), []
    compute = watch._measurement.take

    def take(*arguments):
        printed.append(capsys.readouterr().out)
        return compute(*arguments)

    watch._measurement.take = take
    model = network()
    for _ in range(2):
        fit(model, watch, verbose=of_fit)
    told = [text for text in printed if "curvature" in text]
    assert told == printed[:1] * lines
    for line in told:
        assert "preparing the first probe (31 parameters)" in line
        assert "3 products with the Hessian: each about two gradients" in line
    assert "curvature" not in capsys.readouterr().out.replace("hessian", "")


def test_another_verbosity_is_refused():
    with pytest.raises(ValueError, match='`verbose` must be 0, 1 or "auto".*Rec.*=2'):
        monitor(verbose=2)


def test_repr_tells_what_was_seen(tmp_path):
    watch = monitor(log_dir=tmp_path)
    assert repr(watch).endswith(f"log_dir={str(tmp_path)!r}, 0 probes>")
    fit(network(), watch)
    last = watch.history[-1]
    assert "update_freq=4" in repr(watch) and "3 probes" in repr(watch)
    assert f"at step 8 - trace {last['hessian_trace']:.4g}" in repr(watch)
