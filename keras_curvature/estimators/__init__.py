"""What products with a symmetric operator tell, each figure with its error."""

from keras_curvature.estimators.deflation import DeflatedMoments
from keras_curvature.estimators.diagonal import exact_diagonal, hutchinson_diagonal
from keras_curvature.estimators.eigenvalues import Eigenvalues, eigenvalues
from keras_curvature.estimators.estimate import Estimate
from keras_curvature.estimators.frobenius import (
    exact_squared_frobenius_norm,
    frobenius_norm_of_squared,
    hutchinson_squared_frobenius_norm,
)
from keras_curvature.estimators.moments import (
    Moments,
    exact_moments,
    hutchinson_moments,
)
from keras_curvature.estimators.samples_of_diagonal import (
    moments_of_diagonal,
    sampled_moments,
)
from keras_curvature.estimators.sampling import check_budget
from keras_curvature.estimators.spectral_density import (
    SpectralDensity,
    spectral_density,
)
from keras_curvature.estimators.subspace import DominantSubspace
from keras_curvature.estimators.trace import exact_trace, hutchinson_trace

__all__ = [
    "DeflatedMoments",
    "DominantSubspace",
    "Eigenvalues",
    "Estimate",
    "Moments",
    "SpectralDensity",
    "check_budget",
    "eigenvalues",
    "exact_diagonal",
    "exact_moments",
    "exact_squared_frobenius_norm",
    "exact_trace",
    "frobenius_norm_of_squared",
    "hutchinson_diagonal",
    "hutchinson_moments",
    "hutchinson_squared_frobenius_norm",
    "hutchinson_trace",
    "moments_of_diagonal",
    "sampled_moments",
    "spectral_density",
]
