"""Lanczos iteration with thick restarts, which can be left after any product.

Source: Wu, Simon (2000), "Thick-restart Lanczos method for large symmetric eigenvalue
problems", algorithm 3; in exact arithmetic the same as the implicit restarts of ARPACK
(Lehoucq, Sorensen, Yang 1998), which SciPy's `eigsh` calls.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from keras_curvature.estimators import tall
from keras_curvature.estimators.tall import Vector

_Array = NDArray[np.float64]


class RitzPairs(NamedTuple):
    """Approximate eigenvalues and -vectors from a basis.

    Attributes:
        values: `(k,)`.
        inner: the vectors in terms of the basis, `(size, k)`.
        residuals: the norms of their residuals, `(k,)`.
        floor: how small residuals can be for rounding.
    """

    values: _Array
    inner: _Array
    residuals: _Array
    floor: float


class Lanczos:
    """An orthonormal basis V of growing size with `AV = VT + r tᵀ`, r a unit vector.

    All vectors are orthogonalised against all others, so T is computed in full and
    holds what restarts leave behind without further care. They are kept in the type in
    which they are multiplied, and compared with each other in float64.

    Args:
        multiply: function from a unit vector `(P,)` to its product, in memory that may
            be written to.
        draw: function without arguments to a random vector `(P,)`, likewise.
        dimension: largest size of the basis, below P; its memory is `dimension · P`
            numbers.

    Attributes:
        size: the size of the basis.
    """

    def __init__(
        self,
        multiply: Callable[[Vector], Vector],
        draw: Callable[[], Vector],
        dimension: int,
    ):
        self.size = 0
        self._multiply = multiply
        self._draw = draw
        start = draw()
        self._precision = float(np.finfo(start.dtype).eps)
        _divide(start, tall.take_out(start, [])[1])
        self._vectors = [start]  # V, and then r.
        self._T = np.zeros((dimension, dimension))
        self._t = np.zeros(0)

    def extend(self) -> None:
        """One product, and one more vector in the basis."""
        last, self.size = self.size, self.size + 1
        T = self._T[: self.size, : self.size]
        r = self._multiply(self._vectors[last])
        T[last], norm = tall.take_out(r, self._vectors)
        T[:, last] = T[last]
        self._t = np.append(np.zeros(last), norm)
        if norm <= 10 * self._precision * abs(T).max():
            # The basis spans an invariant subspace; there may be more outside.
            r, self._t[last] = self._draw(), 0
            norm = tall.take_out(r, self._vectors)[1]
        _divide(r, norm)
        self._vectors.append(r)

    def pairs(self, choose: Callable[[_Array], NDArray[np.intp]]) -> RitzPairs:
        """Ritz pairs of the basis so far.

        Args:
            choose: function from increasing eigenvalues to the indices of some.
        """
        values, inner = np.linalg.eigh(self._T[: self.size, : self.size])
        floor = 10 * self._precision * float(abs(values).max())
        chosen = choose(values)
        inner = inner[:, chosen]
        return RitzPairs(values[chosen], inner, abs(self._t @ inner), floor)

    def vectors(self, inner: _Array) -> list[Vector]:
        """The vectors `(P,)` with these coordinates."""
        basis = self._vectors[: self.size]
        return tall.combined(inner.T, basis, basis[0].dtype.name)

    def restart(self, choose: Callable[[_Array], NDArray[np.intp]]) -> None:
        """Keeps the chosen Ritz vectors and the direction in which to go on."""
        values, inner, _, _ = self.pairs(choose)
        kept, r = len(values), self._vectors.pop()
        tall.turn(self._vectors, inner.T)
        self._vectors.append(r)
        self._T[:] = 0
        self._T[range(kept), range(kept)] = values
        self._t = self._t @ inner
        self.size = kept


def _divide(x: Vector, norm: float) -> None:
    tall.turn([x], np.array([[1 / norm]]))
