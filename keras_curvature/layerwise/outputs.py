"""The model's outputs as one space: sizes, unit vectors, products with S."""

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_curvature import backend
from keras_curvature.backend import Tensor
from keras_curvature.layerwise.opened import Output, Place
from keras_curvature.layerwise.recording import LayerRecording
from keras_curvature.layerwise.structure import Name, Structure, entries

#: Bound for the elements of the Hessian of the loss by the outputs (1 GiB in float32).
HESSIAN_ELEMENTS = 2**28

#: Taken for the number of samples where it varies from batch to batch.
UNKNOWN_SIZE = 256


def output_sizes(structure: Structure) -> list[int]:
    """Number of scalar outputs per sample, for each output of the model.

    Raises:
        ValueError: if there is no output, or none of a fixed size.
    """
    if not structure.outputs:
        raise ValueError(
            "The Gauss–Newton matrix needs a loss of the model's outputs. Received: a "
            "`loss_fn` that does not call the model itself, or only in a loop."
        )
    if structure.num_outputs == float("inf"):
        shapes = ", ".join(str(shape.shape) for shape in structure.output_shapes)
        raise ValueError(
            "The Gauss–Newton matrix needs outputs of a fixed size for each "
            f"sample. Received: outputs of shape {shapes}. Pad the sequences."
        )
    return [int(entries(shape)) for shape in structure.output_shapes]


class OutputSpace:
    """The outputs `f` of a recorded model, in front of a final activation.

    S is the Hessian of the loss by them. Used while a function is traced.

    Args:
        recording: a `LayerRecording` with outputs.

    Attributes:
        names: the names of the outputs' shifts.
        count: C, number of scalar outputs per sample.
        samples: the number of samples.

    Raises:
        ValueError: see `output_sizes`.
    """

    def __init__(self, recording: LayerRecording):
        self._recording = recording
        self._sizes = output_sizes(recording.structure)
        self.names: tuple[Place | Output, ...] = recording.structure.outputs
        self.count = sum(self._sizes)
        self._shifts = [recording.point[name] for name in self.names]
        self.samples = ops.shape(self._shifts[0])[0]
        self.known_samples = self._shifts[0].shape[0]
        self.dtype = self._shifts[0].dtype

    def parted(self, flat: Tensor) -> dict[Name, Tensor]:
        """`(N, C)` as a direction at the outputs."""
        parts = backend.parts(flat, self._sizes)
        return {
            name: ops.reshape(part, ops.shape(shift))
            for name, shift, part in zip(self.names, self._shifts, parts, strict=True)
        }

    def joined(self, parts: dict[Name, Tensor]) -> Tensor:
        """A direction at the outputs as `(N, C)`."""
        return ops.concatenate([flat_samples(parts[n]) for n in self.names], axis=1)

    def basis(self, i: Any) -> dict[Name, Tensor]:
        """The i-th unit vector of the outputs, for every sample at once."""
        e = ops.one_hot(i, self.count, dtype=self.dtype)[None]
        return self.parted(ops.broadcast_to(e, (self.samples, self.count)))

    def product(self) -> Callable[[Any], dict[Name, Tensor]]:
        """The function from moves `df` of the outputs to `S df`."""
        return self._recording.product(self.names, self.names)

    def back(self, wanted: list[Name]) -> Callable[[Any], dict[Name, Tensor]]:
        """The function from cotangents at the outputs to those at other names."""
        return self._recording.pull_back(self.names, wanted)

    def hessian(self) -> Tensor:
        """`S_n` for every sample, shape `(N, C, C)`."""
        self._check_size(self.count)
        multiply = self.product()
        columns = backend.map_range(
            lambda i: self.joined(multiply(self.basis(i))), self.count
        )
        return ops.transpose(columns, (1, 2, 0))

    def hessian_by_position(self) -> Tensor:
        """The blocks of S of single positions, shape `(N T, C, C)`.

        For one output of shape `(N, ..., C)` whose positions do not meet in the loss,
        as the words of a sequence; then they are all there is of S.
        """
        ((name,), (shift,)) = self.names, self._shifts
        count = shift.shape[-1]
        self._check_size(count)
        multiply = self.product()

        def column(i: Any) -> Tensor:
            e = ops.one_hot(i, count, dtype=self.dtype)
            product = multiply({name: ops.broadcast_to(e, ops.shape(shift))})
            return ops.reshape(product[name], (-1, count))

        return ops.transpose(backend.map_range(column, count), (1, 2, 0))

    def _check_size(self, width: int) -> None:
        outputs = (self.known_samples or UNKNOWN_SIZE) * self.count
        if outputs * width > HESSIAN_ELEMENTS:
            shapes = ", ".join(str(tuple(s.shape)) for s in self._shifts)
            raise ValueError(
                "The Hessian of the loss by the outputs is too large to take roots "
                f"of: {outputs * width:,} numbers for outputs of shape {shapes}. Use a "
                'smaller batch (`batch_size`), or method="layerwise".'
            )


def flat_samples(x: Tensor) -> Tensor:
    """`(N, …)` as `(N, entries)`."""
    size = int(np.prod(x.shape[1:]))
    return ops.reshape(x, (ops.shape(x)[0], size))
