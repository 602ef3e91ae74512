"""Callbacks: when to probe, and what to hand over."""

from keras_curvature.callbacks.curvature_feed import CurvatureFeed
from keras_curvature.callbacks.curvature_monitor import CurvatureMonitor

__all__ = ["CurvatureFeed", "CurvatureMonitor"]
