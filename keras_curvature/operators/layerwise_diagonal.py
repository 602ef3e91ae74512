"""Samples of the diagonal from random signs at the layers' outputs.

Two things take noise out of a sample, each at a price:

* *groups*: directions of different layers disturb each other in a joint product. With
  a product for each group of layers that noise is gone between groups. A product of a
  group costs less than a joint one: only what lies behind its layers is
  differentiated.
* *the control variate*: of `M = G + (M − G)` the Gauss–Newton part G is the larger one
  in most classifiers, and its diagonal is known exactly after one backward pass for
  each of the model's outputs. Then only `M − G` is left to the signs. A product with
  it costs no more than one with M, see `Recording.residual`.
"""

from keras import ops

from keras_curvature.operators import gauss_newton
from keras_curvature.operators.diagonal_sampler import DiagonalSampler


class LayerwiseDiagonal(DiagonalSampler):
    """Unbiased samples of the Hessian's diagonal.

    Args:
        layer_outputs: a `LayerOutputHessian`.
        groups: `"joint"` for one product of all layers, `"layer"` for a product per
            layer, or a list of lists of layers (or their names); layers that are not
            named make one more group.
        control_variate: whether the Gauss–Newton part is computed exactly; right
            where `gauss_newton.coupling` is zero.

    Raises:
        ValueError: for other groups, or a name that no layer has.
    """

    def __init__(self, layer_outputs, groups="joint", control_variate=False):
        super().__init__(layer_outputs)
        self._control_variate = control_variate
        self._group_of = _grouping(groups, self._operator.variables)
        self._groups = repr(groups)

    def _key(self):
        return (*super()._key(), self._groups, self._control_variate)

    def _prepared(self, batch):
        recording = self._layer_outputs.record(batch, outputs=self._control_variate)
        groups, known = self._sources(recording), {}
        parts = [(recording, group) for group in groups]
        if self._control_variate:
            parts, known = _controlled(recording, groups)

        def draw(seed):
            v = recording.signs(seed)
            total = [known.get(i, 0.0) for i in range(len(recording.variables))]
            for recorded, group in parts:
                part = [x if k in group else None for k, x in enumerate(v)]
                wanted = sorted(k for k in group if v[k] is not None)
                u = recorded.tapes.product(part, wanted=wanted)
                total = list(map(ops.add, total, recording.diagonal(part, u)))
            return total

        return draw

    def _sources(self, recording):
        """Sets of source indices; all uses of one variable are in one set."""
        groups = {}
        for i, variable in enumerate(recording.variables):
            layer = variable.path.rpartition("/")[0]
            sources = {i, *(k for _, k in recording.paths.get(id(variable), []))}
            groups.setdefault(self._group_of(layer), set()).update(sources)
        merged = []
        for group in groups.values():
            # A layer used by two groups (a shared variable) joins them.
            for other in [m for m in merged if m & group]:
                merged.remove(other)
                group = group | other
            merged.append(group)
        return merged


def _controlled(recording, groups):
    """The products that are left with a control variate, and the known diagonals.

    Variables that no rule covers have no cheap Gauss–Newton diagonal and keep their
    products with M.

    Returns:
        Pairs of a recording and a group of its sources, and a dictionary from the
        index of a variable to its Gauss–Newton diagonal.
    """
    covered, uncovered = gauss_newton.by_coverage(recording)
    residual = recording.residual()
    left = []
    for group in groups:
        left.append((residual, group - set(uncovered)))
        left.append((recording, group & set(uncovered)))
    known = gauss_newton.diagonal(recording, covered) if covered else {}
    return [(r, group) for r, group in left if group], known


def _grouping(groups, variables):
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

    def has(path, name):
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
