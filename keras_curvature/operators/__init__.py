"""What the Hessian times a vector is."""

from keras_curvature.operators.exact_diagonal import ExactDiagonal
from keras_curvature.operators.gauss_newton import GaussNewtonDiagonal
from keras_curvature.operators.grouped_diagonal import GroupedDiagonal
from keras_curvature.operators.hessian import HessianOperator
from keras_curvature.operators.layer_outputs import LayerOutputHessian
from keras_curvature.operators.preconditioned import PreconditionedOperator

__all__ = [
    "ExactDiagonal",
    "GaussNewtonDiagonal",
    "GroupedDiagonal",
    "HessianOperator",
    "LayerOutputHessian",
    "PreconditionedOperator",
]
