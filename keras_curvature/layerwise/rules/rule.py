"""What the package asks of a kind of layer, and the register of the kinds."""

from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from keras_curvature import keras_internals
from keras_curvature.backend import Tensor
from keras_curvature.layerwise.rules.paths import Elementwise

_RULES: dict[type | str, "LayerRule"] = {}


class LayerRule:
    """How one kind of layer, linear in its variables, is opened to curvature.

    Subclass it for a layer of your own and register the subclass with
    `register_layer_rule`. The rule runs the layer so that a zero *shift* is added to
    every output that is linear in the layer's variables, and says on which *paths* (see
    `keras_curvature.layerwise.rules.paths`) directions at that output go back to the
    variables.

    ```python
    @kc.register_layer_rule(MyScale)           # z = inputs * self.scale
    class MyScaleRule(kc.LayerRule):
        def paths(self, layer, inputs, z):
            return [Elementwise(layer.scale, inputs, lambda v: ops.sum(v, axis=1))]
    ```

    Nothing is assumed that is not checked: if a variable also acts on the loss in
    another way, or samples mix, the package notices and takes another method.

    Attributes:
        rows_are_samples: whether the output has a row for each sample though it is
            computed from none of them, as a table of positions that is broadcast.
    """

    rows_are_samples = False

    def supports(self, layer: Any) -> bool:
        """Whether this layer, as configured, is linear in its variables."""
        return True

    def variables(self, layer: Any) -> list[Any]:
        """The variables that `paths` covers: by default the layer's own."""
        inner = {
            id(v)
            for sublayer in keras_internals.flat_layers(layer)
            for v in sublayer.variables
        }
        return [v for v in layer.trainable_variables if id(v) not in inner]

    def unit_axes(self, layer: Any, rank: int) -> tuple[int, ...]:
        """The axes of a linear output along which the layer's units lie.

        The others are samples and positions. Defaults to the last axis, or the second
        one of a layer whose channels come first.

        Args:
            layer: the layer.
            rank: number of axes of the output.
        """
        first = getattr(layer, "data_format", None) == "channels_first"
        return (1 if first else rank - 1,)

    def call(
        self,
        layer: Any,
        call: Callable[..., Any],
        shift: Callable[[Tensor, Any], Tensor],
        inputs: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Runs the layer with its shift. While tracing only.

        Args:
            layer: the layer.
            call: its original `call`.
            shift: function `shift(z, inputs)` that returns `z` plus a zero shift, and
                remembers `inputs` for `paths`. To be called once per linear output.
            inputs: the first argument of the layer.
            *args: further positional arguments.
            **kwargs: further keyword arguments.

        Returns:
            The layer's output. Defaults to a shift of the output, in front of the
            activation of layers that have one.
        """
        if getattr(layer, "activation", None) is None:
            return shift(call(inputs, *args, **kwargs), inputs)
        activation = layer.activation
        with keras_internals.replaced(
            layer, "activation", lambda z: activation(shift(z, inputs))
        ):
            return call(inputs, *args, **kwargs)

    def paths(self, layer: Any, inputs: Any, z: Tensor) -> list[Any]:
        """The paths from one shifted output to the layer's variables.

        Args:
            layer: the layer.
            inputs: what `call` handed to `shift`.
            z: the linear output, shape `(N, ...)`.

        Returns:
            A list with one path for each variable that `z` is linear in.
        """
        raise NotImplementedError


def register_layer_rule(
    layer_class: type | str,
) -> Callable[[type[LayerRule]], type[LayerRule]]:
    """Class decorator: makes a `LayerRule` responsible for a layer class.

    It also serves subclasses that inherit the `call` of `layer_class`.

    Args:
        layer_class: subclass of `keras.layers.Layer`; or for one of a package that
            need not be installed its name behind that of the package, such as
            `"keras_hub.PositionEmbedding"`.

    Returns:
        The decorator.
    """

    def register(rule_class: type[LayerRule]) -> type[LayerRule]:
        _RULES[layer_class] = rule_class()
        return rule_class

    return register


def rule_for(layer: Any) -> LayerRule | None:
    """The rule for a layer, or `None` where no rule applies."""
    cls: Any
    for cls in type(layer).__mro__:
        rule = _RULES.get(cls) or _RULES.get(_name(cls))
        if rule is not None:
            inherits = type(layer).call is cls.call
            return rule if inherits and rule.supports(layer) else None
    return None


def _name(cls: type) -> str:
    """The name of a class behind that of the package it is in."""
    return f"{cls.__module__.partition('.')[0]}.{cls.__name__}"


def has_adapters(layer: Any) -> bool:
    """Whether a layer multiplies its kernel up from parts, or holds it quantized."""
    return bool(
        getattr(layer, "lora_enabled", False)
        or getattr(layer, "quantization_mode", None)
    )


def bias_path(layer: Any, channel_axis: int = -1) -> list[Any]:
    """The path to a bias along one axis of the output (as a list)."""
    if getattr(layer, "bias", None) is None:
        return []
    return [Elementwise(layer.bias, None, sum_to_axes([channel_axis]))]


def sum_to_axes(axes: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """A function that sums `(N, ...)` over all axes but the first and `axes`."""

    def reduce(v: Tensor) -> Tensor:
        rank = len(v.shape)
        kept = {axis % rank for axis in axes}
        rest = tuple(i for i in range(1, rank) if i not in kept)
        return ops.sum(v, axis=rest) if rest else v

    return reduce
