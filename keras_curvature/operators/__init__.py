"""What the Hessian times a vector is."""

from keras_curvature.operators.exact_diagonal import ExactDiagonal
from keras_curvature.operators.gauss_newton_diagonal import GaussNewtonDiagonal
from keras_curvature.operators.hessian import HessianOperator
from keras_curvature.operators.layer_outputs import LayerOutputHessian
from keras_curvature.operators.layerwise_diagonal import LayerwiseDiagonal
from keras_curvature.operators.preconditioned import PreconditionedOperator

__all__ = [
    "ExactDiagonal",
    "GaussNewtonDiagonal",
    "HessianOperator",
    "LayerOutputHessian",
    "LayerwiseDiagonal",
    "PreconditionedOperator",
]
