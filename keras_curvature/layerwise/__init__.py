"""Curvature at the layers' outputs, carried back to the variables."""

from keras_curvature.layerwise.activations import ActivationDiagonal
from keras_curvature.layerwise.checks import find_structure
from keras_curvature.layerwise.exact import (
    ExactDiagonal,
    Plan,
    least_matvecs,
    looks_curved,
)
from keras_curvature.layerwise.gauss_newton_diagonal import GaussNewtonDiagonal
from keras_curvature.layerwise.sampled import LayerwiseDiagonal, Samples
from keras_curvature.layerwise.split import SplitDiagonal
from keras_curvature.layerwise.structure import Structure, survey

__all__ = [
    "ActivationDiagonal",
    "ExactDiagonal",
    "GaussNewtonDiagonal",
    "LayerwiseDiagonal",
    "Plan",
    "Samples",
    "SplitDiagonal",
    "Structure",
    "find_structure",
    "least_matvecs",
    "looks_curved",
    "survey",
]
