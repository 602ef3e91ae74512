"""Scale and offset of normalization layers: `z = γ ⊙ x̂ + β`.

The normalized input `x̂` is what the layer itself returns for γ = 1 and β = 0.
"""

import keras
from keras import ops

from keras_curvature.layerwise.rules.paths import Elementwise
from keras_curvature.layerwise.rules.rule import (
    LayerRule,
    register_layer_rule,
    sum_to_axes,
)


@register_layer_rule(keras.layers.BatchNormalization)
@register_layer_rule(keras.layers.GroupNormalization)
@register_layer_rule(keras.layers.LayerNormalization)
@register_layer_rule(keras.layers.RMSNormalization)
class NormalizationRule(LayerRule):
    """Any normalization with a scale and an offset along some axes.

    BatchNormalization in training mode is linear in them as well, but mixes the
    samples, which is noticed elsewhere.
    """

    def call(self, layer, call, shift, inputs, *args, **kwargs):
        """The layer's output with its shift, remembering the normalized input."""
        scale, offset = _scale_and_offset(layer)
        z = call(inputs, *args, **kwargs)
        # A scope of its own forgets what a second call updates. Values that it lacks
        # are those of the variables themselves.
        with keras.StatelessScope() as plain:
            if scale is not None:
                plain.add_update((scale, ops.ones_like(scale)))
            if offset is not None:
                plain.add_update((offset, ops.zeros_like(offset)))
            normalized = ops.stop_gradient(call(inputs, *args, **kwargs))
        return shift(z, normalized)

    def paths(self, layer, inputs, z):
        """Scale and offset."""
        axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
        scale, offset = _scale_and_offset(layer)
        paths = []
        if scale is not None:
            paths.append(Elementwise(scale, inputs, sum_to_axes(axes)))
        if offset is not None:
            paths.append(Elementwise(offset, None, sum_to_axes(axes)))
        return paths


def _scale_and_offset(layer):
    scale = getattr(layer, "gamma", None)
    if isinstance(layer, keras.layers.RMSNormalization):
        scale = layer.scale
    return scale, getattr(layer, "beta", None)
