"""The Hessian over the trainable variables, as a matrix that is never formed."""

import functools
import re
import warnings

import keras
import numpy as np
from keras import ops

from keras_curvature import backend
from keras_curvature.data import ProbeData
from keras_curvature.operators.layer_outputs import LayerOutputHessian
from keras_curvature.probe import FunctionProbe, Probe

#: Products that share one forward pass and gradient; more make the graph larger for
#: little gain (k products cost about 1 + 1.35 k gradients).
PRODUCTS_PER_PASS = 4


class HessianOperator:
    """The symmetric P×P Hessian of a model's training loss, through its products.

    H is the Hessian of the mean loss over the probe data, at the current values of
    the variables: when they change, so does the operator. A product costs 2 to 2.5
    gradients (tape over tape, compiled once), P×P numbers are never stored.

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
        x: inputs: arrays, or a `tf.data.Dataset` or `keras.utils.PyDataset` that
            also holds targets and weights. A data set is read anew for each pass;
            H is then the mean over its batches, weighted by their sizes.
        y: targets.
        sample_weight: weights of the samples.
        class_weight: dictionary from class index to weight, as in `Model.fit`.
        loss_fn: `loss_fn(model, x, y)` returning the scalar loss, for models that
            are not compiled with one.
        variables: Keras variables to differentiate by. Defaults to
            `model.trainable_variables`.
        training: whether layers run in training mode. Defaults to `False`.
        batch_size: splits arrays into chunks of this many samples whose products
            are summed, for probes larger than memory. For losses that are means
            over samples the result is the same; others give the mean over the
            chunks, weighted by size, and a warning.
        hvp: `"tape"` (exact) or `"finite_difference"`: central differences of the
            gradient, for operations without a second derivative. Their relative
            error is about 1e-4 to 1e-3 in float32 and 1e-9 in float64, and large
            where the gradient jumps (relu, max-pooling).
        jit_compile: whether XLA compiles the products. Right unless the model has
            max-pooling, and slower on a CPU. Defaults to `False`.

    Raises:
        ValueError: for a model without loss or variables, inconsistent data, or an
            unknown `hvp`.
    """

    def __init__(
        self,
        model,
        x,
        y=None,
        sample_weight=None,
        *,
        class_weight=None,
        loss_fn=None,
        variables=None,
        training=False,
        batch_size=None,
        hvp="tape",
        jit_compile=False,
    ):
        self._initialize(
            Probe(model, loss_fn, variables, training), hvp, jit_compile, class_weight
        )
        self.set_data(x, y, sample_weight, batch_size=batch_size)
        if batch_size is not None:
            self._check_chunks()

    @classmethod
    def from_function(cls, loss_fn, variables, *, hvp="tape", jit_compile=False):
        """The Hessian of any scalar function of variables; no model needed.

        ```python
        x = tf.Variable([1.0, 2.0])
        op = HessianOperator.from_function(lambda: x[0] ** 2 * x[1], [x])
        op.to_dense()                            # [[4., 2.], [2., 0.]]
        ```

        Args:
            loss_fn: function without arguments that reads `variables` and returns a
                scalar. It is compiled: Python side effects happen once.
            variables: TensorFlow or Keras variables.
            hvp: as for the class.
            jit_compile: as for the class.

        Returns:
            A `HessianOperator`.
        """
        op = cls.__new__(cls)
        op._initialize(FunctionProbe(loss_fn, variables), hvp, jit_compile)
        op.data = ProbeData.none()
        op._build()
        return op

    def _initialize(self, probe, hvp, jit_compile, class_weight=None):
        if hvp not in ("tape", "finite_difference"):
            raise ValueError(
                f'`hvp` must be "tape" or "finite_difference". Received: hvp={hvp!r}.'
            )
        self.probe = probe
        self.hvp = hvp
        self.on_batch = None
        self._jit_compile = jit_compile
        self._class_weight = class_weight
        self._compiled = {}
        self._built = False
        self._named_unconnected = False
        self._named_silent_errors = False

    def set_data(self, x, y=None, sample_weight=None, *, batch_size=None):
        """Moves the operator to other data; nothing is traced again.

        Args:
            x: inputs or data set, as for the class.
            y: targets.
            sample_weight: weights of the samples.
            batch_size: number of samples processed at once.
        """
        data = ProbeData(
            x,
            y,
            sample_weight,
            class_weight=self._class_weight,
            batch_size=batch_size,
            device=self.device,
        )
        self.data = data
        self._build()

    def _build(self):
        if self._built:
            return
        self.probe.build(self.data.first())
        self.variables = self.probe.variables
        for v in self.variables:
            if "float" not in keras.backend.standardize_dtype(v.dtype):
                raise ValueError(
                    "A Hessian needs floating-point variables. Received: "
                    f"{_name(v)} of dtype {v.dtype}."
                )
        self.shapes = [tuple(v.shape) for v in self.variables]
        self.sizes = [int(np.prod(shape)) for shape in self.shapes]
        sources = backend.values_of(self.probe.sources())
        self._dtypes = [s.dtype.name for s in sources]
        self.dtype = np.result_type(*[s.dtype.as_numpy_dtype for s in sources])
        self.shape = (sum(self.sizes),) * 2
        self._built = True

    @property
    def device(self):
        """Name of the device that holds the variables and does the work."""
        variables = self.probe.variables
        return backend.device_of(variables[0]) if variables else ""

    def __repr__(self):
        return (
            f"<HessianOperator {self.shape[0]}×{self.shape[0]} {self.dtype.name}, "
            f"{len(self.variables)} variables>"
        )

    @functools.cached_property
    def layer_outputs(self):
        """The same Hessian over the layers' outputs: a `LayerOutputHessian`."""
        return LayerOutputHessian(self)

    # Products

    def __matmul__(self, v):
        """`H v`.

        Args:
            v: flat vector `(P,)`, a block of vectors `(P, k)`, or a list of arrays
                shaped like the variables. A tensor stays on the device.

        Returns:
            The product, in the form of `v`.

        Raises:
            ValueError: if the shape does not fit.
        """
        if isinstance(v, (list, tuple)):
            return self.split(self @ self.flatten(v))
        if not backend.is_tensor(v):
            v = np.asarray(v)
            dtype = np.result_type(v.dtype, self.dtype)
            with backend.on_device(self.device):
                v = backend.array(v, self.dtype)
            return ops.convert_to_numpy(self @ v).astype(dtype, copy=False)
        if len(v.shape) not in (1, 2) or v.shape[0] != self.shape[0]:
            raise ValueError(
                f"The operator has shape {self.shape}: it multiplies vectors of "
                f"shape ({self.shape[0]},), blocks of shape ({self.shape[0]}, k), "
                "and lists of arrays shaped like the variables. Received: shape "
                f"{tuple(v.shape)}."
            )
        with backend.on_device(self.device):
            if len(v.shape) == 1:
                return self._multiply(v[:, None])[:, 0]
            return self._multiply(v)

    def _multiply(self, block):
        """`H V` for a tensor of shape (P, k), a few columns a pass."""
        block = backend.array(block, self.dtype)
        count = int(block.shape[1])
        if not count:
            return block
        results, start = [], 0
        while start < count:
            # Full groups and single products: two graphs, whatever the count.
            width = PRODUCTS_PER_PASS if count - start >= PRODUCTS_PER_PASS else 1
            columns = block[:, start : start + width]
            results.append(self.mean_over_batches(self._products, width, columns))
            start += width
        return results[0] if len(results) == 1 else ops.concatenate(results, axis=1)

    def _products(self, batch, columns):
        probe = self.probe
        if self.hvp == "finite_difference":

            def gradient_at(values):
                with probe.at(values) as sources:
                    return self._gradient(sources, batch)[1]

            values = backend.values_of(probe.sources())
            directions = [self._split(c) for c in ops.unstack(columns, axis=1)]
            products = backend.finite_difference_products(
                gradient_at, values, directions
            )
            return ops.stack([self._flatten(p) for p in products], axis=1)
        sources = probe.sources()
        tapes = backend.GradientProducts(
            lambda watch: probe.loss(sources, batch), sources
        )
        self._name_unconnected(tapes.gradients)
        self._name_silent_errors(tapes)
        rows = ops.transpose(columns)
        products = backend.loop_over_range(
            lambda i: self._flatten(tapes.product(self._split(rows[i]))),
            columns.shape[1],
            self.dtype.name,
        )
        return ops.transpose(products)

    def _gradient(self, sources, batch):
        loss, gradients = backend.gradient(
            lambda: self.probe.loss(sources, batch), sources
        )
        self._name_unconnected(gradients)
        return loss, [
            ops.zeros(shape, s.dtype.name) if g is None else g
            for g, s, shape in zip(gradients, sources, self.shapes, strict=True)
        ]

    def _value_and_gradient(self, batch):
        loss, gradients = self._gradient(self.probe.sources(), batch)
        return loss, self._flatten(gradients)

    def loss(self):
        """The loss on the probe data, a scalar tensor."""
        return self.mean_over_batches(
            lambda batch: self.probe.loss(self.probe.sources(), batch), "loss"
        )

    def value_and_gradient(self):
        """The loss (scalar tensor) and its flat gradient `(P,)` on the probe data."""
        return self.mean_over_batches(self._value_and_gradient, "gradient")

    def mean_over_batches(self, function, key, *args, numbered=False):
        """The mean of a function of a batch over the data, weighted by size.

        Args:
            function: as for `ProbeData.mean`; compiled on first use.
            key: names the compiled function; the same key must always come with the
                same function.
            *args: further arguments of `function`.
            numbered: whether `function` receives the number of the batch.

        Returns:
            What `function` returns, averaged.

        Raises:
            NotImplementedError: if an operation has no second derivative.
        """
        if key not in self._compiled:
            self._compiled[key] = backend.compiled(function, self._jit_compile)
        try:
            return self.data.mean(
                self._compiled[key], *args, numbered=numbered, on_batch=self.on_batch
            )
        except LookupError as error:
            if "gradient registry" not in str(error) and "No gradient" not in str(
                error
            ):
                raise  # A KeyError of the user's own function, for instance.
            raise NotImplementedError(
                "An operation of the model has no second derivative in TensorFlow "
                f"({error}). Use central differences of the gradient instead: "
                'hvp="finite_difference".'
            ) from error

    def _name_unconnected(self, gradients):
        names = [
            _name(v)
            for v, g in zip(self.variables, gradients, strict=True)
            if g is None
        ]
        if names and not self._named_unconnected:
            self._named_unconnected = True
            warnings.warn(
                "The loss does not depend on these variables; their curvature is "
                f"zero: {', '.join(names)}.",
                stacklevel=2,
            )

    def _name_silent_errors(self, tapes):
        """While tracing: warns once of operations that make the product wrong."""
        if self._named_silent_errors:
            return
        self._named_silent_errors = True
        found = backend.silent_errors(tapes.sources, tapes.gradients)
        if found["second_derivative"]:
            warnings.warn(
                "TensorFlow lacks the second derivative of these operations and takes "
                "it for zero without an error: "
                f"{self._places(found['second_derivative'])}. The Hessian is wrong. "
                'Use central differences of the gradient: hvp="finite_difference".',
                stacklevel=2,
            )
        if found["gradient"]:
            warnings.warn(
                "These operations stop gradients on their way from the loss to the "
                f"variables: {self._places(found['gradient'])}. What they return "
                "counts as a constant, in the gradient and in the Hessian: this is "
                "the Hessian of the loss with that quantity held fixed, and not the "
                "derivative of the gradient that training follows.",
                stacklevel=2,
            )
        if found["xla"] and self._jit_compile:
            warnings.warn(
                "XLA gets second derivatives of max-pooling wrong: "
                f"{self._places(found['xla'])}. The Hessian is wrong. Use "
                "jit_compile=False.",
                stacklevel=2,
            )

    def _places(self, operations):
        """Operations by type, with their layer where the name tells it."""
        layers = {layer.name for layer in self.probe.layers()}
        places = []
        for kind, name in operations:
            # Keras opens the scope of a layer twice: the second one has a suffix.
            parts = [re.sub(r"_\d+$", "", p) for p in name.split("/")]
            inside = [p for p in name.split("/") + parts if p in layers]
            place = f"{kind} in layer {inside[-1]!r}" if inside else f"{kind} ({name})"
            if place not in places:
                places.append(place)
        return ", ".join(places)

    def _check_chunks(self):
        """Warns when the loss of a chunk is not the mean of its parts' losses.

        Compares parts of chunks, because the whole probe may not fit into memory.
        """
        if self.data.num_batches == 1:
            return
        loss = backend.compiled(
            lambda batch: self.probe.loss(self.probe.sources(), batch)
        )
        expected, mean = (float(d.mean(loss)) for d in (self.data, self.data.halved()))
        if not np.isclose(mean, expected, rtol=1e-3, atol=1e-6):
            warnings.warn(
                "The loss is not a mean over samples (a sum, a mean over unmasked "
                "steps, or a penalty on a whole batch): with `batch_size` the "
                "result is the mean over the chunks, weighted by their sizes. "
                f"Mean loss over the chunks: {expected:.6g}, over chunks of half the "
                f"size: {mean:.6g}.",
                stacklevel=3,
            )

    # Conversions

    def split(self, flat):
        """A flat vector as a list of arrays shaped like the variables."""
        ends = np.cumsum(self.sizes)
        return [
            (ops.reshape if backend.is_tensor(flat) else np.reshape)(
                flat[end - size : end], shape
            )
            for end, size, shape in zip(ends, self.sizes, self.shapes, strict=True)
        ]

    def flatten(self, arrays):
        """A list of arrays shaped like the variables as one flat vector.

        Raises:
            ValueError: if their number or shapes do not fit the variables.
        """
        shapes = [tuple(np.shape(a)) for a in arrays]
        if shapes != self.shapes:
            raise ValueError(
                "A list must hold one array for each variable, of its shape: "
                f"{self.shapes}. Received: {shapes}."
            )
        if any(backend.is_tensor(a) for a in arrays):
            return self._flatten(arrays)
        return np.concatenate([np.ravel(a) for a in arrays])

    def _split(self, flat):
        """`split` while tracing, in the dtypes of the variables."""
        return [
            ops.cast(p, dtype)
            for p, dtype in zip(self.split(flat), self._dtypes, strict=True)
        ]

    def _flatten(self, tensors):
        return ops.concatenate(
            [ops.reshape(backend.array(t, self.dtype), (-1,)) for t in tensors]
        )

    def to_dense(self):
        """The Hessian as a NumPy array of shape (P, P): P products, P² numbers."""
        size = self.shape[0]
        dense = np.empty(self.shape, self.dtype)
        for start in range(0, size, PRODUCTS_PER_PASS):
            # The last block is as wide as the others, so that one graph does it all.
            basis = np.eye(size, PRODUCTS_PER_PASS, -start, self.dtype)
            dense[:, start : start + PRODUCTS_PER_PASS] = (self @ basis)[
                :, : size - start
            ]
        return dense

    def to_scipy(self):
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


def _name(variable):
    return getattr(variable, "path", None) or variable.name
