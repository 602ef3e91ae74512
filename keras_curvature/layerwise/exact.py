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
from collections.abc import Callable, Collection, Iterable
from typing import Any

import keras
from keras import ops

from keras_curvature import backend
from keras_curvature.backend import Tensor
from keras_curvature.data_sets import Batch
from keras_curvature.evaluation import Evaluation
from keras_curvature.layerwise import gauss_newton
from keras_curvature.layerwise.checks import find_structure
from keras_curvature.layerwise.groups import connected
from keras_curvature.layerwise.opened import Place
from keras_curvature.layerwise.outputs import UNKNOWN_SIZE
from keras_curvature.layerwise.penalties import off_diagonal, penalty
from keras_curvature.layerwise.recording import LayerRecording
from keras_curvature.layerwise.rules import paths, stacked_products
from keras_curvature.layerwise.statistics import ThroughStatistics, num_statistics
from keras_curvature.layerwise.structure import Structure
from keras_curvature.loss import State

#: Beyond so many scalar outputs of a model its Gauss–Newton part is no help to samples.
FEW_OUTPUTS = 64

#: Bound for the elements of all shifts times the basis vectors folded together.
FOLDED_ELEMENTS = 2**24

#: A variable with more entries has a loop of its own in the parameter basis. The others
#: share one: a loop takes as long to compile as thousands of small products to run.
SHARED_ENTRIES = 2**12

#: Activations that are linear in pieces.
_PIECEWISE = (
    None,
    keras.activations.linear,
    keras.activations.relu,
    keras.activations.relu6,
    keras.activations.leaky_relu,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which way each variable takes, and what it costs.

    Attributes:
        ways: dictionary from the name of a variable to `"outputs"`, `"parameters"` or
            `"gauss_newton"`.
        num_matvecs: number of matrix-vector products (or backward passes).
        num_outputs: number of the model's scalar outputs per sample, which is what
            the exact Gauss–Newton part of all layers with a rule costs in backward
            passes; infinite where that part cannot be told from the rest.
        noise_without: the variance of samples that leave the Gauss–Newton part out,
            over that of others.
    """

    ways: dict[str, str]
    num_matvecs: int
    num_outputs: float = math.inf
    noise_without: float = math.inf


class ExactDiagonal:
    """Plans and computes the exact diagonal.

    Args:
        evaluation: of a `TrainingLoss`.
    """

    def __init__(self, evaluation: Evaluation):
        self._evaluation = evaluation
        self._layout = evaluation.loss.layout
        self._structure = evaluation.once(find_structure)
        self._certify = evaluation.mean_of(self._certificates)
        self._lasting_plan: Plan | None = None
        self._computed: dict[tuple[str, ...], Callable[[], Tensor]] = {}

    def plan(self, seed: int = 0) -> Plan:
        """Chooses the cheapest way for each variable; costs about ten gradients.

        A model is planned once if it has neither penalties, nor a layer whose block
        is all Gauss–Newton, nor so few outputs that the plan's `noise_without`, which
        depends on the weights, is of interest: what is curved stays so.

        Args:
            seed: seed of the certificates.
        """
        if self._lasting_plan is not None:
            return self._lasting_plan
        structure, layout = self._structure, self._layout
        if structure.samples_interact or not structure.uses:
            return Plan(dict.fromkeys(layout.names, "parameters"), layout.size)
        certificates = self._certify(backend.array([seed, 0], "int32"))
        coupling, departures, noise, penalties = (
            ops.convert_to_numpy(x) for x in certificates
        )
        threshold = gauss_newton.beyond_rounding(structure)
        piecewise: set[Place] = set()
        num_outputs = math.inf
        if coupling < threshold:
            places = [use.place for use in structure.uses]
            piecewise = {
                p
                for p, size in zip(places, departures, strict=True)
                if size < threshold
            }
            num_outputs = structure.num_outputs
        penalized = self._penalized()
        diagonal = {
            i for i, size in zip(penalized, penalties, strict=True) if size < threshold
        }
        sound = {i for i in structure.uses_of if i in diagonal or i not in penalized}
        # A control variate would leave what goes through statistics of the batch, which
        # is the most of the noise.
        noise = math.inf if structure.statistics else float(noise)
        plan = cheapest(structure, sound, piecewise, num_outputs, noise)
        if not (piecewise or penalized) and plan.num_outputs > FEW_OUTPUTS:
            self._lasting_plan = plan
        return plan

    def compute(self, plan: Plan) -> Tensor:
        """The exact diagonal as a flat tensor `(P,)`, on the device.

        Args:
            plan: a `Plan` for the same model.
        """
        ways = tuple(plan.ways[name] for name in self._layout.names)
        if ways not in self._computed:
            self._computed[ways] = self._evaluation.mean_of(
                lambda state, batch: self._diagonal(state, batch, ways)
            )
        return self._computed[ways]()

    def _penalized(self) -> list[int]:
        """Variables that act through the places, and also on the loss directly."""
        return [i for i in self._structure.uses_of if i in self._structure.direct]

    # While tracing

    def _certificates(
        self, state: State, batch: Batch, key: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """What speaks against the cheaper ways, each as a relative size.

        Returns:
            The loss; and the coupling of the outputs with the rest, the departures from
            Gauss–Newton by use, the noise without that part, and the departures of
            penalties from a diagonal.
        """
        structure = self._structure
        with_outputs = structure.num_outputs < math.inf
        recording = LayerRecording(structure, state, batch, with_outputs)
        one = ops.ones_like(recording.loss)
        coupling, departures, noise = one, [one] * len(structure.uses), one
        if with_outputs:
            cut = LayerRecording(structure, state, batch, cut=True)
            coupling = gauss_newton.coupling(cut, key)
            departures, noise = gauss_newton.departure(recording, key)
        penalties = [off_diagonal(recording, i, key) for i in self._penalized()]
        return recording.loss, (
            coupling,
            ops.stack(departures),
            noise,
            ops.stack(penalties) if penalties else ops.zeros((0,)),
        )

    def _diagonal(
        self, state: State, batch: Batch, ways: tuple[str, ...]
    ) -> tuple[Tensor, Tensor]:
        taking = {
            way: [i for i, taken in enumerate(ways) if taken == way]
            for way in ("parameters", "outputs", "gauss_newton")
        }
        closed = {
            use.place.layer
            for i in taking["parameters"]
            for use in self._structure.uses_of.get(i, [])
        }
        structure = self._structure.without(closed)
        recording = LayerRecording(
            structure, state, batch, bool(taking["gauss_newton"])
        )
        own = by_parameters(recording, taking["parameters"])
        parts = [
            own[i] if i in own else penalty(recording, i) for i in range(len(ways))
        ]
        found = by_outputs(recording, taking["outputs"])
        found |= gauss_newton.diagonal(recording, taking["gauss_newton"])
        for i, part in found.items():
            parts[i] = parts[i] + part
        if recording.statistics and found:
            through = ThroughStatistics(recording).exact()
            for i in found:
                parts[i] = parts[i] + through[i]
        return recording.loss, self._layout.joined(parts)


def cheapest(
    structure: Structure,
    sound: set[int],
    piecewise: set[Place],
    num_outputs: float,
    noise: float = math.inf,
) -> Plan:
    """The plan that takes the fewest products.

    Args:
        structure: what is known of the model's layers.
        sound: numbers of the variables that may go by their layers' outputs.
        piecewise: places whose curvature is all Gauss–Newton.
        num_outputs: see `Plan`.
        noise: see `Plan.noise_without`.
    """
    layout = structure.loss.layout
    sizes, ways = layout.sizes, dict.fromkeys(layout.names, "parameters")
    # Layers that share a variable go the same way.
    certified, certified_cost, cost = [], 0.0, 0.0
    free = set(range(len(sizes))) - set(structure.uses_of)

    def take(variables: set[int], way: str) -> None:
        ways.update({layout.names[i]: way for i in variables})

    # Numbers of variables, and of layers counted below zero.
    joined = connected(
        {i, *(-1 - use.place.layer for use in uses)}
        for i, uses in structure.uses_of.items()
    )
    for variables in [{i for i in one if i >= 0} for one in joined]:
        places = {use.place: use for i in variables for use in structure.uses_of[i]}
        least: float = sum(sizes[i] for i in variables)
        by_outputs = sum(use.size for use in places.values())
        if variables <= sound and by_outputs < least:
            least = by_outputs
            take(variables, "outputs")
        if variables <= sound and set(places) <= piecewise:
            certified.append(variables)
            certified_cost += least
        cost += least
    if certified_cost > num_outputs:
        cost += num_outputs - certified_cost
        for variables in certified:
            take(variables, "gauss_newton")
    total = int(cost + sum(sizes[i] for i in free))
    if structure.statistics and set(ways.values()) != {"parameters"}:
        total += num_statistics(structure)
        if total >= sum(sizes):
            ways = dict.fromkeys(ways, "parameters")
            total = sum(sizes)
    return Plan(ways, total, num_outputs, noise)


def least_matvecs(structure: Structure, curved: Collection[int] = ()) -> int:
    """What the cheapest plan takes at the least, before anything is certified.

    Args:
        structure: what is known of the model's layers.
        curved: numbers of variables whose curvature is not all Gauss–Newton.
    """
    piecewise = {
        use.place for use in structure.uses if not {*use.variables} & {*curved}
    }
    outputs = structure.num_outputs
    return cheapest(structure, {*structure.uses_of}, piecewise, outputs).num_matvecs


def looks_curved(structure: Structure, budget: int) -> bool:
    """Whether a plan within a budget asks for what activations hardly are: pieces.

    The model's outputs are seen in front of theirs.

    Args:
        structure: what is known of the model's layers.
        budget: number of products.
    """
    if least_matvecs(structure, range(len(structure.loss.variables))) <= budget:
        return False
    last = {o.layer for o in structure.outputs if isinstance(o, Place)}
    return any(
        getattr(use.layer, "activation", None) not in _PIECEWISE
        for use in structure.uses
        if use.place.layer not in last
    )


def by_parameters(recording: LayerRecording, variables: list[int]) -> dict[int, Tensor]:
    """Diagonals by the parameter basis, while tracing: `{variable: tensor}`."""
    diagonals = {i: ops.zeros_like(recording.value(i)) for i in variables}
    acting = [i for i in variables if i in recording.point]
    large = [i for i in acting if _size(recording, i) > SHARED_ENTRIES]
    small = [i for i in acting if i not in large]
    for together in [small, *([i] for i in large)]:
        if together:
            diagonals |= _over_entries(recording, together)
    return diagonals


def _over_entries(recording: LayerRecording, variables: list[int]) -> dict[int, Tensor]:
    """`Σ_j e_j ⊙ H e_j` over the entries j of variables."""
    multiply = recording.whole_product(variables, variables)
    sizes = [_size(recording, i) for i in variables]
    count = sum(sizes)

    def entry(j: Any) -> list[Tensor]:
        e = {}
        parts = backend.parts(ops.one_hot(j, count, dtype="float32"), sizes)
        for i, part in zip(variables, parts, strict=True):
            value = recording.value(i)
            e[i] = ops.cast(ops.reshape(part, value.shape), value.dtype)
        product = multiply(e)
        return [e[i] * product[i] for i in variables]

    sums = backend.sum_range(entry, count, _fold(recording, count))
    return dict(zip(variables, sums, strict=True))


def _size(recording: LayerRecording, i: int) -> int:
    """Number of entries of a variable."""
    return math.prod(recording.value(i).shape)


def by_outputs(recording: LayerRecording, variables: list[int]) -> dict[int, Tensor]:
    """Diagonals by the output basis, while tracing: `{variable: tensor}`."""
    paths_of = {i: recording.paths(i) for i in variables}
    diagonals: dict[int, Tensor] = {}
    for place in sorted({p for uses in paths_of.values() for _, p in uses}):
        users = {
            i: uses
            for i, uses in paths_of.items()
            if place in [other for _, other in uses]
        }
        for i, part in _over_basis(recording, place, users).items():
            diagonals[i] = diagonals[i] + part if i in diagonals else part
    return diagonals


def _over_basis(
    recording: LayerRecording, place: Place, users: dict[int, list[tuple[Any, Place]]]
) -> dict[int, Tensor]:
    """`Σ_j Σ_n (J_nᵀ e_j) ⊙ (J_nᵀ M_n e_j)` over the basis of one shift.

    Args:
        recording: a `LayerRecording`.
        place: the place of the shift.
        users: `{number of a variable that acts through it: its paths}`.
    """
    shift = recording.point[place]
    size = math.prod(shift.shape[1:])
    wanted = sorted({p for uses in users.values() for _, p in uses})
    multiply = recording.product([place], wanted)
    pointwise = {
        i: uses[0][0]
        for i, uses in users.items()
        # Its sum over basis vectors keeps the samples, whose number must be known.
        if shift.shape[0] and len(uses) == 1 and uses[0][0].pointwise(shift.shape)
    }
    others = [i for i in users if i not in pointwise]

    def entry(j: Any) -> list[Tensor]:
        e = ops.reshape(ops.one_hot(j, size, dtype=shift.dtype), (1, *shift.shape[1:]))
        everywhere = ops.broadcast_to(e, ops.shape(shift))
        u = multiply({place: everywhere})
        parts = [e * u[place]] if pointwise else []
        for i in others:
            uses = users[i]
            if len(uses) == 1:
                parts.append(uses[0][0].basis_product(e, u[place]))
                continue
            parts.append(
                stacked_products(
                    [path for path, _ in uses],
                    [everywhere if p == place else None for _, p in uses],
                    [u[p] for _, p in uses],
                )
            )
        return parts

    largest = max([_elements(users[i], shift.shape[0]) for i in others], default=1)
    sums = backend.sum_range(entry, size, _fold(recording, largest))
    diagonals = dict(zip(others, sums[len(sums) - len(others) :], strict=True))
    for i, path in pointwise.items():
        diagonals[i] = path.products(sums[0], ops.ones_like(sums[0]))
    return diagonals


def _elements(uses: list[tuple[Any, Place]], samples: int | None) -> int:
    """Size of what a variable with these uses builds for one basis vector."""
    path = uses[0][0]
    size: int = math.prod(path.variable.shape)
    whole = len(uses) > 1 or getattr(path, "copies", False)
    if not whole:
        return size
    return min(size * (samples or UNKNOWN_SIZE), paths.CHUNK_ELEMENTS)


def folded(shifts: Iterable[Tensor], elements: int = 0) -> int:
    """How many basis vectors are folded together within the memory bound.

    Args:
        shifts: all shifts, each of which has a product for each basis vector.
        elements: of what else there is for each.
    """
    for shift in shifts:
        elements += math.prod(n or UNKNOWN_SIZE for n in shift.shape)
    return max(1, min(256, FOLDED_ELEMENTS // elements))


def _fold(recording: LayerRecording, elements: int) -> int:
    return folded((recording.point[place] for place in recording.shifts), elements)
