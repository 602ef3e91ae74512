"""Embedding: rows of a table, looked up by index."""

from typing import Any

import keras

from keras_curvature.backend import Tensor
from keras_curvature.layerwise.rules.paths import Lookup
from keras_curvature.layerwise.rules.rule import (
    LayerRule,
    has_adapters,
    register_layer_rule,
)


@register_layer_rule(keras.layers.Embedding)
class EmbeddingRule(LayerRule):
    """The table of the embedding; masked entries are what the loss makes of them."""

    def supports(self, layer: Any) -> bool:
        """Whether the table is one plain variable."""
        return not has_adapters(layer)

    def paths(self, layer: Any, inputs: Any, z: Tensor) -> list[Any]:
        """The table."""
        return [Lookup(layer.embeddings, keras.ops.cast(inputs, "int32"))]
