"""Long vectors: orthonormal to rounding whatever comes, without memory of their own."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from keras_curvature.estimators import tall


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    """So that vectors of some thousand entries have several."""
    monkeypatch.setattr(tall, "_ENTRIES", 4096)


def conditioned(size, count, condition, dtype, seed=0):
    """Vectors whose singular values fall from one to `1 / condition`."""
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.standard_normal((size, count)))[0]
    turn = np.linalg.qr(rng.standard_normal((count, count)))[0]
    values = np.geomspace(1, 1 / condition, count)
    return list(np.ascontiguousarray(((vectors * values) @ turn).T.astype(dtype)))


def singular(vectors, count, weights=None):
    """What `to_singular_vectors` makes of copies, as columns."""
    copies = [x.copy() for x in vectors]
    weights = np.ones(len(copies)) if weights is None else weights
    tall.to_singular_vectors(copies, tall.gram(copies), weights, count)
    return np.stack(copies, 1).astype("float64") if copies else None


def off(columns):
    """How far columns are from orthonormal."""
    return np.abs(columns.T @ columns - np.eye(columns.shape[1])).max()


@pytest.mark.parametrize("condition", [1, 1e3, 1e6])
def test_orthonormal_for_a_million_entries(condition):
    """In float32, where Householder's QR is as good and takes a copy of it all."""
    vectors = conditioned(1_000_000, 6, condition, "float32")
    found = singular(vectors, 6)
    assert found.shape == (1_000_000, 6) and off(found) < 1e-6
    # They span the same: nothing of the vectors is left outside but what float32
    # rounds off the smallest of their singular values.
    columns = np.stack(vectors, 1).astype("float64")
    left = columns - found @ (found.T @ columns)
    assert np.linalg.norm(left) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_leading_singular_vectors(dtype):
    """Those of NumPy, sign apart, by decreasing value; with weights."""
    vectors = conditioned(9_001, 5, 100, dtype)
    weights = np.array([1, 0.5, 2, 1, 3])
    expected = np.linalg.svd(np.stack(vectors, 1) * weights, full_matrices=False)[0]
    found = singular(vectors, 3, weights)
    # Rounding over the smallest gap of the singular values.
    tolerance = {"float32": 1e-4, "float64": 1e-11}[dtype]
    np.testing.assert_allclose(
        np.abs((found * expected[:, :3]).sum(0)), 1, atol=tolerance
    )
    assert off(found) < {"float32": 1e-6, "float64": 1e-13}[dtype]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dependent_vectors_are_left_out_or_made_orthonormal(dtype):
    """Zeros, doubles, sums; and scales that are far apart, which are no dependence."""
    a, b = conditioned(5_000, 2, 1, dtype)
    zero = np.zeros_like(a)
    for vectors, rank in (
        ([zero, zero], 0),
        ([a, zero, a], 1),
        ([a, 2 * a, b, a + b, zero], 2),
        ([1e-12 * a, 1e9 * b], 2),
    ):
        found = [x.copy() for x in vectors]
        count = len(vectors)
        tall.to_singular_vectors(found, tall.gram(found), np.ones(count), count)
        # A sum of vectors in float32 is none of them to 1e-7.
        assert rank <= len(found) <= rank + (dtype == "float32" and rank == 2)
        tall.complete(found, count, 5_000, dtype)
        assert len(found) == count and off(np.stack(found, 1).astype("float64")) < 1e-6
    # Where there is hardly room: e₁ − e₂ and e₃ − e₄ leave two directions of four.
    pairs = [np.array([1, -1, 0, 0]) / 2**0.5, np.array([0, 0, 1, -1]) / 2**0.5]
    tall.complete(pairs, 4, 4, "float64")
    assert off(np.stack(pairs, 1)) < 1e-14


def test_inner_products_and_combinations():
    """By hand, over parts that do not divide the length; and blocks of any size."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 10_000)).astype("float32")
    y = rng.integers(-1, 2, (2, 10_000)).astype("int8")
    wide = x.astype("float64")
    np.testing.assert_allclose(tall.gram(x), wide @ wide.T, rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(tall.dot(x, y), wide @ y.T, rtol=1e-12, atol=1e-10)
    c = rng.standard_normal((2, 3))
    np.testing.assert_allclose(tall.combined(c, x, "float64"), c @ wide, atol=1e-13)
    turned = list(x.copy())
    inner = tall.turn(turned, c)
    np.testing.assert_allclose(turned, c @ wide, atol=1e-6)
    np.testing.assert_allclose(inner, tall.gram(turned), rtol=1e-12)
    assert tall.gram([]).shape == (0, 0) and tall.dot(x, []).shape == (3, 0)
    sizes = (5_000, 0, 1, 4_999)
    found = [(b, p.stop - p.start) for b, p in tall.parts(10_000, sizes)]
    assert found == [(0, 4096), (0, 904), (2, 1), (3, 4096), (3, 903)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("outside", [1, 1e-3, 1e-6])
def test_take_out(dtype, outside):
    """However little is left, it is orthogonal to the basis, and nothing is lost."""
    *basis, rest = conditioned(10_000, 5, 1, dtype)
    coordinates = np.array([3.0, -1, 0, 0.5])
    x = (coordinates @ basis + outside * rest).astype(dtype)
    columns, before = np.float64(np.stack(basis, 1)), np.array(x, float)
    taken, norm = tall.take_out(x, basis)
    rounding = {"float32": 1e-6, "float64": 1e-14}[dtype]
    np.testing.assert_allclose(norm, np.linalg.norm(np.float64(x)), rtol=1e-12)
    assert np.linalg.norm(columns.T @ x) <= rounding * norm
    np.testing.assert_allclose(columns @ taken + x, before, atol=rounding)
    np.testing.assert_allclose(taken, coordinates, atol=rounding)


def test_take_out_of_nothing_and_of_no_basis():
    (a,) = conditioned(5_000, 1, 1, "float64")
    taken, norm = tall.take_out(2 * a, [])
    np.testing.assert_allclose([len(taken), norm], [0, 2])
    zero = np.zeros_like(a)
    taken, norm = tall.take_out(zero, [a])
    assert [*taken, norm] == [0, 0]
    inside = 2 * a
    taken, norm = tall.take_out(inside, [a])
    np.testing.assert_allclose([*taken, norm], [2, 0], atol=1e-14)


#: P float32 numbers are 16 MiB. The operator takes no memory but for its product.
_OPERATOR = """
    import resource, sys
    import numpy as np
    from scipy.sparse.linalg import LinearOperator
    from keras_curvature import estimators

    size = 2**22 - 1
    scale = (1 / np.arange(1, size + 1)).astype("float32")[:, None]
    A = LinearOperator(
        (size, size), dtype="float32",
        matvec=lambda v: scale[:, 0] * v.ravel(), matmat=lambda v: scale * v,
    )
    small = np.eye(30, dtype="float32")
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    def used(function):
        function(small)  # What is made once.
        before = peak()
        function(A)
        return (peak() - before) / (4 * size)
"""

_SUBSPACE = """
subspace = estimators.DominantSubspace(8)
def work(A):
    half = A.shape[0] // 2
    for _ in range(2):
        subspace.update(A, 12, block_sizes=(half, A.shape[0] - half))
"""

_TASKS = {
    # Q and HQ, 8 each; 4 products with fresh signs, and these in a byte each. The
    # directions and products of one group are on their way, twice where converted.
    "subspace": (_SUBSPACE, 2 * 8 + 4 + 1 + 16),
    # The same of a model so large that vectors are worked on one by one.
    "subspace, one by one": (
        "estimators.products._NUMBERS = 0\n" + _SUBSPACE,
        2 * 8 + 4 + 1 + 4,
    ),
    # A basis of 20 and what is next, a product, and a direction on its way.
    "eigenvalues": ("def work(A): estimators.eigenvalues(A, 1, 1e-3)", 20 + 5),
    # Two Lanczos vectors instead of eight, and one product.
    "density": ("def work(A): estimators.spectral_density(A, 8, 1)", 2 + 6),
}


@pytest.mark.parametrize("task", _TASKS)
def test_memory(task):
    """In vectors of length P, of a process of its own."""
    work, allowed = _TASKS[task]
    program = textwrap.dedent(_OPERATOR) + work + "\nprint(used(work))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert float(done.stdout.split()[-1]) <= allowed
