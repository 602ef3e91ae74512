"""The optimizers that are compared, and what of each is tuned.

Everybody has one learning rate and one more parameter. The grids begin around the
usual values and are extended where the best trial is at an edge.
"""

import dataclasses
import inspect
from collections.abc import Callable

import keras
import references

import keras_curvature as kc


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer, and how it is fed and tuned.

    Attributes:
        build: function without arguments that returns the optimizer.
        rate: where the search for the learning rate begins.
        parameter: name of the attribute that is tuned besides.
        values: its values; the first is the one that the search begins with.
        curvature: method of `hessian_diagonal` that feeds the optimizer, or `None`.
        refresh: steps between two deliveries of curvature, a multiple of a block.
        products: samples or products of a delivery.
        rows: samples of a step's batch that curvature is measured on, at most.
        tuned: whether anything is tuned at all.
    """

    build: Callable
    rate: float
    parameter: str = "weight_decay"
    values: tuple = (0.004, 0.2)
    curvature: str | None = None
    refresh: int = 20
    products: int = 1
    rows: int | None = None
    tuned: bool = True


def _fed(build, *arguments):
    """The same rule fed by each of two estimators, one sample a delivery."""
    return {
        "layerwise": Method(build, *arguments, curvature="layerwise"),
        "Hutchinson": Method(build, *arguments, curvature="hutchinson"),
    }


_ADAHESSIAN = _fed(references.AdaHessian, 0.05, "power", (1.0, 0.5))
_SOPHIA = _fed(references.Sophia, 0.003, "gamma", (0.01, 0.1))

_DEFAULT = inspect.signature(kc.DiagonalNewton).parameters["learning_rate"].default

#: Those that are compared on batches of other sizes.
OF_SWEEP = (
    "AdamW",
    "Muon",
    "SOAP",
    "DiagonalNewton, axes",
    "axes, without curvature",
    "DiagonalNewton, defaults",
)

#: What `CurvatureFeed` does by itself.
_FEED = {"curvature": "layerwise", "refresh": 100, "rows": 32}

#: By name.
METHODS = {
    "AdamW": Method(lambda: keras.optimizers.AdamW(weight_decay=0.004), 0.01),
    "SGD": Method(
        lambda: keras.optimizers.SGD(momentum=0.9), 0.1, "momentum", (0.9, 0.97)
    ),
    "Lion": Method(lambda: keras.optimizers.Lion(weight_decay=0.004), 0.001),
    "Muon": Method(lambda: keras.optimizers.Muon(weight_decay=0.004), 0.01),
    "NorMuon": Method(lambda: references.NorMuon(weight_decay=0.004), 0.01),
    "SOAP": Method(lambda: references.SOAP(weight_decay=0.004), 0.01),
    "AdaHessian": _ADAHESSIAN["layerwise"],
    "AdaHessian, Hutchinson": _ADAHESSIAN["Hutchinson"],
    "Sophia": _SOPHIA["layerwise"],
    "Sophia, Hutchinson": _SOPHIA["Hutchinson"],
    # Rates are ten times AdamW's for steps of the same length, and so decay as much.
    "DiagonalNewton, entries": Method(
        lambda: kc.DiagonalNewton(weight_decay=0.0004, axes=None),
        _DEFAULT,
        values=(0.0004, 0.02),
        **_FEED,
    ),
    # The same rule with ĥ = 0: what curvature itself is worth.
    "entries, without curvature": Method(
        lambda: kc.DiagonalNewton(weight_decay=0.0004, axes=None),
        _DEFAULT,
        values=(0.0004, 0.02),
    ),
    "DiagonalNewton, axes": Method(
        lambda: kc.DiagonalNewton(weight_decay=0.0004, axes="layer"),
        _DEFAULT,
        values=(0.0004, 0.02),
        **_FEED,
    ),
    # What the axes alone are worth.
    "axes, without curvature": Method(
        lambda: kc.DiagonalNewton(weight_decay=0.0004, axes="layer"),
        _DEFAULT,
        values=(0.0004, 0.02),
    ),
    # What one gets who tunes nothing: with axes, fed and not.
    "DiagonalNewton, defaults": Method(
        kc.DiagonalNewton, _DEFAULT, tuned=False, **_FEED
    ),
    "defaults, without curvature": Method(kc.DiagonalNewton, _DEFAULT, tuned=False),
}
