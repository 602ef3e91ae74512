"""Lanczos iteration with thick restarts, which may be left at any time.

Source: Wu, Simon (2000), "Thick-restart Lanczos method for large symmetric eigenvalue
problems", algorithm 3; in exact arithmetic the same as the implicit restarts of ARPACK
(Lehoucq, Sorensen, Yang 1998), whose basis nobody can look at while it works.
"""

import numpy as np


class Lanczos:
    """An orthonormal basis V of growing size with `AV = VT + r tᵀ`, r a unit vector.

    All vectors are orthogonalised against all others, so T is computed in full and
    holds what restarts leave behind without further care.

    Args:
        multiply: function from a unit vector `(P,)` to its product, in float64.
        draw: function without arguments to a random vector `(P,)`.
        dimension: largest size of the basis, below P; its memory is `dimension · P`
            numbers, and once more during a restart.
        precision: relative rounding errors of the products.
    """

    def __init__(self, multiply, draw, dimension, precision):
        self._multiply = multiply
        self._draw = draw
        self._precision = precision
        start = draw()
        rows = np.empty((dimension + 1, len(start)))
        rows[0] = start / np.linalg.norm(start)
        # Replaced as a whole, so that an interruption finds what belongs together: V
        # and then r as rows, T, and t; their size is that of t.
        self._state = rows, np.zeros((dimension, dimension)), np.zeros(0)

    @property
    def size(self):
        """The size of the basis."""
        return len(self._state[2])

    def extend(self):
        """One product, and one more vector in the basis."""
        rows, T, t = self._state
        size = len(t)
        basis = rows[: size + 1]
        r, column = _orthogonal(self._multiply(rows[size]), basis)
        T[size, : size + 1] = T[: size + 1, size] = column
        norm = np.linalg.norm(r)
        if norm <= 10 * self._precision * abs(T[: size + 1, : size + 1]).max():
            # The basis spans an invariant subspace; there may be more outside.
            r, norm = _orthogonal(self._draw(), basis)[0], 0.0
        rows[size + 1] = r / np.linalg.norm(r)
        self._state = rows, T, np.append(np.zeros(size), norm)

    def pairs(self, choose):
        """Ritz pairs of the basis so far.

        Args:
            choose: function from increasing eigenvalues to the indices of some.

        Returns:
            Values `(k,)`; the pairs in terms of the basis `(size, k)`; the norms of
            their residuals `(k,)`; and how small residuals can be for rounding.
        """
        _, T, t = self._state
        values, inner = np.linalg.eigh(T[: len(t), : len(t)])
        floor = 10 * self._precision * abs(values).max()
        chosen = choose(values)
        inner = inner[:, chosen]
        return values[chosen], inner, abs(t @ inner), floor

    def vectors(self, inner):
        """The vectors `(P, k)` with these coordinates."""
        return self._state[0][: self.size].T @ inner

    def restart(self, choose):
        """Keeps the chosen Ritz vectors and the direction in which to go on."""
        rows, T, t = self._state
        size = len(t)
        values, inner, _, _ = self.pairs(choose)
        kept = len(values)
        fewer, smaller = np.empty_like(rows), np.zeros_like(T)
        np.matmul(inner.T, rows[:size], out=fewer[:kept])
        fewer[kept] = rows[size]
        smaller[range(kept), range(kept)] = values
        self._state = fewer, smaller, t @ inner


def _orthogonal(x, basis):
    """What is outside of the basis, and the coordinates of what is inside.

    Twice, since once leaves rounding errors that grow (Parlett 1998, section 6.9).
    """
    coordinates = 0.0
    for _ in range(2):
        parts = basis @ x
        x = x - parts @ basis
        coordinates = coordinates + parts
    return x, coordinates
