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
import functools
import math
from collections.abc import Callable

import numpy as np
from keras import ops
from numpy.typing import NDArray

from keras_curvature.backend import Tensor, compiled
from keras_curvature.estimators.estimate import Estimate
from keras_curvature.estimators.moments import Moments
from keras_curvature.estimators.products import block_rows, dot, to_host
from keras_curvature.estimators.quadratic_forms import (
    error_of_mean,
    mean_of,
    paired_mean,
    students_factor,
)

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


def deflated_moments(
    basis: Tensor,
    signs: Tensor,
    basis_products: Tensor,
    fresh_products: Tensor,
    num_matvecs: int,
    block_sizes: tuple[int, ...] | None = None,
    diagonal: bool = False,
) -> DeflatedMoments:
    """The figures that Q and random signs tell.

    Args:
        basis: orthonormal Q, tensor `(P, k)`, k ≥ 0.
        signs: fresh signs V, tensor `(P, s)`, s ≥ 0; none when Q spans everything.
        basis_products: HQ, tensor `(P, k)`.
        fresh_products: `H outside(Q, V)`, tensor `(P, s)`.
        num_matvecs: number of products to name in the estimates.
        block_sizes: tuple of sizes, or `None`.
        diagonal: whether to estimate the diagonal too.
    """
    measured = _measure(block_sizes, bool(diagonal))(
        basis, signs, basis_products, fresh_products
    )
    return _figures(measured, int(signs.shape[1]), num_matvecs, block_sizes)


def outside(basis: Tensor, x: Tensor) -> Tensor:
    """`(I − QQᵀ) X` for an orthonormal Q."""
    return x - basis @ dot(basis, x)


@functools.lru_cache(maxsize=64)
def _measure(
    block_sizes: tuple[int, ...] | None, diagonal: bool
) -> Callable[..., dict[str, Tensor]]:
    """Compiles all that is formed from tall arrays, by block; the rest is small."""

    def measure(Q: Tensor, V: Tensor, Z: Tensor, Y: Tensor) -> dict[str, Tensor]:
        T = dot(Q, Z)
        T = (T + ops.transpose(T)) / 2
        # Once more, for what rounding leaves inside of Q.
        orthogonal = outside(Q, Z - Q @ T)
        inside = dot(Q, Y)
        R = outside(Q, Y - Q @ inside)  # = BV
        shares = V * R
        all_of_it = ops.concatenate([Q, orthogonal, V, R], axis=1)

        def grams(x: Tensor) -> Tensor:
            return ops.stack([dot(x[b], x[b]) for b in block_rows(block_sizes)])

        measured = {
            "T": T,
            "inside": inside,
            "grams": grams(all_of_it),
            "trace diagonal": grams(shares),
            "norm diagonal": dot(ops.square(R), ops.square(R)),
        }
        if diagonal:
            # Not the static shape: a graph may serve several numbers of signs.
            count = ops.cast(ops.shape(shares)[1], shares.dtype)
            mean = ops.sum(shares, axis=1) / ops.maximum(count, 1)
            squares = ops.sum(ops.square(shares - mean[:, None]), axis=1)
            known = ops.sum((2 * Z - Q @ T) * Q, axis=1)
            measured["diagonal"] = known + mean
            measured["diagonal error"] = ops.sqrt(
                squares / ops.maximum(count * (count - 1), 1)
            )
        return measured

    return compiled(measure)


# What is not finite gives figures that are not finite, without further noise.
@np.errstate(over="ignore", invalid="ignore")
def _figures(
    measured: dict[str, Tensor],
    fresh: int,
    num_matvecs: int,
    block_sizes: tuple[int, ...] | None,
) -> DeflatedMoments:
    """The figures from what was measured on the device.

    With W = [Q, Z⊥] and C = [[T, I], [I, 0]], K is `W C Wᵀ`; so the products of the
    tall arrays with each other, by block, tell all of it.
    """
    diagonal = None
    if "diagonal" in measured:
        value, error = measured.pop("diagonal"), measured.pop("diagonal error")
        error = None if fresh == 1 else error * students_factor(fresh - 1)
        diagonal = Estimate(value, error, num_matvecs)
    small = {name: to_host(x) for name, x in measured.items()}
    T, grams, trace_diagonal = small["T"], small["grams"], small["trace diagonal"]
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
    mixed = np.swapaxes(WR[:, :k], 1, 2) @ small["inside"]
    norm = grams[:, R, R] + mixed + np.swapaxes(mixed, 1, 2)
    trace = (VR + np.swapaxes(VR, 1, 2)) / 2

    def estimate(
        known: _Array,
        forms: _Array,
        error: _Array | None,
        errors: _Array | None,
        pairs: Estimate | None = None,
    ) -> Estimate:
        values = known + mean_of(forms)
        shares: tuple[Estimate, ...] = ()
        if block_sizes is not None:
            each = [None] * len(values) if errors is None else errors.tolist()
            shares = tuple(
                Estimate(v, e, num_matvecs)
                for v, e in zip(values.tolist(), each, strict=True)
            )
        total = None if error is None else float(error)
        return Estimate(float(values.sum()), total, num_matvecs, shares, pairs)

    pairs = None
    if block_sizes is not None and fresh != 1:
        pairs = Estimate(*_pairs(CW, C @ WV, WR, VR, grams[:, R, R]), num_matvecs)
    total, trace_total = norm.sum(0), trace.sum(0)
    return DeflatedMoments(
        estimate(
            np.trace(CW, axis1=1, axis2=2),
            trace,
            error_of_mean(trace_total, trace_diagonal.sum(0), total),
            error_of_mean(trace, trace_diagonal, grams[:, R, R], of_rows=True),
        ),
        estimate(
            known_rows,
            norm,
            error_of_mean(total, small["norm diagonal"], skewed=True),
            error_of_mean(norm, skewed=True),
            pairs,
        ),
        diagonal,
        num_matvecs,
        *_eigenvalues(T, S, _spectral_norm(total)),
    )


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
    cross = _symmetric(2 * WR @ np.swapaxes(CWV, 1, 2))
    # Sums over j ≠ i of VR[a, i, j] VR[b, j, i].
    own = np.einsum("jaj->ja", VR)
    paired = _symmetric(np.swapaxes(VR, 0, 2) @ np.swapaxes(VR, 1, 2))
    paired -= own[:, :, None] * own[:, None]
    kernel = paired + ((s - 2) * cross + cross.sum(0)) / 2
    rows = mean_of(RR)
    inner = np.maximum(paired.sum(0) / (s * (s - 1)), 0)
    mean, error = paired_mean(kernel, np.sqrt(np.outer(rows, rows) + inner**2))
    return known + mean, error


def _symmetric(x: _Array) -> _Array:
    return (x + np.swapaxes(x, 1, 2)) / 2


def _spectral_norm(forms: _Array) -> float:
    """About the largest eigenvalue of B at most, from its `(Bvᵢ)ᵀ(Bvⱼ)`.

    `‖B‖₂ ≤ ‖B²‖_F^½`, which the variance of `‖Bv‖²`, `2 ‖B²‖_F²`, tells.
    """
    error = error_of_mean(forms, skewed=True)
    if error is None:
        return math.sqrt(max(float(mean_of(forms)), 0.0))  # Rounding apart.
    return math.sqrt(error * math.sqrt(len(forms) / 2))


def _eigenvalues(T: _Array, S: _Array, remainder: float) -> tuple[_Array, _Array]:
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
