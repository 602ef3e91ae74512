"""How one kind of layer carries output directions back to its variables."""

from keras_curvature.layerwise.rules import (
    convolution,
    dense,
    einsum_dense,
    embedding,
    keras_hub,
    normalization,
)
from keras_curvature.layerwise.rules.paths import (
    Elementwise,
    Lookup,
    OuterProduct,
    path_in_axes,
    stacked_products,
)
from keras_curvature.layerwise.rules.rule import (
    LayerRule,
    register_layer_rule,
    rule_for,
)

__all__ = [
    "Elementwise",
    "LayerRule",
    "Lookup",
    "OuterProduct",
    "register_layer_rule",
    "rule_for",
    "path_in_axes",
    "stacked_products",
    "convolution",
    "dense",
    "einsum_dense",
    "embedding",
    "keras_hub",
    "normalization",
]
