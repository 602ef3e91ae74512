"""Embedding: rows of a table, looked up by index, and the table as a kernel."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_curvature import keras_internals
from keras_curvature.backend import Tensor
from keras_curvature.layerwise.rules.dense import as_positions
from keras_curvature.layerwise.rules.paths import Lookup, OuterProduct
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
        return [Lookup(layer.embeddings, ops.cast(inputs, "int32"))]


class ReversibleEmbeddingRule(EmbeddingRule):
    """A table that is looked up in, and multiplied with when called in reverse.

    Language models do both: with the same table, where the first use feeds the second,
    or with one table for each.
    """

    def supports(self, layer: Any) -> bool:
        """Whether the logits are linear in a table that is one plain variable."""
        return super().supports(layer) and layer.logit_soft_cap is None

    def call(
        self,
        layer: Any,
        call: Callable[..., Any],
        shift: Callable[[Tensor, Any], Tensor],
        inputs: Any,
        reverse: bool = False,
    ) -> Any:
        """The layer's output with its shift, remembering which way it goes."""
        z = call(inputs, reverse=reverse)
        # Unlike other layers it masks its output itself.
        shifted = shift(z, (reverse, inputs))
        return keras_internals.with_mask(shifted, keras_internals.mask_of(z))

    def paths(self, layer: Any, inputs: Any, z: Tensor) -> list[Any]:
        """The table that is used this way."""
        reverse, inputs = inputs
        if not reverse:
            return super().paths(layer, inputs, z)

        def arrange(products: Tensor) -> Tensor:
            kernel = products[..., 0, :, :]
            return ops.swapaxes(kernel, -1, -2) if layer.tie_weights else kernel

        table = layer.embeddings if layer.tie_weights else layer.reverse_embeddings
        return [
            OuterProduct(
                table, inputs, as_positions, as_positions, arrange, inputs.shape[-1]
            )
        ]


# Older versions of Keras lack it.
if hasattr(keras.layers, "ReversibleEmbedding"):
    register_layer_rule(keras.layers.ReversibleEmbedding)(ReversibleEmbeddingRule)
