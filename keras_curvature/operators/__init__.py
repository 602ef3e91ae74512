"""What the Hessian times a vector is."""

from keras_curvature.operators.hessian import HessianOperator
from keras_curvature.operators.preconditioned import PreconditionedOperator

__all__ = ["HessianOperator", "PreconditionedOperator"]
