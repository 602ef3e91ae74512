"""Event files as TensorBoard servers show them."""

import pytest
from records import LONG_STEPS, SERVED_STEPS, synthetic_record
from servers import start_browser, tensorboard_server

from keras_curvature.tensorboard.writer import CurvatureWriter


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Chromium, without a window."""
    pytest.importorskip("selenium", reason="selenium drives the browser")
    started = start_browser(tmp_path_factory.mktemp("chromium"))
    if started is None:
        pytest.skip("no browser: install chromium and chromium-driver")
    yield started
    started.quit()


@pytest.fixture(scope="session")
def served_logs(tmp_path_factory):
    """Runs `a`, `b` in two fit calls each, `sparse` of few figures, `long` of many."""
    directory = tmp_path_factory.mktemp("logs")
    for seed, run in enumerate(("a", "b")):
        writer = CurvatureWriter(directory / run)
        for steps in (SERVED_STEPS[:2], SERVED_STEPS[2:]):
            for step in steps:
                writer.write(synthetic_record(step, seed))
            writer.close()
    # What is missing or not a number must not spoil the page.
    with CurvatureWriter(directory / "sparse") as writer:
        writer.write({"step": 1, "loss": 0.5, "hessian_trace": float("nan")})
        density = {"grid": [0.0, 1.5], "density": [0.5, 1 / 6]}
        density["standard_error"] = [0.125, 0.0]
        figures = {"hessian_trace": 4.0, "two_over_learning_rate": 4.0}
        writer.write({"step": 2, "spectral_density": density, **figures})
    with CurvatureWriter(directory / "long", top_layers=0) as writer:
        for step in LONG_STEPS:
            layers = [{"name": n, "trace": float(step + i)} for i, n in enumerate("xy")]
            writer.write({"step": step, "loss": float(step), "layers": layers})
    return directory


@pytest.fixture(scope="session", params=["true", "false"], ids=["fast", "slow"])
def server(request, served_logs):
    """A TensorBoard on these runs, by its fast loader and by its slow one.

    The slow one has TensorFlow read for it where that is installed.
    """
    without = ("tensorflow", "keras") if request.param == "true" else ()
    with tensorboard_server(served_logs, request.param, without) as running:
        running.wait_for_steps([300, 300, LONG_STEPS[-1], 2])
        yield running


@pytest.fixture(scope="session")
def empty_server(tmp_path_factory):
    """A TensorBoard on an empty directory."""
    with tensorboard_server(tmp_path_factory.mktemp("empty"), "true") as running:
        yield running


@pytest.fixture(scope="session")
def serve():
    """`tensorboard_server`, for tests that need one of their own."""
    return tensorboard_server
