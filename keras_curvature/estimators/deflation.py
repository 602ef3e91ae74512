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

import numpy as np
from keras import ops

from keras_curvature.backend import compiled
from keras_curvature.estimators.estimate import Estimate
from keras_curvature.estimators.moments import Moments
from keras_curvature.estimators.products import block_rows, block_sums, dot, to_host
from keras_curvature.estimators.quadratic_forms import (
    error_of_mean,
    mean_of,
    students_factor,
)


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

    eigenvalues: np.ndarray
    residual_norms: np.ndarray


def deflated_moments(
    products, basis, signs, num_matvecs, block_sizes=None, diagonal=False
):
    """The figures that Q and random signs tell, and the products they took.

    Args:
        products: a `Products`.
        basis: orthonormal Q, tensor `(P, k)`, k ≥ 0.
        signs: fresh signs V, tensor `(P, s)`, s ≥ 0; none when Q spans everything.
        num_matvecs: number of products to name in the estimates.
        block_sizes: tuple of sizes, or `None`.
        diagonal: whether to estimate the diagonal too.

    Returns:
        A `DeflatedMoments`, HQ `(P, k)` and H(I − QQᵀ)V `(P, s)`.
    """
    k = int(basis.shape[1])
    both = products(ops.concatenate([basis, _remainders(basis, signs)], axis=1))
    basis_products, fresh_products = both[:, :k], both[:, k:]
    measured = _measure(block_sizes, bool(diagonal))(
        basis, signs, basis_products, fresh_products
    )
    figures = _figures(measured, int(signs.shape[1]), num_matvecs, block_sizes)
    return figures, basis_products, fresh_products


@compiled
def _remainders(basis, signs):
    """`(I − QQᵀ) V`."""
    return signs - ops.matmul(basis, dot(basis, signs))


@functools.lru_cache(maxsize=64)
def _measure(block_sizes, diagonal):
    """Compiles all that is formed from tall arrays, by block; the rest is small."""

    def measure(Q, V, Z, Y):
        T = dot(Q, Z)
        T = (T + ops.transpose(T)) / 2
        orthogonal = Z - ops.matmul(Q, T)
        orthogonal = orthogonal - ops.matmul(Q, dot(Q, orthogonal))
        S = dot(orthogonal, orthogonal)
        inside = ops.matmul(Q, dot(Q, Y))
        R = Y - inside  # = BV
        R = R - ops.matmul(Q, dot(Q, R))
        known_norm = ops.square(Z) + ops.matmul(Q, S) * Q
        known_diagonal = ops.sum(2 * Z * Q - ops.matmul(Q, T) * Q, axis=1)
        shares = V * R
        rows = block_rows(block_sizes)

        def forms(*pairs):
            """Sums of xᵀy over the pairs, for each block of rows."""
            return ops.cast(
                ops.stack([sum(dot(x[b], y[b]) for x, y in pairs) for b in rows]),
                "float64",
            )

        measured = {
            "T": ops.cast(T, "float64"),
            "S": ops.cast(S, "float64"),
            "known norm": block_sums(ops.sum(known_norm, axis=1)[:, None], block_sizes),
            "known trace": block_sums(known_diagonal[:, None], block_sizes),
            # ‖(HW)_b‖² less its part inside of Q, whose mean `known norm` holds.
            "norm": forms((R, R), (R, inside), (inside, R)),
            "norm diagonal": dot(ops.square(R), ops.square(R)),
            "trace": forms((V, R)),
            "trace diagonal": forms((shares, shares)),
        }
        if diagonal:
            # Not the static shape: a graph may serve several numbers of signs.
            count = ops.cast(ops.shape(shares)[1], shares.dtype)
            mean = ops.sum(shares, axis=1) / ops.maximum(count, 1)
            squares = ops.sum(ops.square(shares - mean[:, None]), axis=1)
            measured["diagonal"] = known_diagonal + mean
            measured["diagonal error"] = ops.sqrt(
                squares / ops.maximum(count * (count - 1), 1)
            )
        return measured

    return compiled(measure)


def _figures(measured, fresh, num_matvecs, block_sizes):
    """The figures from what was measured on the device."""
    diagonal = None
    if "diagonal" in measured:
        value, error = measured.pop("diagonal"), measured.pop("diagonal error")
        error = None if fresh == 1 else error * students_factor(fresh - 1)
        diagonal = Estimate(value, error, num_matvecs)
    small = {name: to_host(x) for name, x in measured.items()}
    norm, trace = small["norm"], small["trace"]
    trace = (trace + np.swapaxes(trace, 1, 2)) / 2
    trace_diagonal = small["trace diagonal"]

    def estimate(known, forms, error, errors):
        values = known[:, 0] + mean_of(forms)
        shares = ()
        if block_sizes is not None:
            errors = [None] * len(values) if errors is None else errors.tolist()
            shares = tuple(
                Estimate(float(v), e, num_matvecs)
                for v, e in zip(values, errors, strict=True)
            )
        error = None if error is None else float(error)
        return Estimate(float(values.sum()), error, num_matvecs, shares)

    total, trace_total = norm.sum(0), trace.sum(0)
    return DeflatedMoments(
        estimate(
            small["known trace"],
            trace,
            error_of_mean(trace_total, trace_diagonal.sum(0), total),
            error_of_mean(trace, trace_diagonal),
        ),
        estimate(
            small["known norm"],
            norm,
            error_of_mean(total, small["norm diagonal"], skewed=True),
            error_of_mean(norm, skewed=True),
        ),
        diagonal,
        num_matvecs,
        *_eigenvalues(small["T"], small["S"], _spectral_norm(total)),
    )


def _spectral_norm(forms):
    """About the largest eigenvalue of B at most, from its `(Bvᵢ)ᵀ(Bvⱼ)`.

    `‖B‖₂ ≤ ‖B²‖_F^½`, which the variance of `‖Bv‖²`, `2 ‖B²‖_F²`, tells.
    """
    count = len(forms)
    if count < 2:
        return float(mean_of(forms)) ** 0.5
    return float(error_of_mean(forms, skewed=True) ** 2 * count / 2) ** 0.25


def _eigenvalues(T, S, remainder):
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
