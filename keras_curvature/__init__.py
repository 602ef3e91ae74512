"""See the curvature of a Keras model's loss while `fit` runs, and step with it.

The names below are imported when they are first asked for. For TensorBoard's server
loads the page "Curvature" through this package, needs none of them, and may run where
there is no Keras.
"""

import contextlib
import importlib
import sys
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "CurvatureFeed",
    "CurvatureMonitor",
    "DiagonalNewton",
    "Estimate",
    "HessianOperator",
    "LayerRule",
    "activation_curvature",
    "critical_sharpness",
    "curvature_summary",
    "hessian_diagonal",
    "hessian_eigenvalues",
    "hessian_frobenius_norm",
    "hessian_matrix",
    "hessian_spectral_density",
    "hessian_trace",
    "register_layer_rule",
    "suggest_learning_rate",
]

if TYPE_CHECKING:
    from keras_curvature.activations import activation_curvature
    from keras_curvature.analysis import (
        hessian_diagonal,
        hessian_frobenius_norm,
        hessian_matrix,
        hessian_trace,
    )
    from keras_curvature.callbacks import CurvatureFeed, CurvatureMonitor
    from keras_curvature.critical import critical_sharpness
    from keras_curvature.estimators import Estimate
    from keras_curvature.layerwise.rules import LayerRule, register_layer_rule
    from keras_curvature.learning_rate import suggest_learning_rate
    from keras_curvature.operators import HessianOperator
    from keras_curvature.optimizers import DiagonalNewton
    from keras_curvature.report import curvature_summary
    from keras_curvature.spectrum import hessian_eigenvalues, hessian_spectral_density

#: The room of each name.
_ROOMS = {
    "CurvatureFeed": "callbacks",
    "CurvatureMonitor": "callbacks",
    "DiagonalNewton": "optimizers",
    "Estimate": "estimators",
    "HessianOperator": "operators",
    "LayerRule": "layerwise.rules",
    "activation_curvature": "activations",
    "critical_sharpness": "critical",
    "curvature_summary": "report",
    "hessian_diagonal": "analysis",
    "hessian_eigenvalues": "spectrum",
    "hessian_frobenius_norm": "analysis",
    "hessian_matrix": "analysis",
    "hessian_spectral_density": "spectrum",
    "hessian_trace": "analysis",
    "register_layer_rule": "layerwise.rules",
    "suggest_learning_rate": "learning_rate",
}


def __getattr__(name: str) -> object:
    is_room = name in {room.partition(".")[0] for room in _ROOMS.values()}
    if not (is_room or name in _ROOMS):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        room = importlib.import_module(f"{__name__}.{_ROOMS.get(name, name)}")
    except (ImportError, ValueError) as error:
        # Keras runs on a backend that is not ours, or not at all.
        raise ImportError(f"{__name__}.{name}: {error}") from error
    globals()[name] = room if is_room else getattr(room, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# A saved model is loaded without asking for a name: Keras has to know the optimizer.
if "keras" in sys.modules or "tensorboard.default" not in sys.modules:
    with contextlib.suppress(ImportError, ValueError):
        importlib.import_module(f"{__name__}.optimizers")
