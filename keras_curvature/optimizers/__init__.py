"""Optimizers that step with the curvature they are handed."""

from keras_curvature.optimizers.diagonal_newton import DiagonalNewton

__all__ = ["DiagonalNewton"]
