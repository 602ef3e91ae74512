"""Compares optimizers: `python benchmarks/optimizers`.

Each method is tuned by the same number of trials on a seed of its own, and then trained
with five other seeds. What is there already is not computed again, so an interrupted
run goes on where it was, and two processes can share the tasks. The table and the
pictures in docs are drawn from the results by `--report`.
"""

import argparse
import os
import pathlib
import sys
import time
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# One core: steps this small gain nothing from several, and times compare.
os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "1"
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

import measure
import numpy as np
import report
from methods import METHODS, OF_SWEEP
from tasks import EVERY, SWEPT, TASKS
from train import Trainer
from tuning import TRIALS, tune

#: The first seed that tunes, and the number of those that are reported.
TUNING_SEED = 1000
SEEDS = 5


def compare(task, method, seeds=SEEDS, trials=TRIALS):
    """Tunes a method on a task, and trains with what was best.

    Args:
        task: name in `EVERY`.
        method: name in `METHODS`.
        seeds: number of trainings after tuning.
        trials: number of trainings that tune.

    Returns:
        Dictionary of plain numbers and lists, as it is kept in the results.
    """
    chosen = METHODS[method]
    trainer = Trainer(EVERY[task], chosen)
    tried, rate, value = [], chosen.rate, None
    if chosen.tuned:
        tried = tune(
            lambda rate, value: np.mean(
                [
                    trainer.run(TUNING_SEED + i, rate, value)["held_out"][-1]
                    for i in range(EVERY[task].tuning_seeds)
                ]
            ),
            chosen.rate,
            chosen.values,
            trials,
        )
        rate, value, _ = min(tried, key=lambda trial: trial[2])
    return {
        "learning_rate": rate,
        chosen.parameter: value,
        "trials": tried,
        "runs": [trainer.run(seed, rate, value) for seed in range(seeds)],
        "milliseconds": trainer.costs(value),
        "seconds_to_compile": trainer.seconds_to_compile,
        "num_parameters": trainer.model.count_params(),
    }


def main():
    """Compares the methods on the tasks that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=EVERY)
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--again", action="store_true", help="replaces what is there")
    parser.add_argument("--sweep", action="store_true", help="other sizes of batches")
    parser.add_argument("--costs", action="store_true", help="only times")
    parser.add_argument("--report", action="store_true", help="only table and pictures")
    arguments = parser.parse_args()
    if arguments.report:
        report.write()
        return
    warnings.simplefilter("ignore")
    tasks, methods = (SWEPT, OF_SWEEP) if arguments.sweep else (TASKS, METHODS)
    for task in arguments.tasks or tasks:
        for method in arguments.methods or methods:
            known = report.load(task).get(method)
            if arguments.costs:
                if known and (arguments.again or "milliseconds" not in known):
                    trainer = Trainer(EVERY[task], METHODS[method])
                    known["milliseconds"] = trainer.costs()
                    results = report.load(task) | {method: known}
                    report.save(task, results, measure.environment())
                continue
            if known and not arguments.again:
                continue
            start = time.perf_counter()
            found = compare(task, method, arguments.seeds, arguments.trials)
            # Read anew: another process may have added something meanwhile.
            results = report.load(task) | {method: found}
            report.save(task, results, measure.environment())
            losses = [run["held_out"][-1] for run in found["runs"]]
            print(
                f"{task:14} {method:24} {np.mean(losses):8.4f} ± {np.std(losses):.4f} "
                f"learning rate {found['learning_rate']:.3g} "
                f"({time.perf_counter() - start:.0f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
