"""Every kind of operator gives the same figures, in its own precision and place."""

import matrices
import numpy as np
import pytest
import scipy.sparse
import tensorflow as tf
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from keras_curvature import estimators
from keras_curvature.estimators.products import Products

KINDS = {
    "array": lambda a: a,
    "sparse": scipy.sparse.csr_array,
    "linear_operator": aslinearoperator,
    "matvec_only": lambda a: LinearOperator(
        a.shape, matvec=lambda v: a @ v, dtype=a.dtype
    ),
    "tensor": tf.constant,
    "own_class": matrices.Recorded,
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_agree(kind, dtype):
    dense = matrices.named("network", 30, dtype=dtype)
    operator = KINDS[kind](dense)
    # Rounding of a sum of 30 numbers up to 40, or their squares.
    tolerance = {"float32": 1e-5, "float64": 1e-13}[dtype]
    for function in (
        estimators.hutchinson_diagonal,
        lambda *a: estimators.hutchinson_moments(*a).squared_frobenius_norm,
    ):
        one, other = function(operator, 6), function(dense, 6)
        scale = np.abs(other.value).max()
        np.testing.assert_allclose(one.value, other.value, atol=tolerance * scale)
    diagonal = estimators.exact_diagonal(operator).value
    assert tf.is_tensor(diagonal) and diagonal.dtype == dtype
    np.testing.assert_allclose(diagonal, np.diag(dense), atol=40 * tolerance)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", "float32"),
        ("float64", "float64"),
        ("float16", "float32"),
        ("int64", "float64"),
        ("bool", "float64"),
    ],
)
def test_floating_types(dtype, expected):
    assert Products(np.eye(2, dtype=dtype)).dtype == expected
    assert estimators.exact_moments(np.eye(2, dtype=dtype)).trace.value == 2


def test_signs_are_drawn_where_the_operator_is():
    class Elsewhere(matrices.Recorded):
        device = tf.config.list_logical_devices("CPU")[-1].name

        def __matmul__(self, directions):
            assert directions.device.endswith(self.device.split("/")[-1])
            with tf.device(self.device):
                return super().__matmul__(directions)

    operator = Elsewhere(matrices.named("network", 30))
    estimate = estimators.hutchinson_diagonal(operator, 6, tolerance=0.1)
    assert estimate.value.device.endswith(operator.device.split("/")[-1])
    exact = estimators.exact_moments(operator)
    assert exact.diagonal.value.device.endswith(operator.device.split("/")[-1])
    subspace = estimators.DominantSubspace()
    subspace.update(operator, 6)
    assert subspace.basis.device.endswith(operator.device.split("/")[-1])
    subspace.update(operator, 6)
    estimators.spectral_density(operator, 4, 2)
    estimators.eigenvalues(operator, 2)


@pytest.mark.parametrize(
    "operator",
    [np.zeros((3, 4)), np.zeros(3), "matrix", np.zeros((2, 2), complex)],
    ids=["rectangle", "vector", "text", "complex"],
)
def test_what_is_no_symmetric_operator_is_refused(operator):
    with pytest.raises(ValueError, match="symmetric operator.*Received: "):
        estimators.hutchinson_moments(operator)
