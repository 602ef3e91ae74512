"""Samples of the diagonal from one product per group of layers.

Directions of different layers disturb each other in a joint product. With a product
for each group that noise is gone between groups, at the price of more products. A
product of a group costs less than a joint one: only what lies behind the group's
layers is differentiated.
"""

from keras import ops

from keras_curvature import backend


class GroupedDiagonal:
    """Layerwise samples of the diagonal, group by group.

    Args:
        layer_outputs: a `LayerOutputHessian`.
        groups: `"layer"` for a product per layer, or a list of lists of layers (or
            their names); layers that are not named make one more group.

    Raises:
        ValueError: for anything else, or a name that no layer has.
    """

    def __init__(self, layer_outputs, groups):
        self._layer_outputs = layer_outputs
        self._operator = layer_outputs.operator
        self._names = None
        if groups != "layer":
            self._names = _names(groups, self._operator.variables)

    @property
    def device(self):
        """Name of the device that does the work."""
        return self._operator.device

    @property
    def size(self):
        """P, the number of entries of the diagonal."""
        return self._operator.shape[0]

    def diagonal_samples(self, seed, first, count):
        """Independent unbiased samples, `(P, count)`; see `LayerOutputHessian`.

        Args:
            seed: integer seed.
            first: index of the first sample.
            count: number of samples.
        """
        return self._operator.mean_over_batches(
            lambda batch, seed, number: self._samples(batch, seed, number, count),
            ("grouped", repr(self._names), count),
            backend.array([seed, first], "int32"),
            numbered=True,
        )

    def _samples(self, batch, seed, number, count):
        recording = self._layer_outputs.record(batch)
        groups = self._groups(recording)
        samples = []
        for index in range(count):
            v = recording.signs(backend.fold_seed(seed + [0, index], number))
            total = None
            for group in groups:
                part = [x if k in group else None for k, x in enumerate(v)]
                wanted = sorted(k for k in group if v[k] is not None)
                u = recording.tapes.product(part, wanted=wanted)
                parts = recording.diagonal(part, u)
                total = parts if total is None else list(map(ops.add, total, parts))
            samples.append(self._operator.flatten(total))
        return ops.stack(samples, axis=1)

    def _groups(self, recording):
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

    def _group_of(self, layer):
        if self._names is None:
            return layer
        for number, names in enumerate(self._names):
            if layer in names or any(layer.endswith(f"/{name}") for name in names):
                return number
        return None


def _names(groups, variables):
    if isinstance(groups, str) or not all(
        isinstance(group, (list, tuple)) for group in groups
    ):
        raise ValueError(
            '`groups` must be "joint", "layer", or a list of lists of layers or '
            f"their names. Received: groups={groups!r}."
        )
    layers = {v.path.rpartition("/")[0] for v in variables}
    names = [[getattr(layer, "path", layer) for layer in group] for group in groups]
    for name in (name for group in names for name in group):
        if not any(path == name or path.endswith(f"/{name}") for path in layers):
            raise ValueError(
                f"No layer with variables is called {name!r}. Received: groups="
                f"{groups!r}; the layers are {sorted(layers)}."
            )
    return names
