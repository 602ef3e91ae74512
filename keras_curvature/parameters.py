"""Parameters side by side in one flat vector, and each by itself."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_curvature import backend
from keras_curvature.backend import Tensor


def full_precision(dtype: str) -> str:
    """The name of a floating type, float32 in the place of half precision."""
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def epsilon_of(dtype: str) -> float:
    """The distance from 1 to the next number of a floating type."""
    # NumPy does not know bfloat16.
    return 2.0**-7 if dtype == "bfloat16" else float(np.finfo(dtype).eps)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each parameter array lies in a flat vector of length P.

    The arrays follow each other in their order, each in row-major order.

    Attributes:
        names: a name for each array, no two alike.
        shapes: the shape of each array.
        dtypes: names of their floating types.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Number of entries of each array."""
        return [math.prod(shape) for shape in self.shapes]

    @functools.cached_property
    def size(self) -> int:
        """P, the number of entries in all."""
        return sum(self.sizes)

    @functools.cached_property
    def dtype(self) -> np.dtype[Any]:
        """The floating type that holds every entry: float32 at least."""
        return np.result_type(*map(full_precision, self.dtypes))

    def split(self, flat: Any) -> list[Any]:
        """A flat vector as a list of arrays, tensors or NumPy arrays like itself."""
        if backend.is_tensor(flat):
            parts, reshape = backend.parts(flat, self.sizes), ops.reshape
        else:
            parts, reshape = np.split(flat, np.cumsum(self.sizes)[:-1]), np.reshape
        return [reshape(p, s) for p, s in zip(parts, self.shapes, strict=True)]

    def flatten(self, arrays: Sequence[Any]) -> Any:
        """A list of arrays, one for each parameter array, as one flat vector.

        Raises:
            ValueError: if their number or shapes do not fit.
        """
        shapes = tuple(tuple(np.shape(a)) for a in arrays)
        if shapes != self.shapes:
            raise ValueError(
                "A list must hold one array for each variable, of its shape: "
                f"{list(self.shapes)}. Received: {list(shapes)}."
            )
        if any(backend.is_tensor(a) for a in arrays):
            return self.joined(arrays)
        return np.concatenate([np.ravel(a) for a in arrays])

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """`flatten` for tensors of the right shapes, which are not looked at."""
        dtype = self.dtype.name
        return ops.concatenate(
            [ops.reshape(backend.array(t, dtype), (-1,)) for t in tensors]
        )

    def parted(self, flat: Tensor) -> dict[int, Tensor]:
        """`split` as a direction: by number, each in its own type."""
        return {
            i: ops.cast(part, dtype)
            for i, (part, dtype) in enumerate(
                zip(self.split(flat), self.dtypes, strict=True)
            )
        }
