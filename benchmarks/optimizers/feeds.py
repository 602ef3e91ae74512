"""Which curvature to feed `DiagonalNewton` in the axes of the layers.

    python benchmarks/optimizers/feeds.py [--tasks …]

The same rule is fed nothing, a sample of the Hessian's diagonal, one of Gauss–Newton's,
or a shrunk diagonal of four products. Each trains with three learning rates around the
one that was tuned for samples of the Hessian, and three seeds that nothing was tuned
on; the held-out loss is that of the best rate.
"""

import dataclasses
import json
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "1"
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

import by_task
import measure
import numpy as np
from methods import METHODS
from tasks import TASKS
from train import Trainer

#: Method of the diagonal and its number of products.
FEEDS = {
    "none": (None, 0),
    "Hessian": ("layerwise", 1),
    "Gauss-Newton": ("gauss_newton", 1),
    "shrunk": ("shrunk", 4),
}

#: What is tuned for samples of the Hessian.
TUNED = "DiagonalNewton, axes"

RATES, SEEDS = (0.5, 1.0, 2.0), (3000, 3001, 3002)

#: Not those whose models are linear, nor the one that takes minutes a run.
NETWORKS = tuple(
    name for name in TASKS if name not in ("logistic", "regression", "residual")
)


def of_task(task):
    """The rows of one task."""
    path = measure.RESULTS / "optimizers" / f"{task}.json"
    tuned = json.loads(path.read_text())["results"][TUNED]
    method, rows = METHODS[TUNED], []
    for feed, (curvature, products) in FEEDS.items():
        trainer = Trainer(
            TASKS[task],
            dataclasses.replace(method, curvature=curvature, products=products),
        )
        tried = {}
        for factor in RATES:
            rate = factor * tuned["learning_rate"]
            tried[rate] = [
                trainer.run(seed, rate, tuned[method.parameter])["held_out"][-1]
                for seed in SEEDS
            ]
        rate = min(tried, key=lambda rate: np.nan_to_num(np.mean(tried[rate]), nan=1e9))
        rows.append(
            {
                "task": task,
                "feed": feed,
                "learning rate": rate,
                "held-out loss": float(np.mean(tried[rate])),
                "spread": float(np.std(tried[rate], ddof=1)),
                "all rates": [float(np.mean(x)) for x in tried.values()],
            }
        )
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    by_task.main(__doc__, NETWORKS, of_task, "feeds", "Feeds in the axes of the layers")
