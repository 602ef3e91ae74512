"""XDiag, the best estimator of a diagonal that uses products alone.

Epperly, Tropp, Webber (2023), "XTrace: Making the most of every sample in stochastic
trace estimation", section 2.4. Written here as a rival; the package does not need it.
"""

import numpy as np


def xdiag(operator, num_matvecs, seed):
    """Unbiased estimate of the diagonal from an even number of products.

    Args:
        operator: symmetric, with products `A @ V` for NumPy arrays.
        num_matvecs: number of products; half see random signs, half their range.
        seed: seed of the signs.

    Returns:
        NumPy array `(P,)`.
    """
    rng = np.random.default_rng(seed)
    size, m = operator.shape[0], num_matvecs // 2
    signs = rng.choice([-1.0, 1.0], size=(size, m)).astype(operator.dtype)
    y = operator @ signs
    q, r = np.linalg.qr(y)
    z = operator @ q
    t = z.T @ signs
    # Column i of s spans what q loses when sign vector i is left out.
    s = np.linalg.inv(r).T
    s = s / np.linalg.norm(s, axis=0)
    qs = q @ s
    left_out = (
        -np.sum(qs * (z @ s), axis=1)
        + np.sum(signs * (y - q @ t), axis=1)
        + np.sum(signs * qs * np.sum(s * t, axis=0), axis=1)
    )
    return np.sum(q * z, axis=1) + left_out / m
