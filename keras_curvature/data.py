"""What users pass as data, as batches of tensors where the model lives.

Curvature takes many passes over the same data, and a data set may give other batches at
each of them: it shuffles, or augments at random. So its batches are read once and kept
like arrays. Only one that is too large for that is read anew for each pass, and every
batch is then compared with what it was the first time.
"""

import copy
import itertools
import math
import operator
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Self

import keras
import numpy as np
from keras import ops, tree

from keras_curvature import backend, data_sets
from keras_curvature.data_sets import Batch, endless_batches

__all__ = ["Batch", "ProbeData", "endless_batches"]

#: The batches of a data set are kept up to this size, where the model lives: what an
#: accelerator can spare, and more than curvature needs of most data.
KEPT_BYTES = 2**30

#: As what a batch counts at least: neither small tensors nor reading them are free.
_LEAST_BYTES = 2**16


class ProbeData:
    """Batches `(x, y, sample_weight)`, the same in every pass over them.

    NumPy arrays are copied. A PyTorch tensor is not: changing it in place changes the
    data. A data set is read when this is made, and its batches are kept up to
    `KEPT_BYTES`. A larger one is read anew for each pass, and has to give the same
    batches each time.

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
        across_processes: whether means go over the data of all processes.

    Attributes:
        place: as given.
        at_once: the most samples that a batch of a pass has, see `in_parts`; `None` for
            as many as were given together.

    Raises:
        ValueError: if arrays differ in their number of samples, there are no
            samples, or the data set never ends, gives no batch, or is a one-pass
            generator; in a later pass, if a data set too large to keep has moved.
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        class_weight: dict[int, float] | None = None,
        batch_size: int | None = None,
        place: Any = None,
        across_processes: bool = False,
    ):
        self.place = place
        self.at_once: int | None = None
        self._class_weight = class_weight
        # The number of this process, and how many there are.
        self._process: tuple[int, int] | None = None
        if across_processes:
            self._process = backend.process()
            if self._process is None:
                raise ValueError(
                    "Means over processes need `torch.distributed.init_process_group` "
                    "first, on PyTorch. On JAX `keras.distribution` spreads the data "
                    "of one call over all devices, on TensorFlow the scope of a "
                    f"strategy. Received: across_processes={across_processes!r} on "
                    f"{keras.backend.backend()}."
                )
        # Placed batches with their sizes, or the data set that they are read from.
        self._source: list[tuple[Batch, int]] | _Large
        if data_sets.is_data_set(x):
            data_sets.check(x, y=y, sample_weight=sample_weight, batch_size=batch_size)
            self._source = self._kept(x)
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

    def _kept(self, source: Any) -> "list[tuple[Batch, int]] | _Large":
        """The batches of a data set, or the data set itself if they are too many."""
        kept: list[tuple[Batch, int]] = []
        large, room = _Large(source), KEPT_BYTES
        for batch in large:
            room -= max(_num_bytes(batch), _LEAST_BYTES)
            if room < 0:
                break
            kept.append(self._ready(batch))
        _tell_if_moved(source, tuple(large.digests))
        if room >= 0 and not kept:
            raise ValueError(
                "The probe data set gives no batch: it is empty, or can be read only "
                f"once. Received: x={source!r}."
            )
        if room < 0 and data_sets.num_batches(source) is None:
            raise ValueError(
                "The data set does not tell its length, and did not end within "
                f"{len(large.digests):,} batches ({_gib(KEPT_BYTES)}): maybe it never "
                f"does. Received: x={source!r}. {data_sets.how_to_end(source)}"
            )
        return large if room < 0 else kept

    @classmethod
    def none(cls) -> Self:
        """One batch without content, for a loss that needs no data."""
        return cls._of([((None, None, None), 1)], None)

    @classmethod
    def _of(cls, batches: list[tuple[Batch, int]], place: Any) -> Self:
        data = cls.__new__(cls)
        data.place, data._class_weight, data._source = place, None, batches
        data._process, data.at_once = None, None
        return data

    @property
    def num_batches(self) -> int | None:
        """Number of batches in one pass; `None` if the source does not tell."""
        if isinstance(self._source, list):
            return sum(len(self._cuts(size)) for _, size in self._source)
        if self.at_once is not None:
            return None
        return data_sets.num_batches(self._source.source)

    @property
    def largest(self) -> int:
        """Number of samples in the largest batch; of data read anew in the first."""
        if isinstance(self._source, list):
            return max(self._cuts(size)[0][1] for _, size in self._source)
        return next(iter(self))[1]

    def in_parts(self, at_once: int | None) -> Self:
        """The same data in batches of at most so many samples, as equal as can be."""
        parts = copy.copy(self)
        parts.at_once = at_once
        return parts

    def _cuts(self, size: int) -> list[tuple[int, int]]:
        """Where the parts of a batch begin and end."""
        parts = math.ceil(size / (self.at_once or size))
        step = math.ceil(size / parts)
        return [(start, min(start + step, size)) for start in range(0, size, step)]

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        """Yields `((x, y, sample_weight), number of samples)`."""
        kept = isinstance(self._source, list)
        source: Any = self._source if kept else map(self._ready, self._source)
        for batch, size in source:
            cuts = self._cuts(size)
            for start, end in cuts:
                if len(cuts) == 1:
                    yield batch, size
                    break
                with backend.on(self.place):
                    part = self._placed(batch, start, end)
                yield part

    def moved_to(self, place: Any) -> Self:
        """The same batches in another place, from `backend.place_of`."""
        moved = self.__class__.__new__(self.__class__)
        moved.place, moved._class_weight = place, self._class_weight
        moved._process, moved.at_once = self._process, self.at_once
        moved._source = self._source
        if isinstance(self._source, list):
            moved._source = [moved._placed(b, 0, size) for b, size in self._source]
        return moved

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
            ValueError: if a data set that is too large to keep has moved.
        """
        num_batches, total, samples, done = self.num_batches, None, 0, 0
        mine, processes = self._process or (0, 1)
        # The place is set for the work alone: reading stays where the data set is.
        for done, (batch, size) in enumerate(self, start=1):
            with backend.on(self.place):
                # Of all batches that there are, one process after the other.
                index = (done - 1) * processes + mine + 1
                number = (backend.array(index, "int32"),) if numbered else ()
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
        with backend.on(self.place):
            if self._process is not None:
                total = total if done > 1 else _scaled(total, samples)
                return self.over_processes(total, samples)
            return _map_arrays(lambda t: t / samples, total) if done > 1 else total

    def over_processes(self, total: Any, count: int) -> Any:
        """The sum of totals over the sum of counts, if there are several processes.

        Args:
            total: tensor or nested structure of tensors.
            count: how many samples it is a sum over.

        Returns:
            The mean; `total` as it is if there is one process.
        """
        if self._process is None:
            return total
        whole = backend.sum_over_processes(backend.array(count, "int32"))
        return _map_arrays(lambda t: backend.sum_over_processes(t) / whole, total)

    def first(self) -> Batch:
        """The first batch, `(x, y, sample_weight)`."""
        return next(iter(self))[0]

    @property
    def num_samples(self) -> int | None:
        """Samples in one pass; `None` for data too large to keep."""
        if not isinstance(self._source, list):
            return None
        return sum(size for _, size in self._source)

    def in_equal_parts(self, wanted: int) -> Self | None:
        """The same samples in more batches, each of them a part of one of these.

        Args:
            wanted: how many batches there should be, where that is possible. Each
                batch is split in two at least, and in eight at most.

        Returns:
            A `ProbeData`; `None` where no such number divides all batches into equal
            parts, for data too large to keep, and over several processes.
        """
        if not isinstance(self._source, list) or self._process is not None:
            return None
        common = math.gcd(*(size for _, size in self._source))
        counts = [count for count in range(2, 9) if common % count == 0]
        if not counts:
            return None
        enough = [c for c in counts if c * len(self._source) >= wanted]
        count = min(enough, default=counts[-1])
        parts = []
        with backend.on(self.place):
            for batch, size in self._source:
                ends = range(0, size + 1, size // count)
                parts += [
                    self._placed(batch, start, end)
                    for start, end in itertools.pairwise(ends)
                ]
        return self._of(parts, self.place)

    def in_pairs(self, start: int) -> Iterator[tuple[Batch, int]]:
        """The same samples in other batches: two neighbouring parts in each.

        The parts are the halves of batches, and batches of one sample. From the first
        part on pairs are the batches themselves, from the second part on they are
        across batches; where all batches have one sample, both join batches. Parts
        whose samples have different shapes stay apart.

        Args:
            start: number of the first part that is the first of a pair, 0 or 1.

        Yields:
            `((x, y, sample_weight), number of samples)`, as in an iteration.
        """
        first: tuple[Batch, int] | None = None
        for number, part in enumerate(self._parts(), start=start):
            if number % 2 == 0:
                first = part
            elif first is None:
                yield part
            elif _joinable(first[0], part[0]):
                yield self._joined(first, part)
                first = None
            else:
                yield first
                yield part
                first = None
        if first is not None:
            yield first

    def _parts(self) -> Iterator[tuple[Batch, int]]:
        for batch, size in self:
            middle = size // 2
            for start, end in ((0, middle), (middle, size)):
                if start < end:
                    with backend.on(self.place):
                        part = self._placed(batch, start, end)
                    yield part

    def _joined(self, *parts: Any) -> tuple[Batch, int]:
        """Batches as one."""
        with backend.on(self.place):
            whole = _map_arrays(lambda *a: ops.concatenate(a), *[b for b, _ in parts])
            return self._placed(whole, 0, sum(size for _, size in parts))

    def _ready(self, batch: Batch) -> tuple[Batch, int]:
        """A batch of a data set with the class weights worked in, placed."""
        batch, size = self._weighted(batch)
        return self._placed(batch, 0, size)

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


class _Large:
    """A data set that is read anew for each pass, and must give the same each time.

    Args:
        source: the data set.

    Attributes:
        source: as given.
        digests: of the batches as they were read first.
    """

    def __init__(self, source: Any):
        self.source = source
        self.digests: list[int] = []
        self._ended = False

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches of arrays or tensors.

        Raises:
            ValueError: if one is not what it was.
        """
        number = 0
        for number, batch in enumerate(data_sets.read(self.source), start=1):
            batch = _map_arrays(_as_array, batch)
            found = _digest(batch)
            if number > len(self.digests):
                if self._ended:
                    raise self._moved(f"more than {len(self.digests):,} batches")
                self.digests.append(found)
            elif found != self.digests[number - 1]:
                raise self._moved(f"another batch number {number:,}")
            yield batch
        if number < len(self.digests):
            raise self._moved(f"{number:,} batches and not {len(self.digests):,}")
        self._ended = True

    def _moved(self, what: str) -> ValueError:
        return ValueError(
            f"The data set gave {what} when it was read again: figures would mix "
            "different data. It shuffles, augments at random, or can be read only "
            f"once. Received: x={self.source!r}. {data_sets.how_to_rest(self.source)} "
            f"Or take less of it: up to {_gib(KEPT_BYTES)} is read only once."
        )


#: What data sets gave when they were read last, by their ids as long as they live.
_digests_of: dict[int, tuple[int, ...]] = {}


def _tell_if_moved(source: Any, digests: tuple[int, ...]) -> None:
    """Warns of a data set that gave other batches when it was read before."""
    if id(source) not in _digests_of:
        weakref.finalize(source, _digests_of.pop, id(source), None).atexit = False
    elif _digests_of[id(source)] != digests:
        warnings.warn(
            "The data set gives other batches than when it was read for curvature "
            "before: figures of then and of now are of different data. "
            f"Received: x={source!r}. {data_sets.how_to_rest(source)} Or read it once: "
            "make one `HessianOperator`, and hand it to each function.",
            stacklevel=6,
        )
    _digests_of[id(source)] = digests


def _digest(batch: Batch) -> int:
    """A number that tells a batch from others, by a checksum of its bytes."""
    found = 0
    for a in _leaves(batch):
        array = _on_host(a)
        # Text, or nothing at all, has no bytes of its own.
        text = [array.tolist()] if array.dtype.hasobject else []
        found = zlib.crc32(repr((array.dtype, array.shape, *text)).encode(), found)
        if not text:
            whole: Any = np.ascontiguousarray(array).reshape(-1).view("uint8")
            found = zlib.crc32(whole, found)
    return found


def _num_bytes(batch: Batch) -> int:
    return sum(_on_host(a).nbytes for a in _leaves(batch))


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


def _joinable(a: Batch, b: Batch) -> bool:
    """Whether the samples of two batches are shaped alike."""
    like_a, like_b = (
        [None if x is None else (x.dtype, tuple(x.shape[1:])) for x in _leaves(batch)]
        for batch in (a, b)
    )
    return like_a == like_b


def _check_batch_size(batch_size: Any) -> Any:
    if batch_size is not None and (
        not isinstance(batch_size, (int, np.integer)) or batch_size < 1
    ):
        raise ValueError(
            "`batch_size` is the number of samples that are processed at once: a "
            f"positive integer. Received: batch_size={batch_size!r}."
        )
    return batch_size


def _leaves(structure: Any) -> list[Any]:
    """The arrays of a nested structure, and `None` in place of those it lacks.

    Unlike `keras.tree.flatten` on PyTorch, this leaves no cycle of references, which
    would keep batch after batch in memory.
    """
    leaves: list[Any] = []
    tree.map_structure(leaves.append, structure)
    return leaves


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
    if backend.is_tensor(a):
        array: np.ndarray[Any, Any] = ops.convert_to_numpy(a)
        return array
    # PyTorch hands over neither what is on an accelerator nor what has a gradient.
    return np.asarray(a.detach().cpu() if hasattr(a, "detach") else a)


def _num_samples(batch: Batch) -> int:
    sizes: set[Any] = {
        a.shape[0] if len(a.shape) else None for a in _leaves(batch) if a is not None
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
