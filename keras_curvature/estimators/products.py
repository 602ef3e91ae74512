"""Products with any symmetric operator, as tensors where the operator lives."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    over_blocks,
    signs,
    twice_differentiable,
    wide_float,
)
from keras_curvature.estimators.tall import Vector

#: Directions multiplied at once: products that share a forward pass and a gradient
#: are cheaper, and memory stays at a few vectors of length P.
GROUP = 4

#: Numbers in the vectors that are worked on together, at most (0.5 GiB in float32): of
#: a large model they would take more memory than all else.
_NUMBERS = 2**27

#: Told `(done, total)` after each group of products, the total `None` where nobody
#: knows it; returns whether to go on.
ProgressFunction: TypeAlias = Callable[[int, int | None], bool]

#: A non-negative integer, or a tuple of them (a seed and a step, say).
Seed: TypeAlias = int | Sequence[int]


def together(size: int) -> int:
    """How many vectors of this size are worked on together."""
    return GROUP if GROUP * size <= _NUMBERS else 1


class SymmetricOperator(Protocol):
    """What an estimator needs to know of a matrix: `shape == (P, P)` and `A @ V`.

    A matrix that may move has a method `still()`: a context in which it does not, or
    which raises an error at its end. One that takes rows more easily than columns has
    a method `times_rows(rows)`: the products with the rows of a tensor `(k, P)`, as
    rows.
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

    def __call__(self, directions: Iterable[Vector]) -> list[Vector]:
        """`A v` for directions `(P,)` in host memory, in host memory.

        A few of them at a time, and no more of them are taken before these are
        multiplied. Once told to stop, the products with the first directions alone,
        those of one group at least.
        """
        made: list[Vector] = []
        left = iter(directions)
        while group := list(itertools.islice(left, together(self.size))):
            rows = group[0][None] if len(group) == 1 else np.stack(group)
            rows = rows.astype(self.dtype, copy=False)
            if not self._numpy:
                rows = array(rows, self.dtype)
            # In memory that is ours, and written to later.
            made.extend(
                np.require(on_host(self._times(rows)), requirements=["C", "W", "O"])
            )
            if not self.going:
                break
        return made

    def rows(self, directions: Tensor) -> Tensor:
        """`A v` for each row of a tensor `(k, P)`, as a tensor: all of them at once."""
        return array(
            self._times(on_host(directions) if self._numpy else directions), self.dtype
        )

    def _times(self, rows: Any) -> Any:
        """The products with rows, in the form that the operator takes and returns."""
        if hasattr(self._operator, "times_rows"):
            made = self._operator.times_rows(rows)
        elif self._numpy:
            made = np.asarray(self._operator @ rows.T, self.dtype).T
        else:
            made = array(self._operator @ ops.transpose(rows), self.dtype)
            made = ops.transpose(made)
        self.spent += int(rows.shape[0])
        if self._progress is not None:
            self.going = self._progress(self.spent, self.total)
        return made

    def signs(self, key: Tensor, start: int, width: int) -> Tensor:
        """Random signs for the draws `start … start + width − 1`, `(width, P)`.

        Each row is a function of `key` and of its own number only.
        """
        return _rows(signs, self.size, width, self.dtype)(key, array(start, "int32"))

    def normals(self, key: Tensor, start: int, width: int) -> Tensor:
        """As `signs`, with independent standard normal entries."""
        return _rows(normal, self.size, width, self.dtype)(key, array(start, "int32"))

    def basis(self, start: int, width: int) -> Tensor:
        """The basis vectors `e_start … e_(start+width−1)`, `(width, P)`."""
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
    """The entries of each block, as slices; all entries without `block_sizes`."""
    if block_sizes is None:
        return [slice(None)]
    ends = np.cumsum(block_sizes)
    return [slice(end - size, end) for end, size in zip(ends, block_sizes, strict=True)]


def block_sums(rows: Tensor, block_sizes: tuple[int, ...] | None) -> Tensor:
    """Sums over the entries of each block: `(k, P)` to `(blocks, k)`, `wide_float`."""
    if block_sizes is None:
        sums = ops.sum(rows, axis=1)[None]
    else:
        sums = ops.transpose(over_blocks("sum", rows, block_sizes))
    return ops.cast(sums, wide_float())


def block_products(
    x: Tensor, y: Tensor, block_sizes: tuple[int, ...]
) -> NDArray[np.float64]:
    """Inner products of two vectors `(P,)` by block, `(blocks,)`."""
    return to_host(_block_products(block_sizes)(x, y))


def to_host(x: Tensor) -> NDArray[np.float64]:
    """A small tensor as a NumPy array in float64."""
    return np.asarray(ops.convert_to_numpy(x), np.float64)


def on_host(x: Any) -> NDArray[Any]:
    """A tensor as a NumPy array of its type; not a copy where it is on the host."""
    return np.asarray(x) if isinstance(x, np.ndarray) else ops.convert_to_numpy(x)


@functools.lru_cache(maxsize=64)
def _rows(
    draw: Callable[..., Tensor], size: int, width: int, dtype: str
) -> Callable[..., Tensor]:
    def rows(key: Tensor, start: Tensor) -> Tensor:
        drawn = [draw((size,), fold_in(key, start + j), dtype) for j in range(width)]
        return ops.stack(drawn)

    return compiled(rows)


@functools.lru_cache(maxsize=64)
def _block_products(
    block_sizes: tuple[int, ...],
) -> Callable[[Tensor, Tensor], Tensor]:
    return compiled(lambda x, y: block_sums((x * y)[None], block_sizes)[:, 0])


@functools.lru_cache(maxsize=64)
def _basis(size: int, width: int, dtype: str) -> Callable[..., Tensor]:
    def rows(start: Tensor) -> Tensor:
        numbers = start + ops.arange(width, dtype="int32")
        return ops.cast(numbers[:, None] == ops.arange(size, dtype="int32"), dtype)

    return compiled(rows)


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
