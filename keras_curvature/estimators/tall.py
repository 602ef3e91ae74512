"""Linear algebra of a few very long vectors.

An estimator that compares directions with each other keeps them in host memory, one
array `(P,)` each: memory of a device is for products. What is wanted of them is small
(inner products), or as long as they are (linear combinations). Both are had in passes
over the entries, some thousands of all vectors at a time, in float64: no pass makes an
array of length P that it does not return, and float32 vectors are added up as if they
were exact.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.float64]

#: A direction or a product on the host, `(P,)`, of any real type.
Vector: TypeAlias = NDArray[Any]

#: Entries of each vector in a part. Fewer of them cost time in Python (a pass over two
#: vectors of 14 million takes a third more with 2**12). From twice as many on NumPy's
#: products may go to several threads, which for rows as long and as few as these has
#: taken up to thirty times the time; and tens of vectors no longer fit into a cache.
_ENTRIES = 2**13

#: The relative size of what is left of a vector next to others, squared, below which it
#: is taken for a combination of them. An inner product is good to 1e-15.
_DEPENDENT = 1e-13

#: Passes in which vectors are made orthonormal, after the first one, at most.
_PASSES = 3


def parts(
    size: int, block_sizes: tuple[int, ...] | None = None
) -> Iterator[tuple[int, slice]]:
    """Parts of the entries, each within one block, and the number of that block."""
    start = 0
    for block, length in enumerate((size,) if block_sizes is None else block_sizes):
        for first in range(start, start + length, _ENTRIES):
            yield block, slice(first, min(first + _ENTRIES, start + length))
        start += length


class Window:
    """A part of some vectors at a time, in float64.

    Args:
        vectors: sequence of arrays `(P,)`.
    """

    def __init__(self, vectors: Sequence[Vector]):
        self._vectors = vectors
        self._rows = np.empty((len(vectors), _ENTRIES))

    def __call__(self, part: slice) -> _Array:
        """Entries of all vectors, one vector a row; good until the next call."""
        rows = self._rows[:, : part.stop - part.start]
        for row, vector in zip(rows, self._vectors, strict=True):
            row[:] = vector[part]
        return rows


def gram(vectors: Sequence[Vector]) -> _Array:
    """All inner products, `(k, k)`."""
    total, window = np.zeros((len(vectors),) * 2), Window(vectors)
    for _, part in parts(_length(vectors)):
        rows = window(part)
        total += rows @ rows.T
    return total


def dot(xs: Sequence[Vector], ys: Sequence[Vector]) -> _Array:
    """Inner products of two lists of vectors, `(k, l)`."""
    total = np.zeros((len(xs), len(ys)))
    left, right = Window(xs), Window(ys)
    for _, part in parts(_length([*xs, *ys])):
        total += left(part) @ right(part).T
    return total


def combined(
    coefficients: _Array, vectors: Sequence[Vector], dtype: str
) -> list[Vector]:
    """New vectors `Σ_j c_ij x_j`, one for each row of coefficients."""
    size = _length(vectors)
    made, window = [np.empty(size, dtype) for _ in coefficients], Window(vectors)
    for _, part in parts(size):
        for vector, row in zip(made, coefficients @ window(part), strict=True):
            vector[part] = row
    return made


def turn(vectors: list[Vector], coefficients: _Array) -> _Array:
    """Replaces vectors by combinations of them, in the memory that they have.

    Args:
        vectors: list of arrays `(P,)`; its first entries are overwritten and the others
            dropped.
        coefficients: array `(m, k)` for k vectors, m ≤ k.

    Returns:
        The inner products of the new vectors as they are stored, `(m, m)`.
    """
    made = vectors[: len(coefficients)]
    total = np.zeros((len(made),) * 2)
    before, after = Window(vectors), Window(made)
    for _, part in parts(_length(vectors)):
        for vector, row in zip(made, coefficients @ before(part), strict=True):
            vector[part] = row
        rows = after(part)
        total += rows @ rows.T
    del vectors[len(made) :]
    return total


def take_out(x: Vector, basis: Sequence[Vector]) -> tuple[_Array, float]:
    """Takes from a vector, in its place, what lies in the span of an orthonormal basis.

    Once leaves rounding errors that grow (Parlett 1998, section 6.9). Each pass tells
    what it left, and another one follows where that is more than rounding.

    Args:
        x: array `(P,)`, finite.
        basis: arrays `(P,)`, orthonormal to the rounding of their type.

    Returns:
        The coordinates of what was taken, `(k,)`, and the norm of what is left.
    """
    taken, inside = np.zeros(len(basis)), dot([x], basis)[0]
    window, epsilon = Window([*basis, x]), _tolerance([x])
    for _ in range(_PASSES):
        taken, left, square = taken + inside, np.zeros(len(basis)), 0.0
        for _, part in parts(len(x)):
            rows = window(part)
            known, entries = rows[:-1], rows[-1]
            # As it is stored.
            x[part] = entries - inside @ known
            entries[:] = x[part]
            left += known @ entries
            square += float(entries @ entries)
        inside, norm = left, math.sqrt(square)
        if math.sqrt(inside @ inside) <= epsilon * norm:
            break
    return taken, norm


def to_singular_vectors(
    vectors: list[Vector], inner: _Array, weights: _Array, count: int
) -> _Array:
    """Replaces vectors by left singular vectors of the array `[w_1 x_1, w_2 x_2, …]`.

    Inner products alone lose the square of the condition number; but what they give
    is so well conditioned that nothing is lost the second time ("CholeskyQR2",
    Yamamoto, Nakatsukasa, Yanagisawa, Fukaya 2015; here vectors that depend on others
    are left out).

    Args:
        vectors: list of arrays `(P,)`, changed in place. Those of the largest singular
            values remain, by decreasing value.
        inner: the inner products of the vectors, `(k, k)`, finite.
        weights: array `(k,)`.
        count: how many to find, at most k.

    Returns:
        The inner products of what was found, `count` vectors or as many as the rank
        allows, with the vectors as they were, `(…, k)`.
    """
    weighted = inner * np.outer(weights, weights)
    basis = _gram_schmidt(weighted, _DEPENDENT * np.diag(weighted))
    rotation = np.linalg.svd(basis @ weighted, full_matrices=False)[0]
    made = rotation[:, :count].T @ basis * weights
    found = turn(vectors, made)
    for _ in range(_PASSES):
        if abs(found - np.eye(len(found))).max(initial=0) <= _tolerance(vectors):
            break
        # They have norms of about one, or are nothing but rounding.
        again = _gram_schmidt(found, np.full(len(found), 1e-2))
        made, found = again @ made, turn(vectors, again)
    products: _Array = made @ inner
    return products


def complete(vectors: list[Vector], count: int, size: int, dtype: str) -> None:
    """Adds unit vectors to orthonormal ones until there are `count`."""
    while len(vectors) < count:
        # The basis vector that is least inside of their span.
        inside = np.zeros(size)
        for vector in vectors:
            inside += np.square(vector, dtype=np.float64)
        unit = np.zeros(size, dtype)
        unit[inside.argmin()] = 1
        for _ in range(2):
            (unit,) = combined(
                np.append(-dot([unit], vectors), 1)[None], [*vectors, unit], dtype
            )
            unit /= math.sqrt(gram([unit])[0, 0])
        vectors.append(unit)


def _gram_schmidt(inner: _Array, least: _Array) -> _Array:
    """Combinations of vectors that are orthonormal, from their inner products.

    Each is made of one vector and those before it. Left out are vectors whose square
    is, next to those before, at most `least`.
    """
    rows: list[_Array] = []
    for vector, enough in zip(np.eye(len(inner)), least, strict=True):
        for _ in range(2):
            for row in rows:
                vector = vector - (row @ inner @ vector) * row
        left = vector @ inner @ vector
        if left > enough:
            rows.append(vector / math.sqrt(left))
    return np.reshape(rows, (-1, len(inner)))


def _tolerance(vectors: Sequence[Vector]) -> float:
    """How far from orthonormal rounding may leave vectors of their type."""
    epsilon = max((float(np.finfo(x.dtype).eps) for x in vectors), default=0.0)
    return max(4 * epsilon, 1e-14)


def _length(vectors: Sequence[Vector]) -> int:
    """P; zero where there are no vectors, and nothing to do."""
    return len(vectors[0]) if len(vectors) else 0
