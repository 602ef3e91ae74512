"""A symmetric operator split at a subspace: what is known, and what signs show.

With an orthonormal Q of shape `(P, k)` and Z = HQ,

    H = K + B,   K = ZQᵀ + Q Z⊥ᵀ,   Z⊥ = (I − QQᵀ)Z,   B = (I − QQᵀ) H (I − QQᵀ)

K is known exactly. B is seen through random signs v, since H(I − QQᵀ)v is Bv and a part
inside of Q. The two are orthogonal:

    ‖H‖_F² = ‖K‖_F² + E‖Bv‖²,    tr H = tr K + E vᵀBv,    diag H = diag K + E v ⊙ Bv

This is the splitting of Hutch++ (Meyer, Musco, Musco, Woodruff 2021), made to use the
symmetry: there ‖H(I − QQᵀ)v‖² is sampled, which is ‖Bv‖² and a part that Z tells
exactly. It is unbiased for every Q that was chosen before v was drawn.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keras_curvature.backend import array
from keras_curvature.estimators import tall
from keras_curvature.estimators.estimate import Estimate
from keras_curvature.estimators.moments import Moments
from keras_curvature.estimators.quadratic_forms import (
    error_of_mean,
    mean_of,
    paired_mean,
    students_factor,
)
from keras_curvature.estimators.tall import Vector

_Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class DeflatedMoments(Moments):
    """`Moments`, and the dominant eigenvalues from the same products.

    Attributes:
        eigenvalues: approximate eigenvalues of largest magnitude, a NumPy array
            sorted by decreasing magnitude.
        residual_norms: for each of them how far at most the nearest eigenvalue of
            the operator is; itself an estimate (the norm of B is). The error is
            usually much smaller: it decreases with the square of the residual.
    """

    squared_frobenius_norm: Estimate
    eigenvalues: _Array
    residual_norms: _Array


# What is not finite gives figures that are not finite, without further noise.
@np.errstate(over="ignore", invalid="ignore")
def deflated_moments(
    basis: Sequence[Vector],
    signs: Sequence[Vector],
    basis_products: Sequence[Vector],
    fresh_products: Sequence[Vector],
    num_matvecs: int,
    block_sizes: tuple[int, ...] | None = None,
    diagonal: bool = False,
    inner: _Array | None = None,
) -> DeflatedMoments:
    """The figures that Q and random signs tell.

    Args:
        basis: orthonormal Q, list of k ≥ 0 arrays `(P,)`.
        signs: fresh signs V, list of s ≥ 0 arrays; none when Q spans everything.
        basis_products: HQ, k arrays.
        fresh_products: `H outside(Q, V)`, s arrays. There is one product at least.
        num_matvecs: number of products to name in the estimates.
        block_sizes: tuple of sizes, or `None`.
        diagonal: whether to estimate the diagonal too.
        inner: the inner products of Q, HQ and the fresh products, if they are known:
            `tall.gram` of all of them.
    """
    vectors = [*basis, *basis_products, *fresh_products]
    inner = tall.gram(vectors) if inner is None else inner
    measured = _measured(
        basis, signs, basis_products, fresh_products, inner, block_sizes, diagonal
    )
    dtype = vectors[-1].dtype.name
    return _figures(measured, len(signs), num_matvecs, block_sizes, dtype)


def outside(basis: Sequence[Vector], vectors: Sequence[Vector]) -> list[Vector]:
    """`(I − QQᵀ) X` for an orthonormal Q, in the type of Q."""
    inside = tall.dot(vectors, basis)
    coefficients = np.concatenate([np.eye(len(vectors)), -inside], axis=1)
    return tall.combined(coefficients, [*vectors, *basis], basis[0].dtype.name)


def _measured(
    Q: Sequence[Vector],
    V: Sequence[Vector],
    Z: Sequence[Vector],
    Y: Sequence[Vector],
    inner: _Array,
    block_sizes: tuple[int, ...] | None,
    diagonal: bool,
) -> dict[str, _Array]:
    """All that is formed from long vectors, by block; the rest is small."""
    k, s = len(Q), len(V)
    # Q is orthonormal to the rounding of its type, the rest is orthogonal to it.
    inside = np.linalg.solve(inner[:k, :k], inner[:k, k:])
    T = inner[:k, k : 2 * k]
    T = (T + T.T) / 2
    of_Z, of_Y = inside[:, :k].T, inside[:, k:].T
    window = tall.Window([*Q, *Z, *V, *Y])
    size, width = len((*Z, *Y)[0]), 2 * (k + s)
    grams = np.zeros((1 if block_sizes is None else len(block_sizes), width, width))
    trace_diagonal, norm_diagonal = np.zeros((len(grams), s, s)), np.zeros((s, s))
    entries, errors = np.empty((2, size if diagonal else 0))
    for block, part in tall.parts(size, block_sizes):
        rows = window(part)
        q, z, v, r = np.split(rows, np.cumsum([k, k, s]))
        if diagonal:
            known = ((2 * z - T @ q) * q).sum(0)
        # From differences of inner products little would be left of what is small.
        z -= of_Z @ q  # = Z⊥
        r -= of_Y @ q  # = BV
        grams[block] += rows @ rows.T
        shares, squares = v * r, r * r
        trace_diagonal[block] += shares @ shares.T
        norm_diagonal += squares @ squares.T
        if diagonal:
            mean = shares.sum(0) / max(s, 1)
            entries[part] = known + mean
            spread = np.square(shares - mean).sum(0)
            errors[part] = np.sqrt(spread / max(s * (s - 1), 1))
    measured = {
        "T": T,
        "inside": inner[:k, 2 * k :],
        "grams": grams,
        "trace diagonal": trace_diagonal,
        "norm diagonal": norm_diagonal,
    }
    if diagonal:
        measured |= {"diagonal": entries, "diagonal error": errors}
    return measured


def _figures(
    measured: dict[str, _Array],
    fresh: int,
    num_matvecs: int,
    block_sizes: tuple[int, ...] | None,
    dtype: str,
) -> DeflatedMoments:
    """The figures from what was measured; a diagonal goes where the operator is.

    With W = [Q, Z⊥] and C = [[T, I], [I, 0]], K is `W C Wᵀ`; so the products of the
    tall arrays with each other, by block, tell all of it.
    """
    diagonal = None
    if "diagonal" in measured:
        error: Any = None
        if fresh != 1:
            error = measured["diagonal error"] * students_factor(fresh - 1)
            error = array(error, dtype)
        diagonal = Estimate(array(measured["diagonal"], dtype), error, num_matvecs)
    T, grams = measured["T"], measured["grams"]
    trace_diagonal = measured["trace diagonal"]
    k = len(T)
    W, V, R = slice(2 * k), slice(2 * k, 2 * k + fresh), slice(2 * k + fresh, None)
    WW, WV, WR, VR = grams[:, W, W], grams[:, W, V], grams[:, W, R], grams[:, V, R]
    eye = np.eye(k)
    C = np.block([[T, eye], [eye, 0 * eye]])
    CW = C @ WW
    S = WW[:, k:, k:].sum(0)
    # Z = W [T; I]; and ‖K‖² by rows is that of Z and of Q Z⊥ᵀ.
    rows_of_Z = C[:, :k].T @ WW @ C[:, :k]
    known_rows = np.trace(rows_of_Z + S @ WW[:, :k, :k], axis1=1, axis2=2)
    # ‖(HV)_b‖² less its part inside of Q, whose mean the known rows hold.
    mixed = np.swapaxes(WR[:, :k], 1, 2) @ measured["inside"]
    norm = grams[:, R, R] + mixed + np.swapaxes(mixed, 1, 2)
    trace = (VR + np.swapaxes(VR, 1, 2)) / 2

    pairs, by_block = None, block_sizes is not None
    if by_block and fresh != 1:
        pairs = Estimate(*_pairs(CW, C @ WV, WR, VR, grams[:, R, R]), num_matvecs)
    total, trace_total = norm.sum(0), trace.sum(0)
    return DeflatedMoments(
        of_shares(
            np.trace(CW, axis1=1, axis2=2) + mean_of(trace),
            [
                error_of_mean(trace_total, trace_diagonal.sum(0), total),
                error_of_mean(trace, trace_diagonal, grams[:, R, R], of_rows=True),
            ],
            num_matvecs,
            by_block,
        ),
        of_shares(
            known_rows + mean_of(norm),
            [
                error_of_mean(total, measured["norm diagonal"], skewed=True),
                error_of_mean(norm, skewed=True),
            ],
            num_matvecs,
            by_block,
            pairs,
        ),
        diagonal,
        num_matvecs,
        *dominant_eigenvalues(T, S, spectral_norm(total)),
    )


def of_shares(
    values: _Array,
    errors: Sequence[_Array | None],
    num_matvecs: int,
    by_block: bool,
    pairs: Estimate | None = None,
) -> Estimate:
    """A figure that is a sum over blocks.

    Args:
        values: the shares of the blocks, `(n,)`.
        errors: the standard error of their sum, and those of each of them, `(n,)`.
        num_matvecs: number of products to name.
        by_block: whether to tell of the blocks.
        pairs: of the norm.
    """
    of_sum, of_each = errors
    shares: tuple[Estimate, ...] = ()
    if by_block:
        each = [None] * len(values) if of_each is None else of_each.tolist()
        shares = tuple(
            Estimate(v, e, num_matvecs)
            for v, e in zip(values.tolist(), each, strict=True)
        )
    total = None if of_sum is None else float(of_sum)
    return Estimate(float(values.sum()), total, num_matvecs, shares, pairs)


def _pairs(
    CW: _Array, CWV: _Array, WR: _Array, VR: _Array, RR: _Array
) -> tuple[_Array, _Array | None]:
    """`‖H_ab‖²` for all pairs of blocks, and its standard error.

    `‖K_ab‖²` is known. For the rest, with independent signs v and w,

        ‖B_ab‖² = E (w_a · (Bv)_a) (v_b · (Bw)_b)
        ⟨K_ab, B_ab⟩ = E (K_ab v_b) · (Bv)_a

    so that every pair of directions gives a sample.

    Args:
        CW: `C Wᵀ_a W_a` for each block a, `(n, 2k, 2k)`.
        CWV: `C Wᵀ_a V_a`, `(n, 2k, s)`.
        WR: `Wᵀ_a R_a` with `R = BV`, `(n, 2k, s)`.
        VR: `Vᵀ_a R_a`, `(n, s, s)`.
        RR: `Rᵀ_a R_a`, `(n, s, s)`.

    Returns:
        Two arrays `(n, n)`; the error is `None` from two directions.
    """
    n, s = len(VR), VR.shape[-1]
    known = CW.reshape(n, -1) @ np.swapaxes(CW, 1, 2).reshape(n, -1).T
    if not s:
        return known, np.zeros((n, n))
    WR, CWV, VR = (np.moveaxis(x, 2, 0) for x in (WR, CWV, VR))  # (s, n, …)
    cross = symmetric(2 * WR @ np.swapaxes(CWV, 1, 2))
    # Sums over j ≠ i of VR[a, i, j] VR[b, j, i].
    own = np.einsum("jaj->ja", VR)
    paired = symmetric(np.swapaxes(VR, 0, 2) @ np.swapaxes(VR, 1, 2))
    paired -= own[:, :, None] * own[:, None]
    kernel = paired + ((s - 2) * cross + cross.sum(0)) / 2
    rows = mean_of(RR)
    inner = np.maximum(paired.sum(0) / (s * (s - 1)), 0)
    mean, error = paired_mean(kernel, np.sqrt(np.outer(rows, rows) + inner**2))
    return known + mean, error


def symmetric(x: _Array) -> _Array:
    """The symmetric part of matrices."""
    return (x + np.swapaxes(x, -1, -2)) / 2


def spectral_norm(forms: _Array) -> float:
    """About the largest eigenvalue of B at most, from its `(Bvᵢ)ᵀ(Bvⱼ)`.

    `‖B‖₂ ≤ ‖B²‖_F^½`, which the variance of `‖Bv‖²`, `2 ‖B²‖_F²`, tells.
    """
    error = error_of_mean(forms, skewed=True)
    if error is None:
        return math.sqrt(max(float(mean_of(forms)), 0.0))  # Rounding apart.
    return math.sqrt(error * math.sqrt(len(forms) / 2))


def dominant_eigenvalues(
    T: _Array, S: _Array, remainder: float
) -> tuple[_Array, _Array]:
    """The k dominant eigenvalues of K, and residual norms for H.

    In an orthonormal basis of the range of Q and Z⊥, K is `[[T, Eᵀ], [E, 0]]` with
    `EᵀE = S`. Its eigenvalues are much closer to those of H than T's (the Ritz
    values): they miss only what B contributes to second order. For an eigenvector y
    of K, `Hy − μy = By`, and B sees only the part of y outside of Q.
    """
    k = len(T)
    if not (np.isfinite(T).all() and np.isfinite(S).all()):
        return np.full(k, np.nan), np.full(k, np.nan)
    squares, vectors = np.linalg.eigh(S)
    E = np.sqrt(np.maximum(squares, 0))[:, None] * vectors.T
    values, vectors = np.linalg.eigh(np.block([[T, E.T], [E, np.zeros((k, k))]]))
    order = np.argsort(-abs(values), kind="stable")[:k]
    outside = np.linalg.norm(vectors[k:, order], axis=0)
    return values[order], outside * remainder
