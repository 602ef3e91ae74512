"""Event files as TensorBoard servers show them."""

import pytest
from records import SERVED_STEPS, synthetic_record
from servers import tensorboard_server

from keras_curvature.tensorboard.writer import CurvatureWriter


@pytest.fixture(scope="session")
def served_logs(tmp_path_factory):
    """Runs `a` and `b`, in two fit calls each, and `sparse` with few figures."""
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
    return directory


@pytest.fixture(scope="session", params=["true", "false"], ids=["fast", "slow"])
def server(request, served_logs):
    """A TensorBoard on these runs, by its fast loader and by its slow one."""
    with tensorboard_server(served_logs, load_fast=request.param) as running:
        for run in ("a", "b", "sparse"):
            running.wait_for_run(f"{run}/curvature")
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
