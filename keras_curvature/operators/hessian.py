"""The Hessian over the trainable variables, as a matrix that is never formed."""

import contextlib
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops, tree

from keras_curvature import backend
from keras_curvature.backend import Caveat, Direction, Tensor
from keras_curvature.data import ProbeData
from keras_curvature.data_sets import Batch
from keras_curvature.evaluation import Evaluation, of_values
from keras_curvature.loss import FunctionLoss, Loss, State, TrainingLoss
from keras_curvature.memory import Need
from keras_curvature.operators.finite_differences import difference_product
from keras_curvature.selection import given_themselves

#: As its authors spell it.
_FRAMEWORK = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}[
    keras.backend.backend()
]

#: The loss, and the product with a direction.
_Recorded: TypeAlias = tuple[Tensor, Callable[[Direction], Direction]]


class HessianOperator:
    """The symmetric P×P Hessian of a model's training loss, through its products.

    H is the Hessian of the mean loss over the probe data, at the current values of
    the variables: when they change, so does the operator. A product costs 2 to 2.5
    gradients (compiled once), P×P numbers are never stored.

    ```python
    op = kc.HessianOperator(model, x, y)
    hv = op @ v                                  # v: flat vector of length P
    top = scipy.sparse.linalg.eigsh(op.to_scipy(), k=3)
    ```

    A flat vector holds the variables in the order of `model.trainable_variables`,
    each flattened in row-major order. `split` and `flatten` convert between a flat
    vector and a list of arrays.

    Args:
        model: a compiled Keras model (or any, with `loss_fn`).
        x: inputs: arrays, or a data set that also holds targets and weights: a
            `tf.data.Dataset`, a `keras.utils.PyDataset` or a PyTorch `DataLoader`. A
            data set is read once, and its batches are kept up to 1 GiB; a larger one
            is read anew for each pass, and must give the same batches each time. H is
            the mean over the batches, weighted by their sizes.
        y: targets.
        sample_weight: weights of the samples.
        class_weight: dictionary from class index to weight, as in `Model.fit`.
        loss_fn: `loss_fn(model, x, y)` returning the scalar loss, for models that
            are not compiled with one.
        variables: what to differentiate by: a pattern of paths such as
            `"*/attention/*"`, a layer (its trainable variables), a Keras variable, or
            a list of them. Patterns are those of file names (`fnmatch`); they match
            paths of trainable variables, with or without the model's name in front.
            Defaults to `model.trainable_variables`, as they are when the operator is
            made.
        training: how the layers run. `None`, the default, is as in training without
            its noise: BatchNormalization takes the statistics of the batch, and is
            differentiated through them; Dropout, noise and augmentation are still.
            `False` is as in inference, `True` as in training with its noise.
        half_precision: whether layers and variables in bfloat16 stay so. Otherwise they
            compute in float32, which takes a copy of the variables and twice the
            memory of what layers compute, and gives figures that are good to rounding;
            in bfloat16 they are wrong by some percent. Defaults to `False`.
        batch_size: splits arrays into chunks of this many samples whose products
            are summed, for probes larger than memory. For losses that are means
            over samples the result is the same; others give the mean over the
            chunks, weighted by size, and a warning, as several batches of a data set
            do. `"auto"` takes as many as fit into the memory by a prediction, and
            halves their number where it runs out all the same; where the result would
            not be the same, the samples stay together.
        across_processes: whether the mean goes over the data of all processes of
            `torch.distributed`, each of which passes its own part and makes the same
            calls. Defaults to `False`.
        hvp: `"tape"` (exact) or `"finite_difference"`: central differences of the
            gradient, for operations without a second derivative. Their relative
            error is about 1e-4 to 1e-3 in float32 and 1e-9 in float64, and large
            where the gradient jumps (relu, max-pooling).
        jit_compile: whether XLA compiles the products on TensorFlow. Right unless the
            model has max-pooling, and slower on a CPU. Defaults to `False`.

    Attributes:
        evaluation: the `Evaluation` of the loss on the data.
        variables: what the loss is differentiated by.
        shape: `(P, P)`.
        dtype: NumPy type of the products.
        mode: how the layers run, in words.
        need: the memory that a probe will need, with `batch_size="auto"`; else `None`.

    Raises:
        ValueError: for a model without loss or variables, a pattern that matches none,
            inconsistent data, a data set that never ends, a loss that draws other
            random numbers each time, or an unknown `hvp`.
    """

    need: Need | None

    def __init__(
        self,
        model: Any,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        class_weight: dict[int, float] | None = None,
        loss_fn: Callable[..., Any] | None = None,
        variables: Any = None,
        training: bool | None = None,
        half_precision: bool = False,
        batch_size: int | str | None = None,
        across_processes: bool = False,
        hvp: str = "tape",
        jit_compile: bool = False,
    ):
        _check_hvp(hvp, half_precision)
        self._class_weight = class_weight
        self._across_processes = across_processes
        known = given_themselves(variables) or getattr(model, "weights", [])
        auto = _is_auto(batch_size)
        data = self._data(known, x, y, sample_weight, None if auto else batch_size)
        loss = TrainingLoss(
            model,
            # What is found out before the memory is known takes little of it.
            data.in_parts(2).first() if auto else data.first(),
            loss_fn=loss_fn,
            variables=variables,
            training=training,
            half_precision=half_precision,
        )
        self._make(Evaluation(loss, data, jit_compile), hvp)
        # Variables that were made just now may have been placed elsewhere.
        if not known:
            self.evaluation.data = data.moved_to(self.place)
        if auto:
            self.need = _fit_to_memory(self.evaluation)
        if self.evaluation.data.at_once is None:
            _tell_of_grouping(self.evaluation)

    @classmethod
    def from_function(
        cls,
        loss_fn: Callable[..., Any],
        parameters: Any,
        *,
        hvp: str = "tape",
        jit_compile: bool = False,
    ) -> "HessianOperator":
        """The Hessian of any scalar function; no model needed.

        ```python
        op = HessianOperator.from_function(loss_fn, params)      # loss_fn(params)

        x = tf.Variable([1.0, 2.0])
        op = HessianOperator.from_function(lambda: x[0] ** 2 * x[1], [x])
        op.to_dense()                            # [[4., 2.], [2., 0.]]
        ```

        Args:
            loss_fn: function of the parameters that returns a scalar; or a function
                without arguments that reads variables. It is compiled: Python side
                effects happen once.
            parameters: the parameters, any nested structure of arrays; or a list of
                the variables, Keras' own on any backend, or TensorFlow's.
            hvp: as for the class.
            jit_compile: as for the class.

        Returns:
            A `HessianOperator`.

        Raises:
            ValueError: for parameters that the function does not take.
        """
        _check_hvp(hvp)
        op = cls.__new__(cls)
        op._class_weight = None
        loss = FunctionLoss(loss_fn, parameters)
        op._make(Evaluation(loss, ProbeData.none(), jit_compile), hvp)
        return op

    def _make(self, evaluation: Evaluation, hvp: str) -> None:
        self.evaluation = evaluation
        self.need = None
        self.hvp = hvp
        self.variables = list(evaluation.loss.variables)
        layout = evaluation.loss.layout
        self.shape = layout.size, layout.size
        self.dtype = layout.dtype
        by_tape = hvp == "tape"
        self._products = (
            evaluation.mean_of(self._by_tape, record=self._recorded)
            if by_tape
            else evaluation.mean_of(self._by_differences)
        )
        self._loss_and_gradient = evaluation.mean_of(self._gradient)
        _tell(evaluation, by_tape)

    def _data(
        self, variables: Any, x: Any, y: Any, sample_weight: Any, batch_size: Any
    ) -> ProbeData:
        return ProbeData(
            x,
            y,
            sample_weight,
            class_weight=self._class_weight,
            batch_size=batch_size,
            place=backend.place_of(variables[0]) if variables else None,
            across_processes=self._across_processes,
        )

    def set_data(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        batch_size: int | str | None = None,
    ) -> None:
        """Moves the operator to other data; the same shapes are not compiled again.

        A data set is read now, as when the operator was made: passing the same one
        again takes what it gives by then.

        Args:
            x: inputs or data set, as for the class.
            y: targets.
            sample_weight: weights of the samples.
            batch_size: number of samples processed at once. With `"auto"` for the
                class, what was found to fit holds on.
        """
        at_once = self.evaluation.data.at_once
        given = None if _is_auto(batch_size) else batch_size
        data = self._data(self.variables, x, y, sample_weight, given)
        self.evaluation.data = data.in_parts(None if given else at_once)
        if self.evaluation.data.at_once is None:
            _tell_of_grouping(self.evaluation)

    def set_parameters(self, parameters: Any) -> None:
        """Moves an operator of a function to other parameters.

        Args:
            parameters: in the structure, shapes and types of those given before.

        Raises:
            ValueError: for others, or an operator that reads variables.
        """
        loss = self.evaluation.loss
        if not isinstance(loss, FunctionLoss):
            raise ValueError(
                "The operator of a model is at the model's present weights. Received: "
                f"parameters for {self!r}. Assign them to the model's variables."
            )
        loss.move_to(parameters)

    @property
    def sizes(self) -> list[int]:
        """Number of entries of each variable; they add up to P."""
        return self.evaluation.loss.layout.sizes

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shape of each variable."""
        return list(self.evaluation.loss.layout.shapes)

    @property
    def place(self) -> Any:
        """Where the variables live and the work is done: for `backend.on`."""
        return backend.place_of(self.variables[0])

    @property
    def mode(self) -> str | None:
        """How the layers of a model run, in words; `None` for a function.

        As in `"training without noise"`, `"inference"` or `"training"`; and how many
        samples BatchNormalization takes its statistics of, if it does.
        """
        loss = self.evaluation.loss
        if not isinstance(loss, TrainingLoss):
            return None
        if not loss.takes_batch_statistics:
            return loss.mode
        size = len(tree.flatten(self.evaluation.data.first())[0])
        return f"{loss.mode}, BatchNormalization over {size} samples"

    def still(self) -> contextlib.AbstractContextManager[None]:
        """A context in which all products are of one matrix; see `Evaluation.still`."""
        return self.evaluation.still()

    def __repr__(self) -> str:
        return (
            f"<HessianOperator {self.shape[0]}×{self.shape[0]} {self.dtype.name}, "
            f"{len(self.variables)} variables>"
        )

    # Products

    def __matmul__(self, v: Any) -> Any:
        """`H v`.

        Args:
            v: flat vector `(P,)`, a block of vectors `(P, k)`, or a list of arrays
                shaped like the variables. A tensor stays on the device.

        Returns:
            The product, in the form of `v`.

        Raises:
            NotImplementedError: if an operation has no second derivative.
            ValueError: if the shape does not fit.
        """
        if isinstance(v, (list, tuple)):
            return self.split(self @ self.flatten(v))
        if not backend.is_tensor(v):
            v = np.asarray(v)
            dtype = np.result_type(v.dtype, self.dtype)
            with backend.on(self.place):
                v = backend.array(v, self.dtype.name)
            return ops.convert_to_numpy(self @ v).astype(dtype, copy=False)
        if len(v.shape) not in (1, 2) or v.shape[0] != self.shape[0]:
            raise ValueError(
                f"The operator has shape {self.shape}: it multiplies vectors of "
                f"shape ({self.shape[0]},), blocks of shape ({self.shape[0]}, k), "
                "and lists of arrays shaped like the variables. Received: shape "
                f"{tuple(v.shape)}."
            )
        with backend.on(self.place):
            if len(v.shape) == 1:
                return self.times_rows(v[None])[0]
            return ops.transpose(self.times_rows(ops.transpose(v)))

    def times_rows(self, rows: Tensor) -> Tensor:
        """`H v` for each row v of a tensor `(k, P)`, as rows; a few of them a pass.

        What an estimator calls: variables lie side by side in a row, so that neither
        directions nor products are transposed.
        """
        rows = backend.array(rows, self.dtype.name)
        count = int(rows.shape[0])
        results, start, most = [], 0, backend.PRODUCTS_PER_PASS
        with backend.on(self.place):
            while start < count:
                # Single products, and groups that say how many of their rows count:
                # two signatures, whatever the count.
                left = min(most, count - start)
                width = 1 if left == 1 else most
                part = rows if left == count else rows[start : start + left]
                if left < width:
                    part = ops.pad(part, ((0, width - left), (0, 0)))
                # XLA on TensorFlow has to know how many of them to multiply.
                known = self.evaluation.jit_compile
                number = width if known else backend.array(left, "int32")
                results.append(self._products(part, number)[:left])
                start += left
            if len(results) == 1:
                return results[0]
            return ops.concatenate(results) if results else rows

    def _recorded(self, state: State, batch: Batch) -> _Recorded:
        loss = self.evaluation.loss
        point = dict(enumerate(state.values))
        recording = backend.record(of_values(loss, state.others, batch), point)
        return recording.loss, recording.product(point, point)

    def _by_tape(
        self, recorded: _Recorded, rows: Tensor, count: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        layout, (loss, multiply) = self.evaluation.loss.layout, recorded

        def product(i: Any) -> Tensor:
            return layout.joined(list(multiply(layout.parted(rows[i])).values()))

        return loss, backend.loop_range(product, count, rows.shape[0])

    def _by_differences(
        self, state: State, batch: Batch, rows: Tensor, count: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        layout, loss = self.evaluation.loss.layout, self.evaluation.loss

        def gradient_at(values: list[Tensor]) -> list[Tensor]:
            at = of_values(loss, state.others, batch)
            return list(backend.gradient(at, dict(enumerate(values)))[2].values())

        def product(i: Any) -> Tensor:
            direction = list(layout.parted(rows[i]).values())
            return layout.joined(difference_product(gradient_at, values, direction))

        values = backend.values(state.values)
        return loss(state, batch), backend.loop_range(product, count, rows.shape[0])

    def _gradient(
        self, state: State, batch: Batch
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        at = of_values(self.evaluation.loss, state.others, batch)
        loss, _, gradient = backend.gradient(at, dict(enumerate(state.values)))
        flat = self.evaluation.loss.layout.joined(list(gradient.values()))
        return loss, (loss, flat)

    def loss(self) -> Tensor:
        """The loss on the probe data, a scalar tensor."""
        return self.evaluation.mean_loss()

    def value_and_gradient(self) -> tuple[Tensor, Tensor]:
        """The loss (scalar tensor) and its flat gradient `(P,)` on the probe data."""
        value, gradient = self._loss_and_gradient()
        return value, gradient

    # Conversions

    def split(self, flat: Any) -> list[Any]:
        """A flat vector as a list of arrays shaped like the variables."""
        return self.evaluation.loss.layout.split(flat)

    def flatten(self, arrays: Sequence[Any]) -> Any:
        """A list of arrays shaped like the variables as one flat vector.

        Raises:
            ValueError: if their number or shapes do not fit the variables.
        """
        return self.evaluation.loss.layout.flatten(arrays)

    def structured(self, flat: Any) -> Any:
        """A flat NumPy vector as arrays in the structure of the parameters.

        A list for a model; for a function of parameters what it takes.
        """
        arrays, loss = self.split(flat), self.evaluation.loss
        return loss.pack(arrays) if isinstance(loss, FunctionLoss) else arrays

    def to_dense(self) -> np.ndarray:
        """The Hessian as a NumPy array of shape (P, P): P products, P² numbers."""
        size, width = self.shape[0], backend.PRODUCTS_PER_PASS
        dense = np.empty(self.shape, self.dtype)
        with self.still():
            for start in range(0, size, width):
                # The last block is as wide as the others, so that it is compiled once.
                basis = np.eye(size, width, -start, self.dtype)
                dense[:, start : start + width] = (self @ basis)[:, : size - start]
        return dense

    def to_scipy(self) -> Any:
        """The operator as a `scipy.sparse.linalg.LinearOperator` on NumPy arrays."""
        from scipy.sparse.linalg import LinearOperator

        return LinearOperator(
            self.shape,
            matvec=lambda v: self @ np.ravel(v),
            rmatvec=lambda v: self @ np.ravel(v),
            matmat=lambda v: self @ v,
            rmatmat=lambda v: self @ v,
            dtype=self.dtype,
        )


def _is_auto(batch_size: Any) -> bool:
    return isinstance(batch_size, str) and batch_size == "auto"


def _fit_to_memory(evaluation: Evaluation) -> Need:
    """Splits the batches so that a probe fits into memory, where that is the same."""
    need, whole = Need.of(evaluation), evaluation.data
    loss, fitting = evaluation.loss, need.fitting()
    small = fitting is None or fitting >= whole.largest
    evaluation.adapts = not (
        isinstance(loss, TrainingLoss) and loss.takes_batch_statistics
    )
    if not small and evaluation.adapts:
        evaluation.data = whole.in_parts(fitting)
        evaluation.adapts = evaluation.differs_by_grouping() is None
    if not small and not evaluation.adapts:
        evaluation.data = whole
        _warn(
            "The probe data may not fit into memory, and in smaller batches the "
            "figures would be others: the loss is not a mean over samples, or "
            "BatchNormalization takes the statistics of the batch. It stays as it is: "
            f"{need.told(whole)}. Take fewer samples, or give `batch_size` a number."
        )
    return need


def _check_hvp(hvp: str, half_precision: bool = False) -> None:
    if hvp not in ("tape", "finite_difference"):
        raise ValueError(
            f'`hvp` must be "tape" or "finite_difference". Received: hvp={hvp!r}.'
        )
    if half_precision and hvp != "tape":
        raise ValueError(
            "Differences of gradients are mostly rounding in half precision. Received: "
            f'hvp={hvp!r}, half_precision=True. Use hvp="tape", or leave '
            "`half_precision` off."
        )


def _tell(evaluation: Evaluation, by_tape: bool) -> None:
    """Warns of what is known to be wrong with the derivatives of a loss."""
    loss, findings = evaluation.loss, evaluation.loss.findings
    names = [loss.layout.names[i] for i in sorted(findings.unconnected)]
    if names:
        _warn(
            "The loss does not depend on these variables; their curvature is "
            f"zero: {', '.join(names)}."
        )

    if isinstance(loss, TrainingLoss) and loss.unwrapped:
        fails = " Training such a model fails there (keras#21207)."
        _warn(
            f"On {_FRAMEWORK}, layers that were made in a `keras.RematScope` run "
            "without gradient checkpointing while curvature is measured, and take the "
            f"memory of other layers: {', '.join(loss.unwrapped)}."
            + (fails if _FRAMEWORK == "TensorFlow" else "")
        )

    def places(kind: str) -> str:
        return _places(loss, [c for c in findings.caveats if c.kind == kind])

    if places("random"):
        raise ValueError(
            "The loss draws other random numbers each time it is computed, so that no "
            "two products would be of the same Hessian. Received: "
            f"{places('random')}. Draw with `keras.random` and a "
            "`keras.random.SeedGenerator`, which stays as it is meanwhile, or with a "
            "fixed seed (`tf.random.stateless_uniform` and its like, a "
            "`torch.Generator` that is seeded at each call); or use training=False, if "
            "it draws in training only."
        )
    if by_tape and places("second_derivative"):
        _warn(
            f"{_FRAMEWORK} lacks the second derivative of these operations and takes "
            f"it for zero without an error: {places('second_derivative')}. The Hessian "
            "is wrong. Use central differences of the gradient: "
            'hvp="finite_difference".'
        )
    if places("gradient"):
        _warn(
            "These operations stop gradients on their way from the loss to the "
            f"variables: {places('gradient')}. What they return counts as a constant, "
            "in the gradient and in the Hessian: this is the Hessian of the loss with "
            "that quantity held fixed, and not the derivative of the gradient that "
            "training follows."
        )
    if by_tape and evaluation.jit_compile and places("xla"):
        _warn(
            "XLA gets second derivatives of max-pooling wrong: "
            f"{places('xla')}. The Hessian is wrong. Use jit_compile=False."
        )


def _in_inference(evaluation: Evaluation) -> Evaluation:
    """The same loss as in inference."""
    loss: Any = evaluation.loss
    return Evaluation(loss.as_in_inference(), evaluation.data)


def _tell_of_grouping(evaluation: Evaluation) -> None:
    """Warns where a mean over batches is not the loss of all samples together.

    That BatchNormalization takes the statistics of each batch is meant, and the reason
    why it is compared as in inference.
    """
    loss = evaluation.loss
    if isinstance(loss, TrainingLoss) and loss.takes_batch_statistics:
        compared = evaluation.once(_in_inference)
        compared.data, evaluation = evaluation.data, compared
    means = evaluation.differs_by_grouping()
    if means is not None:
        _warn(
            "The loss is not a mean over samples (a sum, a mean over unmasked steps or "
            "by the sum of weights, a penalty on a whole batch, or layers that mix the "
            "samples of a batch). With several batches, all figures are those of the "
            "mean over these batches, weighted by their sizes; other batches of the "
            "same samples give others: near the present weights, the mean loss is "
            f"{means[0]:.6g} in one grouping and {means[1]:.6g} in another. Put all "
            "samples into one batch, or use the batches of training.",
            stacklevel=4,
        )


def _warn(message: str, stacklevel: int = 5) -> None:
    # The line that made the operator, past its own constructor.
    warnings.warn(message, stacklevel=stacklevel)


def _places(loss: Loss, caveats: list[Caveat]) -> str:
    """Operations by type, with their layer where the name tells it."""
    layers = (
        {layer.name for layer in loss.layers()}
        if isinstance(loss, TrainingLoss)
        else set()
    )
    places: list[str] = []
    for caveat in caveats:
        name = caveat.name
        # Keras opens the scope of a layer twice: the second one has a suffix.
        parts = [re.sub(r"_\d+$", "", p) for p in name.split("/")]
        inside = [p for p in name.split("/") + parts if p in layers]
        place = f"in layer {inside[-1]!r}" if inside else f"({name})"
        place = f"{caveat.operation} {place}"
        if place not in places:
            places.append(place)
    return ", ".join(places)
