"""What users pass as data, as batches of tensors where the model lives.

Arrays are placed once and kept; a data set is read anew for every pass, so that nothing
larger than a batch is ever in memory.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any, Self

import keras
import numpy as np
from keras import ops, tree

from keras_curvature import backend, data_sets
from keras_curvature.data_sets import Batch, endless_batches

__all__ = ["Batch", "ProbeData", "endless_batches"]


class ProbeData:
    """Batches `(x, y, sample_weight)` that can be iterated over any number of times.

    NumPy arrays are copied. A PyTorch tensor is not: changing it in place changes the
    data.

    Args:
        x: model inputs: an array, a tensor of any framework, or a nested structure of
            them with a common first dimension; or a data set: a `tf.data.Dataset`, a
            `keras.utils.PyDataset` or a `torch.utils.data.DataLoader`, on any backend.
            A data set yields `x`, `(x, y)` or `(x, y, sample_weight)`.
        y: targets, structured as the model's outputs. Not allowed with a data set.
        sample_weight: weights, structured like `y`, or one array for all outputs.
            Not allowed with a data set.
        class_weight: dictionary from class index to weight, as in `Model.fit`;
            multiplies the sample weights.
        batch_size: splits arrays into batches of at most this many samples.
            Defaults to one batch with all of them.
        place: where the batches are placed, from `backend.place_of`. Defaults to
            anywhere.

    Raises:
        ValueError: if arrays differ in their number of samples, there are no
            samples, the data set never ends, or it is a one-pass generator.
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        class_weight: dict[int, float] | None = None,
        batch_size: int | None = None,
        place: Any = None,
    ):
        self.place = place
        self._class_weight = class_weight
        # A list of placed batches with their sizes, or the data set that is read.
        self._source: Any
        if data_sets.is_data_set(x):
            data_sets.check(x, y=y, sample_weight=sample_weight, batch_size=batch_size)
            self._source = x
        elif hasattr(x, "__next__") or callable(x):
            raise ValueError(
                "A generator can be read only once, and curvature needs several "
                f"passes over the same data. Received: x={x!r}. Pass arrays, "
                f"{data_sets.KINDS}."
            )
        else:
            data, size = self._weighted(_map_arrays(_as_floatx, (x, y, sample_weight)))
            step = _check_batch_size(batch_size) or size
            self._source = [
                self._placed(data, start, min(start + step, size))
                for start in range(0, size, step)
            ]

    @classmethod
    def none(cls) -> Self:
        """One batch without content, for a loss that needs no data."""
        return cls._of([((None, None, None), 1)], None)

    @classmethod
    def _of(cls, batches: list[tuple[Batch, int]], place: Any) -> Self:
        data = cls.__new__(cls)
        data.place, data._class_weight, data._source = place, None, batches
        return data

    @property
    def num_batches(self) -> int | None:
        """Number of batches in one pass; `None` if the source does not tell."""
        if isinstance(self._source, list):
            return len(self._source)
        return data_sets.num_batches(self._source)

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        """Yields `((x, y, sample_weight), number of samples)`."""
        if isinstance(self._source, list):
            yield from self._source
            return
        for batch in data_sets.read(self._source):
            batch, size = self._weighted(_map_arrays(_as_array, batch))
            yield self._placed(batch, 0, size)

    def mean(
        self,
        function: Callable[..., Any],
        *args: Any,
        numbered: bool = False,
        on_batch: Callable[[int, int | None], None] | None = None,
    ) -> Any:
        """The mean of `function(batch, *args)` over all batches, weighted by size.

        Args:
            function: takes a batch `(x, y, sample_weight)`; returns a tensor or a
                nested structure of tensors.
            *args: further arguments of `function`, the same for all batches.
            numbered: whether the number of the batch, from 1, follows as last argument.
            on_batch: called as `on_batch(done, num_batches)` after each batch.

        Returns:
            What `function` returns, averaged. Constants: PyTorch does not remember
            how they were computed.

        Raises:
            ValueError: if the data set gives no batch.
        """
        num_batches, total, samples, done = self.num_batches, None, 0, 0
        # The place is set for the work alone: reading stays where the data set is.
        for done, (batch, size) in enumerate(self, start=1):
            with backend.on(self.place):
                number = (backend.array(done, "int32"),) if numbered else ()
                result = function(batch, *args, *number)
                result = _map_arrays(ops.stop_gradient, result)
                # A single batch is its own mean, to the last bit.
                if done == 1:
                    total = result
                else:
                    if done == 2:
                        total = _scaled(total, samples)
                    total = _map_arrays(operator.add, total, _scaled(result, size))
            samples += size
            if on_batch is not None:
                on_batch(done, num_batches)
        if done == 0:
            raise self._empty()
        if done > 1:
            with backend.on(self.place):
                total = _map_arrays(lambda t: t / samples, total)
        return total

    def first(self) -> Batch:
        """The first batch, `(x, y, sample_weight)`.

        Raises:
            ValueError: if the data set gives no batch.
        """
        for batch, _ in self:
            return batch
        raise self._empty()

    def halved(self) -> Self:
        """The same samples in batches of half the size (twice, from a size of one).

        Only for arrays, whose batches are of equal size but for the last.

        Raises:
            TypeError: if the batches are a data set's.
        """
        if not isinstance(self._source, list):
            raise TypeError(
                "Only arrays can be halved: a data set makes its own batches. "
                f"Received: x={self._source!r}."
            )
        batches = []
        with backend.on(self.place):
            if self._source[0][1] == 1:
                for i in range(0, len(self._source), 2):
                    pair = [batch for batch, _ in self._source[i : i + 2]]
                    joined = _map_arrays(lambda *a: ops.concatenate(a), *pair)
                    batches.append(self._placed(joined, 0, len(pair)))
            else:
                for batch, size in self._source:
                    half = (size + 1) // 2
                    for start in range(0, size, half):
                        end = min(start + half, size)
                        batches.append(self._placed(batch, start, end))
        return self._of(batches, self.place)

    def _empty(self) -> ValueError:
        return ValueError(
            "The probe data set gives no batch: it is empty, or can be read only "
            f"once. Received: x={self._source!r}."
        )

    def _weighted(self, batch: Batch) -> tuple[Batch, int]:
        """A batch of arrays with the class weights worked in, and its size."""
        size = _num_samples(batch)
        if self._class_weight is not None:
            x, y, sample_weight = batch
            weight = _class_weights(y, self._class_weight)
            if sample_weight is not None:
                weight = _map_arrays(lambda w: _product(w, weight), sample_weight)
            batch = (x, y, weight)
        return batch, size

    def _placed(self, batch: Batch, start: int, end: int) -> tuple[Batch, int]:
        """The samples from `start` to `end` in their place, and their number."""

        def placed(a: Any) -> backend.Tensor:
            # All of it is not sliced: JAX would copy a tensor.
            part = a if len(a) == end - start else a[start:end]
            # Frameworks may take over the memory of a NumPy array, and with it whatever
            # its owner writes there later.
            part = part if backend.is_tensor(part) else np.array(part)
            return backend.placed(part, self.place)

        return _map_arrays(placed, batch), end - start


def _check_batch_size(batch_size: Any) -> Any:
    if batch_size is not None and (
        not isinstance(batch_size, (int, np.integer)) or batch_size < 1
    ):
        raise ValueError(
            "`batch_size` is the number of samples that are processed at once: a "
            f"positive integer. Received: batch_size={batch_size!r}."
        )
    return batch_size


def _map_arrays(function: Callable[..., Any], *structures: Any) -> Any:
    return tree.map_structure(
        lambda *a: None if a[0] is None else function(*a), *structures
    )


def _scaled(structure: Any, factor: int) -> Any:
    return _map_arrays(lambda a: a * factor, structure)


def _as_array(a: Any) -> Any:
    """A tensor of the backend as it is, anything else as a NumPy array of numbers."""
    if backend.is_tensor(a):
        return a
    if isinstance(a, (bool, int, float, complex, str, bytes)):
        raise ValueError(
            "A list stands for several inputs or outputs, not for an array, as in "
            f"`Model.fit`. Received: {a!r} of type {type(a).__name__} in place of an "
            "array. Convert lists of numbers with `numpy.asarray` first."
        )
    # NumPy makes something of any object, often an array of objects.
    array = _on_host(a) if hasattr(a, "__array__") else None
    if array is None or array.dtype.kind not in "biufc" and not _is_float(array):
        received = (
            f"an object of type {type(a).__name__}"
            if array is None
            else f"an array of dtype {array.dtype} with shape {array.shape}"
        )
        raise ValueError(
            "Probe data must be arrays of numbers with rows of equal length. "
            f"Received: {received}. Encode text and pad rows first; on TensorFlow, a "
            "model that takes strings itself can be probed on tensors or a "
            "`tf.data.Dataset`."
        )
    return array


def _as_floatx(a: Any) -> Any:
    """Numbers as `fit` would see them: floats in Keras' default float type."""
    array = _as_array(a)
    if not backend.is_tensor(array) and _is_float(array):
        return array.astype(keras.config.floatx(), copy=False)
    return array


def _is_float(array: np.ndarray[Any, Any]) -> bool:
    # NumPy does not count bfloat16 among its own.
    return "float" in array.dtype.name


def _on_host(a: Any) -> np.ndarray[Any, Any]:
    # PyTorch hands over neither what is on an accelerator nor what has a gradient.
    return np.asarray(a.detach().cpu() if hasattr(a, "detach") else a)


def _num_samples(batch: Batch) -> int:
    sizes: set[Any] = {
        a.shape[0] if len(a.shape) else None
        for a in tree.flatten(batch)
        if a is not None
    }
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        raise ValueError(
            "All inputs, targets and sample weights must have the same number of "
            "samples (their first dimension), and at least one; a data set must be "
            f"batched. Received: first dimensions {sorted(sizes, key=str)}."
        )
    return int(sizes.pop())


def _class_weights(y: Any, class_weight: dict[int, float]) -> np.ndarray[Any, Any]:
    """Sample weights by class, from integer or one-hot labels, as in `fit`."""
    if y is None or tree.is_nested(y):
        raise ValueError(
            "`class_weight` needs a model with a single output and its labels. "
            f"Received: y of type {type(y).__name__}."
        )
    labels = _on_host(y)
    if labels.ndim > 1:
        labels = labels.argmax(-1) if labels.shape[-1] > 1 else labels.squeeze(-1)
    if labels.ndim > 1:
        raise ValueError(
            "`class_weight` needs one label per sample. Received: labels of shape "
            f"{labels.shape}. Pass `sample_weight` instead."
        )
    weight = [class_weight.get(int(label), 1.0) for label in np.round(labels)]
    return np.asarray(weight, dtype=keras.config.floatx())


def _product(
    sample_weight: Any, class_weight: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Weights of samples, or of their parts, times one weight for each sample."""
    weight = _on_host(sample_weight)
    each = class_weight.reshape(-1, *[1] * (weight.ndim - 1))
    return np.asarray(weight * each, class_weight.dtype)
