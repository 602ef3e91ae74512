"""The comparison of optimizers: tuning, references, and one small comparison."""

import math
import pathlib
import sys

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


def test_steps_to_a_target():
    run = {"steps": [10, 20, 30], "held_out": [3.0, 2.0, 1.0]}
    assert report.steps_to({"runs": [run]}, 1.5) == 25
    assert report.steps_to({"runs": [run]}, 3.5) == 10
    assert report.steps_to({"runs": [run]}, 0.5) == math.inf


def test_runs_depend_on_the_seed_alone():
    """Not on what the same traced model trained before."""
    trainer = Trainer(TASKS["logistic"], METHODS["DiagonalNewton"])
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
