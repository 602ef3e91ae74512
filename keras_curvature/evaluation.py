"""A loss on data: what is compiled of it, and how it is averaged over batches."""

from collections.abc import Callable
from typing import Any, TypeVar

from keras_curvature import backend
from keras_curvature.backend import Direction, Tensor
from keras_curvature.data import ProbeData
from keras_curvature.loss import Loss, State

T = TypeVar("T")


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
        on_batch: `None`, or a function `on_batch(done, num_batches)` that is called
            after each batch.
    """

    def __init__(self, loss: Loss, data: ProbeData, jit_compile: bool = False):
        self.loss = loss
        self.data = data
        self.on_batch: Callable[[int, int | None], None] | None = None
        self.jit_compile = jit_compile
        self._made: dict[Any, Any] = {}

    def mean_of(
        self, function: Callable[..., Any], numbered: bool = False
    ) -> Callable[..., Any]:
        """Compiles a function of state and batch, and averages it over the data.

        Args:
            function: pure function `function(state, batch, *args)` that returns a
                tensor or a nested structure of tensors.
            numbered: whether the number of the batch follows as last argument.

        Returns:
            A function of `*args`. It returns what `function` returns for the present
            state, averaged over the batches by their sizes. Its method `traces()`
            tells how often it was compiled.
        """
        compiled = backend.compiled(function, self.jit_compile)

        def mean(*args: Any) -> Any:
            state = self.loss.state()
            with backend.twice_differentiable():
                return self.data.mean(
                    lambda batch, *rest: compiled(state, batch, *rest),
                    *args,
                    numbered=numbered,
                    on_batch=self.on_batch,
                )

        mean.traces = compiled.traces  # type: ignore[attr-defined]
        return mean

    def at_first(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(state, batch, *args)` of the first batch, compiled and run once."""
        with backend.on(self.data.place), backend.twice_differentiable():
            return backend.compiled(function)(
                self.loss.state(), self.data.first(), *args
            )

    def outline(self, function: Callable[..., Any], *args: Any) -> backend.Outline:
        """What is known of `function(state, batch, *args)` before it runs."""
        with backend.twice_differentiable():
            return backend.outline(
                function, self.loss.state(), self.data.first(), *args
            )

    def once(self, make: Callable[["Evaluation"], T]) -> T:
        """`make(self)`, made at the first call and kept as long as this lives.

        Args:
            make: function or class that finds something out about the loss.
        """
        if make not in self._made:
            self._made[make] = make(self)
        made: T = self._made[make]
        return made


def of_values(
    loss: Loss, others: list[Tensor], batch: Any
) -> Callable[[Direction], tuple[Tensor, dict[Any, Tensor]]]:
    """A loss as a function of the values of its variables, by number."""
    return lambda point: (loss(State(list(point.values()), others), batch), {})
