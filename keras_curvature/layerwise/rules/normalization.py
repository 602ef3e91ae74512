"""Scale and offset of normalization layers: `z = γ ⊙ x̂ + β`.

The normalized input `x̂` is what the layer itself returns for γ = 1 and β = 0.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_curvature.backend import Tensor
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
@register_layer_rule("keras_hub.LlamaLayerNorm")
@register_layer_rule("keras_hub.MistralLayerNormalization")
class NormalizationRule(LayerRule):
    """Any normalization with a scale and an offset along some axes.

    BatchNormalization in training mode is linear in them as well; how it mixes the
    samples is dealt with in `keras_curvature.layerwise.statistics`.
    """

    def call(
        self,
        layer: Any,
        call: Callable[..., Any],
        shift: Callable[[Tensor, Any], Tensor],
        inputs: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The layer's output with its shift, remembering the normalized input."""
        scale, offset = _scale_and_offset(layer)
        z = call(inputs, *args, **kwargs)
        # A scope of its own forgets what a second call updates. It starts from the
        # values of the present one (moving averages).
        values = [(v, v.value) for v in layer.variables]
        with keras.StatelessScope() as plain:
            for variable, value in values:
                if variable is scale:
                    value = ops.ones(variable.shape, variable.dtype)
                if variable is offset:
                    value = ops.zeros(variable.shape, variable.dtype)
                plain.add_update((variable, value))
            normalized = ops.stop_gradient(call(inputs, *args, **kwargs))
        return shift(z, normalized)

    def unit_axes(self, layer: Any, rank: int) -> tuple[int, ...]:
        """Those of scale and offset."""
        return tuple(sorted(axis % rank for axis in _axes(layer)))

    def paths(self, layer: Any, inputs: Any, z: Tensor) -> list[Any]:
        """Scale and offset."""
        axes = _axes(layer)
        scale, offset = _scale_and_offset(layer)
        paths = []
        if scale is not None:
            paths.append(Elementwise(scale, inputs, sum_to_axes(axes)))
        if offset is not None:
            paths.append(Elementwise(offset, None, sum_to_axes(axes)))
        return paths


def _axes(layer: Any) -> list[int]:
    axis = getattr(layer, "axis", -1)
    return list(axis) if isinstance(axis, (list, tuple)) else [axis]


def _scale_and_offset(layer: Any) -> tuple[Any, Any]:
    scale = getattr(layer, "scale", None)
    if not isinstance(scale, keras.Variable):  # Of others it says whether there is one.
        scale = getattr(layer, "gamma", None)
    return scale, getattr(layer, "beta", None)
