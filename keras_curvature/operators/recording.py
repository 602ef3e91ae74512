"""The loss of a model recorded with a zero shift on every linear layer output."""

import contextlib
import dataclasses
import inspect
import itertools
from typing import Any

import keras
from keras import ops, tree

from keras_curvature import backend
from keras_curvature.layer_rules import replaced, rule_for, stacked_products


@dataclasses.dataclass
class Use:
    """One linear output of one layer, in one call."""

    layer: Any
    rule: Any
    received: Any  # list of all tensors among the layer's arguments
    inputs: Any  # what the rule remembered for its paths
    output: Any  # the linear output, before the shift
    shift: Any
    returned: Any = None  # what the layer returned, activation included

    def paths(self):
        """The paths from this output to the layer's variables."""
        return self.rule.paths(self.layer, self.inputs, self.output)


class Recording:
    """Loss and gradient over the joint space of variables and layer outputs.

    The sources of `tapes` are the variables, in order, followed by the shifts of
    `uses` and of `outputs`, in the order in which the model makes them. A variable acts
    through the shifts where `paths` says so. Its own source then only stands for
    what else depends on it: penalties.

    Exists while a function is being traced, and belongs to that trace.

    Args:
        probe: a `Probe`.
        batch: `(x, y, sample_weight)`.
        rules: dictionary from layer to rule. Those that turn out not to hold are
            left out; see `rules`.
        outputs: whether the model's outputs are shifted as well.
        constant: indices of the sources behind whose tensors the gradient counts as
            a constant; see `residual`.

    Attributes:
        names: a name for each variable, see `unique_names`.
        rules: the rules that hold.
        tapes: `GradientProducts` over the joint space.
        uses: `{index of its source: Use}`.
        paths: `{id(variable): [(path, index of its source), …]}`.
        outputs: indices of the sources at the model's outputs, in front of a final
            activation (the layer's own, or a layer `Activation` or `Softmax`).
        shifted: `{index of a source: the tensor that it shifts}`, after the shift.
    """

    def __init__(self, probe, batch, rules, outputs=False, constant=()):
        self._made_of = probe, batch
        self._constant_behind = frozenset(constant)
        self.variables = probe.variables
        self.names = unique_names(self.variables)
        self.rules = dict(rules)
        while True:
            self.uses, self.outputs, self.shifted = {}, [], {}
            self._reassigned = set()
            sources = probe.sources()
            self._values = {
                id(v): s for v, s in zip(self.variables, sources, strict=True)
            }
            self.tapes = backend.GradientProducts(
                lambda watch, sources=sources: self._loss(
                    probe, sources, batch, watch, outputs
                ),
                sources,
            )
            self.paths = self._paths()
            unsound = self._unsound_variables(batch)
            sound = {
                layer: rule
                for layer, rule in self.rules.items()
                if not any(id(v) in unsound for v in rule.variables(layer))
            }
            if len(sound) == len(self.rules):
                break
            self.rules = sound

    def residual(self):
        """The same with `M − G` in the place of M, where this one has outputs.

        G is the Gauss–Newton part, `Jᵀ S J` with the Jacobian J of the model's
        outputs and the Hessian S of the loss by them: with the gradient at the
        outputs held constant, what remains is the model's own curvature.
        """
        return Recording(*self._made_of, self.rules, True, self.outputs)

    def signs(self, seed):
        """A random direction of the joint space; `None` where the loss is flat."""
        return [
            None
            if gradient is None
            else backend.random_signs_like(source, backend.fold_seed(seed, i))
            for i, (source, gradient) in enumerate(
                zip(self.tapes.sources, self.tapes.gradients, strict=True)
            )
        ]

    def diagonal(self, v, u):
        """`Σ_n (J_nᵀ v_n) ⊙ (J_nᵀ u_n) + v ⊙ u` for every variable.

        Args:
            v: direction of the joint space, `None` for zero parts.
            u: its product; may lack what `v` lacks.

        Returns:
            A list of tensors shaped like the variables.
        """
        diagonal = []
        for i, variable in enumerate(self.variables):
            part = ops.zeros(variable.shape, self.tapes.sources[i].dtype.name)
            if v[i] is not None:
                part = part + v[i] * u[i]
            mine = [
                (path, k)
                for path, k in self.paths.get(id(variable), [])
                if v[k] is not None
            ]
            if mine:
                part = part + stacked_products(
                    [path for path, _ in mine],
                    [v[k] for _, k in mine],
                    [u[k] for _, k in mine],
                )
            diagonal.append(part)
        return diagonal

    def _loss(self, probe, sources, batch, watch, outputs):
        count = itertools.count(len(self.variables))

        def add_shift(z):
            shift, index = ops.zeros_like(z), next(count)
            watch(shift)
            shifted = z + shift
            if index in self._constant_behind:
                shifted = backend.with_constant_cotangent(shifted)
            self.shifted[index] = shifted
            return shift, index

        with contextlib.ExitStack() as stack:
            trace = backend.current_trace()
            for layer, rule in self.rules.items():
                stack.enter_context(self._hook(layer, rule, trace, add_shift))
            if outputs:
                activated = []
                for layer in probe.layers():
                    if type(layer) in _ACTIVATIONS:
                        stack.enter_context(_noted(layer, activated))
                stack.enter_context(
                    self._hook_outputs(probe.model, trace, add_shift, activated)
                )
            return probe.loss(sources, batch)

    def _hook(self, layer, rule, trace, add_shift):
        original = layer.call

        def call(*args, **kwargs):
            if backend.current_trace() is not trace:
                # In the body of a loop: its tensors cannot leave it.
                return original(*args, **kwargs)
            made = []
            inputs, rest, others = bound_call(original, args, kwargs)
            received = [t for t in tree.flatten((args, kwargs)) if backend.is_tensor(t)]

            def shift(z, remembered):
                epsilon, index = add_shift(z)
                made.append(Use(layer, rule, received, remembered, z, epsilon))
                self.uses[index] = made[-1]
                return self.shifted[index]

            def run(x, *args, **kwargs):
                return original(x, *args, **kwargs)

            with self._constant(rule.variables(layer)):
                returned = rule.call(layer, run, shift, inputs, *rest, **others)
            for use in made:
                use.returned = returned
            return returned

        return replaced(layer, "call", call)

    @contextlib.contextmanager
    def _constant(self, variables):
        """A context in which variables are constants for the tapes.

        They act through the shift alone, so that any gradient that still reaches them
        comes from another use.
        """
        with keras.StatelessScope() as nested:
            scope = nested.original_scope
        # Changed within the probe's own scope: a nested one would hide the values of
        # all other variables, and forget losses and updates.
        values = [(v, scope.get_current_value(v)) for v in variables]
        values = [(v, value) for v, value in values if value is not None]
        for variable, value in values:
            if value is not self._values.get(id(variable)):
                # Computed from the variable (spectral normalization).
                self._reassigned.add(id(variable))
            scope.add_update((variable, ops.stop_gradient(value)))
        try:
            yield
        finally:
            for variable, value in values:
                scope.add_update((variable, value))

    def _hook_outputs(self, model, trace, add_shift, activated):
        original = model.call

        def shifted(y, others):
            if not _is_float(y):
                return y
            index, returned = self._index_of_output(y), y
            if index is None or sum(other is y for other in others) > 1:
                z, activation = next(
                    ((z, call) for z, call, a in activated if a is y),
                    (y, lambda z: z),
                )
                _, index = add_shift(z)
                returned = activation(self.shifted[index])
                mask = getattr(y, "_keras_mask", None)
                if mask is not None:
                    returned._keras_mask = mask
            self.outputs.append(index)
            return returned

        def call(*args, **kwargs):
            outputs = original(*args, **kwargs)
            if backend.current_trace() is not trace:
                return outputs
            everything = tree.flatten(outputs)
            return tree.map_structure(lambda y: shifted(y, everything), outputs)

        return replaced(model, "call", call)

    def _index_of_output(self, y):
        """Source of the layer output that leads to `y` and to nothing else."""
        mine = [k for k, use in self.uses.items() if use.returned is y]
        if not mine or mine[-1] in self.outputs or backend.is_used(y):
            return None
        # Several shifts in one layer: the last one only if nothing follows it.
        alone = len(mine) == 1 or self.shifted[mine[-1]] is y
        return mine[-1] if alone else None

    def _paths(self):
        paths = {}
        for index, use in self.uses.items():
            # What the layer was not asked for (frozen by itself) is no constant there.
            mine = {id(v) for v in use.rule.variables(use.layer)}
            for path in use.paths():
                if id(path.variable) in mine:
                    paths.setdefault(id(path.variable), []).append((path, index))
        return paths

    def _unsound_variables(self, batch):
        """Ids of variables for which the formula over layer outputs does not hold."""
        uses = self.uses.values()
        frozen = {id(v) for u in uses for v in u.rule.variables(u.layer)}
        unsound = frozen - set(self.paths) | self._reassigned
        for use in uses:
            if not _rows_are_samples(use.output, batch):
                unsound |= {id(v) for v in use.rule.variables(use.layer)}
        for i, variable in enumerate(self.variables):
            uses = self.paths.get(id(variable), [])
            shifts = {k: self.tapes.sources[k] for _, k in uses}
            gradient = self.tapes.gradients[i]
            # A penalty's gradient depends on the variable only. Anything else that
            # reaches the variable directly also depends on what the layers give out.
            if shifts and gradient is not None:
                if self.tapes.depends(gradient, list(shifts.values())):
                    unsound.add(id(variable))
            # One use that feeds another: its inputs move with the variable, which
            # adds a second-order term that the formula lacks.
            for path, k in uses:
                others = [shift for m, shift in shifts.items() if m != k]
                if gradient is not None:
                    others.append(self.tapes.sources[i])
                received = [*self.uses[k].received, path.inputs]
                if others and backend.reaches(others, received):
                    unsound.add(id(variable))
        return unsound


#: Layers that only apply an activation to their input.
_ACTIVATIONS = (keras.layers.Activation, keras.layers.Softmax)


def _noted(layer, calls):
    """A context in which calls of an activation are noted: input, function, output."""
    original = layer.call

    def call(*args, **kwargs):
        returned = original(*args, **kwargs)
        z, rest, others = bound_call(original, args, kwargs)
        calls.append((z, lambda z: original(z, *rest, **others), returned))
        return returned

    return replaced(layer, "call", call)


def _rows_are_samples(z, batch):
    """Whether the first axis of a layer output can be that of the batch.

    It is not if the output is computed from constants alone (an embedding of the
    positions), or if the number of rows does not fit.
    """
    data = [t for t in tree.flatten(batch) if t is not None]
    rows, samples = z.shape[0] if z.shape else 0, data[0].shape[0]
    if None not in (rows, samples) and rows != samples:
        return False
    return backend.reaches(data, [z])


def bound_call(call, args, kwargs):
    """The arguments of a layer: the first one, other positional ones, by keyword."""
    if args:
        return args[0], args[1:], kwargs
    name = next(iter(inspect.signature(call).parameters))
    return kwargs[name], (), {k: v for k, v in kwargs.items() if k != name}


def unique_names(variables):
    """Paths of variables; a path that occurs again gets a number."""
    names, seen = [], {}
    for variable in variables:
        path = variable.path
        seen[path] = seen.get(path, 0) + 1
        names.append(path if seen[path] == 1 else f"{path} ({seen[path]})")
    return names


def rules_for(model, variables):
    """The layers of a model that a rule covers and that hold a variable asked for."""
    asked = {id(v) for v in variables}
    rules = {}
    for layer in model._flatten_layers():
        rule = rule_for(layer)
        if rule and any(id(v) in asked for v in rule.variables(layer)):
            rules[layer] = rule
    return rules


def _is_float(tensor):
    return "float" in keras.backend.standardize_dtype(tensor.dtype)
