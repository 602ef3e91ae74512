"""The axes of a layer: what `DiagonalNewton` turns a matrix into before it steps.

A variable W with rows and columns has gradients G. The eigenvectors of the averages of
`G Gᵀ` and `Gᵀ G` are axes of its two sides, in which the Hessian is nearer to diagonal
than in the entries of W. They are those of Shampoo (Gupta, Koren, Singer, ICML 2018,
arXiv 1802.09568), and are followed as in SOAP (Vyas et al. 2024, arXiv 2409.11321): now
and then by one step of orthogonal iteration, `Q ← QR(L Q)`.

Everything here is a function of tensors.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from keras import ops
from keras.backend import standardize_dtype

#: Sides with more entries keep theirs: axes cost a square matrix.
MAX_SIDE = 1024

#: A side keeps its own axes if it is more than so many times as long as the other: its
#: moments are known from too few columns, and would cost more than the variable.
MAX_RATIO = 8


class Sides(NamedTuple):
    """How a variable is a matrix, and which of its two sides are turned.

    Attributes:
        rows: number of rows.
        columns: number of columns.
        left: whether the rows are turned.
        right: whether the columns are turned.
    """

    rows: int
    columns: int
    left: bool
    right: bool


def sides_of(shape: Sequence[int]) -> Sides | None:
    """A variable as a matrix; `None` for one that is not turned.

    Axes are split into two groups where that makes the sides most alike. So a
    convolution's kernel has a column for each output channel, and an attention layer's
    one for each unit of all heads. Vectors are not turned, nor is a single row or
    column: there the entries have units of their own, and steps follow those.

    Args:
        shape: of the variable.
    """
    splits = [
        (math.prod(shape[:k]), math.prod(shape[k:])) for k in range(1, len(shape))
    ]
    splits = [split for split in splits if min(split) > 1]
    if not splits:
        return None
    rows, columns = min(splits, key=lambda split: max(split) / min(split))
    left = rows <= min(MAX_SIDE, MAX_RATIO * columns)
    right = columns <= min(MAX_SIDE, MAX_RATIO * rows)
    return Sides(rows, columns, left, right) if left or right else None


def turned_sizes(sides: Sides | None) -> list[tuple[str, int]]:
    """Name and size of each side that is turned."""
    if sides is None:
        return []
    both = ("rows", sides.rows, sides.left), ("columns", sides.columns, sides.right)
    return [(name, size) for name, size, is_turned in both if is_turned]


def moments(gradient: Any, sides: Sides) -> list[Any]:
    """`G Gᵀ` and `Gᵀ G`, for the sides that are turned."""
    g = ops.reshape(gradient, (sides.rows, sides.columns))
    t = ops.transpose(g)
    return [
        ops.matmul(a, b)
        for a, b, turned in ((g, t, sides.left), (t, g, sides.right))
        if turned
    ]


def turned(x: Any, sides: Sides, matrices: Sequence[Any]) -> Any:
    """`Aᵀ X B`, in the shape of x.

    Args:
        x: tensor shaped like the variable.
        sides: how it is a matrix.
        matrices: A and B, for the sides that are turned.
    """
    matrix, rest = ops.reshape(x, (sides.rows, sides.columns)), list(matrices)
    if sides.left:
        matrix = ops.matmul(ops.transpose(rest.pop(0)), matrix)
    if sides.right:
        matrix = ops.matmul(matrix, rest.pop(0))
    return ops.reshape(matrix, x.shape)


def turned_back(x: Any, sides: Sides, matrices: Sequence[Any]) -> Any:
    """`A X Bᵀ`, in the shape of x; see `turned`."""
    return turned(x, sides, [ops.transpose(matrix) for matrix in matrices])


def spread(x: Any, sides: Sides, matrices: Sequence[Any]) -> Any:
    """Squared lengths along other axes: `turned` with squared entries.

    Of a diagonal matrix with entries x it is the diagonal in the other axes.
    """
    return turned(x, sides, [ops.square(matrix) for matrix in matrices])


def followed(vectors: Any, moment: Any) -> Any:
    """One step of orthogonal iteration towards the eigenvectors of a moment.

    Args:
        vectors: the axes so far, as columns.
        moment: average of `G Gᵀ` or `Gᵀ G`.

    Returns:
        Orthogonal matrix; `vectors` where there is nothing to go by, or no number.
    """
    half = standardize_dtype(vectors.dtype) in ("float16", "bfloat16")
    q, average = (ops.cast(x, "float32") if half else x for x in (vectors, moment))
    product = ops.matmul(average, q)
    # By their size, as the eigenvectors that the iteration leads to are.
    order = ops.argsort(-ops.sum(q * product, axis=0))
    product = ops.take(product, order, axis=1)
    size = ops.max(ops.abs(product))
    usable = ops.isfinite(size) & (size > 0)
    # Of any scale, and of full rank: where no gradient ever was, an axis stays.
    scaled = ops.where(usable, product / ops.where(usable, size, 1), 0)
    new, _ = ops.qr(scaled + 1e-7 * ops.take(q, order, axis=1))
    return ops.cast(ops.where(usable, new, q), vectors.dtype)
