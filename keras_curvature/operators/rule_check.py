"""Whether layer rules describe what their layers do, found out by numbers.

A rule that leaves out a factor, or a layer that does not do what its configuration
says, would make curvature wrong without a sign of it. So each rule's `J_nᵀ` is
compared with the derivative of the layer itself, once for each model.
"""

import contextlib

import keras
from keras import ops, tree

from keras_curvature import backend
from keras_curvature.layer_rules import replaced
from keras_curvature.operators.recording import bound_call

#: Relative error of a layer's Jacobian beyond which its rule is not believed.
TOLERANCE = 1e-3

#: Samples that each Jacobian is compared for.
_SAMPLES = 2


def jacobian_errors(probe, batch, rules, seed):
    """The relative error of `Σ_n J_nᵀ v_n` for random `v`, by layer; while tracing.

    Every layer is cut off from the others, so that a single gradient compares all.

    Args:
        probe: a `Probe`.
        batch: `(x, y, sample_weight)`.
        rules: dictionary from layer to rule.
        seed: seed of the directions.

    Returns:
        A list of scalar tensors in the order of `rules`; zero for layers that are
        not called, or only in the body of a loop, and one where the Jacobian itself
        depends on the variable, so that the layer is not linear in it.
    """
    if not rules:
        return []
    sources, trace, used = probe.sources(), [], []

    def pairing(watch):
        trace.append(backend.current_trace())
        with contextlib.ExitStack() as stack:
            for layer, rule in rules.items():
                calls = _Calls(layer, rule, trace[0], watch, seed, len(used))
                used.append(calls)
                stack.enter_context(replaced(layer, "call", calls))
            probe.loss(sources, batch)
        return sum(calls.pairing for calls in used)

    tapes = backend.GradientProducts(pairing, [])
    gradients = {id(s): g for s, g in zip(tapes.sources, tapes.gradients, strict=True)}
    return [calls.error(gradients) for calls in used]


class _Calls:
    """Stands in for a layer's `call` and remembers what its rule says of it."""

    def __init__(self, layer, rule, trace, watch, seed, number):
        self._layer, self._rule, self._call = layer, rule, layer.call
        self._trace, self._watch = trace, watch
        self._seed = seed + [1 + number, 0]
        self.pairing = ops.zeros((), keras.config.floatx())
        self._expected = []  # (value of the variable, J^T v)
        self._given = []
        self._linear = True

    def __call__(self, *args, **kwargs):
        if backend.current_trace() is not self._trace:
            return self._call(*args, **kwargs)
        args, kwargs = tree.map_structure(_cut, (args, kwargs))
        self._given = [t for t in tree.flatten((args, kwargs)) if backend.is_tensor(t)]
        inputs, rest, others = bound_call(self._call, args, kwargs)
        with keras.StatelessScope() as nested:
            scope = nested.original_scope
        variables = self._rule.variables(self._layer)
        originals = [scope.get_current_value(v) for v in variables]
        values = {}
        for v in variables:
            values[id(v)] = ops.stop_gradient(v.value) * 1
            self._watch(values[id(v)])
            scope.add_update((v, values[id(v)]))
        try:
            return self._rule.call(
                self._layer,
                lambda x, *args, **kwargs: self._call(x, *args, **kwargs),
                lambda z, remembered: self._note(z, remembered, values),
                inputs,
                *rest,
                **others,
            )
        finally:
            for v, original in zip(variables, originals, strict=True):
                if original is None:
                    del scope.state_mapping[id(v)]
                else:
                    scope.add_update((v, original))

    def _note(self, z, remembered, values):
        seed = self._seed + [0, len(self._expected)]
        v = backend.random_signs_like(z[:_SAMPLES], seed)
        self.pairing += ops.cast(ops.sum(v * z[:_SAMPLES]), self.pairing.dtype)
        for path in self._rule.paths(self._layer, remembered, z):
            value = values.get(id(path.variable))
            if value is not None:
                inputs = None
                if path.inputs is not None:
                    inputs = path.inputs[:_SAMPLES]
                    if backend.reaches([value], [path.inputs], stops=self._given):
                        self._linear = False
                carried = ops.sum(path.per_sample(inputs, v), axis=0)
                self._expected.append((value, carried))
        return ops.stop_gradient(z)

    def error(self, gradients):
        """The largest relative error, over the variables."""
        if not self._linear:
            return ops.ones((), "float64")
        expected = {}
        for value, carried in self._expected:
            total = expected.setdefault(id(value), (value, []))[1]
            total.append(carried)
        errors = [ops.zeros((), "float64")]
        for value, parts in expected.values():
            carried, actual = sum(parts), gradients[id(value)]
            actual = ops.zeros_like(value) if actual is None else actual
            scale = ops.maximum(ops.max(ops.abs(actual)), ops.max(ops.abs(carried)))
            distance = ops.max(ops.abs(actual - carried))
            error = ops.where(scale > 0, distance / scale, 0.0)
            errors.append(ops.cast(error, "float64"))
        return ops.max(ops.stack(errors))


def _cut(x):
    if backend.is_tensor(x) and "float" in keras.backend.standardize_dtype(x.dtype):
        return ops.stop_gradient(x)
    return x
