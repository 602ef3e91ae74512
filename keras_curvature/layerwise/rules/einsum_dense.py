"""EinsumDense: `z = einsum(equation, a, W) + b`; attention layers are made of it."""

import math
import string
from typing import Any

import keras
from keras import ops

from keras_curvature.backend import Tensor
from keras_curvature.layerwise.rules.paths import Elementwise, OuterProduct
from keras_curvature.layerwise.rules.rule import (
    LayerRule,
    has_adapters,
    register_layer_rule,
)


@register_layer_rule(keras.layers.EinsumDense)
class EinsumDenseRule(LayerRule):
    """Each index of the equation is a position, a group, an input or an output.

    | index occurs in | it is |
    |---|---|
    | inputs, output | a position, or the sample (the first) |
    | inputs, kernel, output | a group |
    | inputs, kernel | an input of a unit |
    | kernel, output | a unit |
    """

    def supports(self, layer: Any) -> bool:
        """Whether every index of the kernel has one of these roles."""
        if has_adapters(layer):
            return False
        a, w, z = _indices(layer)
        return (
            a[:1] == z[:1]
            and a[0] not in w
            and set(w) <= set(a) | set(z)
            and set(a) <= set(w) | set(z)
        )

    def unit_axes(self, layer: Any, rank: int) -> tuple[int, ...]:
        """Those of groups and units, as the heads and features of an attention."""
        a, w, out = _indices(layer)
        # Of the input's rank; an ellipsis has as many axes in both.
        a, w, out = _indices(layer, rank - len(out) + len(a))
        return tuple(i for i, name in enumerate(out) if name in w)

    def paths(self, layer: Any, inputs: Any, z: Tensor) -> list[Any]:
        """Kernel and bias."""
        a, w, out = _indices(layer, len(inputs.shape))
        groups = [i for i in w if i in a and i in out]
        rows = [i for i in w if i in a and i not in out]
        columns = [i for i in w if i in out and i not in a]
        positions = [i for i in out[1:] if i not in w]
        size = dict(zip(w, layer.kernel.shape, strict=True))

        def arrange(products: Tensor) -> Tensor:
            lead = list(ops.shape(products)[:-3])
            order = groups + rows + columns
            tensor = ops.reshape(products, lead + [size[i] for i in order])
            n = len(lead)
            return ops.transpose(tensor, [*range(n), *(n + order.index(i) for i in w)])

        kernel = OuterProduct(
            layer.kernel,
            inputs,
            lambda x: _grouped(x, a, positions, groups, rows),
            lambda v: _grouped(v, out, positions, groups, columns),
            arrange,
            math.prod(size[i] for i in rows),
            math.prod(size[i] for i in groups),
            matrix=not groups and rows + columns == list(w),
        )
        if layer.bias is None:
            return [kernel]
        lead = len(out) - len(layer.bias.shape)
        shape = (1,) * lead + tuple(layer.bias.shape)
        bias = Elementwise(layer.bias, None, lambda v: _sum_to_shape(v, shape, layer))
        return [kernel, bias]


def _indices(layer: Any, rank: int | None = None) -> tuple[str, ...]:
    """The indices of inputs, kernel and output, an ellipsis spelled out."""
    left, output = layer.equation.replace(" ", "").split("->")
    inputs, kernel = left.split(",")
    used = len(inputs.replace("...", ""))
    spare = [c for c in string.ascii_uppercase if c not in layer.equation]
    extra = "".join(spare[: 1 if rank is None else rank - used])
    return tuple(part.replace("...", extra) for part in (inputs, kernel, output))


def _grouped(
    x: Tensor, indices: str, positions: list[str], groups: list[str], last: list[str]
) -> Tensor:
    """A tensor as (N, T, G, F), its axes named by `indices`."""
    order = [indices[0], *positions, *groups, *last]
    x = ops.transpose(x, [indices.index(i) for i in order])
    sizes = dict(zip(order, x.shape, strict=True))

    def product(names: list[str]) -> int:
        known = [sizes[name] for name in names]
        return -1 if None in known else math.prod(known)

    return ops.reshape(
        x, (ops.shape(x)[0], product(positions), product(groups), product(last))
    )


def _sum_to_shape(v: Tensor, shape: tuple[int, ...], layer: Any) -> Tensor:
    """Sums output directions over the axes along which the bias is broadcast."""
    axes = tuple(
        i for i, size in enumerate(shape) if i > 0 and size == 1 and v.shape[i] != 1
    )
    summed = ops.sum(v, axis=axes) if axes else v
    return ops.reshape(summed, (ops.shape(v)[0], *layer.bias.shape))
