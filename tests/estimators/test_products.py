"""Every kind of operator gives the same figures, in its own precision and place."""

import warnings

import keras
import matrices
import numpy as np
import pytest
import scipy.sparse
from keras import ops
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from keras_curvature import backend, estimators
from keras_curvature.estimators import products as module
from keras_curvature.estimators.products import Products

KINDS = {
    "array": lambda a: a,
    "sparse": scipy.sparse.csr_array,
    "linear_operator": aslinearoperator,
    "matvec_only": lambda a: LinearOperator(
        a.shape, matvec=lambda v: a @ v, dtype=a.dtype
    ),
    "tensor": lambda a: backend.array(a, a.dtype.name),
    "own_class": matrices.Recorded,
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_agree(kind, dtype):
    dense = matrices.named("network", 30, dtype=dtype)
    # Rounding of a sum of 30 numbers up to 40, or their squares.
    tolerance = {"float32": 1e-5, "float64": 1e-13}[dtype]
    one, other = (
        estimators.hutchinson_moments(operator, 6, diagonal=True)
        for operator in (KINDS[kind](dense), dense)
    )
    assert backend.is_tensor(one.diagonal.value)
    assert ops.dtype(one.diagonal.value) == dtype
    for name in ("trace", "squared_frobenius_norm", "diagonal"):
        a, b = (ops.convert_to_numpy(getattr(m, name).value) for m in (one, other))
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


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


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="the others always have float64"
)
def test_without_float64():
    """JAX has none unless it is told to: all is computed in float32, and says so."""
    import jax

    dense = matrices.named("network")
    with jax.enable_x64(False), warnings.catch_warnings():
        warnings.simplefilter("error")
        moments = estimators.exact_moments(dense, (20, 40))
        np.testing.assert_allclose(moments.trace.value, np.trace(dense), rtol=1e-6)
        assert ops.dtype(moments.diagonal.value) == "float32"
        for estimate in (
            estimators.hutchinson_moments(dense, 8, 1e-9, block_sizes=(20, 40)).trace,
            estimators.DominantSubspace().update(dense, 24).trace,
            estimators.sampled_moments(
                lambda start, width: ops.ones((60, width)), 8, 1e-9
            ).trace,
        ):
            assert np.isfinite(estimate.value)
        found = estimators.eigenvalues(matrices.named("network", 100), 3, 1e-5)
        np.testing.assert_allclose(found.values, [40, 25, 16], rtol=1e-6)
        density = estimators.spectral_density(dense, 20, 2)
        np.testing.assert_allclose([x[-1] for x in density.nodes], 40, rtol=1e-6)


@pytest.mark.parametrize("kind", ["equal", "squares"])
def test_long_sums_keep_their_digits(kind):
    """One after the other, 5·10⁶ equal numbers add up to 4 % less in float32."""
    rows = np.full((5_000_000, 2), 0.1, "float32")
    if kind == "squares":
        rows = np.random.default_rng(0).standard_normal(rows.shape, "float32") ** 2
    sizes = (3_000_000, 0, 2_000_000)
    expected = np.add.reduceat(rows, [0, 3_000_000], 0, "float64")
    given = backend.array(np.ascontiguousarray(rows.T))
    sums = backend.compiled(lambda x: module.block_sums(x, sizes))(given)
    np.testing.assert_allclose(module.to_host(sums)[[0, 2]], expected, rtol=1e-5)
    assert not module.to_host(sums)[1].any()
    wide = rows.astype("float64")
    # And the norm of an estimate, for its relative error.
    estimate = estimators.Estimate(backend.array(rows[:, 0]), np.ones(1, "float32"), 1)
    np.testing.assert_allclose(
        estimate.relative_standard_error, 1 / np.linalg.norm(wide[:, 0]), rtol=1e-5
    )


def elsewhere():
    """A place that is not the default one."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.device(tf.config.list_logical_devices("CPU")[-1].name):
            return backend.place_of(tf.Variable(1.0))
    if keras.backend.backend() == "jax":
        import jax

        return backend.place_of(jax.device_put(1.0, jax.devices("cpu")[-1]))
    return pytest.skip("PyTorch has one CPU device")


def test_all_work_is_done_where_the_operator_is():
    class Elsewhere(matrices.Recorded):
        place = elsewhere()

        def __matmul__(self, directions):
            assert backend.place_of(directions) == self.place
            with backend.on(self.place):
                return super().__matmul__(directions)

    assert backend.place_of(backend.array(1.0)) != Elsewhere.place
    operator = Elsewhere(matrices.named("network", 80))
    moments = estimators.hutchinson_moments(operator, 6, 0.1, diagonal=True)
    assert backend.place_of(moments.diagonal.value) == operator.place
    exact = estimators.exact_moments(operator)
    assert backend.place_of(exact.diagonal.value) == operator.place
    subspace = estimators.DominantSubspace()
    for _ in range(2):
        figures = subspace.update(operator, 6, diagonal=True)
        assert backend.place_of(figures.diagonal.value) == operator.place
    estimators.spectral_density(operator, 4, 2)
    estimators.eigenvalues(operator, 2)


def test_groups_are_counted_until_told_to_stop():
    dense = np.arange(100.0).reshape(10, 10)
    operator, calls = matrices.Recorded(dense), []

    def progress(done, total):
        calls.append((done, total))
        return done < 10

    products = Products(operator, progress)
    products.total = 30
    directions = list(np.eye(10)[:9])
    np.testing.assert_allclose(products(directions), dense.T[:9])
    assert products.going
    assert products([]) == []
    # One more group, and what is known by then; no other directions are made.
    left = iter(directions)
    np.testing.assert_allclose(products(left), dense.T[:4])
    assert len(list(left)) == 5
    assert not products.going and products.spent == 13
    assert calls == [(4, 30), (8, 30), (9, 30), (13, 30)]
    assert [d.shape[1] for d in operator.directions] == [4, 4, 1, 4]


@pytest.mark.parametrize(
    "operator",
    [np.zeros((3, 4)), np.zeros(3), "matrix", np.zeros((2, 2), complex)],
    ids=["rectangle", "vector", "text", "complex"],
)
def test_what_is_no_symmetric_operator_is_refused(operator):
    with pytest.raises(ValueError, match="symmetric operator.*Received: "):
        estimators.hutchinson_moments(operator)


def test_large_vectors_are_worked_on_one_by_one(monkeypatch):
    """With the same figures."""
    dense = matrices.named("network", 60, dtype="float32")
    sizes = (20, 40)

    def figures():
        recorded = matrices.Recorded(dense)
        found = estimators.hutchinson_moments(recorded, 6, block_sizes=sizes)
        subspace = estimators.DominantSubspace().update(recorded, 24, 0, sizes)
        return [
            found.trace.value,
            found.trace.standard_error,
            found.squared_frobenius_norm.value,
            subspace.trace.value,
            subspace.squared_frobenius_norm.value,
        ]

    together = figures()
    monkeypatch.setattr(module, "_NUMBERS", 4 * 60 - 1)
    assert module.together(60) == 1 and module.together(59) == module.GROUP
    np.testing.assert_allclose(figures(), together, rtol=1e-4)
