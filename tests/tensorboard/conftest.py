"""Real TensorBoard servers, and event files read back."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request

import pytest
from records import SERVED_STEPS, synthetic_record

from keras_curvature.tensorboard.writer import CurvatureWriter


class Server:
    """A running TensorBoard, asked over HTTP."""

    def __init__(self, url, pid):
        self.url = url
        self.pid = pid

    def get(self, route, **query):
        """The body of a response, parsed if it is JSON."""
        address = f"{self.url}data/{route}"
        if query:
            address += "?" + urllib.parse.urlencode(query)
        with urllib.request.urlopen(address, timeout=20) as response:
            body = response.read()
            kind = response.headers["Content-Type"]
        return json.loads(body) if kind.startswith("application/json") else body

    def wait_for_run(self, run, seconds=40):
        """Returns when the server has read something of a run."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if run in self.get("runs"):
                return
            time.sleep(0.2)
        raise TimeoutError(f"TensorBoard shows no run {run!r}: {self.get('runs')}")


@contextlib.contextmanager
def tensorboard_server(log_dir, load_fast):
    """Starts TensorBoard on a directory, as a user does.

    Args:
        log_dir: What to show.
        load_fast: "true" or "false": which of its two loaders reads the files.
    """
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir)]
    command += ["--port", "0", "--reload_interval", "1", "--load_fast", load_fast]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""},
    )
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            address = re.search(r"(http://localhost:\d+/)", line)
            if address:
                break
        else:
            raise RuntimeError("TensorBoard did not start:\n" + "".join(said))
        # What it says later must not fill the pipe.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield Server(address[1], process.pid)
    finally:
        process.terminate()
        process.wait(timeout=20)


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
