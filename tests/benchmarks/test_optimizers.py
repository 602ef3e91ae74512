"""The comparison of optimizers: tuning, references, and one small comparison."""

import math
import pathlib
import sys

import cases
import keras
import numpy as np
import pytest
import scripts
import tensorflow as tf

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "optimizers"
sys.path.append(str(FOLDER))

import references  # noqa: E402
import report  # noqa: E402
import tuning  # noqa: E402
from methods import METHODS  # noqa: E402
from tasks import TASKS  # noqa: E402
from train import Trainer, schedule  # noqa: E402


def main_module(monkeypatch):
    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        monkeypatch.setenv(name, "1")  # What it sets is undone after the test.
    return scripts.loaded(FOLDER / "__main__.py")


@pytest.mark.parametrize("best", [1e-5, 0.02, 30.0])
def test_tuning_finds_a_rate_that_is_anywhere(best):
    """Beyond the first grid too, with the number of trials that everybody has."""
    trials = tuning.tune(
        lambda rate, value: abs(math.log10(rate / best)) + value, 0.01, (1, 0), 12
    )
    assert len(trials) == len({trial[:2] for trial in trials}) == 12
    rate, value, _ = min(trials, key=lambda trial: trial[2])
    assert value == 0 and abs(math.log10(rate / best)) <= 0.3


def test_divergence_loses():
    trials = tuning.tune(lambda rate, value: np.nan if rate > 1e-3 else 1, 0.01, (0, 1))
    assert len(trials) == tuning.TRIALS
    assert min(trials, key=lambda trial: trial[2])[0] <= 1e-3


def test_schedule_rises_and_falls_to_zero():
    factors = schedule(100)
    assert factors.max() == 1 and len(factors) == 100
    assert 0 < factors[0] < 0.3 and 0 < factors[-1] < 0.02


def stepped(optimizer, diagonals, gradients):
    variable = tf.Variable([1.0, 1.0])
    optimizer.build([variable])
    for diagonal in diagonals:
        optimizer.update_hessian_diagonal([tf.constant(diagonal)])
    for gradient in gradients:
        optimizer.apply([tf.constant(gradient)], [variable])
    return variable.numpy()


def test_adahessian_by_hand():
    """Root mean square of the deliveries; their signs do not matter."""
    end = stepped(references.AdaHessian(0.1), [[3.0, -1.0], [-4.0, 1.0]], [[2.0, -1.0]])
    # Debiased over two deliveries of nearly equal weight.
    h = np.sqrt((0.999 * np.array([9, 1]) + np.array([16, 1])) / 1.999)
    np.testing.assert_allclose(end, 1 - 0.1 * np.array([2, -1]) / (h + 1e-4), 1e-5)


def test_sophia_by_hand():
    """Clipped where curvature is small or negative."""
    end = stepped(references.Sophia(0.1, gamma=1.0), [[500.0, -1.0]], [[2.0, -1.0]])
    # Neither average is debiased: 0.04 of the gradient over 0.01 of the diagonal.
    np.testing.assert_allclose(end, [1 - 0.1 * 0.08 / 5, 1.1], 1e-6)


def test_soap_by_hand():
    """Adam in the eigenvectors of both sides; the first step only finds them."""
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((3, 4, 3)).astype("float32")
    variable = tf.Variable(np.zeros((4, 3), "float32"))
    optimizer = references.SOAP(0.1)
    optimizer.build([variable])
    moments = [np.zeros((n, n)) for n in (4, 3)]
    momentum, square, weights = np.zeros((4, 3)), np.zeros((4, 3)), np.zeros((4, 3))
    left = right = None
    for step, g in enumerate(gradients.astype("float64")):
        optimizer.apply([tf.constant(g, "float32")], [variable])
        if step:
            momentum += 0.05 * (g - momentum)
            square += 0.05 * ((left.T @ g @ right) ** 2 - square)
            known = 1 - 0.95**step
            turned = left.T @ momentum @ right / known
            move = turned / (np.sqrt(square / known) + 1e-8)
            weights -= 0.1 * left @ move @ right.T
        for moment, outer in zip(moments, (g @ g.T, g.T @ g), strict=True):
            moment += 0.05 * (outer - moment)
        if not step:
            left, right = (np.linalg.eigh(moment)[1] for moment in moments)
        np.testing.assert_allclose(variable.numpy(), weights, atol=2e-5)


def test_soap_follows_the_axes():
    rng = np.random.default_rng(0)
    factor = rng.standard_normal((5, 5)) * np.array([8, 4, 2, 1, 0.5])
    variable = tf.Variable(np.zeros((5, 6), "float32"))
    optimizer = references.SOAP(0.0)
    optimizer.build([variable])
    for _ in range(400):
        g = factor @ rng.standard_normal((5, 6))
        optimizer.apply([tf.constant(g, "float32")], [variable])
    moment, axes = (
        slots[0][0].numpy() for slots in (optimizer._moments, optimizer._axes)
    )
    turned = axes.T @ moment @ axes
    off = turned - np.diag(np.diag(turned))
    assert np.linalg.norm(off) < 0.05 * np.linalg.norm(turned)


def test_normuon_moves_all_units_alike():
    rng = np.random.default_rng(0)
    gradient = rng.standard_normal((8, 4)).astype("float32") * [1, 10, 0.1, 1]
    variable = tf.Variable(np.zeros((8, 4), "float32"), name="kernel")
    optimizer = references.NorMuon(0.1, weight_decay=None)
    variable = keras.Variable(np.zeros((8, 4), "float32"), name="kernel")
    optimizer.build([variable])
    optimizer.apply([tf.constant(gradient, "float32")], [variable])
    sizes = np.sqrt(np.mean(variable.numpy() ** 2, axis=0))
    np.testing.assert_allclose(sizes, 0.1 * 0.2, rtol=1e-4)


def test_steps_to_a_target():
    run = {"steps": [10, 20, 30], "held_out": [3.0, 2.0, 1.0]}
    assert report.steps_to({"runs": [run]}, 1.5) == 25
    assert report.steps_to({"runs": [run]}, 3.5) == 10
    assert report.steps_to({"runs": [run]}, 0.5) == math.inf


@pytest.mark.parametrize("name", ["full_batch", "poisson", "value", "residual"])
def test_tasks_have_data_and_a_gradient(name):
    task = TASKS[name]
    x, y, x_held_out, y_held_out = task.data()
    assert len(x) == len(y) >= task.batch and len(x_held_out) == len(y_held_out) > 300
    model = task.build()
    with tf.GradientTape() as tape:
        loss = task.loss(y[:8], model(x[:8], training=True))
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    assert np.isfinite(loss) and all(np.any(g) for g in gradients)


def test_residual_of_the_differential_equation():
    """The Laplacian that goes forward is that of differences of the values."""
    with cases.floatx("float64"):
        model = TASKS["poisson"].build()
        points = np.array([[0.3, 0.6], [0.8, 0.1]])

        def outputs(points, f, boundary):
            rows = [[*point, f, boundary] for point in points]
            return model(np.array(rows)).numpy()[:, 0]

        def value(points):
            return outputs(points, 0, 1) / 10

        step, laplacian = 1e-3, -4 * value(points)
        for move in np.concatenate([np.eye(2), -np.eye(2)]):
            laplacian = laplacian + value(points + step * move)
        found = outputs(points, 7, 0) - 7
        np.testing.assert_allclose(found, laplacian / step**2, rtol=1e-4)


def test_runs_depend_on_the_seed_alone():
    """Not on what the same traced model trained before."""
    trainer = Trainer(TASKS["logistic"], METHODS["DiagonalNewton, entries"])
    first = trainer.run(3, 0.2)
    other = trainer.run(4, 0.5, 0.02)
    assert other["held_out"] != first["held_out"]
    assert trainer.run(3, 0.2) == first


def test_comparison(tmp_path, monkeypatch):
    """Tuned on one seed, run on others, kept and found again."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    compare = main_module(monkeypatch)
    for method in ("AdamW", "DiagonalNewton, defaults"):
        found = compare.compare("logistic", method, seeds=2, trials=5)
        assert len(found["trials"]) == (5 if method == "AdamW" else 0)
        results = report.load("logistic") | {method: found}
        report.save("logistic", results, {})
    rows = report.summary("logistic", report.load("logistic"))
    assert list(rows) == ["AdamW", "DiagonalNewton, defaults"]
    assert rows["DiagonalNewton, defaults"]["held_out"] < 0.2
    assert 0 < rows["DiagonalNewton, defaults"]["share"] < 1
    assert "| logistic regression |" in report.tables({"logistic": rows})
