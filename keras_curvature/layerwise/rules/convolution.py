"""Convolutions: a kernel that meets a patch of the input at every pixel.

Once the patches are written out, a convolution is a dense layer that is used at every
output position. Written for any number of spatial dimensions.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

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

#: Kernel size, strides and dilation in each spatial dimension, and padding.
_Geometry: TypeAlias = tuple[Sequence[int], Sequence[int], Sequence[int], str]


def patches(
    x: Tensor,
    kernel_size: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
    padding: str,
) -> Tensor:
    """The inputs under the kernel at every output position.

    Args:
        x: tensor `(N, *spatial, C)`.
        kernel_size: extent of the kernel in each spatial dimension.
        strides: stride in each.
        dilation: dilation in each.
        padding: `"valid"`, `"same"` or `"causal"`.

    Returns:
        Tensor `(N, T, K, C)`: output positions and kernel positions in row-major
        order.
    """
    rank = len(kernel_size)
    sizes = list(ops.shape(x)[1 : 1 + rank])
    span = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True)]
    pads = [(0, 0)] * rank
    if padding == "same":
        totals = [
            _at_least_zero(-(n // -s) * s - s + e - n)
            for n, s, e in zip(sizes, strides, span, strict=True)
        ]
        pads = [(t // 2, t - t // 2) for t in totals]
    elif padding == "causal":
        pads = [(e - 1, 0) for e in span]
    x = ops.pad(x, [(0, 0), *pads, (0, 0)])
    counts = [
        (n + sum(p) - e) // s + 1
        for n, p, e, s in zip(sizes, pads, span, strides, strict=True)
    ]
    for axis in range(rank):
        # A slice for each kernel position along the axis; a new axis counts them.
        taken = [
            _strided(x, axis + 1, j * dilation[axis], counts[axis], strides[axis])
            for j in range(kernel_size[axis])
        ]
        x = ops.stack(taken, axis=rank + axis + 1)
    n, channels = ops.shape(x)[0], x.shape[-1]
    return ops.reshape(x, (n, _product(counts), _product(kernel_size), channels))


def _strided(x: Tensor, axis: int, start: int, count: Any, stride: int) -> Tensor:
    index: list[Any] = [slice(None)] * len(x.shape)
    index[axis] = slice(start, start + (count - 1) * stride + 1, stride)
    return x[tuple(index)]


def _at_least_zero(n: Any) -> Any:
    return max(n, 0) if isinstance(n, int) else ops.maximum(n, 0)


def _product(sizes: Sequence[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def _channels_last(layer: Any, x: Tensor) -> Tensor:
    return ops.moveaxis(x, 1, -1) if layer.data_format == "channels_first" else x


def _bias(layer: Any) -> list[Any]:
    return bias_path(layer, 1 if layer.data_format == "channels_first" else -1)


def _geometry(layer: Any) -> _Geometry:
    return layer.kernel_size, layer.strides, layer.dilation_rate, layer.padding


def _kernel_path(
    layer: Any, kernel: Any, inputs: Tensor, geometry: _Geometry, groups: int
) -> OuterProduct:
    """The path to a kernel `(*kernel_size, I, O)` whose groups split the channels."""

    def rows(x: Tensor) -> Tensor:
        p = patches(_channels_last(layer, x), *geometry)
        n, t, k, c = ops.shape(p)[0], p.shape[1], p.shape[2], p.shape[3]
        p = ops.reshape(p, (n, -1 if t is None else t, k, groups, c // groups))
        p = ops.transpose(p, (0, 1, 3, 2, 4))
        return ops.reshape(p, (n, -1 if t is None else t, groups, k * (c // groups)))

    def columns(v: Tensor) -> Tensor:
        return _pixels(layer, v, groups)

    def arrange(products: Tensor) -> Tensor:
        # (..., G, K·I, O/G) to (..., *kernel_size, I, O), groups outermost in O. The
        # groups of a depthwise kernel (*kernel_size, C, M) are its C.
        lead = list(ops.shape(products)[:-3])
        moved = ops.moveaxis(products, -3, -2)
        return ops.reshape(moved, lead + list(kernel.shape))

    channels = inputs.shape[1 if layer.data_format == "channels_first" else -1]
    width = _product(geometry[0]) * (channels // groups)
    return OuterProduct(
        kernel, inputs, rows, columns, arrange, width, groups, matrix=groups == 1
    )


def _pixels(layer: Any, v: Tensor, groups: int) -> Tensor:
    """`(N, *spatial, C)` as `(N, T, groups, C / groups)`."""
    v = _channels_last(layer, v)
    positions: Any = 1
    for size in v.shape[1:-1]:
        positions = -1 if size is None or positions == -1 else positions * size
    channels = v.shape[-1]
    return ops.reshape(v, (ops.shape(v)[0], positions, groups, channels // groups))


@register_layer_rule(keras.layers.Conv1D)
@register_layer_rule(keras.layers.Conv2D)
@register_layer_rule(keras.layers.Conv3D)
class ConvRule(LayerRule):
    """Strides, dilation, any padding, groups, both data formats."""

    def supports(self, layer: Any) -> bool:
        """Whether the kernel is one plain variable."""
        return not has_adapters(layer)

    def paths(self, layer: Any, inputs: Any, z: Tensor) -> list[Any]:
        """Kernel and bias."""
        kernel = _kernel_path(
            layer, layer.kernel, inputs, _geometry(layer), layer.groups
        )
        return [kernel, *_bias(layer)]


@register_layer_rule(keras.layers.DepthwiseConv1D)
@register_layer_rule(keras.layers.DepthwiseConv2D)
class DepthwiseConvRule(LayerRule):
    """One group per input channel."""

    def paths(self, layer: Any, inputs: Any, z: Tensor) -> list[Any]:
        """Kernel and bias."""
        return [_depthwise_path(layer, layer.kernel, inputs), *_bias(layer)]


def _depthwise_path(layer: Any, kernel: Any, inputs: Tensor) -> OuterProduct:
    """The path to a kernel `(*kernel_size, C, multiplier)`."""
    return _kernel_path(layer, kernel, inputs, _geometry(layer), kernel.shape[-2])


@register_layer_rule(keras.layers.SeparableConv1D)
@register_layer_rule(keras.layers.SeparableConv2D)
class SeparableConvRule(LayerRule):
    """Two linear outputs: of the depthwise, then of the pointwise convolution."""

    def call(
        self,
        layer: Any,
        call: Callable[..., Any],
        shift: Callable[[Tensor, Any], Tensor],
        inputs: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Both convolutions in turn, each with its shift."""
        z = ops.depthwise_conv(
            inputs,
            layer.depthwise_kernel,
            strides=layer.strides,
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )
        z = shift(z, ("depthwise", inputs))
        out = ops.conv(
            z, layer.pointwise_kernel, padding="valid", data_format=layer.data_format
        )
        if layer.bias is not None:
            shape = [1] * len(out.shape)
            shape[1 if layer.data_format == "channels_first" else -1] = -1
            out = out + ops.reshape(layer.bias, shape)
        out = shift(out, ("pointwise", z))
        return out if layer.activation is None else layer.activation(out)

    def paths(self, layer: Any, inputs: Any, z: Tensor) -> list[Any]:
        """The depthwise kernel, or the pointwise kernel and the bias."""
        part, inputs = inputs
        if part == "depthwise":
            return [_depthwise_path(layer, layer.depthwise_kernel, inputs)]
        ones = (1,) * (len(z.shape) - 2)
        kernel = _kernel_path(
            layer, layer.pointwise_kernel, inputs, (ones, ones, ones, "valid"), 1
        )
        return [kernel, *_bias(layer)]


@register_layer_rule(keras.layers.Conv1DTranspose)
@register_layer_rule(keras.layers.Conv2DTranspose)
@register_layer_rule(keras.layers.Conv3DTranspose)
class ConvTransposeRule(LayerRule):
    """A convolution with the roles of inputs and outputs exchanged."""

    def supports(self, layer: Any) -> bool:
        """Whether the kernel is one plain variable."""
        return not has_adapters(layer)

    def paths(self, layer: Any, inputs: Any, z: Tensor) -> list[Any]:
        """Kernel `(*kernel_size, O, I)` and bias."""
        geometry = _geometry(layer)

        def columns(v: Tensor) -> Tensor:
            p = patches(_channels_last(layer, v), *geometry)
            n, t, k, c = ops.shape(p)[0], p.shape[1], p.shape[2], p.shape[3]
            return ops.reshape(p, (n, -1 if t is None else t, 1, k * c))

        def arrange(products: Tensor) -> Tensor:
            # (..., 1, I, K·O) to (..., *kernel_size, O, I).
            moved = ops.moveaxis(products[..., 0, :, :], -2, -1)
            lead = list(ops.shape(products)[:-3])
            return ops.reshape(moved, lead + list(layer.kernel.shape))

        kernel = OuterProduct(
            layer.kernel,
            inputs,
            lambda x: _pixels(layer, x, 1),
            columns,
            arrange,
            layer.kernel.shape[-1],
            copies=True,
        )
        return [kernel, *_bias(layer)]
