"""What was tried on the way to `DiagonalNewton`'s rule, and what each part is worth.

`python benchmarks/optimizers/variants.py` trains every variant on every task with three
learning rates and two seeds, which no other benchmark uses.
"""

import argparse
import os
import pathlib
import sys
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "1"
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

import keras
import measure
import numpy as np
import report
from keras import ops
from methods import Method
from tasks import TASKS
from train import Trainer

SEEDS = (2000, 2001)

#: Trust radius of the variants that have one: at zero, and relative.
RADIUS, GROWTH = 0.1, 0.3


class Variant(keras.optimizers.Optimizer):
    """An optimizer whose direction is any function of what `Slots` holds."""

    def __init__(self, rule, transported=False, **kwargs):
        super().__init__(0.1, **kwargs)
        self._rule, self._transported = rule, transported

    def build(self, variables):
        """Creates the slots."""
        if self.built:
            return
        super().build(variables)
        self._m, self._v, self._h, self._squares = self.add_optimizer_variables(
            variables, ["m", "v", "h", "squares"]
        )
        self._deliveries = self.add_variable((), "zeros", "float32", name="deliveries")

    def update_hessian_diagonal(self, diagonals):
        """Takes in a new diagonal."""
        self.absorb(diagonals)

    def absorb(self, diagonals):
        """Averages diagonals and their squares, debiased."""
        self._deliveries.assign_add(1)
        weight = 0.05 / (1 - 0.95**self._deliveries)
        for h, squares, d in zip(self._h, self._squares, diagonals, strict=True):
            h.assign_add((d - h) * weight)
            squares.assign_add((ops.square(d) - squares) * weight)

    def absorbed(self, finite):
        """Nothing is refused."""

    def update_step(self, gradient, variable, learning_rate):
        """Moves one variable."""
        i = self._get_variable_index(variable)
        step = ops.cast(self.iterations + 1, "float32")
        self._m[i].assign_add((gradient - self._m[i]) * 0.1)
        self._v[i].assign_add((ops.square(gradient) - self._v[i]) * 0.001)
        m = self._m[i] / (1 - 0.9**step)
        s = ops.sqrt(self._v[i] / (1 - 0.999**step)) + 1e-12
        h, root = ops.abs(self._h[i] + 0), ops.sqrt(self._squares[i] + 0)
        moved = learning_rate * self._rule(
            m=m, s=s, h=h, root=root, g=gradient, w=ops.convert_to_tensor(variable)
        )
        self.assign_sub(variable, moved)
        if self._transported:
            # The average of gradients as it would be at the new point.
            self._m[i].assign_sub(self._h[i] * moved)


def radius(w, growth=GROWTH):
    """The trust radius."""
    return ops.sqrt(RADIUS**2 + ops.square(growth * w))


def bounded(u, s, h, r):
    """The step of `DiagonalNewton`."""
    return ops.clip(u, -s, s) / (h + s / r)


def relative(h, damping=0.1):
    """Curvature with relative damping."""
    return h + damping * ops.mean(h) + 1e-20


def grafted(d, m, s):
    """A direction with the norm of Adam's."""
    norm = ops.sqrt(ops.sum(ops.square(m / s)) / (ops.sum(ops.square(d)) + 1e-30))
    return d * norm


def rank_one(h):
    """Curvature as a product of one factor for each row and one for each column."""
    if len(h.shape) < 2:
        return h
    flat = ops.reshape(h, (-1, h.shape[-1]))
    rows, columns = (ops.mean(flat, axis=a, keepdims=True) for a in (1, 0))
    return ops.reshape(rows * columns / (ops.mean(flat) + 1e-20), h.shape)


def _adam(m, s, **_):
    return m / s


def _rule(m, s, h, g, w, **_):
    return bounded((m + g) / 2, s, h, radius(w))


def _no_curvature(m, s, g, w, **_):
    return bounded((m + g) / 2, s, 0.0, radius(w))


def _fixed_radius(m, s, h, g, w, **_):
    return bounded((m + g) / 2, s, h, RADIUS)


def _linear_radius(m, s, h, g, w, **_):
    return bounded((m + g) / 2, s, h, RADIUS + GROWTH * ops.abs(w))


def _heavier(m, s, h, g, w, **_):
    return bounded((m + g) / 2, s, 3 * h, radius(w))


def _momentum(m, s, h, w, **_):
    return bounded(m, s, h, radius(w))


def _waiting(m, s, h, g, w, **_):
    return ops.where(m * g >= 0, bounded(m, s, h, radius(w)), 0.0)


def _root(m, s, root, g, w, **_):
    return bounded((m + g) / 2, s, root, radius(w))


def _rank_one(m, s, h, g, w, **_):
    return bounded((m + g) / 2, s, rank_one(h), radius(w))


def _newton(m, s, h, **_):
    return ops.clip(m, -s, s) / relative(h)


def _mean_damping(m, s, h, **_):
    return ops.clip(m, -s, s) / (h + 0.1 * (ops.mean(h) + s / 0.01))


def _square_root(m, s, h, **_):
    return grafted(m / ops.sqrt(relative(h)), m, s)


def _quarter(m, s, h, **_):
    return grafted(m / s * relative(h) ** -0.25, m, s)


def _wiener(m, s, h, **_):
    h = relative(h)
    return grafted(m * h / (ops.square(h) + ops.square(s / 0.1)), m, s)


#: Name: rule, middle learning rate, further arguments of `Variant`, estimator.
VARIANTS = {
    "Adam": (_adam, 0.02, {}, None),
    "the rule": (_rule, 0.2, {}, "layerwise"),
    "without curvature": (_no_curvature, 0.2, {}, None),
    "radius that does not grow": (_fixed_radius, 0.2, {}, "layerwise"),
    "radius ρ + τ abs(θ)": (_linear_radius, 0.2, {}, "layerwise"),
    "three times the curvature": (_heavier, 0.2, {}, "layerwise"),
    "momentum alone": (_momentum, 0.2, {}, "layerwise"),
    "momentum, waiting where the gradient disagrees": (_waiting, 0.2, {}, "layerwise"),
    "momentum carried along by curvature": (
        _rule,
        0.2,
        {"transported": True},
        "layerwise",
    ),
    "root of averaged squares for abs(ĥ)": (_root, 0.2, {}, "layerwise"),
    "the same from Hutchinson's samples": (_root, 0.2, {}, "hutchinson"),
    "ĥ as rows times columns": (_rank_one, 0.2, {}, "layerwise"),
    "Gauss–Newton samples": (_rule, 0.2, {}, "gauss_newton"),
    "relative damping by mean and gradient": (_mean_damping, 0.1, {}, "layerwise"),
    "relative damping by mean alone": (_newton, 0.03, {}, "layerwise"),
    "square root, norm of Adam's step": (_square_root, 0.02, {}, "layerwise"),
    "Adam's over ĥ^¼, norm of Adam's step": (_quarter, 0.02, {}, "layerwise"),
    "Wiener filter, norm of Adam's step": (_wiener, 0.02, {}, "layerwise"),
}


def main():
    """Trains the variants that are not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for task in arguments.tasks:
        for name in arguments.variants:
            rule, rate, options, curvature = VARIANTS[name]
            if task in report.load(report.VARIANTS).get(name, {}):
                continue
            method = Method(
                lambda rule=rule, options=options: Variant(rule, **options),
                rate,
                curvature=curvature,
                refresh=100,
                rows=32,
            )
            trainer = Trainer(TASKS[task], method)
            losses = {}
            for factor in (0.5, 1, 2):
                runs = [trainer.run(seed, factor * rate) for seed in SEEDS]
                losses[f"{factor * rate:.3g}"] = np.mean(
                    [run["held_out"][-1] for run in runs]
                )
            results = report.load(report.VARIANTS)
            results.setdefault(name, {})[task] = losses
            report.save(report.VARIANTS, results, measure.environment())
            print(task, name, losses, flush=True)


if __name__ == "__main__":
    main()
