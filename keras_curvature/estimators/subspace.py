"""The dominant eigenvectors of an operator, kept from one look to the next.

A network's Hessian has a few large eigenvalues, which make plain averages over random
directions noisy. `deflation` takes them out of the averages; here is kept what that
needs, the subspace Q that they span.
"""

import dataclasses
import math

import numpy as np
from keras import ops

from keras_curvature.backend import array, compiled, is_tensor
from keras_curvature.estimators.deflation import DeflatedMoments, deflated_moments
from keras_curvature.estimators.products import (
    Products,
    check_blocks,
    seed_key,
    to_host,
)
from keras_curvature.estimators.sampling import check_budget

#: Keeps these draws apart from those of the plain averages.
_PURPOSE = 1

#: Weight of the fresh products against HQ in the choice of the next Q; 1 would make
#: the sketch an unbiased picture of H². Fresh directions are noisier: between 0.3 and
#: 1 nothing changes where the subspace is stable, and below it a turn of the
#: subspace is followed one look later (measured along training runs).
_FRESH_WEIGHT = 0.5


class DominantSubspace:
    """Frobenius norm, trace and top eigenvalues, better from look to look.

    During training the dominant subspace of a Hessian turns slowly (Gur-Ari,
    Roberts, Dyer 2018). What one `update` learns about it, the next one uses: with
    12 products each, along the training of three small networks, the relative error of
    the Frobenius norm was 5 % at the first look and 0.5 to 1.5 % from the third on,
    that of plain averages 6 to 10 % (benchmarks/results/subspace_tracking.json).

    ```python
    subspace = DominantSubspace()
    for step in ...:
        figures = subspace.update(A, num_matvecs=12)
        figures.frobenius_norm, figures.trace, figures.eigenvalues
    ```

    The splitting is in `deflation`. The next Q comes from one step of block power
    iteration, enlarged by the fresh products (Halko, Martinsson, Tropp 2011,
    algorithms 4.1 and 4.4).

    Args:
        k: number of directions to keep. Defaults to two thirds of the products of
            an update.
    """

    def __init__(self, k: int | None = None):
        if k is not None and (int(k) != k or k < 1):
            raise ValueError(f"`k` must be a positive integer. Received: k={k!r}.")
        self.k = None if k is None else int(k)
        self._basis = None
        self._draws = 0
        self._spread: float | None = None

    @property
    def basis(self):
        """The orthonormal Q for the next update, `(P, k)`, or `None` before any."""
        return self._basis

    def update(
        self,
        A,
        num_matvecs: int = 12,
        seed=0,
        block_sizes=None,
        diagonal: bool = False,
        partial: bool = False,
    ) -> DeflatedMoments:
        """Looks at the operator with a given number of products.

        At most two thirds of them go into HQ, the others see fresh random signs.
        Without a Q of the right size a third is spent on finding one first. An
        operator of size P ≤ `num_matvecs` is measured exactly.

        The standard errors come from few fresh directions, and are widened such that
        two of them cover the truth in about 95 % of all cases; see
        `quadratic_forms`. A single fresh direction gives none. When one large
        eigenvalue is missing in Q, four directions may all miss it too, by chance;
        so the spread of earlier updates counts as well, and the errors of the norm
        are never below the geometric mean of the spreads seen.

        An operator with infinite or undefined products gives figures that are
        undefined, and leaves Q as it was.

        Args:
            A: symmetric operator of shape `(P, P)` with products `A @ V`.
            num_matvecs: number of products to spend.
            seed: a non-negative integer, or a tuple of them. Updates count their
                draws, so that the same seed may serve all of them.
            block_sizes: sizes of consecutive groups of coordinates, adding up to P.
            diagonal: whether to estimate the diagonal too. Defaults to `False`.
            partial: what Ctrl-C does. `True` ends the products, and returns what those
                that are done tell, if that is anything with a standard error; else, and
                by default, the interruption is raised and leaves Q as it was.

        Returns:
            A `DeflatedMoments`; blocks as for `hutchinson_moments`.

        Raises:
            ValueError: for an operator that is not square, a budget below one, or
                block sizes that do not add up.
        """
        products = Products(A)
        num_matvecs = check_budget(num_matvecs, None)
        blocks = check_blocks(block_sizes, products.size)
        with products.placed():
            key = seed_key(seed, _PURPOSE)
            basis, draws, sketch = self._start(products, key, num_matvecs)
            spent = 0 if sketch is None else int(sketch[0].shape[1])
            budget = min(num_matvecs, products.size)
            signs = products.signs(key, draws, budget - spent - int(basis.shape[1]))
            try:
                figures, basis_products, fresh_products = deflated_moments(
                    products, basis, signs, budget, blocks, diagonal, partial
                )
            except KeyboardInterrupt:
                if not partial or spent < 2:
                    raise
                # What found Q is an average over random signs by itself.
                signs, found = sketch
                figures, basis_products, fresh_products = deflated_moments(
                    lambda _: found, basis[:, :0], signs, spent, blocks, diagonal
                )
            fresh = int(fresh_products.shape[1])
            figures, spread = self._steadied(figures, fresh)
            following = _dominant(
                basis_products,
                fresh_products,
                self._kept(num_matvecs, products.size),
            )
        # Only now, so that an interrupted update leaves everything as it was.
        self._basis = self._basis if following is None else following
        self._draws = draws + fresh
        self._spread = spread
        return figures

    def _steadied(self, figures, fresh):
        """Widens the errors of the norm where earlier spreads call for it.

        The geometric mean forgets fast: Q gets better by orders of magnitude.
        """
        squared = figures.squared_frobenius_norm
        error = squared.relative_standard_error
        if not error or not math.isfinite(error):
            return figures, self._spread
        spread = error * math.sqrt(fresh)
        mean = spread
        if self._spread is not None:
            # Four fresh directions weigh as much as all that was seen before.
            weight = fresh / (fresh + 4)
            mean = self._spread ** (1 - weight) * spread**weight
        factor = max(1.0, mean / spread)
        return dataclasses.replace(
            figures, squared_frobenius_norm=_widened(squared, factor)
        ), mean

    def _kept(self, num_matvecs, size):
        return min(size, self.k or max(1, num_matvecs - _fresh(num_matvecs)))

    def _start(self, products, key, num_matvecs):
        """The Q to use now, the draws made, and the signs and products that found Q."""
        if num_matvecs >= products.size:
            return products.basis(0, products.size), self._draws, None
        known = self._basis
        if known is not None and int(known.shape[0]) == products.size:
            columns = min(int(known.shape[1]), num_matvecs - _fresh(num_matvecs))
            return array(known[:, :columns], products.dtype), self._draws, None
        width = num_matvecs // 3 if num_matvecs > 3 else 0
        nothing = products.basis(0, 1)[:, :0]
        if not width:
            return nothing, self._draws, None
        signs = products.signs(key, self._draws, width)
        found = products(signs)
        basis = _dominant(nothing, found, min(width, self.k or width))
        if basis is None:
            basis = nothing
        return basis, self._draws + width, (signs, found)

    def get_state(self) -> dict:
        """All that the next update depends on, as NumPy arrays and integers."""
        basis = self._basis
        return {
            "basis": None if basis is None else ops.convert_to_numpy(basis),
            "draws": self._draws,
            "spread": self._spread,
        }

    def set_state(self, state: dict):
        """Continues from what `get_state` returned.

        A basis that is not finite is dropped, and found anew by the next update.

        Args:
            state: dictionary with `"basis"`, an array `(P, k)` or `None`, and
                `"draws"`, the number of signs drawn so far, and `"spread"`, the
                relative spread seen so far or `None`.

        Raises:
            ValueError: if the entries are missing or of the wrong shape.
        """
        if not {"basis", "draws", "spread"} <= set(state):
            raise ValueError(
                'The state must hold "basis", "draws" and "spread", as `get_state` '
                f"returns them. Received: {sorted(state)}."
            )
        basis = state["basis"]
        if basis is not None:
            basis = ops.convert_to_numpy(basis) if is_tensor(basis) else basis
            basis = np.asarray(basis)
            if basis.ndim != 2 or basis.shape[0] < basis.shape[1]:
                raise ValueError(
                    "The basis must have shape (P, k) with k ≤ P. Received: shape "
                    f"{basis.shape}."
                )
            if basis.dtype not in (np.float32, np.float64):
                basis = basis.astype(np.float32)
            # Estimates are unbiased for any orthonormal Q, and only for those.
            gram = basis.T.astype(np.float64) @ basis
            if not np.isfinite(gram).all():
                basis = None
            elif abs(gram - np.eye(len(gram))).max(initial=0) > 1e-5:
                basis = np.linalg.qr(basis)[0]
        self._basis = basis
        self._draws = int(state["draws"])
        self._spread = None if state["spread"] is None else float(state["spread"])


def _widened(estimate, factor):
    return dataclasses.replace(
        estimate,
        standard_error=estimate.standard_error * factor,
        blocks=tuple(_widened(b, factor) for b in estimate.blocks),
    )


def _fresh(num_matvecs):
    """Number of fresh directions wanted: a third, two at least."""
    return min(num_matvecs, max(2, num_matvecs // 3))


def _dominant(basis_products, fresh_products, count):
    """The next Q: the leading left singular vectors of all products.

    Householder's QR gives orthonormal columns for any rank, zero included.
    """
    width = int(fresh_products.shape[1])
    weight = _FRESH_WEIGHT / max(width, 1) ** 0.5
    orthogonal, triangle = _factors(
        basis_products, fresh_products, array(weight, fresh_products.dtype)
    )
    triangle = to_host(triangle)
    if not np.isfinite(triangle).all():
        return None
    turn = np.linalg.svd(triangle)[0][:, :count]
    return ops.matmul(orthogonal, array(turn, orthogonal.dtype))


@compiled
def _factors(basis_products, fresh_products, weight):
    return ops.qr(ops.concatenate([basis_products, weight * fresh_products], axis=1))
