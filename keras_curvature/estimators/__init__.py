"""What products with a symmetric operator tell, each figure with its error."""

from keras_curvature.estimators.deflation import DeflatedMoments
from keras_curvature.estimators.eigenvalues import Eigenvalues, eigenvalues
from keras_curvature.estimators.estimate import Estimate
from keras_curvature.estimators.moments import (
    Moments,
    error_of_diagonal,
    exact_moments,
    hutchinson_moments,
    quieter,
)
from keras_curvature.estimators.products import (
    GROUP,
    Products,
    block_products,
    seed_key,
    to_host,
)
from keras_curvature.estimators.samples_of_diagonal import (
    moments_of_diagonal,
    sampled_moments,
)
from keras_curvature.estimators.sampling import MINIMUM_SAMPLES, check_budget
from keras_curvature.estimators.shrinkage import Part, PartSamples, exact_part, summed
from keras_curvature.estimators.spectral_density import (
    SpectralDensity,
    spectral_density,
)
from keras_curvature.estimators.subspace import DominantSubspace

__all__ = [
    "DeflatedMoments",
    "DominantSubspace",
    "Eigenvalues",
    "Estimate",
    "GROUP",
    "MINIMUM_SAMPLES",
    "Moments",
    "Part",
    "PartSamples",
    "Products",
    "SpectralDensity",
    "block_products",
    "check_budget",
    "eigenvalues",
    "error_of_diagonal",
    "exact_moments",
    "exact_part",
    "hutchinson_moments",
    "moments_of_diagonal",
    "quieter",
    "sampled_moments",
    "seed_key",
    "spectral_density",
    "summed",
    "to_host",
]
