"""The dominant eigenvectors of an operator, kept from one look to the next.

A network's Hessian has a few large eigenvalues, which make plain averages over random
directions noisy. `deflation` takes them out of the averages; here is kept what that
needs, the subspace Q that they span.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops
from numpy.typing import NDArray

from keras_curvature.backend import Tensor
from keras_curvature.estimators import tall
from keras_curvature.estimators.deflation import (
    DeflatedMoments,
    deflated_moments,
    outside,
)
from keras_curvature.estimators.estimate import Estimate
from keras_curvature.estimators.left_out import left_out_moments
from keras_curvature.estimators.products import (
    Products,
    ProgressFunction,
    Seed,
    SymmetricOperator,
    check_blocks,
    on_host,
    seed_key,
    together,
)
from keras_curvature.estimators.sampling import check_budget
from keras_curvature.estimators.tall import Vector

#: Keeps these draws apart from those of the plain averages.
_PURPOSE = 1

#: Weight of the fresh products against HQ in the choice of the next Q; 1 would make
#: the sketch an unbiased picture of H². Fresh directions are noisier: between 0.3 and
#: 1 nothing changes where the subspace is stable, and below it a turn of the
#: subspace is followed one look later (measured along training runs).
_FRESH_WEIGHT = 0.5


class _State(NamedTuple):
    """What one update leaves for the next: Q, the signs drawn, the spread seen."""

    basis: list[Vector] | None = None
    draws: int = 0
    spread: float | None = None


class _Look(NamedTuple):
    """Q, random signs V, and the products HQ and H(I − QQᵀ)V.

    Where Q is the left singular vectors of HV, there are singular values instead of the
    latter.
    """

    basis: list[Vector]
    signs: list[Vector]
    basis_products: list[Vector]
    fresh_products: list[Vector]
    singular_values: NDArray[np.float64] | None = None


class DominantSubspace:
    """Frobenius norm, trace and top eigenvalues, better from look to look.

    During training the dominant subspace of a Hessian turns slowly (Gur-Ari,
    Roberts, Dyer 2018). What one `update` learns about it, the next one uses: with
    12 products each, along the training of three small networks, the relative error of
    the Frobenius norm was 4 % at the first look and 0.4 to 1.7 % from the third on,
    that of plain averages 6 to 10 % (benchmarks/results/subspace_tracking.json).

    ```python
    subspace = DominantSubspace()
    for step in ...:
        figures = subspace.update(A, num_matvecs=12)
        figures.frobenius_norm, figures.trace, figures.eigenvalues
    ```

    The splitting is in `deflation`, that of the first look in `left_out`. The next Q
    comes from one step of block power iteration, enlarged by the products with signs
    (Halko, Martinsson, Tropp 2011, algorithms 4.1 and 4.4).

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
    def basis(self) -> NDArray[Any] | None:
        """The orthonormal Q for the next update, a copy `(P, k)`; `None` before any."""
        basis = self._state.basis
        return None if basis is None else np.stack(basis, axis=1)

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
        Without a Q of the right size half of them find one, and what they leave is
        seen by leaving each of them out in turn, see `left_out`; of an odd number one
        is not spent. An operator of size P ≤ `num_matvecs` is measured exactly.

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
            inner = _inner(look)
            figures = _figures(look, products.spent, blocks, diagonal, inner)
            figures, spread = self._steadied(figures, len(look.signs))
            basis = self._state.basis
            if math.isfinite(figures.squared_frobenius_norm.value):
                kept = self.k or max(1, budget - _fresh(budget))
                basis = _dominant(look, inner, kept)
        self._state = _State(basis, draws, spread)
        return figures

    def _look(self, products: Products, key: Tensor, budget: int) -> tuple[_Look, int]:
        """The products that are wanted, or some of them; and the signs drawn so far."""
        basis = self._known(products, budget)
        if basis is None:
            return self._first_look(products, key, budget)
        k, draws = len(basis), self._state.draws
        signs = _signs(products, key, draws, budget - k)
        made = products(_directions(basis, signs, products.dtype))
        found = len(made) - k
        if len(made) < budget and found < 2:
            raise KeyboardInterrupt
        look = _Look(basis, signs[:found], made[:k], made[k:])
        return look, draws + len(signs)

    def _first_look(
        self, products: Products, key: Tensor, budget: int
    ) -> tuple[_Look, int]:
        """Without a Q: half of the products find it, and show what is left as well."""
        draws = self._state.draws
        width = budget // 2 if budget > 3 else budget
        products.total = 2 * width if width < budget else budget
        signs = _signs(products, key, draws, width)
        found = products(signs)
        if len(found) < min(width, 2):
            raise KeyboardInterrupt
        signs, draws = signs[: len(found)], draws + len(signs)
        # What they are by themselves: plain averages.
        look = _Look([], signs, [], found)
        inner = _inner(look)
        if width == budget or not (products.going and np.isfinite(inner).all()):
            return look, draws
        of_found = _complete(found, inner, np.ones(width), width)
        basis = found
        made = products(basis)
        if len(made) == width:
            values = np.linalg.norm(of_found, axis=1)
            return _Look(basis, signs, made, [], values), draws
        # They are what Q holds of them, and no more.
        again = tall.combined(of_found.T, basis, products.dtype)
        return look._replace(fresh_products=again), draws

    def _known(self, products: Products, budget: int) -> list[Vector] | None:
        """The Q to use, unless it has to be found first."""
        if budget == products.size:
            return list(np.eye(budget, dtype=products.dtype))
        basis = self._state.basis
        if basis is None or any(len(x) != products.size for x in basis):
            return None
        count = min(len(basis), budget - _fresh(budget))
        return [x.astype(products.dtype, copy=False) for x in basis[:count]]

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
        _, draws, spread = self._state
        return {"basis": self.basis, "draws": draws, "spread": spread}

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


def _orthonormal(basis: NDArray[Any]) -> list[Vector] | None:
    """A basis from outside, mended if need be; `None` if it cannot be."""
    if basis.ndim != 2 or basis.shape[0] < basis.shape[1]:
        raise ValueError(
            "The basis must have shape (P, k) with k ≤ P. Received: shape "
            f"{basis.shape}."
        )
    dtype = "float64" if basis.dtype == np.float64 else "float32"
    vectors = [np.array(column, dtype) for column in basis.T]
    # Estimates are unbiased for any orthonormal Q, and only for those.
    inner = tall.gram(vectors)
    if not vectors or not np.isfinite(inner).all():
        return None
    if abs(inner - np.eye(len(inner))).max(initial=0) > 1e-5:
        _complete(vectors, inner, np.ones(len(inner)), len(inner))
    return vectors


def _widened(estimate: Estimate, factor: float) -> Estimate:
    return dataclasses.replace(
        estimate,
        standard_error=estimate.standard_error * factor,
        blocks=tuple(_widened(b, factor) for b in estimate.blocks),
    )


def _fresh(num_matvecs: int) -> int:
    """Number of fresh directions wanted: a third, two at least."""
    return min(num_matvecs, max(2, num_matvecs // 3))


def _signs(products: Products, key: Tensor, start: int, width: int) -> list[Vector]:
    """Random signs for some draws, a byte for each."""
    return [
        on_host(products.signs(key, number, 1))[0].astype(np.int8)
        for number in range(start, start + width)
    ]


def _directions(
    basis: list[Vector], signs: list[Vector], dtype: str
) -> Iterator[Vector]:
    """Q and (I − QQᵀ)V, the latter made as they are needed."""
    yield from basis
    step = together(len(signs[0])) if signs else 1
    for start in range(0, len(signs), step):
        group = signs[start : start + step]
        yield from outside(basis, group) if basis else (v.astype(dtype) for v in group)


def _figures(
    look: _Look,
    num_matvecs: int,
    blocks: tuple[int, ...] | None,
    diagonal: bool,
    inner: NDArray[np.float64],
) -> DeflatedMoments:
    """What a look tells."""
    Q, V, Z, Y, values = look
    if values is not None:
        return left_out_moments(Q, V, Z, num_matvecs, blocks, diagonal, inner)
    return deflated_moments(Q, V, Z, Y, num_matvecs, blocks, diagonal, inner)


def _inner(look: _Look) -> NDArray[np.float64]:
    """The inner products of Q, HQ and the fresh products."""
    with np.errstate(over="ignore", invalid="ignore"):
        return tall.gram([*look.basis, *look.basis_products, *look.fresh_products])


def _dominant(look: _Look, inner: NDArray[np.float64], count: int) -> list[Vector]:
    """The next Q: the leading left singular vectors of all products, in their place."""
    k, values = len(look.basis), look.singular_values
    if values is None:
        others, place = look.fresh_products, 2 * k
        values = np.ones(len(others))
    else:
        others, place = look.basis, 0
    fresh = len(others)
    weights = np.append(np.ones(k), _FRESH_WEIGHT / max(fresh, 1) ** 0.5 * values)
    order = np.r_[k : 2 * k, place : place + fresh]
    vectors = [*look.basis_products, *others]
    look.basis_products.clear()
    others.clear()
    inner = inner[np.ix_(order, order)]
    _complete(vectors, inner, weights, min(count, len(vectors)))
    return vectors


def _complete(
    vectors: list[Vector],
    inner: NDArray[np.float64],
    weights: NDArray[np.float64],
    count: int,
) -> NDArray[np.float64]:
    """Puts singular vectors in the place of vectors, as many as asked for.

    Returns:
        Their inner products with what was there, `(count, k)`; zero for those that only
        make up the number.
    """
    size, dtype = len(vectors[0]), vectors[0].dtype.name
    of_vectors = np.zeros((count, len(vectors)))
    coordinates = tall.to_singular_vectors(vectors, inner, weights, count)
    of_vectors[: len(coordinates)] = coordinates
    tall.complete(vectors, count, size, dtype)
    return of_vectors
