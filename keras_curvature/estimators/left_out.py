"""Figures from random signs whose own products span the subspace Q.

Random signs V, their products Y = HV, an orthonormal Q that spans Y, and Z = HQ. The
signs that made Q cannot show what `deflation` sees through fresh ones: what is left of
H outside of Q was chosen by them. But each of them is fresh to what the others span.
With Q₍ᵢ₎ for a basis of all products but the i-th, and H = K₍ᵢ₎ + B₍ᵢ₎ the splitting
there,

    tr H = E [tr K₍ᵢ₎ + vᵢᵀB₍ᵢ₎vᵢ]

and likewise the norm and the diagonal, a sample from every sign and all from the same
products. So half of them make Q instead of a third, and as many samples show the rest.
Leaving one out is the idea of XTrace and XDiag (Epperly, Tropp, Webber 2024, "XTrace:
Making the most of every sample in stochastic trace estimation", arXiv 2301.07825),
which split H on one side, `(I − QQᵀ)H`. From both sides less is left to be sampled, and
nothing is needed that is not known. With T = QᵀZ, Z⊥ = Z − QT, an orthonormal S in
which Q loses QS when signs are left out, and d = (I − SSᵀ)Qᵀv,

    Bv = QS Sᵀ(QᵀHv − Td) − Z⊥d

lies in the span of W = [Q, Z⊥] like all else; so inner products of long vectors, by
block, tell everything but the diagonal. Where two signs meet, as in the norms of pairs
of blocks, both are left out.

Samples that share their subspaces are not quite independent, which their spread does
not show. Next to eigenvalues that stand out it makes no difference; where all are alike
and signs are a tenth of the dimensions or more, deviations are up to 1.3 times as large
as is told.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from keras_curvature.backend import array
from keras_curvature.estimators import tall
from keras_curvature.estimators.deflation import (
    DeflatedMoments,
    dominant_eigenvalues,
    of_shares,
    spectral_norm,
    symmetric,
)
from keras_curvature.estimators.estimate import Estimate
from keras_curvature.estimators.quadratic_forms import (
    error_of_mean,
    paired_mean,
    students_factor,
)
from keras_curvature.estimators.tall import Vector

_Array = NDArray[np.float64]

#: Signs that meet each other, at most: there are half as many pairs as their square,
#: and errors become no better.
_MEETING = 24


# What is not finite gives figures that are not finite, without further noise.
@np.errstate(over="ignore", invalid="ignore")
def left_out_moments(
    basis: Sequence[Vector],
    signs: Sequence[Vector],
    basis_products: Sequence[Vector],
    num_matvecs: int,
    block_sizes: tuple[int, ...] | None = None,
    diagonal: bool = False,
    inner: _Array | None = None,
) -> DeflatedMoments:
    """The figures that signs tell, each with what the others span.

    Args:
        basis: orthonormal Q that spans HV, list of k arrays `(P,)`.
        signs: random signs V, k ≥ 2 arrays.
        basis_products: HQ, k arrays.
        num_matvecs: number of products to name in the estimates.
        block_sizes: tuple of sizes, or `None`.
        diagonal: whether to estimate the diagonal too.
        inner: the inner products of Q and HQ, if they are known: `tall.gram` of all of
            them.
    """
    k, by_block = len(basis), block_sizes is not None
    tall_arrays = [*basis, *basis_products]
    inner = tall.gram(tall_arrays) if inner is None else inner
    # Q is orthonormal to the rounding of its type.
    inside = np.asarray(np.linalg.solve(inner[:k, :k], inner[:k, k:]), np.float64)
    T = (inside + inside.T) / 2
    # H is symmetric: QᵀHV = (HQ)ᵀV.
    of_signs, of_products = np.split(tall.dot(tall_arrays, signs), 2)
    split = _Split(T, of_signs, of_products)
    ones = split.without(np.arange(k)[:, None])
    passed = _passed(
        basis, signs, basis_products, inside, T, ones, block_sizes, diagonal
    )
    shares = _Shares(T, passed["grams"])
    samples = shares.samples(ones)
    met = shares.meetings(split, samples)
    count = met["norm"].shape[-1]
    of_trace = passed["trace diagonal"][:, :count, :count]
    of_norm = passed["norm diagonal"][:count, :count]
    forms = met["trace"], of_trace, met["rest"]
    trace_errors = [
        error_of_mean(*(x.sum(0) for x in forms)),
        error_of_mean(*forms, of_rows=True),
    ]
    norm_errors = [
        error_of_mean(met["norm"].sum(0), of_norm, skewed=True),
        error_of_mean(met["norm"], skewed=True),
    ]
    pairs = entries = None
    if by_block:
        pairs = Estimate(*paired_mean(met["kernel"], met["spread"]), num_matvecs)
    if diagonal:
        dtype = basis[0].dtype.name
        widened = passed["diagonal error"] * students_factor(k - 1)
        entries = Estimate(
            array(passed["diagonal"], dtype), array(widened, dtype), num_matvecs
        )
    S = passed["grams"].sum(0)[k : 2 * k, k : 2 * k]
    return DeflatedMoments(
        _estimate(samples["trace"], trace_errors, num_matvecs, by_block),
        _estimate(samples["norm"], norm_errors, num_matvecs, by_block, pairs),
        entries,
        num_matvecs,
        *dominant_eigenvalues(T, S, spectral_norm(met["rest"].sum(0))),
    )


def _estimate(
    samples: _Array,
    errors: list[_Array | None],
    num_matvecs: int,
    by_block: bool,
    pairs: Estimate | None = None,
) -> Estimate:
    """A figure from its samples by block, `(n, k)`.

    What signs that meet tell of its errors comes from many more numbers than the spread
    of the samples; but that, too, must be covered.

    Args:
        samples: of each block.
        errors: of the sum over blocks, and of each, as those that meet tell them.
        num_matvecs: number of products to name.
        by_block: whether to tell of the blocks.
        pairs: of the norm.
    """
    k = samples.shape[1]
    widest = []
    for each, error in zip((samples.sum(0), samples), errors, strict=True):
        # The errors are of means of fewer samples where not all meet.
        told = 0.0 if error is None else error * (min(k, _MEETING) / k) ** 0.5
        own = np.std(each, axis=-1, ddof=1) * students_factor(k - 1) / k**0.5
        widest.append(np.maximum(told, own))
    return of_shares(samples.mean(1), widest, num_matvecs, by_block, pairs)


class _Left(NamedTuple):
    """What becomes of the splitting when l signs are left out, in b ways.

    Attributes:
        lost: S, `(b, k, l)`: Q loses QS.
        rest: Bv for each of these signs is W times a column of it, `(b, 2k, l)`.
        inside: and the part of `H(I − P)v` within what is left of Q is Q times one,
            `(b, k, l)`.
    """

    lost: _Array
    rest: _Array
    inside: _Array


class _Split:
    """The splitting of H by Q, in coordinates.

    Args:
        T: QᵀHQ.
        of_signs: QᵀV.
        of_products: QᵀHV.
    """

    def __init__(self, T: _Array, of_signs: _Array, of_products: _Array):
        self.T, self._of_signs, self._of_products = T, of_signs, of_products
        self._directions = np.full_like(T, np.nan)
        if np.isfinite(of_products).all():
            # Orthogonal to all columns but one: those of the inverse's transpose.
            left, values, right = np.linalg.svd(of_products)
            # What V does not tell from rounding, Q may lose as well.
            least = 1e-12 * values.max(initial=0) or 1.0
            inverse = (left / np.maximum(values, least)) @ right
            self._directions = inverse / np.linalg.norm(inverse, axis=0)

    def without(self, draws: NDArray[np.int64]) -> _Left:
        """Leaves out signs by their numbers, `(b, l)`."""
        S = np.moveaxis(self._directions[:, draws], 0, 1)
        if draws.shape[1] > 1 and np.isfinite(S).all():
            S = np.linalg.qr(S)[0]
        d = np.moveaxis(self._of_signs[:, draws], 0, 1)
        d = d - S @ (_transposed(S) @ d)
        within = np.moveaxis(self._of_products[:, draws], 0, 1) - self.T @ d
        outside = S @ (_transposed(S) @ within)
        rest = np.concatenate([outside, -d], axis=1)
        return _Left(S, rest, within - outside)


def _passed(
    Q: Sequence[Vector],
    V: Sequence[Vector],
    Z: Sequence[Vector],
    inside: _Array,
    T: _Array,
    ones: _Left,
    block_sizes: tuple[int, ...] | None,
    diagonal: bool,
) -> dict[str, _Array]:
    """All that is formed from long vectors, by block; the rest is small."""
    k, size = len(Q), len(Q[0])
    rest, S = ones.rest[:, :, 0].T, ones.lost[:, :, 0].T
    within = np.einsum("ki,kl,li->i", S, T, S)[:, None]
    window = tall.Window([*Q, *Z, *V])
    blocks = 1 if block_sizes is None else len(block_sizes)
    grams = np.zeros((blocks, 3 * k, 3 * k))
    trace_diagonal, norm_diagonal = np.zeros((blocks, k, k)), np.zeros((k, k))
    entries, errors = np.empty((2, size if diagonal else 0))
    for block, part in tall.parts(size, block_sizes):
        rows = window(part)
        q, z, v = np.split(rows, 3)
        within_Q = inside.T @ q
        if diagonal:
            known = ((2 * z - within_Q) * q).sum(0)
        z -= within_Q  # = Z⊥
        grams[block] += rows @ rows.T
        r = rest.T @ rows[: 2 * k]  # = Bv
        shares, squares = v * r, r * r
        trace_diagonal[block] += shares @ shares.T
        norm_diagonal += squares @ squares.T
        if diagonal:
            lost = S.T @ q
            shares -= (2 * (S.T @ z) + within * lost) * lost
            mean = shares.mean(0)
            entries[part] = known + mean
            spread = np.square(shares - mean).sum(0)
            errors[part] = np.sqrt(spread / (k * (k - 1)))
    return {
        "grams": grams,
        "trace diagonal": trace_diagonal,
        "norm diagonal": norm_diagonal,
        "diagonal": entries,
        "diagonal error": errors,
    }


class _Shares:
    """The samples that signs tell, by block.

    With C = [[T, I], [I, 0]], K is `W C Wᵀ`. Where Q loses QS it is `W (C − F M Fᵀ) Wᵀ`
    with F = [[S, 0], [0, S]] and M = [[SᵀTS, I], [I, 0]].

    Args:
        T: QᵀHQ.
        grams: inner products of Q, Z⊥ and V by block, `(blocks, 3k, 3k)`.
    """

    def __init__(self, T: _Array, grams: _Array):
        k = len(T)
        self._T, self._WW = T, grams[:, : 2 * k, : 2 * k]
        self._C = np.block([[T, np.eye(k)], [np.eye(k), np.zeros((k, k))]])
        CW = self._CW = self._C @ self._WW
        self._WV = grams[:, : 2 * k, 2 * k :]
        self._CV = self._C @ self._WV
        self._trace = np.trace(CW, axis1=1, axis2=2)
        self._pairs = _all_pairs(CW, _transposed(CW))

    def _removed(self, left: _Left) -> tuple[_Array, _Array]:
        """F and M, `(b, 2k, 2l)` and `(b, 2l, 2l)`."""
        S = left.lost
        zeros = np.zeros_like(S)
        F = np.block([[S, zeros], [zeros, S]])
        within = _transposed(S) @ self._T @ S
        eye = np.broadcast_to(np.eye(S.shape[2]), within.shape)
        return F, np.block([[within, eye], [eye, 0 * eye]])

    def _known(self, F: _Array, M: _Array) -> tuple[_Array, _Array]:
        """`tr K_aa`, `(b, n)`, and `‖K_ab‖²`, `(b, n, n)`."""
        of_F, C_of_F = _of_all(self._WW, F), _of_all(self._CW, F)
        F, M = F[:, None], M[:, None]
        MFF = M @ (_transposed(F) @ of_F)
        mixed = _all_pairs(of_F @ M, C_of_F)
        pairs = self._pairs - mixed - _transposed(mixed)
        pairs += _all_pairs(MFF, _transposed(MFF))
        return self._trace - np.trace(MFF, axis1=2, axis2=3), pairs

    def _rest(self, left: _Left) -> tuple[_Array, _Array, _Array]:
        """`Wᵀ_a (Bv)_a`, `(b, n, 2k, l)`, and by block its products with Bv and more.

        Those are `(Bv)ᵀ_a (Bw)_a`, and the same and what `H(I − P)v` and Bw have in
        common in the rows of the block, `(b, n, l, l)`.
        """
        seen = _of_all(self._WW, left.rest)
        rest, inside = left.rest[:, None], left.inside[:, None]
        squares = _transposed(rest) @ seen
        more = _transposed(inside) @ seen[:, :, : inside.shape[2]]
        return seen, squares, squares + more + _transposed(more)

    def samples(self, ones: _Left) -> dict[str, _Array]:
        """What each sign tells alone, left out: `(n, k)`.

        Returns:
            Samples of the trace, of the squared norm of the rows, and of the part of
            it that is `‖Bv‖²`.
        """
        trace, pairs = self._known(*self._removed(ones))
        _, squares, rows = self._rest(ones)
        form = np.einsum("nwb,bw->bn", self._WV, ones.rest[:, :, 0])
        return {
            "trace": (trace + form).T,
            "norm": (pairs.sum(2) + rows[:, :, 0, 0]).T,
            "rest": squares[:, :, 0, 0].T,
        }

    def meetings(self, split: _Split, samples: dict[str, _Array]) -> dict[str, _Array]:
        """What signs tell two by two, both left out.

        Args:
            split: leaves them out.
            samples: what each of them tells alone.

        Returns:
            Forms for `error_of_mean`, `(n, count, count)`, of what the samples are of;
            and what `paired_mean` takes for the norms of pairs of blocks.
        """
        n, k = samples["trace"].shape
        count = min(k, _MEETING)
        forms = {name: np.zeros((n, count, count)) for name in samples}
        for name, form in forms.items():
            form[:, range(count), range(count)] = samples[name][:, :count]
        kernel, paired = np.zeros((count, n, n)), np.zeros((n, n))
        for j in range(1, count):
            draws = np.stack([np.arange(j), np.full(j, j)], axis=1)
            left = split.without(draws)
            F, M = self._removed(left)
            seen, squares, rows = self._rest(left)
            V = np.moveaxis(self._WV[:, :, draws], 2, 0)
            CV = np.moveaxis(self._CV[:, :, draws], 2, 0)
            # v_a · (Bw)_a, first by v.
            mixed = _transposed(V) @ left.rest[:, None]
            met = {"trace": symmetric(mixed), "norm": rows, "rest": squares}
            for name, form in met.items():
                forms[name][:, :j, j] = forms[name][:, j, :j] = form[:, :, 0, 1].T
            both = symmetric(mixed[:, :, 0, 1, None] * mixed[:, None, :, 1, 0])
            told = self._known(F, M)[1] + both
            F, M = F[:, None], M[:, None]
            of_V = CV - F @ (M @ (_transposed(F) @ V))
            told += symmetric(_all_pairs(seen, of_V))
            kernel[:j] += told
            kernel[j] += told.sum(0)
            paired += both.sum(0)
        inner = np.maximum(paired / (count * (count - 1) / 2), 0)
        norms = samples["rest"].mean(1)
        spread = np.sqrt(np.outer(norms, norms) + inner**2)
        return {**forms, "kernel": kernel, "spread": spread}


def _of_all(matrices: _Array, columns: _Array) -> _Array:
    """Products of all with all: `(n, p, q)` and `(b, q, r)` to `(b, n, p, r)`."""
    return np.moveaxis(np.tensordot(matrices, columns, ([2], [1])), 2, 0)


def _all_pairs(x: _Array, y: _Array) -> _Array:
    """Sums of `x_a ∘ y_b` for all pairs of blocks: `(…, n, ·, ·)` to `(…, n, n)`."""
    x, y = (z.reshape(*z.shape[:-2], -1) for z in (x, y))
    return x @ _transposed(y)


def _transposed(matrices: _Array) -> _Array:
    return np.swapaxes(matrices, -1, -2)
