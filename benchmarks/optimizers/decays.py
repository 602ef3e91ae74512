"""What the default weight decay of `DiagonalNewton` does, without curvature.

    python benchmarks/optimizers/decays.py [--tasks …]

All else is the optimizer's default, the learning rate too. Three seeds that nothing
was tuned on.
"""

import os
import pathlib
import sys
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "1"
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

import by_task
import numpy as np
from methods import METHODS
from tasks import TASKS
from train import Trainer

from keras_curvature.optimizers import diagonal_newton

#: Of variables that have axes, per step of rate one.
DECAYS = (0.0, 0.01, 0.02)

SEEDS = (4000, 4001, 4002)

#: Models with a single output have no axes.
NETWORKS = tuple(name for name in TASKS if name not in ("logistic", "regression"))


def of_task(task):
    """The row of one task, in a list."""
    method, row = METHODS["defaults, without curvature"], {"task": task}
    for decay in DECAYS:
        with mock.patch.object(diagonal_newton, "DECAY_ALONG_AXES", decay):
            trainer = Trainer(TASKS[task], method)
            losses = [trainer.run(s, method.rate)["held_out"][-1] for s in SEEDS]
        row[f"{decay:g}"] = float(np.mean(losses))
        row[f"spread, {decay:g}"] = float(np.std(losses, ddof=1))
    print(row, flush=True)
    return [row]


if __name__ == "__main__":
    title = "Held-out losses by the default weight decay"
    by_task.main(__doc__, NETWORKS, of_task, "decays", title)
