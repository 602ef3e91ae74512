"""What users pass as data, as batches on the model's device.

Arrays are placed once and kept; a `tf.data.Dataset` or a `keras.utils.PyDataset` is
read anew for every pass, so that nothing larger than a batch is ever in memory.
"""

import keras
import numpy as np
from keras import ops, tree

from keras_curvature import backend


class ProbeData:
    """Batches `(x, y, sample_weight)` that can be iterated over any number of times.

    Args:
        x: model inputs: an array or a nested structure of arrays with a common
            first dimension, a `tf.data.Dataset`, or a `keras.utils.PyDataset`. A
            data set yields `x`, `(x, y)` or `(x, y, sample_weight)`.
        y: targets, structured as the model's outputs. Not allowed with a data set.
        sample_weight: weights, structured like `y`, or one array for all outputs.
            Not allowed with a data set.
        class_weight: dictionary from class index to weight, as in `Model.fit`;
            multiplies the sample weights.
        batch_size: splits arrays into batches of at most this many samples.
            Defaults to one batch with all of them.
        device: name of the device that the batches are placed on.

    Raises:
        ValueError: if arrays differ in their number of samples, there are no
            samples, the data set never ends, or it is a one-pass generator.
    """

    def __init__(
        self,
        x,
        y=None,
        sample_weight=None,
        class_weight=None,
        batch_size=None,
        device="",
    ):
        self.device = device
        self._class_weight = class_weight
        self._source = None
        self._batches = None
        if _is_data_set(x):
            _check_data_set(x, y, sample_weight, batch_size)
            self._source = x
        elif hasattr(x, "__next__") or callable(x):
            raise ValueError(
                "A generator can be read only once, and curvature needs several "
                f"passes over the same data. Received: x={x!r}. Pass arrays, a "
                "`tf.data.Dataset` or a `keras.utils.PyDataset`."
            )
        else:
            data = _map_arrays(_as_array, (x, y, sample_weight))
            size = _num_samples(data)
            step = _check_batch_size(batch_size) or size
            self._batches = [
                self._place(_map_arrays(lambda a, s=s: a[s : s + step], data))
                for s in range(0, size, step)
            ]

    @classmethod
    def none(cls):
        """One batch without content, for a loss that needs no data."""
        data = cls.__new__(cls)
        data.device, data._source, data._batches = "", None, [((None,) * 3, 1)]
        return data

    @property
    def num_batches(self):
        """Number of batches in one pass; `None` if the source does not tell."""
        if self._batches is not None:
            return len(self._batches)
        if isinstance(self._source, keras.utils.PyDataset):
            return self._source.num_batches
        cardinality = int(self._source.cardinality())
        return cardinality if cardinality >= 0 else None

    def __iter__(self):
        """Yields `((x, y, sample_weight), number of samples)`."""
        if self._batches is not None:
            yield from self._batches
            return
        source = self._source
        if isinstance(source, keras.utils.PyDataset):
            batches = (source[i] for i in range(source.num_batches))
        else:
            batches = source
        for batch in batches:
            yield self._place(_unpack(batch))

    def mean(self, function, *args, numbered=False, on_batch=None):
        """The mean of `function(batch, *args)` over all batches, weighted by size.

        Args:
            function: takes a batch `(x, y, sample_weight)`; returns a tensor or a
                nested structure of tensors.
            *args: further arguments of `function`, the same for all batches.
            numbered: whether the number of the batch follows as last argument.
            on_batch: called as `on_batch(done, num_batches)` after each batch.

        Returns:
            What `function` returns, averaged.

        Raises:
            ValueError: if the data set gives no batch.
        """
        num_batches, total, samples = self.num_batches, None, 0
        # The device is set for the work alone: reading stays where the data set is.
        for done, (batch, size) in enumerate(self, start=1):
            with backend.on_device(self.device):
                number = (backend.array(done, "int32"),) if numbered else ()
                result = function(batch, *args, *number)
                if num_batches != 1:
                    result = tree.map_structure(lambda r, n=size: r * n, result)
                    if total is not None:
                        result = tree.map_structure(ops.add, total, result)
            total = result
            samples += size
            if on_batch is not None:
                on_batch(done, num_batches)
        if total is None:
            raise self._empty()
        if num_batches != 1:
            with backend.on_device(self.device):
                total = tree.map_structure(lambda t: t / samples, total)
        return total

    def first(self):
        """The first batch, `(x, y, sample_weight)`.

        Raises:
            ValueError: if the data set gives no batch.
        """
        for batch, _ in self:
            return batch
        raise self._empty()

    def halved(self):
        """The same samples in batches of half the size (twice, from a size of one).

        Only for arrays, whose batches are of equal size but for the last.
        """
        data = type(self).none()
        data.device, data._batches = self.device, []
        with backend.on_device(self.device):
            if self._batches[0][1] == 1:
                for i in range(0, len(self._batches), 2):
                    pair = [batch for batch, _ in self._batches[i : i + 2]]
                    data._batches.append((_map_arrays(_join, *pair), len(pair)))
                return data
            for batch, size in self._batches:
                half = (size + 1) // 2
                for start in range(0, size, half):
                    rows = slice(start, min(start + half, size))
                    part = _map_arrays(lambda a, r=rows: a[r], batch)
                    data._batches.append((part, rows.stop - start))
        return data

    def _empty(self):
        return ValueError(
            "The probe data set gives no batch: it is empty, or can be read only "
            f"once. Received: x={self._source!r}."
        )

    def _place(self, batch):
        x, y, sample_weight = batch
        size = _num_samples(batch)
        if self._class_weight is not None:
            weight = _class_weights(y, self._class_weight)
            sample_weight = weight if sample_weight is None else sample_weight * weight
        arrays = (x, y, sample_weight)
        return _map_arrays(lambda a: backend.placed(a, self.device), arrays), size


def endless_batches(x, *rest):
    """The batches of a data set one after the other, again and again.

    Args:
        x: a `tf.data.Dataset`, which may be endless, or a `keras.utils.PyDataset`.
        *rest: must be empty: a data set brings its targets along.

    Yields:
        Tuples `(x, y, sample_weight)`.

    Raises:
        ValueError: if `x` is no data set, or has no batch.
    """
    if rest or not _is_data_set(x):
        raise ValueError(
            "A fresh batch for each probe needs a data set to take it from: a "
            "`tf.data.Dataset` or a `keras.utils.PyDataset`. Received: data of type "
            f"{type(x).__name__}."
        )
    return _cycle(x)


def _cycle(source):
    while True:
        batches = source
        if isinstance(source, keras.utils.PyDataset):
            batches = (source[i] for i in range(source.num_batches or 2**31))
        empty = True
        for batch in batches:
            empty = False
            yield _unpack(batch)
        if empty:
            raise ValueError(f"The data set gave no batch. Received: x={source!r}.")


def _is_data_set(x):
    return isinstance(x, keras.utils.PyDataset) or (
        hasattr(x, "element_spec") and hasattr(x, "cardinality")
    )


def _check_data_set(source, y, sample_weight, batch_size):
    for name, value in [
        ("y", y),
        ("sample_weight", sample_weight),
        ("batch_size", batch_size),
    ]:
        if value is not None:
            raise ValueError(
                f"A data set brings its own targets, weights and batches: leave "
                f"`{name}` out. Received: {name} of type {type(value).__name__} "
                f"with x of type {type(source).__name__}."
            )
    endless = (
        source.num_batches is None
        if isinstance(source, keras.utils.PyDataset)
        else int(source.cardinality()) == -1
    )
    if endless:
        raise ValueError(
            "The data set never ends, so a pass over it would not either. "
            f"Received: x={source!r}. Limit it, for instance with `x.take(10)`."
        )


def _check_batch_size(batch_size):
    if batch_size is not None and (
        not isinstance(batch_size, (int, np.integer)) or batch_size < 1
    ):
        raise ValueError(
            "`batch_size` is the number of samples that are processed at once: a "
            f"positive integer. Received: batch_size={batch_size!r}."
        )
    return batch_size


def _unpack(batch):
    return keras.utils.unpack_x_y_sample_weight(tree.lists_to_tuples(batch))


def _map_arrays(function, *structures):
    return tree.map_structure(
        lambda *a: None if a[0] is None else function(*a), *structures
    )


def _join(*arrays):
    return ops.concatenate(arrays)


def _as_array(a):
    """Numbers as `fit` would see them: floats in Keras' default float type."""
    if backend.is_tensor(a):
        return a
    if isinstance(a, (bool, int, float, complex, str, bytes)):
        raise ValueError(
            "A list stands for several inputs or outputs, not for an array, as in "
            f"`Model.fit`. Received: {a!r} of type {type(a).__name__} in place of an "
            "array. Convert lists of numbers with `numpy.asarray` first."
        )
    a = np.asarray(a)
    if a.dtype.kind not in "biufc" and "float" not in a.dtype.name:
        raise ValueError(
            "Probe data must be arrays of numbers with rows of equal length. "
            f"Received: an array of dtype {a.dtype} with shape {a.shape}. Encode "
            "text and pad rows first; a model that takes strings itself can be "
            "probed on tensors or a `tf.data.Dataset`."
        )
    if np.issubdtype(a.dtype, np.floating):
        return a.astype(keras.config.floatx(), copy=False)
    return a


def _num_samples(batch):
    sizes = {
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


def _class_weights(y, class_weight):
    """Sample weights by class, from integer or one-hot labels, as in `fit`."""
    if y is None or tree.is_nested(y):
        raise ValueError(
            "`class_weight` needs a model with a single output and its labels. "
            f"Received: y of type {type(y).__name__}."
        )
    labels = np.asarray(y)
    if labels.ndim > 1:
        labels = labels.argmax(-1) if labels.shape[-1] > 1 else labels.squeeze(-1)
    if labels.ndim > 1:
        raise ValueError(
            "`class_weight` needs one label per sample. Received: labels of shape "
            f"{labels.shape}. Pass `sample_weight` instead."
        )
    weight = [class_weight.get(int(label), 1.0) for label in np.round(labels)]
    return np.asarray(weight, dtype=keras.config.floatx())
