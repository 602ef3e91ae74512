"""How far the mean of a few quadratic forms `vᵢᵀMvᵢ` may be off.

The forms alone, s of them, say little about their variance when s is 4. The mixed
forms `vᵢᵀMvⱼ` say more and cost nothing. For random signs

    Var vᵀMv = 2 (‖M‖_F² − Σ_a M_aa²),
    E (vᵢᵀMvⱼ)² = ‖M‖_F²,   E Σ_a (v_a(Mv)_a)ᵢ (v_a(Mv)_a)ⱼ = Σ_a M_aa²   for i ≠ j

so that s(s − 1)/2 pairs join s − 1 degrees of freedom: 9 in all instead of 3 when s
is 4. (For Gaussian v, and without the diagonal term, this is the sample variance
averaged over all rotations of the directions among each other.)
"""

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtri, stdtrit

_Array = NDArray[np.float64]


def mean_of(forms: _Array) -> _Array:
    """The mean of the forms, `(…, s, s)` to `(…)`; zero when there are none."""
    mean: _Array = np.trace(forms, axis1=-2, axis2=-1) / max(forms.shape[-1], 1)
    return mean


def error_of_mean(
    forms: _Array,
    diagonal: _Array | float = 0.0,
    squared_norms: _Array | None = None,
    skewed: bool = False,
    of_rows: bool = False,
) -> _Array | None:
    """Standard error of the mean of the forms, such that two cover 95 %.

    Widened twice: by Student's t for the few degrees of freedom; and where the forms
    are `skewed`, sums of few squares, for the fact that a mean which is too small
    comes with a spread which is too small. There the mean behaves like a scaled
    χ² with as many degrees of freedom as its relative spread implies (Satterthwaite
    1946), and its distance from the truth is at most twice the result in 95 % of
    all cases.

    Args:
        forms: array `(…, s, s)` of `vᵢᵀMvⱼ`.
        diagonal: array `(…, s, s)` of the mixed diagonal terms above; left out, the
            error is on the safe side for matrices with a heavy diagonal.
        squared_norms: array `(…, s, s)` of `(Mvᵢ)ᵀMvⱼ`, where known: its diagonal
            estimates `‖M‖_F²` as well, better than the mixed forms.
        skewed: whether the forms are squared norms.
        of_rows: whether the forms are those of a block a of rows, `v_aᵀ(Mv)_a`, and
            the squared norms those of the rows. Their variance is
            `‖M_a‖² + ‖M_aa‖² − 2 Σ M_xx²`, of which the forms alone may say much too
            little; it is at least `‖M_a‖² − Σ M_xx²`.

    Returns:
        An array `(…)`; zeros when there are no forms because nothing is random,
        `None` from a single form.
    """
    count = forms.shape[-1]
    if count == 0:
        return np.zeros(forms.shape[:-2])
    if count == 1:
        return None
    # What is not finite gives errors that are not finite, without further noise.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return _error_of_mean(forms, diagonal, squared_norms, skewed, of_rows)


def _error_of_mean(
    forms: _Array,
    diagonal: _Array | float,
    squared_norms: _Array | None,
    skewed: bool,
    of_rows: bool,
) -> _Array:
    count = forms.shape[-1]
    values = np.diagonal(forms, axis1=-2, axis2=-1)
    mean = values.mean(-1)
    within = ((values - mean[..., None]) ** 2).sum(-1)
    # An estimate of a positive sum: without the bound an unlucky one would make the
    # whole variance vanish.
    pairs = np.maximum(_mixed(forms**2) - _mixed(diagonal * np.ones_like(forms)), 0)
    degrees = (count - 1) * (1 + count / 2)
    variance = (within + pairs) / degrees
    if squared_norms is not None:
        norms = np.diagonal(squared_norms, axis1=-2, axis2=-1).mean(-1)
        mixed = _mixed(diagonal * np.ones_like(forms)) / (count * (count - 1))
        variance = np.maximum(variance, (1 if of_rows else 2) * (norms - mixed))
    error: _Array = np.sqrt(np.maximum(variance, 0) / count)
    widened: _Array = error * students_factor(degrees)
    if skewed:
        # The square of the mean is too large by its variance. For a single
        # eigenvalue this makes the degrees of freedom the number of forms, and there
        # are never fewer.
        freedom = np.maximum(2 * (mean / error) ** 2 - 2, count)
        skew = mean * (freedom / chdtri(freedom, 0.95) - 1) / 2
        usable = (mean > 0) & (error > 0) & np.isfinite(skew)
        widened = np.where(usable, np.maximum(widened, skew), widened)
    return widened


def paired_mean(kernel: _Array, spread: _Array) -> tuple[_Array, _Array | None]:
    """The mean of a symmetric `h(vᵢ, vⱼ)` over all pairs, and its standard error.

    The error is the larger one of two, for few draws often miss what makes it: the
    jackknife over the draws (Efron, Stein 1981), and the `spread` that a single
    pair has if it is a product of two Gaussian numbers. Widened by Student's t.

    Args:
        kernel: array `(s, …)` of the sums of `h(vᵢ, vⱼ)` over `j ≠ i`.
        spread: array `(…)` of standard deviations of a pair.

    Returns:
        Two arrays `(…)`; the error is `None` for fewer than three draws.
    """
    count = len(kernel)
    means = kernel / (count - 1)
    mean = means.mean(0)
    if count < 3:
        return mean, None
    with np.errstate(over="ignore", invalid="ignore"):
        squares = ((means - mean) ** 2).sum(0)
        jackknife = 4 * (count - 1) / (count * (count - 2) ** 2) * squares
        pairs = 2 * spread**2 / (count * (count - 1))
        error = np.sqrt(np.maximum(jackknife, pairs))
    return mean, error * students_factor(count - 1)


def students_factor(degrees: float) -> float:
    """Width of Student's 95 % interval against that of the normal distribution."""
    return float(stdtrit(degrees, 0.975) / 1.959964) if degrees > 0 else 1.0


def _mixed(matrices: _Array) -> _Array:
    """Sum over the pairs i ≠ j."""
    mixed: _Array = matrices.sum((-2, -1)) - np.trace(matrices, axis1=-2, axis2=-1)
    return mixed
