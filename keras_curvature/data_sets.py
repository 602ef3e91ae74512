"""Data sets: which objects count as one, how long they are, and how they are read.

A data set gives its batches itself: a `keras.utils.PyDataset`, a `tf.data.Dataset` or
a `torch.utils.data.DataLoader`, whatever framework Keras runs on. Neither TensorFlow
nor PyTorch is imported to recognise them: whoever passes one has done so already.
"""

import contextlib
import copy
import itertools
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import keras
import numpy as np

#: `(x, y, sample_weight)`: nested structures of arrays, or `None` for what is missing.
Batch: TypeAlias = tuple[Any, Any, Any]

#: For messages: what counts as a data set.
KINDS = "a `tf.data.Dataset`, a `keras.utils.PyDataset` or a PyTorch `DataLoader`"


def is_data_set(x: object) -> bool:
    """Whether `x` gives its batches itself."""
    return isinstance(x, keras.utils.PyDataset) or _is_loader(x) or _is_tf_data(x)


def num_batches(source: Any) -> int | None:
    """Number of batches in one pass; `None` if the data set does not tell."""
    if isinstance(source, keras.utils.PyDataset):
        number: int | None = source.num_batches
        return number
    if _is_loader(source):
        with contextlib.suppress(TypeError, NotImplementedError):
            return len(source)
        return None
    cardinality = int(source.cardinality())
    return cardinality if cardinality >= 0 else None


def check(source: Any, **others: Any) -> None:
    """Refuses a data set that has no end, and arguments beside a data set.

    Args:
        source: the data set.
        **others: what else was passed: all must be `None`.

    Raises:
        ValueError: for any of these.
    """
    for name, value in others.items():
        if value is not None:
            raise ValueError(
                f"A data set brings its own targets, weights and batches: leave "
                f"`{name}` out. Received: {name} of type {type(value).__name__} "
                f"with x of type {type(source).__name__}."
            )
    # A data set that does not tell its length counts as finite: `filter` makes such.
    if _is_tf_data(source):
        endless = int(source.cardinality()) == -1
    else:
        endless = isinstance(source, keras.utils.PyDataset) and (
            source.num_batches is None
        )
    if endless:
        raise ValueError(
            "The data set never ends, so a pass over it would not either. "
            f"Received: x={source!r}. {how_to_end(source)}"
        )


def how_to_end(source: Any) -> str:
    """For messages: what gives a data set an end, or makes it tell its length."""
    if isinstance(source, keras.utils.PyDataset):
        return "Let its `num_batches` be a number."
    if _is_loader(source):
        return "Give the data set of the `DataLoader` a `__len__`."
    return (
        "Limit it, for instance with `x.take(10)`, or say how long it is with "
        "`x.apply(tf.data.experimental.assert_cardinality(num_batches))`."
    )


def how_to_rest(source: Any) -> str:
    """For messages: what makes a data set give the same batches in each pass."""
    if isinstance(source, keras.utils.PyDataset):
        return "Let its `__getitem__(i)` return the same batch each time."
    if _is_loader(source):
        return "Use `shuffle=False`, and no random augmentation."
    return "Keep its batches: `x.cache()`, after shuffling and augmentation."


def endless_batches(x: Any, *rest: Any) -> Iterator[Batch]:
    """The batches of a data set one after the other, again and again.

    Args:
        x: a data set as for `ProbeData`; it may be endless.
        *rest: must be empty: a data set brings its targets along.

    Yields:
        Tuples `(x, y, sample_weight)`, as the data set gives them.

    Raises:
        ValueError: if `x` is no data set, or has no batch.
    """
    if rest or not is_data_set(x):
        raise ValueError(
            "A fresh batch for each probe needs a data set to take it from: "
            f"{KINDS}. Received: data of type {type(x).__name__}."
        )
    return _cycle(x)


def _cycle(source: Any) -> Iterator[Batch]:
    # One for all passes, or each would shuffle as the one before it.
    states = _RandomStates(source)
    while True:
        empty = True
        for batch in read(source, states):
            empty = False
            yield batch
        if empty:
            raise ValueError(f"The data set gave no batch. Received: x={source!r}.")


def read(source: Any, states: "_RandomStates | None" = None) -> Iterator[Batch]:
    """One pass over a data set; endless if the data set is.

    Shuffling, augmentation, and the mere start of a `DataLoader` draw random numbers
    from Python's, NumPy's or PyTorch's global state. They draw as they would, but the
    states are put back after each batch: a training run draws what it would draw if
    nobody else had read. Two passes with no draw of others in between are alike.
    (Not so for a `tf.data.Dataset`, which draws in threads of its own.)

    Args:
        source: a data set.
        states: the random states to go on with. Defaults to the present ones.

    Yields:
        Tuples `(x, y, sample_weight)`, `None` for what the data set does not give.
    """
    if _is_loader(source) and source.persistent_workers:
        # All its iterators are one and the same, perhaps training's right now.
        source = copy.copy(source)
        source._iterator = None
    states = states or _RandomStates(source)
    with states.apart():
        batches = _batches(source)
    while True:
        with states.apart():
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield keras.utils.unpack_x_y_sample_weight(_with_tuples(batch))


def _with_tuples(structure: Any) -> Any:
    """Tuples in place of lists, as `fit` hands them to the model.

    Unlike `keras.tree.lists_to_tuples` on PyTorch, this leaves no cycle of references,
    which would keep batch after batch in memory.
    """
    if isinstance(structure, dict):
        return {name: _with_tuples(part) for name, part in structure.items()}
    if isinstance(structure, list) or type(structure) is tuple:
        return tuple(map(_with_tuples, structure))
    return structure


def _batches(source: Any) -> Iterator[Any]:
    if isinstance(source, keras.utils.PyDataset):
        number = source.num_batches
        indices = itertools.count() if number is None else range(number)
        return (source[i] for i in indices)
    return iter(source)


class _RandomStates:
    """A second line of global random numbers, which begins where the first one is."""

    def __init__(self, source: Any):
        self._parts: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []
        self._states: list[Any] | None = None
        if _is_tf_data(source):
            return
        self._parts.append((random.getstate, random.setstate))
        self._parts.append((np.random.get_state, np.random.set_state))
        torch = sys.modules.get("torch")
        if torch is not None:
            self._parts.append((torch.get_rng_state, torch.set_rng_state))
        if _is_loader(source):
            own = [source.generator, getattr(source.sampler, "generator", None)]
            for generator in filter(None, own):
                self._parts.append((generator.get_state, generator.set_state))

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """A context that draws from the second line and goes on with it next time."""
        first = self._get()
        if self._states is not None:
            self._set(self._states)
        try:
            yield
        finally:
            self._states = self._get()
            self._set(first)

    def _get(self) -> list[Any]:
        return [get() for get, _ in self._parts]

    def _set(self, states: list[Any]) -> None:
        for (_, put), state in zip(self._parts, states, strict=True):
            put(state)


def _is_tf_data(x: object) -> bool:
    return hasattr(x, "element_spec") and hasattr(x, "cardinality")


def _is_loader(x: object) -> bool:
    module = sys.modules.get("torch.utils.data")
    return module is not None and isinstance(x, module.DataLoader)
