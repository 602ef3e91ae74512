"""How directions at a layer's output reach one of its variables, sample by sample.

A layer that is linear in a variable W has `z_n = J_n W + const` for sample n. A *path*
is one use of W in the model and knows `J_nᵀ`. Four things are asked of it:

    per_sample(inputs, v)   J_nᵀ v_n for every sample, shape (N, *W.shape)
    total(v)                Σ_n J_nᵀ v_n, shape W.shape
    products(v, u)          Σ_n (J_nᵀ v_n) ⊙ (J_nᵀ u_n), shape W.shape
    basis_product(e, u)     the same for v = e, a unit vector in every sample

The third is what curvature is made of, and never builds the first for more samples
than fit into `CHUNK_ELEMENTS`; the last serves exact diagonals, and is cheaper. A path
is *pointwise* if products depend on `v ⊙ u` alone: then a sum over basis vectors takes
a single call. `inputs` is the path's attribute of that name (what the
layer received, or `None`), or its rows for some of the samples.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from keras_curvature import backend
from keras_curvature.axes import Axes, as_matrix, turned
from keras_curvature.backend import Tensor

#: Upper bound for the elements of a per-sample intermediate (16 MiB in float32).
CHUNK_ELEMENTS = 2**22


class OuterProduct:
    """A variable that meets its inputs in a product: `z_t = a_t W`, positions t.

    `J_nᵀ v_n = Σ_t a_nt ⊗ v_nt`: the sum runs over the positions (time steps,
    pixels) at which the sample uses the variable.

    Args:
        variable: the Keras variable.
        inputs: tensor that `rows` makes the input factors from; samples first.
        rows: function from (a chunk of) `inputs` to factors `(N, T, G, I)`, with G
            groups that do not mix.
        columns: function from (a chunk of) output directions to factors
            `(N, T, G, O)`.
        arrange: function from `(..., G, I, O)` to `(..., *variable.shape)`.
        width: I, the inputs of a unit.
        groups: G.
        copies: whether `columns` repeats or drops entries (a transposed
            convolution) instead of rearranging them.
        matrix: whether `arrange` keeps the order of entries and there is one group:
            the variable, read as a matrix, has a row for each input.
    """

    def __init__(
        self,
        variable: Any,
        inputs: Tensor,
        rows: Callable[[Tensor], Tensor],
        columns: Callable[[Tensor], Tensor],
        arrange: Callable[[Tensor], Tensor],
        width: int,
        groups: int = 1,
        copies: bool = False,
        matrix: bool = False,
    ):
        self.variable = variable
        self.inputs = inputs
        self._matrix = matrix
        self.copies = copies
        self._rows = rows
        self._columns = columns
        self._arrange = arrange
        self._width = width
        self._groups = groups

    def in_axes(self, axes: Axes) -> Any:
        """The path to the variable's coordinates in axes of its sides."""
        sizes = self.variable.shape
        as_it_is = self._matrix and as_matrix(sizes, axes)[0] == self._width
        if axes is None or not as_it_is:
            return InAxes(self, axes)
        left, right = axes

        def times(factors: Tensor, side: Tensor | None) -> Tensor:
            if side is None:
                return factors
            return ops.matmul(factors, ops.cast(side, factors.dtype))

        return OuterProduct(
            self.variable,
            self.inputs,
            lambda x: times(self._rows(x), left),
            lambda v: times(self._columns(v), right),
            self._arrange,
            self._width,
        )

    def _outer(self, rows: Tensor, columns: Tensor) -> Tensor:
        """`Σ_t a_t ⊗ v_t`, shape (N, G, I, O)."""
        if 1 in (rows.shape[-1], columns.shape[-1]):
            # Depthwise: a batched product of thin matrices would crawl.
            return ops.sum(rows[..., :, None] * columns[..., None, :], axis=1)
        rows = ops.transpose(rows, (0, 2, 3, 1))
        columns = ops.transpose(columns, (0, 2, 1, 3))
        return ops.matmul(rows, columns)

    def per_sample(self, inputs: Tensor, v: Tensor) -> Tensor:
        """`J_nᵀ v_n` for every sample."""
        return self._arrange(self._outer(self._rows(inputs), self._columns(v)))

    def total(self, v: Tensor) -> Tensor:
        """`Σ_n J_nᵀ v_n`: samples are positions like others."""

        def of_chunk(inputs: Tensor, v: Tensor) -> Tensor:
            rows, columns = (
                ops.reshape(x, (1, -1, *x.shape[2:]))
                for x in (self._rows(inputs), self._columns(v))
            )
            return self._outer(rows, columns)[0]

        total = backend.sum_chunks(of_chunk, [self.inputs, v], self._chunk_size(v))
        return self._arrange(total)

    def products(self, v: Tensor, u: Tensor) -> Tensor:
        """`Σ_n (J_nᵀ v_n) ⊙ (J_nᵀ u_n)`."""

        def of_chunk(inputs: Tensor, v: Tensor, u: Tensor) -> Tensor:
            rows, v, u = self._rows(inputs), self._columns(v), self._columns(u)
            if rows.shape[1] == 1:
                # One position: (a ⊗ v) ⊙ (a ⊗ u) = a² ⊗ (v ⊙ u), one matmul.
                squares = ops.transpose(ops.square(rows[:, 0]), (1, 2, 0))
                return ops.matmul(squares, ops.transpose((v * u)[:, 0], (1, 0, 2)))
            return ops.sum(self._outer(rows, v) * self._outer(rows, u), axis=0)

        total = backend.sum_chunks(of_chunk, [self.inputs, v, u], self._chunk_size(v))
        return self._arrange(total)

    def pointwise(self, shape: Sequence[int]) -> bool:
        """Whether products of outputs of this shape depend on `v ⊙ u` alone."""
        del shape
        return bool(self._rows(self.inputs[:1]).shape[1] == 1)

    def basis_product(self, e: Tensor, u: Tensor) -> Tensor:
        """`Σ_n (J_nᵀ e_n) ⊙ (J_nᵀ u_n)` for a unit vector `(1, *z.shape[1:])`."""
        if self.copies:
            return self.products(ops.broadcast_to(e, ops.shape(u)), u)
        rows, columns, u = self._rows(self.inputs), self._columns(e), self._columns(u)
        # e picks one position t, group g and unit o. Only column o of W is touched,
        # and only what M gives out at the same unit counts.
        position = ops.sum(columns[0], axis=-1)  # (T, G)
        unit = ops.sum(columns[0], axis=0)  # (G, O)
        at_unit = ops.sum(u * unit, axis=-1)  # (N, T, G)
        left = ops.einsum("ntgi,tg->ngi", rows, position)
        right = ops.einsum("ntgi,ntg->ngi", rows, at_unit)
        product = ops.sum(left * right, axis=0)  # (G, I)
        return self._arrange(product[:, :, None] * unit[:, None, :])

    def _chunk_size(self, v: Tensor) -> int:
        # Known without running `rows`, which would take operations in a graph.
        inputs, entries = self._groups * self._width, math.prod(self.variable.shape)
        outputs = entries // self._width
        given, size = (self.inputs, inputs) if self.copies else (v, outputs)
        if None in given.shape[1:]:
            return 1
        positions = math.prod(given.shape[1:]) // size
        if positions == 1:
            return int(v.shape[0] or CHUNK_ELEMENTS)
        elements = entries + positions * (inputs + outputs)
        return int(max(1, CHUNK_ELEMENTS // elements))


class Elementwise:
    """A variable that multiplies or is added to elements: `z = a ⊙ W`, or `z = W`.

    Args:
        variable: the Keras variable.
        factor: tensor shaped like the output, or `None` for an added variable.
        reduce: function that sums an output-shaped tensor over the positions at
            which a sample uses the same entry: to `(N, *variable.shape)`.
    """

    def __init__(
        self,
        variable: Any,
        factor: Tensor | None,
        reduce: Callable[[Tensor], Tensor],
    ):
        self.variable = variable
        self.inputs = factor
        self._reduce = reduce

    def per_sample(self, inputs: Tensor, v: Tensor) -> Tensor:
        """`J_nᵀ v_n` for every sample."""
        return self._reduce(v if inputs is None else inputs * v)

    def total(self, v: Tensor) -> Tensor:
        """`Σ_n J_nᵀ v_n`."""
        return ops.sum(self.per_sample(self.inputs, v), axis=0)

    def products(self, v: Tensor, u: Tensor) -> Tensor:
        """`Σ_n (J_nᵀ v_n) ⊙ (J_nᵀ u_n)`."""
        factor = self.inputs
        return ops.sum(self.per_sample(factor, v) * self.per_sample(factor, u), axis=0)

    def pointwise(self, shape: Sequence[int]) -> bool:
        """Whether products of outputs of this shape depend on `v ⊙ u` alone."""
        return bool(math.prod(shape[1:]) == math.prod(self.variable.shape))

    def basis_product(self, e: Tensor, u: Tensor) -> Tensor:
        """`Σ_n (J_nᵀ e_n) ⊙ (J_nᵀ u_n)` for a unit vector `(1, *z.shape[1:])`."""
        return self.products(e, u)


class Lookup:
    """A table whose rows are looked up: `z_t = W[id_t]`.

    No tensor of the size of the table is built for a sample: entries of the same
    row meet through a mask of equal indices.

    Args:
        variable: the Keras variable, shape `(vocabulary, features)`.
        indices: integer tensor, samples first, any shape.
    """

    def __init__(self, variable: Any, indices: Tensor):
        self.variable = variable
        self.inputs = _positions(indices, 0)

    def per_sample(self, inputs: Tensor, v: Tensor) -> Tensor:
        """`J_nᵀ v_n` for every sample; as large as the table for each of them."""
        one_hot = ops.one_hot(inputs, self.variable.shape[0], dtype=v.dtype)
        return ops.matmul(ops.transpose(one_hot, (0, 2, 1)), _positions(v, 1))

    def total(self, v: Tensor) -> Tensor:
        """`Σ_n J_nᵀ v_n`."""
        return ops.segment_sum(
            ops.reshape(v, (-1, v.shape[-1])),
            ops.reshape(self.inputs, (-1,)),
            num_segments=self.variable.shape[0],
        )

    def products(self, v: Tensor, u: Tensor) -> Tensor:
        """`Σ_n (J_nᵀ v_n) ⊙ (J_nᵀ u_n)`."""

        def of_chunk(indices: Tensor, v: Tensor, u: Tensor) -> Tensor:
            same = ops.equal(indices[:, :, None], indices[:, None, :])
            gathered = ops.matmul(ops.cast(same, u.dtype), u)
            features = v.shape[-1]
            return ops.segment_sum(
                ops.reshape(v * gathered, (-1, features)),
                ops.reshape(indices, (-1,)),
                num_segments=self.variable.shape[0],
            )

        positions = self.inputs.shape[1]
        chunk = CHUNK_ELEMENTS // positions**2 if positions else 1
        return backend.sum_chunks(
            of_chunk,
            [self.inputs, _positions(v, 1), _positions(u, 1)],
            max(1, chunk),
        )

    def pointwise(self, shape: Sequence[int]) -> bool:
        """Whether products of outputs of this shape depend on `v ⊙ u` alone."""
        del shape
        return bool(self.inputs.shape[1] == 1)

    def basis_product(self, e: Tensor, u: Tensor) -> Tensor:
        """`Σ_n (J_nᵀ e_n) ⊙ (J_nᵀ u_n)` for a unit vector `(1, *z.shape[1:])`."""
        return self.products(ops.broadcast_to(e, ops.shape(u)), u)


class InAxes:
    """A path to the coordinates of its variable in axes of its two sides.

    Any path will do; the contributions of the samples are turned one by one.

    Args:
        path: the path to the variable's entries.
        axes: see `keras_curvature.axes`.
    """

    def __init__(self, path: Any, axes: Axes):
        self.variable = path.variable
        self.inputs = path.inputs
        self._path, self._axes = path, axes

    def per_sample(self, inputs: Tensor, v: Tensor) -> Tensor:
        """`J_nᵀ v_n` for every sample, in the axes."""
        return turned(self._path.per_sample(inputs, v), self._axes, lead=1)

    def products(self, v: Tensor, u: Tensor) -> Tensor:
        """`Σ_n (J_nᵀ v_n) ⊙ (J_nᵀ u_n)`, in the axes."""
        return _summed([(self, self.inputs, v, u)])


def path_in_axes(path: Any, axes: Axes) -> Any:
    """The path to a variable's coordinates in axes of its sides.

    It knows `per_sample` and `products`, which samples of a diagonal are made of.

    Args:
        path: the path to its entries.
        axes: see `keras_curvature.axes`.
    """
    if isinstance(path, OuterProduct):
        return path.in_axes(axes)
    return InAxes(path, axes)


def _positions(x: Tensor, trailing: int) -> Tensor:
    """All axes but the first and the last `trailing` ones flattened into one."""
    shape = ops.shape(x)
    kept = tuple(shape[len(shape) - trailing :])
    middle = x.shape[1 : len(shape) - trailing]
    size = -1
    if None not in middle:
        size = 1
        for n in middle:
            size *= n
    return ops.reshape(x, (shape[0], size, *kept))


def stacked_products(
    paths: Sequence[Any], vs: Sequence[Tensor | None], us: Sequence[Tensor]
) -> Tensor:
    """`Σ_n (Σ_uses J_nᵀ v_n) ⊙ (Σ_uses J_nᵀ u_n)`: a variable with several uses.

    Cross terms between the uses are included.

    Args:
        paths: the paths of one variable, one for each use.
        vs: their output directions; `None` for a zero one.
        us: their products.
    """
    if len(paths) == 1:
        return paths[0].products(vs[0], us[0])
    return _summed(
        [(path, path.inputs, v, u) for path, v, u in zip(paths, vs, us, strict=True)]
    )


def _summed(given: Sequence[tuple[Any, ...]]) -> Tensor:
    """`Σ_n (Σ_uses J_nᵀ v_n) ⊙ (Σ_uses J_nᵀ u_n)` from paths, inputs, v and u."""

    def of_chunk(*arrays: Tensor) -> Tensor:
        rows, v_sum, u_sum = iter(arrays), 0, 0
        for path, *use in given:
            inputs, v, u = (None if a is None else next(rows) for a in use)
            if v is not None:
                v_sum = v_sum + path.per_sample(inputs, v)
            u_sum = u_sum + path.per_sample(inputs, u)
        return ops.sum(v_sum * u_sum, axis=0)

    arrays = [a for _, *use in given for a in use if a is not None]
    size = max(1, math.prod(given[0][0].variable.shape))
    return backend.sum_chunks(of_chunk, arrays, max(1, CHUNK_ELEMENTS // size))
