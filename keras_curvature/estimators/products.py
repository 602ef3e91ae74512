"""Products with any symmetric operator, as tensors where the operator lives."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import scipy.sparse
from keras import ops
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from keras_curvature.backend import (
    Tensor,
    array,
    compiled,
    fold_in,
    normal,
    on,
    signs,
    sum_chunks,
    twice_differentiable,
    wide_float,
)

#: Directions multiplied at once: products that share a forward pass and a gradient
#: are cheaper, and memory stays at a few vectors of length P.
GROUP = 4

#: Rows that `dot` adds up at once, in float32 perhaps. A matrix product adds them one
#: after the other: of 10^7 rows with few columns 2 to 4 % may be lost, of these 1e-5.
_ROWS = 2**13

#: Told `(done, total)` after each group of products, the total `None` where nobody
#: knows it; returns whether to go on.
ProgressFunction: TypeAlias = Callable[[int, int | None], bool]

#: A non-negative integer, or a tuple of them (a seed and a step, say).
Seed: TypeAlias = int | Sequence[int]


class SymmetricOperator(Protocol):
    """What an estimator needs to know of a matrix: `shape == (P, P)` and `A @ V`.

    A matrix that may move has a method `still()`: a context in which it does not, or
    which raises an error at its end.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """`(P, P)`."""
        ...

    def __matmul__(self, directions: Any, /) -> Any:
        """The product with directions `(P, k)`."""
        ...


class Products:
    """A symmetric operator A, seen through its products, which are counted.

    Takes NumPy matrices, SciPy sparse matrices and `LinearOperator`s, which are
    given NumPy arrays, and anything else with a `shape` and `A @ V`, which is given
    tensors.

    Args:
        operator: symmetric, of shape `(P, P)`; its symmetry is not checked. Where it
            lives is what its attribute `place` says, if it has one.
        progress: told how many products are made, and says whether to go on. Defaults
            to going on for ever.

    Attributes:
        size: P.
        dtype: name of the floating type of all products.
        place: where the operator lives, for `backend.on`; `None` when unknown.
        spent: number of products made so far.
        total: how many there will be, for `progress`; `None` unless somebody says so.
        going: whether to go on, as `progress` said last.

    Raises:
        ValueError: if the operator is not square, or complex.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        progress: ProgressFunction | None = None,
    ):
        shape = tuple(getattr(operator, "shape", ()))
        if len(shape) != 2 or shape[0] != shape[1]:
            raise ValueError(
                "An estimator takes a symmetric operator with a `shape` (P, P) and "
                "products `A @ V`: a NumPy matrix, a SciPy LinearOperator, a "
                f"HessianOperator. Received: {type(operator).__name__} of shape "
                f"{shape or None}."
            )
        self.size = int(shape[0])
        self.dtype = _floating(operator)
        self.spent = 0
        self.total: int | None = None
        self.going = True
        self._operator, self._progress = operator, progress
        self._numpy = isinstance(
            operator, (np.ndarray, LinearOperator)
        ) or scipy.sparse.issparse(operator)
        self.place = None if self._numpy else getattr(operator, "place", None)

    def __call__(self, directions: Tensor) -> Tensor:
        """`A V` for a tensor `(P, k)`, as a tensor.

        A few directions at a time. Once told to stop, the products with the first
        directions alone, those of one group at least.
        """
        made = []
        for start in range(0, int(directions.shape[1]), GROUP):
            group = directions[:, start : start + GROUP]
            if self._numpy:
                group = ops.convert_to_numpy(group)
            made.append(array(self._operator @ group, self.dtype))
            self.spent += int(group.shape[1])
            if self._progress is not None:
                self.going = self._progress(self.spent, self.total)
            if not self.going:
                break
        if len(made) > 1:
            return ops.concatenate(made, axis=1)
        return made[0] if made else directions

    def signs(self, key: Tensor, start: int, width: int) -> Tensor:
        """Random signs for the draws `start … start + width − 1`, `(P, width)`.

        Each column is a function of `key` and of its own number only.
        """
        return _columns(signs, self.size, width, self.dtype)(key, array(start, "int32"))

    def normals(self, key: Tensor, start: int, width: int) -> Tensor:
        """As `signs`, with independent standard normal entries."""
        return _columns(normal, self.size, width, self.dtype)(
            key, array(start, "int32")
        )

    def basis(self, start: int, width: int) -> Tensor:
        """The basis vectors `e_start … e_(start+width−1)`, `(P, width)`."""
        return _basis(self.size, width, self.dtype)(array(start, "int32"))

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """A context for the products of one estimate.

        The operator keeps still. Tensors are made next to it, and are precise: graphics
        processors round the factors of a matrix product to ten bits otherwise, and Q
        would not be orthonormal.
        """
        still = getattr(self._operator, "still", contextlib.nullcontext)
        with still(), on(self.place), twice_differentiable():
            yield


def seed_key(seed: Seed, purpose: int = 0) -> Tensor:
    """A key for the backend's random functions: a pair of integers.

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


def check_blocks(
    block_sizes: Sequence[int] | None, size: int
) -> tuple[int, ...] | None:
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


def block_rows(block_sizes: tuple[int, ...] | None) -> list[slice]:
    """The rows of each block, as slices; all rows without `block_sizes`."""
    if block_sizes is None:
        return [slice(None)]
    ends = np.cumsum(block_sizes)
    return [slice(end - size, end) for end, size in zip(ends, block_sizes, strict=True)]


def block_sums(rows: Tensor, block_sizes: tuple[int, ...] | None) -> Tensor:
    """Sums of the rows of each block: `(P, k)` to `(blocks, k)`, in `wide_float`."""
    # Along the last axis all frameworks add in a tree. Along the first one TensorFlow
    # adds one number after the other, and is off by 2 to 9 % after 10^7 in float32.
    columns = ops.transpose(rows)
    sums = [ops.sum(columns[:, b], axis=1) for b in block_rows(block_sizes)]
    return ops.cast(ops.stack(sums), wide_float())


def dot(x: Tensor, y: Tensor) -> Tensor:
    """`xᵀ y` of two tall blocks, `(P, k)` and `(P, l)`, as a `(k, l)` tensor."""

    def part(a: Tensor, b: Tensor) -> Tensor:
        # Here and elsewhere not `ops.matmul`, which computes in float32 on PyTorch.
        return ops.cast(ops.transpose(a) @ b, wide_float())

    return ops.cast(sum_chunks(part, [x, y], _ROWS), x.dtype)


def to_host(x: Tensor) -> NDArray[np.float64]:
    """A small tensor as a NumPy array in float64."""
    return np.asarray(ops.convert_to_numpy(x), np.float64)


@functools.lru_cache(maxsize=64)
def _columns(
    draw: Callable[..., Tensor], size: int, width: int, dtype: str
) -> Callable[..., Tensor]:
    def columns(key: Tensor, start: Tensor) -> Tensor:
        drawn = [draw((size,), fold_in(key, start + j), dtype) for j in range(width)]
        return ops.stack(drawn, axis=1) if drawn else ops.zeros((size, 0), dtype)

    return compiled(columns)


@functools.lru_cache(maxsize=64)
def _basis(size: int, width: int, dtype: str) -> Callable[..., Tensor]:
    def columns(start: Tensor) -> Tensor:
        rows = ops.arange(size, dtype="int32")[:, None]
        return ops.cast(rows == start + ops.arange(width, dtype="int32"), dtype)

    return compiled(columns)


def _floating(operator: Any) -> str:
    """Name of the type to compute in: float32 or the widest there is."""
    if getattr(operator, "dtype", None) is None:
        return wide_float()
    dtype = ops.dtype(operator)
    if dtype.startswith("complex"):
        raise ValueError(
            "Estimators take real symmetric operators. Received: an operator of "
            f"dtype {dtype}."
        )
    return "float32" if dtype in ("float16", "bfloat16", "float32") else wide_float()
