"""Layers of KerasHub, which need not be installed: known by their names."""

from typing import Any

from keras import ops

from keras_curvature.backend import Tensor
from keras_curvature.layerwise.rules.paths import Elementwise
from keras_curvature.layerwise.rules.rule import LayerRule, register_layer_rule


@register_layer_rule("keras_hub.PositionEmbedding")
class PositionEmbeddingRule(LayerRule):
    """A row for each position, the same for all samples."""

    rows_are_samples = True

    def paths(self, layer: Any, inputs: Any, z: Tensor) -> list[Any]:
        """The table, of which the first rows are used."""
        table = layer.position_embeddings
        unused = table.shape[0] - z.shape[-2]

        def reduce(v: Tensor) -> Tensor:
            axes = tuple(range(1, len(v.shape) - 2))
            v = ops.sum(v, axis=axes) if axes else v
            return ops.pad(v, [(0, 0), (0, unused), (0, 0)]) if unused else v

        return [Elementwise(table, None, reduce)]
