"""Samples of the diagonal from random signs at the layers' outputs.

One Hessian-vector product with respect to a zero shift of all outputs, along
independent random signs `v`, gives `u = M v` for all samples and layers at once, and

    E[Σ_n (J_nᵀ v_n) ⊙ (J_nᵀ u_n)] = diag(H_WW).

The noise between samples and between the inputs of a unit, which makes Hutchinson's
estimate useless at affordable cost, is gone. This is Curvature Propagation (Martens,
Sutskever, Swersky, ICML 2012, arXiv 1206.6464) as an ordinary Hessian-vector product.
Variables that no rule covers, and penalties, join the same product as directions of
their own, so that an estimate is complete and unbiased for every model.

Two things take noise out of a sample, each at a price:

* *groups*: directions of different layers disturb each other in a joint product. With
  a product for each group of layers that noise is gone between groups. A product of a
  group costs less than a joint one: only what lies behind its layers is
  differentiated.
* *the control variate*: of `M = G + (M − G)` the Gauss–Newton part G is the larger one
  in most classifiers, and its diagonal is known exactly after one backward pass for
  each of the model's outputs. Then only `M − G` is left to the signs. A product with
  it costs no more than one with M, see `OpenedLoss`.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

from keras_curvature import backend
from keras_curvature.axes import Axes
from keras_curvature.backend import Tensor
from keras_curvature.data_sets import Batch
from keras_curvature.evaluation import Evaluation
from keras_curvature.layerwise import gauss_newton
from keras_curvature.layerwise.checks import find_structure
from keras_curvature.layerwise.groups import connected
from keras_curvature.layerwise.opened import Place, Statistic
from keras_curvature.layerwise.recording import LayerRecording
from keras_curvature.layerwise.statistics import ThroughStatistics
from keras_curvature.layerwise.structure import Name, Structure
from keras_curvature.loss import State

#: One sample of the diagonal, a tensor for each variable, from a key; while tracing.
#: Or of another diagonal, in the parts that `Samples` is told how to join.
Draw: TypeAlias = Callable[[Tensor], Any]

#: The loss, and what draws samples; from state, batch, and axes where there are some.
Prepared: TypeAlias = Callable[..., tuple[Tensor, Draw]]


class Samples:
    """Independent unbiased samples of a diagonal.

    Args:
        evaluation: of a `TrainingLoss`.
        prepared: pure function of state and batch, and of axes where samples are asked
            for in some, to the loss and a `Draw`.
        joined: puts what is drawn side by side in one flat tensor; by default the
            parts of the variables.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        prepared: Prepared,
        joined: Callable[[Any], Tensor] | None = None,
    ):
        self._joined = joined or evaluation.loss.layout.joined
        self._prepared = prepared
        self._mean = evaluation.mean_of(self._draw, numbered=True)

    def __call__(
        self, key: Tensor, start: int, width: int, axes: list[Axes] | None = None
    ) -> Tensor:
        """Samples number `start … start + width − 1`.

        Args:
            key: a key, for `backend.fold_in`. A sample is a function of key, number
                and the model's state alone.
            start: number of the first one.
            width: how many; they share one forward pass and gradient.
            axes: of each variable, whose diagonals are taken in them; `None` for
                entries.

        Returns:
            Tensor `(width, P)`, on the device.
        """
        return self._mean(*_given(key, start, width, axes))

    def once(
        self, key: Tensor, start: int, width: int, axes: list[Axes] | None = None
    ) -> Tensor:
        """The same, where no more may be asked for; see `Mean.once`."""
        return self._mean.once(*_given(key, start, width, axes))

    def _draw(
        self,
        state: State,
        batch: Batch,
        key: Tensor,
        start: Tensor,
        width: Any,
        *rest: Any,
    ) -> tuple[Tensor, Tensor]:
        *axes, number = rest
        loss, draw = self._prepared(state, batch, *axes)

        def sample(i: Any) -> Tensor:
            # Fresh signs for each sample and each batch of the data.
            own = backend.fold_in(backend.fold_in(key, start + i), number)
            return self._joined(draw(own))

        return loss, backend.loop_range(sample, width)


def _given(key: Tensor, start: int, width: int, axes: list[Axes] | None) -> list[Any]:
    return [
        key,
        backend.array(start, "int32"),
        width,
        *([] if axes is None else [axes]),
    ]


class LayerwiseDiagonal:
    """Unbiased samples of the Hessian's diagonal.

    Args:
        evaluation: of a `TrainingLoss`.
        groups: `"joint"` for one product of all layers, `"layer"` for a product per
            layer, or a list of lists of layers (or their names); layers that are not
            named make one more group.
        control_variate: whether the Gauss–Newton part is computed exactly; right
            where `gauss_newton.coupling` is zero.

    Attributes:
        samples: the `Samples`.

    Raises:
        ValueError: for other groups, or a name that no layer has.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        groups: Any = "joint",
        control_variate: bool = False,
    ):
        self._structure = evaluation.once(find_structure)
        self._groups = _groups(self._structure, groups)
        self._control_variate = control_variate
        self.samples = Samples(evaluation, self._prepared)

    def _prepared(
        self, state: State, batch: Batch, axes: list[Axes] | None = None
    ) -> tuple[Tensor, Draw]:
        recording = LayerRecording(
            self._structure, state, batch, outputs=self._control_variate, axes=axes
        )
        parts = [(recording, group) for group in self._groups]
        known: dict[int, Tensor] = {}
        if self._control_variate:
            parts, known = self._controlled(recording)
        samplers = [(group, _sampler(r, group)) for r, group in parts]
        names = [name for _, group in parts for name in group]

        def draw(key: Tensor) -> list[Tensor]:
            total = [known.get(i, 0.0) for i in range(len(state.values))]
            signs = recording.random(backend.signs, names, key)
            for group, sampled in samplers:
                part = sampled({name: signs[name] for name in group})
                total = [t + p for t, p in zip(total, part, strict=True)]
            return total

        return recording.loss, draw

    def _controlled(
        self, recording: LayerRecording
    ) -> tuple[list[tuple[LayerRecording, list[Name]]], dict[int, Tensor]]:
        """The products that are left with a control variate, and the known diagonals.

        Variables that no rule covers have no cheap Gauss–Newton diagonal and keep their
        products with M, and so do statistics of the batch.
        """
        covered = self._structure.uses_of
        residual = recording.residual()
        left = []
        for group in self._groups:
            reached: list[Name] = [
                n for n in group if isinstance(n, Place) or n in covered
            ]
            left.append((residual, reached))
            left.append((recording, [n for n in group if n not in reached]))
        known = gauss_newton.diagonal(recording, list(covered))
        return [(r, group) for r, group in left if group], known


def _sampler(
    recording: LayerRecording, group: list[Name]
) -> Callable[[dict[Name, Tensor]], list[Tensor]]:
    """The function from signs of a group of names to its part of a sample."""
    if any(isinstance(name, Statistic) for name in group):
        return ThroughStatistics(recording).sampler(group)
    multiply = recording.product(group, group)
    return lambda v: recording.diagonal(v, multiply(v))


def _groups(structure: Structure, groups: Any) -> list[list[Name]]:
    """Names by group; all uses of one variable are in one group.

    Statistics of the batch have a product of their own, or join that of all.
    """
    variables = structure.loss.variables
    group_of = _grouping(groups, variables)
    sets: dict[Any, set[Name]] = {}
    for i, variable in enumerate(variables):
        names: set[Name] = {use.place for use in structure.uses_of.get(i, [])}
        if i in structure.direct:
            names.add(i)
        layer = variable.path.rpartition("/")[0]
        sets.setdefault(group_of(layer), set()).update(names)
    own = None if groups == "joint" else Statistic
    sets.setdefault(own, set()).update(structure.statistics)
    number = structure.numbers
    # A layer used by two groups (a shared variable) joins them.
    return [
        sorted(group, key=number.__getitem__)
        for group in connected(names for names in sets.values() if names)
    ]


def _grouping(groups: Any, variables: Any) -> Callable[[str], Any]:
    """A function from the path of a layer to its group."""
    if groups == "joint":
        return lambda layer: None
    if groups == "layer":
        return lambda layer: layer
    if isinstance(groups, str) or not all(
        isinstance(group, (list, tuple)) for group in groups
    ):
        raise ValueError(
            '`groups` must be "joint", "layer", or a list of lists of layers or '
            f"their names. Received: groups={groups!r}."
        )
    layers = {v.path.rpartition("/")[0] for v in variables}
    names = [[getattr(layer, "path", layer) for layer in group] for group in groups]

    def has(path: str, name: str) -> bool:
        return path == name or path.endswith(f"/{name}")

    for name in (name for group in names for name in group):
        if not any(has(path, name) for path in layers):
            raise ValueError(
                f"No layer with variables is called {name!r}. Received: groups="
                f"{groups!r}; the layers are {sorted(layers)}."
            )
    return lambda layer: next(
        (n for n, group in enumerate(names) if any(has(layer, x) for x in group)), None
    )
