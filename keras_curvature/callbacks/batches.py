"""Where a monitor takes a fresh batch from at each probe."""

from typing import Any

import numpy as np
from keras import ops, tree

from keras_curvature.callbacks.arguments import check, is_count
from keras_curvature.data import Batch, endless_batches


class NextBatches:
    """The batches of a data set one after the other, whatever the step.

    Args:
        data: what `endless_batches` takes.

    Raises:
        ValueError: if it is no data set.
    """

    def __init__(self, *data: Any):
        self._data = data
        self._batches = endless_batches(*data)

    def at(self, step: int) -> Batch:
        """The next batch.

        Args:
            step: any.
        """
        try:
            return next(self._batches)
        except Exception:
            # A generator that failed gives nothing ever after.
            self._batches = endless_batches(*self._data)
            raise


class RandomRows:
    """Random rows of arrays: those of a step are a function of the seed and the step.

    So a training that is resumed goes on with the rows that it would have had.

    Args:
        data: tuple of arrays or nested structures of equally many samples.
        size: number of rows in a batch; all of them if there are fewer.
        seed: a non-negative integer.

    Raises:
        ValueError: for another size, or arrays of different lengths.
    """

    def __init__(self, data: Any, size: int, seed: int):
        check(
            is_count(size, 1), "must be a positive number of samples", batch_size=size
        )
        self._arrays = tree.map_structure(ops.convert_to_numpy, tuple(data))
        counts = {len(a) for a in tree.flatten(self._arrays)}
        if len(counts) != 1 or 0 in counts:
            raise ValueError(
                "All arrays in `train_data` must have the same number of samples, and "
                f"at least one. Received: {sorted(counts)} samples."
            )
        (self._count,) = counts
        self._size, self._seed = min(size, self._count), seed

    def at(self, step: int) -> Batch:
        """The rows of a step.

        Args:
            step: the step of training.
        """
        rng = np.random.default_rng([self._seed, step])
        rows = rng.choice(self._count, self._size, replace=False)
        batch: Batch = tree.map_structure(lambda a: a[rows], self._arrays)
        return batch
