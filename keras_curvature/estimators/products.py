"""Products with any symmetric operator, as tensors where the operator lives."""

import functools

import numpy as np
import scipy.sparse
from keras import ops
from scipy.sparse.linalg import LinearOperator

from keras_curvature.backend import (
    array,
    compiled,
    fold_seed,
    on_device,
    random_normal,
    random_signs,
)

#: Directions multiplied at once: products that share a forward pass and a gradient
#: are cheaper, and memory stays at a few vectors of length P.
GROUP = 4


class Products:
    """A symmetric operator A, seen through its products.

    Takes NumPy matrices, SciPy sparse matrices and `LinearOperator`s, which are
    given NumPy arrays, and anything else with a `shape` and `A @ V`, which is given
    tensors.

    Args:
        operator: symmetric, of shape `(P, P)`; its symmetry is not checked.

    Attributes:
        size: P.
        dtype: name of the floating type of all products.
        device: name of the device that holds the operator; empty when unknown.

    Raises:
        ValueError: if the operator is not square, or complex.
    """

    def __init__(self, operator):
        if isinstance(operator, Products):
            operator = operator.operator
        shape = tuple(getattr(operator, "shape", ()))
        if len(shape) != 2 or shape[0] != shape[1]:
            raise ValueError(
                "An estimator takes a symmetric operator with a `shape` (P, P) and "
                "products `A @ V`: a NumPy matrix, a SciPy LinearOperator, a "
                f"HessianOperator. Received: {type(operator).__name__} of shape "
                f"{shape or None}."
            )
        self.operator = operator
        self.size = int(shape[0])
        self.dtype = _floating(operator)
        self._numpy = isinstance(
            operator, (np.ndarray, LinearOperator)
        ) or scipy.sparse.issparse(operator)
        # NumPy arrays have a `device` too, which is none of the backend's names.
        self.device = "" if self._numpy else getattr(operator, "device", "") or ""

    def __call__(self, directions):
        """`A V` for a tensor of shape `(P,)` or `(P, k)`, as a tensor."""
        if self._numpy:
            directions = ops.convert_to_numpy(directions)
        return array(self.operator @ directions, self.dtype)

    def signs(self, key, start, width):
        """Random signs for the draws `start … start + width − 1`, `(P, width)`.

        Each column is a function of `key` and of its own number only.
        """
        return self._draw("signs", key, start, width)

    def normals(self, key, start, width):
        """As `signs`, with independent standard normal entries."""
        return self._draw("normals", key, start, width)

    def _draw(self, kind, key, start, width):
        if not width:
            return self.basis(0, 1)[:, :0]
        return _draw(kind, width, self.dtype)(
            key, array(start, "int32"), array(self.size, "int32")
        )

    def basis(self, start, width):
        """The basis vectors `e_start … e_(start+width−1)`, `(P, width)`."""
        return _basis(width, self.dtype)(
            array(start, "int32"), array(self.size, "int32")
        )

    def placed(self):
        """A context in which new tensors are placed next to the operator."""
        return on_device(self.device)


def seed_key(seed, purpose=0):
    """A pair of integers for the backend's random functions.

    Args:
        seed: a non-negative integer, or a tuple of them (a seed and a step, say).
        purpose: keeps the draws of different estimators apart.

    Raises:
        ValueError: if `seed` is anything else.
    """
    numbers = seed if isinstance(seed, (tuple, list)) else (seed,)
    if not numbers or not all(
        isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n >= 0
        for n in numbers
    ):
        raise ValueError(
            "`seed` must be a non-negative integer, or a tuple of them. Received: "
            f"seed={seed!r}."
        )
    sequence = np.random.SeedSequence([int(n) for n in numbers], spawn_key=(purpose,))
    return array(sequence.generate_state(2).astype(np.int32))


def check_blocks(block_sizes, size):
    """`block_sizes` as a tuple of integers, `None` if there are none.

    Raises:
        ValueError: if they are not positive or do not add up to `size`.
    """
    if block_sizes is None:
        return None
    sizes = tuple(int(n) for n in block_sizes)
    if not sizes or min(sizes) < 0 or sum(sizes) != size:
        raise ValueError(
            f"`block_sizes` must be sizes that add up to P = {size}. Received: "
            f"{len(sizes)} sizes that add up to {sum(sizes)}: {sizes}."
        )
    return sizes


def block_rows(block_sizes):
    """The rows of each block, as slices; all rows without `block_sizes`."""
    if block_sizes is None:
        return [slice(None)]
    ends = np.cumsum(block_sizes)
    return [slice(end - size, end) for end, size in zip(ends, block_sizes, strict=True)]


def block_sums(rows, block_sizes):
    """Sums of the rows of each block: `(P, k)` to `(blocks, k)`, in float64."""
    return ops.cast(
        ops.stack([ops.sum(rows[b], axis=0) for b in block_rows(block_sizes)]),
        "float64",
    )


def dot(x, y):
    """`xᵀ y` of two tall blocks, `(P, k)` and `(P, l)`, as a `(k, l)` tensor."""
    return ops.matmul(ops.transpose(x), y)


def to_host(x):
    """A small tensor as a NumPy array in float64."""
    return np.asarray(ops.convert_to_numpy(x), np.float64)


@functools.cache
def _draw(kind, width, dtype):
    draw = {"signs": random_signs, "normals": random_normal}[kind]

    def columns(key, start, size):
        return ops.stack(
            [draw((size,), fold_seed(key, start + j), dtype) for j in range(width)],
            axis=1,
        )

    return compiled(columns)


@functools.cache
def _basis(width, dtype):
    def columns(start, size):
        rows = ops.arange(size, dtype="int32")[:, None]
        return ops.cast(rows == start + ops.arange(width, dtype="int32"), dtype)

    return compiled(columns)


def _floating(operator):
    """Name of the type to compute in: float32 or float64."""
    dtype = getattr(operator, "dtype", None)
    if dtype is None:
        return "float64"
    dtype = np.dtype(getattr(dtype, "as_numpy_dtype", dtype))
    if dtype.kind == "c":
        raise ValueError(
            "Estimators take real symmetric operators. Received: an operator of "
            f"dtype {dtype.name}."
        )
    if dtype.kind in "iub":
        return "float64"
    return np.promote_types(dtype, np.float32).name
