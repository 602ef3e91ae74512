"""Dense: `z = a W + b`, on flat inputs and on sequences."""

from typing import Any

import keras
from keras import ops

from keras_curvature.backend import Tensor
from keras_curvature.layerwise.rules.paths import OuterProduct
from keras_curvature.layerwise.rules.rule import (
    LayerRule,
    bias_path,
    has_adapters,
    register_layer_rule,
)


def as_positions(x: Tensor) -> Tensor:
    """`(N, ..., F)` as `(N, T, 1, F)`: one group, all middle axes positions."""
    n, features = ops.shape(x)[0], x.shape[-1]
    positions: Any = 1
    for size in x.shape[1:-1]:
        positions = -1 if size is None or positions == -1 else positions * size
    return ops.reshape(x, (n, positions, 1, features))


@register_layer_rule(keras.layers.Dense)
class DenseRule(LayerRule):
    """The kernel is used once for each position of a sample."""

    def supports(self, layer: Any) -> bool:
        """Whether the kernel is one plain variable."""
        return not has_adapters(layer)

    def paths(self, layer: Any, inputs: Any, z: Tensor) -> list[Any]:
        """Kernel and bias."""
        kernel = OuterProduct(
            layer.kernel,
            inputs,
            as_positions,
            as_positions,
            lambda w: ops.squeeze(w, -3),
            layer.kernel.shape[0],
            matrix=True,
        )
        return [kernel, *bias_path(layer)]
