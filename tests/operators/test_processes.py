"""Several processes of `torch.distributed`, each with its share of the data."""

import os
import pathlib
import re
import subprocess
import sys
import time

import cases
import keras
import numpy as np
import pytest
from patience import PATIENCE

import keras_curvature as kc

only_torch = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="PyTorch's own"
)
TESTS = pathlib.Path(__file__).parent.parent


@only_torch
def test_two_processes_find_what_one_finds(tmp_path):
    sys.path.insert(0, str(TESTS / "operators"))
    try:
        import processes_work
    finally:
        sys.path.pop(0)
    meeting_point = tmp_path / "meeting_point"
    paths = [tmp_path / f"{rank}.npz" for rank in range(2)]
    work = TESTS / "operators" / "processes_work.py"
    running = [
        subprocess.Popen(
            [sys.executable, work, str(rank), "2", meeting_point, paths[rank]],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(map(str, [TESTS, *sys.path])),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    end = time.monotonic() + PATIENCE
    codes = [None, None]
    # One that fails leaves the other waiting.
    while None in codes and not any(codes) and time.monotonic() < end:
        time.sleep(0.1)
        codes = [process.poll() for process in running]
    for process in running:
        process.kill()
    assert codes == [0, 0], [process.communicate()[1] for process in running]
    model, x, y = processes_work.network()
    expected = processes_work.figures(kc.HessianOperator(model, x, y, batch_size=2))
    first, second = map(np.load, paths)
    for name, value in expected.items():
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_allclose(first[name], value, rtol=2e-4, atol=1e-6)


@only_torch
def test_the_example():
    example = TESTS.parent / "examples" / "distributed_torch.py"
    done = subprocess.run(
        [sys.executable, example, "--steps", "20"],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"say (\S+) and (\S+); one process alone (\S+)\.\n", done.stdout)
    first, second, alone = map(float, found.groups())
    assert first == second == pytest.approx(alone, rel=1e-4)


def test_processes_that_were_not_set_up_are_refused():
    model, x, y, *_ = cases.mlp_gelu()
    with pytest.raises(ValueError, match="torch.distributed.init_process_group"):
        kc.HessianOperator(model, x, y, across_processes=True)
