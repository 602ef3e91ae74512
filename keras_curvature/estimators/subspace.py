"""The dominant eigenvectors of an operator, kept from one look to the next.

A network's Hessian has a few large eigenvalues, which make plain averages over random
directions noisy. `deflation` takes them out of the averages; here is kept what that
needs, the subspace Q that they span.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_curvature.backend import Tensor, array, compiled
from keras_curvature.estimators.deflation import (
    DeflatedMoments,
    deflated_moments,
    outside,
)
from keras_curvature.estimators.estimate import Estimate
from keras_curvature.estimators.products import (
    Products,
    ProgressFunction,
    Seed,
    SymmetricOperator,
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


class _State(NamedTuple):
    """What one update leaves for the next: Q, the signs drawn, the spread seen."""

    basis: Tensor | None = None
    draws: int = 0
    spread: float | None = None


class _Look(NamedTuple):
    """Q, random signs V, and the products HQ and H(I − QQᵀ)V."""

    basis: Tensor
    signs: Tensor
    basis_products: Tensor
    fresh_products: Tensor


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
        # Replaced as a whole, so that an interruption leaves what belongs together.
        self._state = _State()

    @property
    def basis(self) -> Tensor | None:
        """The orthonormal Q for the next update, `(P, k)`, or `None` before any."""
        return self._state.basis

    def update(
        self,
        A: SymmetricOperator,
        num_matvecs: int = 12,
        seed: Seed = 0,
        block_sizes: Sequence[int] | None = None,
        diagonal: bool = False,
        progress: ProgressFunction | None = None,
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
            progress: `progress(done, total)` is called after each group of products.
                When it returns `False`, what they tell by then is returned, if that
                is anything with a standard error.

        Returns:
            A `DeflatedMoments`; blocks as for `hutchinson_moments`.

        Raises:
            ValueError: for an operator that is not square, a budget below one, or
                block sizes that do not add up.
            KeyboardInterrupt: if `progress` says stop before anything is known. Q is
                then left as it was.
        """
        products = Products(A, progress)
        budget = min(check_budget(num_matvecs, None), products.size)
        products.total = budget
        blocks = check_blocks(block_sizes, products.size)
        with products.working():
            look, draws = self._look(products, seed_key(seed, _PURPOSE), budget)
            figures = deflated_moments(*look, products.spent, blocks, diagonal)
            figures, spread = self._steadied(figures, int(look.signs.shape[1]))
            basis = self._state.basis
            if math.isfinite(figures.squared_frobenius_norm.value):
                kept = self.k or max(1, budget - _fresh(budget))
                basis = _dominant(look.basis_products, look.fresh_products, kept)
        self._state = _State(basis, draws, spread)
        return figures

    def _look(self, products: Products, key: Tensor, budget: int) -> tuple[_Look, int]:
        """The products that are wanted, or some of them; and the signs drawn so far."""
        draws = self._state.draws
        look, basis = None, self._known(products, budget)
        if basis is None:
            # What finds Q is an average over random signs by itself.
            basis = nothing = ops.zeros((products.size, 0), products.dtype)
            width = budget // 3 if budget > 3 else 0
            signs = products.signs(key, draws, width)
            draws += width
            found = products(signs)
            if width:
                look = _Look(nothing, signs[:, : found.shape[1]], nothing, found)
                dominant = _dominant(nothing, found, min(width, self.k or width))
                basis = nothing if dominant is None else dominant
        complete = False
        if products.going:
            k = int(basis.shape[1])
            signs = products.signs(key, draws, budget - products.spent - k)
            draws += int(signs.shape[1])
            columns = _directions(basis, signs)
            made = products(columns)
            complete = made.shape[1] == columns.shape[1]
            if complete or made.shape[1] >= k + 2:
                signs = signs[:, : made.shape[1] - k]
                look = _Look(basis, signs, made[:, :k], made[:, k:])
        if look is None or not (complete or look.signs.shape[1] >= 2):
            raise KeyboardInterrupt
        return look, draws

    def _known(self, products: Products, budget: int) -> Tensor | None:
        """The Q to use, unless it has to be found first."""
        if budget == products.size:
            return products.basis(0, budget)
        basis = self._state.basis
        if basis is None or int(basis.shape[0]) != products.size:
            return None
        columns = min(int(basis.shape[1]), budget - _fresh(budget))
        return array(basis[:, :columns], products.dtype)

    def _steadied(
        self, figures: DeflatedMoments, fresh: int
    ) -> tuple[DeflatedMoments, float | None]:
        """Widens the errors of the norm where earlier spreads call for it.

        The geometric mean forgets fast: Q gets better by orders of magnitude.
        """
        squared, seen = figures.squared_frobenius_norm, self._state.spread
        error = squared.relative_standard_error
        if not error or not math.isfinite(error):
            return figures, seen
        spread = mean = error * math.sqrt(fresh)
        if seen is not None:
            # Four fresh directions weigh as much as all that was seen before.
            weight = fresh / (fresh + 4)
            mean = seen ** (1 - weight) * spread**weight
        squared = _widened(squared, max(1.0, mean / spread))
        return dataclasses.replace(figures, squared_frobenius_norm=squared), mean

    def get_state(self) -> dict[str, Any]:
        """All that the next update depends on, as NumPy arrays and integers."""
        basis, draws, spread = self._state
        if basis is not None:
            basis = ops.convert_to_numpy(basis)
        return {"basis": basis, "draws": draws, "spread": spread}

    def set_state(self, state: Mapping[str, Any]) -> None:
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
        basis, spread = state["basis"], state["spread"]
        self._state = _State(
            None if basis is None else _orthonormal(ops.convert_to_numpy(basis)),
            int(state["draws"]),
            None if spread is None else float(spread),
        )


def _orthonormal(basis: Any) -> Any:
    """A basis from outside, mended if need be; `None` if it cannot be."""
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
        return None
    if abs(gram - np.eye(len(gram))).max(initial=0) > 1e-5:
        return np.linalg.qr(basis)[0]
    return basis


def _widened(estimate: Estimate, factor: float) -> Estimate:
    return dataclasses.replace(
        estimate,
        standard_error=estimate.standard_error * factor,
        blocks=tuple(_widened(b, factor) for b in estimate.blocks),
    )


def _fresh(num_matvecs: int) -> int:
    """Number of fresh directions wanted: a third, two at least."""
    return min(num_matvecs, max(2, num_matvecs // 3))


def _dominant(
    basis_products: Tensor, fresh_products: Tensor, count: int
) -> Tensor | None:
    """The next Q: the leading left singular vectors of all products.

    Householder's QR gives orthonormal columns for any rank, zero included. `None` if
    the products are not finite.
    """
    width = int(fresh_products.shape[1])
    weight = _FRESH_WEIGHT / max(width, 1) ** 0.5
    orthogonal, triangle = _factors(
        basis_products, fresh_products, array(weight, ops.dtype(basis_products))
    )
    triangle = to_host(triangle)
    if not np.isfinite(triangle).all():
        return None
    turn = np.linalg.svd(triangle)[0][:, :count]
    return orthogonal @ array(turn, ops.dtype(orthogonal))


@compiled
def _directions(basis: Tensor, signs: Tensor) -> Tensor:
    """Q and (I − QQᵀ)V, side by side."""
    return ops.concatenate([basis, outside(basis, signs)], axis=1)


@compiled
def _factors(
    basis_products: Tensor, fresh_products: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    columns = ops.concatenate([basis_products, weight * fresh_products], axis=1)
    factors: tuple[Tensor, Tensor] = ops.qr(columns)
    return factors
