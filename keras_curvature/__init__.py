"""See the curvature of a Keras model's loss while `fit` runs, and step with it."""

__version__ = "0.1.0"

__all__ = [
    "CurvatureFeed",
    "CurvatureMonitor",
    "DiagonalNewton",
    "Estimate",
    "HessianOperator",
    "LayerRule",
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

try:
    from keras_curvature.analysis import (
        hessian_diagonal,
        hessian_frobenius_norm,
        hessian_matrix,
        hessian_trace,
    )
    from keras_curvature.callbacks import CurvatureFeed, CurvatureMonitor
    from keras_curvature.estimators import Estimate
    from keras_curvature.layerwise.rules import LayerRule, register_layer_rule
    from keras_curvature.learning_rate import suggest_learning_rate
    from keras_curvature.operators import HessianOperator
    from keras_curvature.optimizers import DiagonalNewton
    from keras_curvature.report import curvature_summary
    from keras_curvature.spectrum import hessian_eigenvalues, hessian_spectral_density
except (ImportError, ValueError) as _error:
    # Keras runs on another backend, or not at all. TensorBoard loads our page through
    # this package all the same; whoever asks for one of the names is told why.
    _reason = _error

    def __getattr__(name: str) -> object:
        if name in __all__:
            raise ImportError(f"keras_curvature.{name}: {_reason}") from _reason
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
