"""The exact diagonal of the Hessian, each variable by the cheapest way.

Three ways lead to the diagonal of one variable's block:

* *output basis*: `v = e_j` at a layer's output, for all samples at once, gives column
  j of every `M_n`; a layer needs one product per output and position instead of one
  per weight;
* *parameter basis*: one product per weight, cheaper for a kernel that is used at more
  positions than it has entries, and the only way for variables that no rule covers;
* *Gauss–Newton*: where it is certified that the block has no other part (see
  `gauss_newton.departure`), one backward pass per scalar output of the model serves
  all such layers.

Basis vectors are folded into the batch axis, a bounded number at a time.
"""

import dataclasses
import math

import numpy as np
from keras import ops

from keras_curvature import backend
from keras_curvature.layer_rules import paths, stacked_products
from keras_curvature.operators import gauss_newton
from keras_curvature.operators.recording import Recording, unique_names

#: Beyond so many scalar outputs of a model its Gauss–Newton part is no help to samples.
FEW_OUTPUTS = 64

#: Bound for the elements of all shifts times the basis vectors folded together.
FOLDED_ELEMENTS = 2**24


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which way each variable takes, and what it costs.

    Attributes:
        ways: dictionary from the path of a variable to `"outputs"`, `"parameters"` or
            `"gauss_newton"`; a path that occurs again is followed by a number.
        num_matvecs: number of matrix-vector products (or backward passes).
        num_outputs: number of the model's scalar outputs per sample, which is what
            the exact Gauss–Newton part of all layers with a rule costs in backward
            passes; infinite where that part cannot be told from the rest.
        noise_without: the variance of samples that leave the Gauss–Newton part out,
            over that of others.
    """

    ways: dict
    num_matvecs: int
    num_outputs: float = math.inf
    noise_without: float = math.inf


class ExactDiagonal:
    """Plans and computes the exact diagonal for one `LayerOutputHessian`.

    Args:
        layer_outputs: a `LayerOutputHessian`.
    """

    def __init__(self, layer_outputs):
        self._layer_outputs = layer_outputs
        self._operator = layer_outputs.operator
        self._lasting_plan = None

    def plan(self, seed=0):
        """Chooses the cheapest way for each variable; costs about ten gradients.

        A model is planned once if it has neither penalties, nor a layer whose block
        is all Gauss–Newton, nor so few outputs that the plan's `noise_without`, which
        depends on the weights, is of interest: what is curved stays so.

        Args:
            seed: seed of the certificates.

        Returns:
            A `Plan`.
        """
        if self._lasting_plan is not None:
            return self._lasting_plan
        operator = self._operator
        if self._layer_outputs.samples_interact:
            ways = dict.fromkeys(unique_names(operator.variables), "parameters")
            return Plan(ways, sum(operator.sizes))
        coupling, departures, noise, penalties = operator.mean_over_batches(
            self._certificates,
            ("exact", "certificates"),
            backend.array([seed, 0], "int32"),
        )
        # Rounding is orders below, a curved activation orders above.
        threshold = np.finfo(operator.dtype).eps ** (2 / 3)
        notes = self._layer_outputs.notes["exact"]
        piecewise, num_outputs = set(), math.inf
        if float(coupling) < threshold:
            piecewise = {k for k, size in departures.items() if float(size) < threshold}
            num_outputs = self._layer_outputs.num_outputs
        diagonal = {i for i, size in penalties.items() if float(size) < threshold}
        plan = self._cheapest(notes, piecewise, diagonal, num_outputs, float(noise))
        if not (piecewise or penalties) and plan.num_outputs > FEW_OUTPUTS:
            self._lasting_plan = plan
        return plan

    def compute(self, plan):
        """The exact diagonal as a flat tensor `(P,)`, on the device.

        Args:
            plan: a `Plan` for the same model and data shapes.
        """
        key = ("exact", "diagonal", tuple(sorted(plan.ways.items())))
        return self._operator.mean_over_batches(
            lambda batch: self._diagonal(batch, plan.ways), key
        )

    # While tracing

    def _certificates(self, batch, seed):
        """What speaks against the cheaper ways, each as a relative size.

        Returns:
            The coupling of the outputs with the rest, the departures from
            Gauss–Newton by use, the noise without that part, and the departures of
            penalties from a diagonal.
        """
        recording = self._layer_outputs.record(batch, outputs=True)
        notes = _Notes.of(recording)
        one = ops.ones((), recording.tapes.loss.dtype.name)
        departures = dict.fromkeys(recording.uses, one)
        coupling = noise = one
        if self._layer_outputs.num_outputs < math.inf:
            coupling = gauss_newton.coupling(recording, seed)
            found, noise = gauss_newton.departure(recording, seed)
            departures.update({k: found[k] for k in departures if k in found})
        # Kept with the operator, as the graph is that is traced here.
        self._layer_outputs.notes["exact"] = notes
        penalties = {
            i: _off_diagonal(recording, i, seed)
            for i in notes.uses_of
            if i in notes.penalized
        }
        return coupling, departures, noise, penalties

    def _cheapest(self, notes, piecewise, diagonal_penalty, num_outputs, noise):
        size = dict(enumerate(self._operator.sizes))
        ways = dict.fromkeys(size, "parameters")
        # Layers that share a variable or an output go the same way.
        certified, certified_cost, cost = [], 0, 0
        free = set(size)
        for variables, uses in notes.groups():
            by_parameters = sum(size[i] for i in variables)
            by_outputs = sum(notes.size_of[k] for k in uses)
            sound = all(
                i in diagonal_penalty or i not in notes.penalized for i in variables
            )
            free -= set(variables)
            cheapest = by_parameters
            if sound and by_outputs < by_parameters:
                cheapest = by_outputs
                ways.update(dict.fromkeys(variables, "outputs"))
            if sound and all(k in piecewise for k in uses):
                certified.append(variables)
                certified_cost += cheapest
            cost += cheapest
        if certified_cost > num_outputs:
            cost += num_outputs - certified_cost
            for variables in certified:
                ways.update(dict.fromkeys(variables, "gauss_newton"))
        names = unique_names(self._operator.variables)
        named = {names[i]: way for i, way in ways.items()}
        total = int(cost + sum(size[i] for i in free))
        return Plan(named, total, num_outputs, noise)

    def _diagonal(self, batch, ways):
        probe = self._operator.probe
        names = unique_names(probe.variables)
        way_of = {
            id(v): ways[name] for v, name in zip(probe.variables, names, strict=True)
        }
        rules = {
            layer: rule
            for layer, rule in self._layer_outputs.rules.items()
            if not any(way_of.get(id(v)) == "parameters" for v in rule.variables(layer))
        }
        recording = Recording(probe, batch, rules, "gauss_newton" in ways.values())
        taking = {
            way: [i for i, v in enumerate(probe.variables) if way_of[id(v)] == way]
            for way in ("parameters", "outputs", "gauss_newton")
        }
        parts = [None] * len(probe.variables)
        for i in range(len(parts)):
            direct = i in taking["parameters"]
            parts[i] = (_by_parameters if direct else _penalty)(recording, i)
        for way, diagonal in [
            ("outputs", _by_outputs),
            ("gauss_newton", gauss_newton.diagonal),
        ]:
            if taking[way]:
                for i, part in diagonal(recording, taking[way]).items():
                    parts[i] = parts[i] + part
        return self._operator.flatten(parts)


@dataclasses.dataclass
class _Notes:
    """What a plan needs to know of a recording; variables by their index.

    Attributes:
        uses_of: `{variable: indices of the sources that it acts through}`.
        layer_of: `{index of a source: its layer}`.
        size_of: `{index of a source: its entries per sample}`.
        penalized: variables that also act on the loss directly.
    """

    uses_of: dict
    layer_of: dict
    size_of: dict
    penalized: set

    @classmethod
    def of(cls, recording):
        first, sources = len(recording.variables), recording.tapes.sources
        uses_of = {
            i: [k for _, k in recording.paths[id(v)]]
            for i, v in enumerate(recording.variables)
            if id(v) in recording.paths
        }
        used = {k for uses in uses_of.values() for k in uses}
        return cls(
            uses_of,
            {k: recording.uses[k].layer for k in used},
            {
                k: math.inf
                if None in sources[k].shape[1:]
                else math.prod(sources[k].shape[1:])
                for k in used
            },
            {i for i in range(first) if recording.tapes.gradients[i] is not None},
        )

    def groups(self):
        """Connected sets of variables and the outputs of their layers."""
        groups = []
        for i, uses in self.uses_of.items():
            layers = {id(self.layer_of[k]) for k in uses}
            variables, all_uses = {i}, set(uses)
            for group in [g for g in groups if g[2] & layers]:
                groups.remove(group)
                variables |= group[0]
                all_uses |= group[1]
                layers |= group[2]
            groups.append((variables, all_uses, layers))
        return [(variables, uses) for variables, uses, _ in groups]


def _off_diagonal(recording, i, seed):
    """Relative size of what a penalty's Hessian has off its diagonal."""
    source = recording.tapes.sources[i]
    estimates = []
    for number in range(2):
        key = backend.fold_seed(seed, 20_000 + 2 * i + number)
        signs = backend.random_signs_like(source, key)
        product = recording.tapes.product(_direction(recording, {i: signs}), wanted=[i])
        estimates.append(signs * product[i])
    scale = ops.max(ops.abs(estimates[0]))
    distance = ops.max(ops.abs(estimates[0] - estimates[1]))
    return ops.where(scale > 0, distance / scale, 0.0)


def _penalty(recording, i):
    """What acts on variable i directly: known to be diagonal here."""
    source = recording.tapes.sources[i]
    if recording.tapes.gradients[i] is None:
        return ops.zeros_like(source)
    v = _direction(recording, {i: ops.ones_like(source)})
    return recording.tapes.product(v, wanted=[i])[i]


def _by_parameters(recording, i):
    """`Σ_j e_j ⊙ H e_j` over the entries of variable i."""
    source = recording.tapes.sources[i]
    size = math.prod(source.shape)

    def entry(j):
        e = ops.reshape(ops.one_hot(j, size, dtype=source.dtype.name), source.shape)
        product = recording.tapes.product(_direction(recording, {i: e}), wanted=[i])
        return [e * product[i]]

    return backend.sum_over_range(entry, size, _fold(recording, size))[0]


def _by_outputs(recording, variables):
    """Diagonals by the output basis: `{index of the variable: tensor}`."""
    uses_of = {i: recording.paths[id(recording.variables[i])] for i in variables}
    diagonals = dict.fromkeys(uses_of, 0.0)
    for k in sorted({k for uses in uses_of.values() for _, k in uses}):
        users = {i: uses for i, uses in uses_of.items() if k in [m for _, m in uses]}
        for i, part in _over_basis(recording, k, users).items():
            diagonals[i] = diagonals[i] + part
    return diagonals


def _over_basis(recording, k, users):
    """`Σ_j Σ_n (J_nᵀ e_j) ⊙ (J_nᵀ M_n e_j)` over the basis of one shift.

    Args:
        recording: a `Recording`.
        k: index of the shift's source.
        users: `{index of a variable that acts through it: its uses}`.
    """
    tapes, source = recording.tapes, recording.tapes.sources[k]
    size = math.prod(source.shape[1:])
    wanted = sorted({m for uses in users.values() for _, m in uses})
    pointwise = {
        name: uses[0][0]
        for name, uses in users.items()
        # Its sum over basis vectors keeps the samples, whose number must be known.
        if source.shape[0] and len(uses) == 1 and uses[0][0].pointwise(source.shape)
    }
    others = [name for name in users if name not in pointwise]

    def entry(j):
        e = ops.reshape(
            ops.one_hot(j, size, dtype=source.dtype.name), (1, *source.shape[1:])
        )
        everywhere = ops.broadcast_to(e, ops.shape(source))
        u = tapes.product(_direction(recording, {k: everywhere}), wanted=wanted)
        parts = [e * u[k]] if pointwise else []
        for name in others:
            uses = users[name]
            if len(uses) == 1:
                parts.append(uses[0][0].basis_product(e, u[k]))
                continue
            parts.append(
                stacked_products(
                    [path for path, _ in uses],
                    [everywhere if m == k else None for _, m in uses],
                    [u[m] for _, m in uses],
                )
            )
        return parts

    largest = max([_elements(users[n], source.shape[0]) for n in others], default=1)
    sums = backend.sum_over_range(entry, size, _fold(recording, largest))
    diagonals = dict(zip(others, sums[len(sums) - len(others) :], strict=True))
    for name, path in pointwise.items():
        diagonals[name] = path.products(sums[0], ops.ones_like(sums[0]))
    return diagonals


def _elements(uses, samples):
    """Size of what a variable with these uses builds for one basis vector."""
    path = uses[0][0]
    size = math.prod(path.variable.shape)
    whole = len(uses) > 1 or getattr(path, "copies", False)
    return (
        min(size * (samples or gauss_newton.UNKNOWN_SIZE), paths.CHUNK_ELEMENTS)
        if whole
        else size
    )


def _direction(recording, parts):
    """A direction of the joint space that is zero but for some sources."""
    return [parts.get(i) for i in range(len(recording.tapes.sources))]


def _fold(recording, elements):
    """How many basis vectors are folded together within the memory bound."""
    for use in recording.uses.values():
        elements += math.prod(n or gauss_newton.UNKNOWN_SIZE for n in use.shift.shape)
    return max(1, min(256, FOLDED_ELEMENTS // elements))
