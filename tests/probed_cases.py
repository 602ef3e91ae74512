"""The named cases, each built and probed once for all tests of a process.

What is slow about a case is to trace it. `conftest.py` has all tests of one case run in
one process, so that they share the operator and what it has compiled.
"""

import dataclasses
import functools
import warnings
from typing import Any

import cases
import keras
import numpy as np

from keras_curvature.operators import HessianOperator

ON_TENSORFLOW = keras.backend.backend() == "tensorflow"

#: Keras computes in float64 on TensorFlow alone.
FLOAT = "float64" if ON_TENSORFLOW else "float32"

if ON_TENSORFLOW:
    import reference


@dataclasses.dataclass(frozen=True)
class Probed:
    """A case, its operator, and what the first probe of it left behind.

    Attributes:
        case: the case.
        op: its operator.
        dense: its Hessian, by products.
        traces: how many graphs that took.
        before, after: all that a probe must leave alone, on TensorFlow.
        warnings: what was said meanwhile.
    """

    case: cases.Case
    op: HessianOperator
    dense: np.ndarray
    traces: int
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    warnings: list[warnings.WarningMessage]

    @functools.cached_property
    def differences(self) -> np.ndarray:
        """The Hessian by central differences of the gradient, on TensorFlow."""
        with cases.floatx(FLOAT):
            return reference.hessian_by_differences(self.case)


@functools.cache
def probed(name):
    """A named case, built and probed in the type `FLOAT`."""
    with cases.floatx(FLOAT), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        case = cases.CASES[name]()
        before = reference.state_of(case.model) if ON_TENSORFLOW else None
        model, x, y, sample_weight, training = case
        op = HessianOperator(model, x, y, sample_weight, training=training)
        dense = op.to_dense()
        after = reference.state_of(case.model) if ON_TENSORFLOW else None
    return Probed(case, op, dense, op._products.traces(), before, after, caught)
