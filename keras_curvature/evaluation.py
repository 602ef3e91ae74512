"""A loss on data: what is compiled of it, and how it is averaged over batches."""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from keras import ops

from keras_curvature import backend
from keras_curvature.backend import Direction, Tensor
from keras_curvature.data import ProbeData
from keras_curvature.data_sets import Batch
from keras_curvature.loss import Loss, State

T = TypeVar("T")

#: Relative and absolute differences of losses that rounding may explain: what is
#: compiled for one purpose adds up in another order than what is for another.
_RELATIVE, _ABSOLUTE = 1e-4, 1e-6

#: What is computed in many steps may be off by so many times the rounding of one.
_STEPS = 12


class Evaluation:
    """A loss and the data that it is averaged over.

    Args:
        loss: a `TrainingLoss` or a `FunctionLoss`.
        data: a `ProbeData`.
        jit_compile: whether TensorFlow compiles with XLA.

    Attributes:
        loss: as given.
        data: as given; other data may take its place.
        jit_compile: as given.
        adapts: whether batches are halved where the memory runs out. The mean over
            them must not depend on how samples are put together.
        on_batch: `None`, or a function `on_batch(done, num_batches)` that is called
            after each batch.
        mean_loss: the `Mean` of the loss itself.
    """

    def __init__(self, loss: Loss, data: ProbeData, jit_compile: bool = False):
        self.loss = loss
        self.data = data
        self.on_batch: Callable[[int, int | None], None] | None = None
        self.jit_compile = jit_compile
        self.adapts = False
        self._made: dict[Any, Any] = {}
        self._held: State | None = None
        self._kept: tuple[Mean, ProbeData, Any] | None = None
        self._seen: dict[Any, Any] = {}
        self._losses_seen: list[Tensor] = []
        self.mean_loss = self.mean_of(lambda state, batch: (loss(state, batch),) * 2)

    def state(self) -> State:
        """The present values of all variables, or those that are held."""
        return self.loss.state() if self._held is None else self._held

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """A context in which all products are of one and the same function.

        The values of all variables are taken once, at its beginning: the weights may
        move meanwhile. What else a loss may read (a random state, something outside of
        the model) cannot be held, but each pass over the data gives the loss as well,
        and it must be the same in all of them. A context inside of another one shares
        its state. On PyTorch the graph of the gradient is built once for all products
        that follow each other, if there is one batch.

        Raises:
            ValueError: at its end, if the loss has moved.
        """
        if self._held is not None:
            yield
            self._check_losses()
            return
        self._held = self.loss.state()
        try:
            yield
            self._check_losses()
        finally:
            self._held, self._kept, self._losses_seen = None, None, []
            self._seen = {}

    def meanwhile(self, owner: Any) -> dict[Any, Any]:
        """What an owner has seen within the present `still` context; it fills it."""
        seen: dict[Any, Any] = {}
        return seen if self._held is None else self._seen.setdefault(owner, seen)

    def beyond_rounding(self, limit: float) -> float:
        """A relative difference from which on something counts as different.

        Args:
            limit: what it is in float32.
        """
        return max(limit, _STEPS * self.loss.epsilon)

    def saw(self, loss: Tensor) -> None:
        """Takes note of the mean loss in a pass over the data."""
        if self._held is not None:
            self._losses_seen.append(loss)

    def _check_losses(self) -> None:
        # Not as they come: a number that is asked for stops the device.
        losses = [float(ops.convert_to_numpy(loss)) for loss in self._losses_seen]
        self._losses_seen = self._losses_seen[:1]
        low, high = min(losses, default=0.0), max(losses, default=0.0)
        relative = self.beyond_rounding(_RELATIVE)
        if high - low > _ABSOLUTE + relative * max(abs(low), abs(high)):
            raise ValueError(
                "The loss moved while its curvature was measured: figures would mix "
                "the Hessians of different functions. Received: losses between "
                f"{low:.6g} and {high:.6g} in {len(losses):,} passes over the same "
                "data at the same weights. Does it draw random numbers, or read "
                "something that was changed meanwhile? Draw with `keras.random` and a "
                "`keras.random.SeedGenerator`, and keep what it reads in "
                "`keras.Variable`s."
            )

    def mean_of(
        self,
        function: Callable[..., Any],
        numbered: bool = False,
        record: Callable[[State, Batch], Any] | None = None,
    ) -> "Mean":
        """Compiles a function of state and batch, and averages it over the data.

        Args:
            function: pure function `function(state, batch, *args)` that returns the
                loss, and a tensor or a nested structure of tensors.
            numbered: whether the number of the batch follows as last argument.
            record: pure function `record(state, batch)`; what it returns is passed to
                `function(recorded, *args)` in the place of state and batch, and kept
                from call to call where that can be.

        Returns:
            A `Mean`: a function of `*args`.
        """
        return Mean(self, function, numbered, record)

    def kept(self, owner: "Mean", record: Callable[[], T]) -> T:
        """`record()`, or what it returned before, if that may be kept.

        It is while all products are of the same function of one batch, until another
        function passes over the data: so nothing needs memory beside it.
        """
        if self._held is None or self.data.num_batches != 1:
            return record()
        if self._kept is None or self._kept[:2] != (owner, self.data):
            self._kept = owner, self.data, record()
        recorded: T = self._kept[2]
        return recorded

    def loss_at(self, state: State) -> Tensor:
        """The mean loss at another state than the present one: a scalar tensor."""
        return self.mean(lambda batch: self.mean_loss.compiled(state, batch)[0])

    def mean(
        self,
        function: Callable[..., Any],
        *args: Any,
        numbered: bool = False,
        owner: "Mean | None" = None,
    ) -> Any:
        """`ProbeData.mean`; in smaller batches where the memory runs out.

        Args:
            function: function of a batch and of `*args`.
            *args: the same for all batches.
            numbered: whether the number of the batch follows.
            owner: whose recording may be kept.
        """
        if self._kept is not None and self._kept[0] is not owner:
            self._kept = None

        def work() -> Any:
            with backend.twice_differentiable():
                return self.data.mean(
                    function, *args, numbered=numbered, on_batch=self.on_batch
                )

        return self._within_memory(work)

    def _within_memory(self, work: Callable[[], T]) -> T:
        """What `work()` returns, with batches halved as often as it takes."""
        before = self.data.at_once
        while True:
            try:
                result = work()
            except Exception as error:
                if not (self.adapts and backend.is_out_of_memory(error)):
                    raise
                # A traceback would keep what was computed in memory.
                failed, self._kept = error.with_traceback(None), None
            else:
                break
            if not self._halve():
                raise failed
        if self.data.at_once != before:
            warnings.warn(
                "The memory ran out, and the probe data is taken in smaller batches "
                f"from now on: {self.data.largest:,} samples at once.",
                stacklevel=5,
            )
        return result

    def _halve(self) -> bool:
        """Halves the batches; tells whether that could be done."""
        whole, size = self.data, self.data.largest
        if size == 1:
            return False
        self.data = whole.in_parts(math.ceil(size / 2))
        if whole.at_once is None and self.differs_by_grouping() is not None:
            self.data, self.adapts = whole, False
        return self.adapts

    def differs_by_grouping(self) -> tuple[float, float] | None:
        """Whether the mean over batches depends on which samples share a batch.

        It does not for a loss that is a mean over samples. Two groupings are compared:
        halves of a batch together, and halves of neighbouring batches (see
        `ProbeData.in_pairs`). Together they link all samples, so that a loss that is
        normalised by something that varies within batches or between them shows. The
        weights are moved by random numbers: at the present ones all samples may have
        the same loss, as they often have before training.

        Returns:
            `None` for one batch and where it makes no difference; else the mean over
            either groups, weighted by their sizes, at the moved weights.
        """
        if self.data.num_batches == 1:
            return None
        state = self.state()
        for at in (_moved(state, self.data.place), state):
            means, losses = zip(
                *(self._losses(at, start) for start in (0, 1)), strict=True
            )
            if all(map(math.isfinite, means)):
                break
        every = [*losses[0], *losses[1]]
        # More than rounding, and a thousandth of what the groups differ by.
        rounding = self.beyond_rounding(1e-5) * max(map(abs, every))
        spread = max(every) - min(every)
        differ = abs(means[0] - means[1]) > max(rounding, 1e-3 * spread)
        return means if differ else None

    def _losses(self, state: State, start: int) -> tuple[float, list[float]]:
        """The mean over pairs of parts, weighted by size, and the losses of each."""
        losses, sizes = [], []
        for batch, size in self.data.in_pairs(start):
            with backend.on(self.data.place), backend.twice_differentiable():
                loss, _ = self.mean_loss.compiled(state, batch)
            losses.append(float(ops.convert_to_numpy(loss)))
            sizes.append(size)
        products = [loss * size for loss, size in zip(losses, sizes, strict=True)]
        return sum(products) / sum(sizes), losses

    def at_first(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(state, batch, *args)` of the first batch, which is not asked again.

        The mean over the first batches of all processes, so that all draw the same
        conclusions.
        """
        run: Callable[..., Any] = functools.partial(backend.run_once, function)
        if self.loss.findings.branches:
            # What is in them must be as far from the rest as in all other functions.
            run = backend.compiled(function)

        def work() -> Any:
            with backend.on(self.data.place), backend.twice_differentiable():
                found = run(self.state(), self.data.first(), *args)
                return self.data.over_processes(found, 1)

        return self._within_memory(work)

    def outline(self, function: Callable[..., Any], *args: Any) -> backend.Outline:
        """What is known of `function(state, batch, *args)` before it runs."""
        with backend.twice_differentiable():
            return backend.outline(function, self.state(), self.data.first(), *args)

    def once(self, make: Callable[["Evaluation"], T]) -> T:
        """`make(self)`, made at the first call and kept as long as this lives.

        Args:
            make: function or class that finds something out about the loss.
        """
        if make not in self._made:
            self._made[make] = make(self)
        made: T = self._made[make]
        return made


class Mean:
    """A function of state and batch, averaged over the data at the present state.

    Args:
        evaluation: the `Evaluation` that has the state and the data.
        function: `function(state, batch, *args)`; returns the loss and something else.
        numbered: whether the number of the batch follows as last argument.
        record: `record(state, batch)`, in whose place the function takes what it
            returns.

    Attributes:
        compiled: the function of state and batch, compiled.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        function: Callable[..., Any],
        numbered: bool = False,
        record: Callable[[State, Batch], Any] | None = None,
    ):
        self._evaluation = evaluation
        self._numbered = numbered
        if record is not None:
            function = self._recorded(function, record)
        self._function = function
        self.compiled = backend.compiled(function, evaluation.jit_compile)

    def _recorded(
        self, function: Callable[..., Any], record: Callable[[State, Batch], Any]
    ) -> Callable[..., Any]:
        """The function of state and batch, by way of a recording."""

        def of_batch(state: State, batch: Batch, *args: Any) -> Any:
            if not backend.KEEPS_RECORDINGS:
                return function(record(state, batch), *args)
            kept = self._evaluation.kept(self, lambda: record(state, batch))
            return function(kept, *args)

        return of_batch

    def __call__(self, *args: Any) -> Any:
        """What comes with the loss, averaged over the batches by their sizes."""
        return self._averaged(self.compiled, *args)

    def once(self, *args: Any) -> Any:
        """The same, without compiling it, where that is possible and quicker.

        For what may never be asked again.
        """
        evaluation = self._evaluation
        compiles = evaluation.loss.findings.branches or not backend.RUNS_UNCOMPILED
        if compiles or evaluation.data.num_batches != 1:
            return self(*args)
        return self._averaged(
            functools.partial(backend.run_once, self._function), *args
        )

    def _averaged(self, function: Callable[..., Any], *args: Any) -> Any:
        evaluation = self._evaluation
        state = evaluation.state()
        loss, result = evaluation.mean(
            lambda batch, *rest: function(state, batch, *rest),
            *args,
            numbered=self._numbered,
            owner=self,
        )
        evaluation.saw(loss)
        return result

    def traces(self) -> int:
        """How often the function was compiled."""
        traces: int = self.compiled.traces()  # type: ignore[attr-defined]
        return traces


def _moved(state: State, place: Any) -> State:
    """The variables somewhere else, at a distance that they would learn to go."""
    values = []
    with backend.on(place):
        for number, value in enumerate(state.values):
            key = backend.array([number, 0], "int32")
            noise = backend.normal(tuple(value.shape), key, value.dtype)
            size = ops.sqrt(ops.mean(ops.square(value)))
            # What is zero, as biases are, gets a size too.
            values.append(value + noise * ops.where(size > 0, size / 2, 0.1))
    return State(values, state.others)


def of_values(
    loss: Loss, others: list[Tensor], batch: Any
) -> Callable[[Direction], tuple[Tensor, dict[Any, Tensor]]]:
    """A loss as a function of the values of its variables, by number."""
    return lambda point: (loss(State(list(point.values()), others), batch), {})
