"""What the Hessian times a vector is."""

from keras_curvature.operators.basis_diagonal import BasisDiagonal
from keras_curvature.operators.hessian import HessianOperator
from keras_curvature.operators.preconditioned import PreconditionedOperator
from keras_curvature.operators.turned import TurnedOperator, turned_rows

__all__ = [
    "BasisDiagonal",
    "HessianOperator",
    "PreconditionedOperator",
    "TurnedOperator",
    "turned_rows",
]
