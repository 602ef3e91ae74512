"""Lanczos iteration with thick restarts, which can be left after any product.

Source: Wu, Simon (2000), "Thick-restart Lanczos method for large symmetric eigenvalue
problems", algorithm 3; in exact arithmetic the same as the implicit restarts of ARPACK
(Lehoucq, Sorensen, Yang 1998), which SciPy's `eigsh` calls.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.float64]

#: Columns of the basis that a restart turns at once, so that it needs no second basis.
_COLUMNS = 2**18


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
    holds what restarts leave behind without further care.

    Args:
        multiply: function from a unit vector `(P,)` to its product, in float64.
        draw: function without arguments to a random vector `(P,)`.
        dimension: largest size of the basis, below P; its memory is `dimension · P`
            numbers.
        precision: relative rounding errors of the products.

    Attributes:
        size: the size of the basis.
    """

    def __init__(
        self,
        multiply: Callable[[_Array], _Array],
        draw: Callable[[], _Array],
        dimension: int,
        precision: float,
    ):
        self.size = 0
        self._multiply = multiply
        self._draw = draw
        self._precision = precision
        start = draw()
        self._rows = np.empty((dimension + 1, len(start)))  # V, and then r.
        self._rows[0] = start / np.linalg.norm(start)
        self._T = np.zeros((dimension, dimension))
        self._t = np.zeros(0)

    def extend(self) -> None:
        """One product, and one more vector in the basis."""
        last, self.size = self.size, self.size + 1
        basis = self._rows[: self.size]
        T = self._T[: self.size, : self.size]
        r, column = _orthogonal(self._multiply(basis[last]), basis)
        T[last] = T[:, last] = column
        norm = float(np.linalg.norm(r))
        if norm <= 10 * self._precision * abs(T).max():
            # The basis spans an invariant subspace; there may be more outside.
            r, norm = _orthogonal(self._draw(), basis)[0], 0.0
        self._rows[self.size] = r / np.linalg.norm(r)
        self._t = np.append(np.zeros(last), norm)

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

    def vectors(self, inner: _Array) -> _Array:
        """The vectors `(P, k)` with these coordinates."""
        return self._rows[: self.size].T @ inner

    def restart(self, choose: Callable[[_Array], NDArray[np.intp]]) -> None:
        """Keeps the chosen Ritz vectors and the direction in which to go on."""
        values, inner, _, _ = self.pairs(choose)
        kept, rows = len(values), self._rows
        for start in range(0, rows.shape[1], _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            rows[:kept, columns] = inner.T @ rows[: self.size, columns]
        rows[kept] = rows[self.size]
        self._T[:] = 0
        self._T[range(kept), range(kept)] = values
        self._t = self._t @ inner
        self.size = kept


def _orthogonal(x: _Array, basis: _Array) -> tuple[_Array, _Array]:
    """What is outside of the basis, and the coordinates of what is inside.

    Twice, since once leaves rounding errors that grow (Parlett 1998, section 6.9).
    """
    coordinates = np.zeros(len(basis))
    for _ in range(2):
        parts = basis @ x
        x = x - parts @ basis
        coordinates = coordinates + parts
    return x, coordinates
