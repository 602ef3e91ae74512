"""DiagonalNewton in `fit`: what Keras does around an optimizer must go on working."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_curvature.optimizers import DiagonalNewton

SAMPLES, WIDTH = 16, 3
BACKEND = keras.backend.backend()

#: On PyTorch, Keras knows no more than one step in an execution.
PER_EXECUTION = 1 if BACKEND == "torch" else 4

#: `jit_compile` runs `torch.compile` there, which needs a C++ compiler and minutes.
xla = pytest.mark.skipif(BACKEND == "torch", reason="XLA compiles for the others")


class Deliver(keras.callbacks.Callback):
    """Hands over a made-up diagonal before training and after every execution."""

    def __init__(self, diagonal=None):
        super().__init__()
        self._diagonal = diagonal or (
            lambda optimizer, variable, i: np.cos(
                i + 3 * ops.convert_to_numpy(variable)
            )
        )
        self.delivered = []

    def deliver(self):
        optimizer = self.model.optimizer
        if not optimizer.built:
            # Only then: LossScaleOptimizer adds its variables once more each time.
            optimizer.build(self.model.trainable_variables)
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        number = int(optimizer.iterations + 0)
        self.delivered.append(number)
        taken = optimizer.update_hessian_diagonal(
            [
                self._diagonal(optimizer, variable, number)
                for variable in self.model.trainable_variables
            ]
        )
        assert taken

    def on_train_begin(self, logs=None):
        optimizer = self.model.optimizer
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        if not optimizer.curvature_updates:
            self.deliver()

    def on_train_batch_end(self, batch, logs=None):
        self.deliver()


def data(samples=SAMPLES, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, WIDTH))
    return x, x @ [[1.0], [-2.0], [0.5]] + 0.1 * rng.standard_normal((samples, 1))


def mlp(optimizer, *between, **arguments):
    """Two kernels, one of them with axes of its own, and a bias; and what is between.

    Each variable makes the step larger that is traced and compiled.
    """
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            layers.Input((WIDTH,)),
            layers.Dense(4, activation="tanh"),
            *between,
            layers.Dense(1, use_bias=False),
        ]
    )
    model.compile(optimizer=optimizer, loss="mse", **arguments)
    return model


def fit(model, epochs=1, callbacks=None, **arguments):
    x, y = data()
    arguments = {"batch_size": 4, "shuffle": False, "verbose": 0} | arguments
    callbacks = [Deliver()] if callbacks is None else callbacks
    return model.fit(x, y, epochs=epochs, callbacks=callbacks, **arguments)


def weights(model):
    return [v.numpy() for v in model.variables + model.optimizer.variables]


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


# Against NumPy, through the compiled training step


SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.5, 3, 0.7)


@pytest.mark.parametrize(
    "mode",
    [
        {},
        pytest.param({"jit_compile": True}, marks=xla),
        {"steps_per_execution": PER_EXECUTION},
        {"weight_decay": 0.1},
        {"clipnorm": 0.5},
        {"global_clipnorm": 0.5},
        {"gradient_accumulation_steps": 2},
        {"use_ema": True, "ema_momentum": 0.6},
        {"loss_scale_factor": 64.0},
    ],
    ids=lambda mode: next(iter(mode), "plain"),
)
def test_trajectory_in_fit(mode, float64):
    """A linear model, 12 batches: schedule, deliveries and Keras' own options.

    The learning rate must be the schedule's at each step, and a diagonal delivered
    after a batch must count in the next.
    """
    options = dict(mode)
    jit_compile = options.pop("jit_compile", False)
    per_execution = options.pop("steps_per_execution", 1)
    optimizer = DiagonalNewton(SCHEDULE, beta_2=0.6, **options)
    model = keras.Sequential([layers.Input((WIDTH,)), layers.Dense(1, use_bias=False)])
    model.layers[0].kernel.assign([[0.3], [0.2], [-0.4]])
    model.compile(
        optimizer=optimizer,
        loss="mse",
        steps_per_execution=per_execution,
        jit_compile=jit_compile,
    )

    def diagonal(optimizer, variable, i):
        return np.cos(i + np.arange(3.0))[:, None]

    deliver = Deliver(diagonal)
    fit(model, epochs=3, callbacks=[deliver])

    x, y = data()
    w, average, reference = np.array([[0.3], [0.2], [-0.4]]), 0.0, Reference(0.6)
    every = mode.get("gradient_accumulation_steps", 1)
    held = np.zeros_like(w)
    reference.deliver(diagonal(None, None, 0))
    for batch in range(12):
        rows = slice(4 * (batch % 4), 4 * (batch % 4) + 4)
        held += 2 * x[rows].T @ (x[rows] @ w - y[rows]) / 4 / every
        if (batch + 1) % every == 0:
            rate = 0.5 * 0.7 ** (batch / 3)
            norm = np.linalg.norm(held)
            if norm > 0.5 and ("clipnorm" in mode or "global_clipnorm" in mode):
                held *= 0.5 / norm
            w = w - rate * mode.get("weight_decay", 0.0) * w
            w = w - rate * reference.direction(held, w)
            held = np.zeros_like(w)
        momentum = 0.6 if batch else 0.0
        average = momentum * average + (1 - momentum) * w
        if (batch + 1) % per_execution == 0:
            reference.deliver(diagonal(None, None, (batch + 1) // every))
    expected = average if mode.get("use_ema") else w
    # The schedule is evaluated in float32.
    np.testing.assert_allclose(model.layers[0].kernel.numpy(), expected, 1e-6)
    assert optimizer.curvature_updates == 1 + 12 // per_execution


class Reference:
    """The formula of `DiagonalNewton`'s docstring, with its defaults, in NumPy."""

    def __init__(self, beta_2):
        self.beta_2, self.m, self.v, self.h = beta_2, 0.0, 0.0, 0.0
        self.steps = self.updates = 0

    def deliver(self, diagonal):
        self.updates += 1
        self.h = (1 - self.beta_2) * diagonal + self.beta_2 * self.h

    def direction(self, gradient, values):
        self.steps += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        m = self.m / (1 - 0.9**self.steps)
        usual = np.sqrt(self.v / (1 - 0.999**self.steps))
        h = np.abs(self.h / (1 - self.beta_2**self.updates))
        followed = np.clip((gradient + m) / 2, -usual, usual)
        return followed / (h + usual / np.hypot(0.1, 0.3 * values))


def test_weight_decay_exclusions():
    """Excluded variables decay by nothing, the others by the rate times the decay."""
    optimizer = DiagonalNewton(0.5, weight_decay=0.2)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    model = keras.Sequential([layers.Input((WIDTH,)), layers.Dense(2)])
    dense = model.layers[0]
    dense.bias.assign([1.0, 2.0])
    before = dense.kernel.numpy()
    optimizer.build(model.trainable_variables)
    optimizer.update_hessian_diagonal([np.ones((WIDTH, 2)), np.ones(2)])
    optimizer.apply([ops.zeros((WIDTH, 2)), ops.zeros(2)])
    np.testing.assert_array_equal(dense.bias.numpy(), [1.0, 2.0])
    np.testing.assert_allclose(dense.kernel.numpy(), 0.9 * before, 1e-6)


@pytest.mark.parametrize(
    ("options", "decay"),
    [({}, 0.01), ({"axes": None}, 0.0), ({"weight_decay": 0}, 0.0)],
    ids=["axes", "entries", "none"],
)
def test_what_has_axes_decays_by_default(options, decay):
    """Kernels with two sides, and neither vectors nor single columns.

    Nor what is excluded; and nothing any more once there is curvature.
    """
    optimizer = DiagonalNewton(0.5, **options)
    optimizer.exclude_from_weight_decay(var_names=["excluded"])
    variables = [keras.Variable(np.ones(s)) for s in ((4, 3), (4, 1), (3,))]
    variables.append(keras.Variable(np.ones((4, 3)), name="excluded"))
    optimizer.build(variables)
    zeros = [ops.zeros(v.shape) for v in variables]
    expected = (1 - 0.5 * decay, 1, 1, 1)
    for _ in range(2):
        optimizer.apply(zeros)
        for variable, value in zip(variables, expected, strict=True):
            np.testing.assert_allclose(ops.convert_to_numpy(variable), value, 1e-6)
        optimizer.update_hessian_diagonal(zeros)
    again = DiagonalNewton.from_config(optimizer.get_config())
    assert again.get_config() == optimizer.get_config()
    assert again.get_config()["weight_decay"] == options.get("weight_decay")


# Save and resume


@pytest.mark.parametrize(
    "options, compiling",
    [
        ({"normalized": True}, {"jit_compile": False}),
        pytest.param({}, {"jit_compile": True}, marks=xla),
        ({"gradient_accumulation_steps": 3}, {}),
        (
            {
                "use_ema": True,
                "ema_overwrite_frequency": 3,
                "weight_decay": 0.01,
                "global_clipnorm": 1.0,
            },
            {"steps_per_execution": PER_EXECUTION},
        ),
        ({"mixed": True, "learning_rate": SCHEDULE}, {}),
        ({"axes": "layer", "weight_decay": 0.01}, {}),
        pytest.param({"axes": "layer"}, {"jit_compile": True}, marks=xla),
        ({"axes": "layer", "gradient_accumulation_steps": 2}, {}),
        ({"axes": "layer", "mixed": True}, {}),
    ],
    ids=[
        "plain",
        "xla",
        "accumulation",
        "ema_decay_clip",
        "mixed_schedule",
        "axes_decay",
        "axes_xla",
        "axes_accumulation",
        "axes_mixed",
    ],
)
def test_resumes_bit_for_bit(options, compiling, tmp_path):
    """Saved as `.keras` in mid-training, curvature included."""
    options = dict(options)
    mixed = options.pop("mixed", False)
    between = [layers.BatchNormalization()] * options.pop("normalized", False)
    keras.config.set_dtype_policy("mixed_float16" if mixed else "float32")
    try:
        model = mlp(DiagonalNewton(**options), *between, **compiling)
        fit(model, 2)
        model.save(tmp_path / "model.keras")
        # With `use_ema` on JAX, Keras leaves weights and their averages in the same
        # buffers, and the next `fit` fails, whatever the optimizer (3.15.1).
        model.set_weights(model.get_weights())
        fit(model, 2)
        again = keras.models.load_model(tmp_path / "model.keras")
        with warnings.catch_warnings():
            # In particular not the one that curvature is missing.
            warnings.simplefilter("error", UserWarning)
            fit(again, 2)
    finally:
        keras.config.set_dtype_policy("float32")
    assert_same(weights(model), weights(again))
    optimizer = getattr(again.optimizer, "inner_optimizer", again.optimizer)
    assert isinstance(optimizer, DiagonalNewton)
    assert optimizer.curvature_updates > 4


# Kinds of models and of training


def test_mixed_float16():
    """`LossScaleOptimizer` wraps it; slots are float32; a skipped step is skipped."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = mlp(DiagonalNewton())
        fit(model, 3)
    finally:
        keras.config.set_dtype_policy("float32")
    outer = model.optimizer
    assert isinstance(outer, keras.optimizers.LossScaleOptimizer)
    inner = outer.inner_optimizer
    assert {v.dtype for v in inner._curvatures} == {"float32"}
    before = [v.numpy() for v in inner.variables]
    x, y = data()
    model.train_on_batch(x, np.inf * y)
    assert_same(before, [v.numpy() for v in inner.variables])


@pytest.mark.parametrize(
    "options",
    [{}, {"clipnorm": 0.1}, {"global_clipnorm": 0.1}, {"clipvalue": 0.1}]
    + [{"gradient_accumulation_steps": 2}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_embedding(options):
    """Sparse gradients, with words that occur twice, step like dense ones."""
    ends = []
    tokens = np.array([[0, 1, 1, 3], [3, 3, 2, 1]] * 4)
    for sparse in (True, False):
        keras.utils.set_random_seed(0)
        inputs = layers.Input((4,), dtype="int32")
        table = layers.Embedding(6, 2)
        hidden = (
            table(inputs)
            if sparse
            else layers.Dense(2, use_bias=False)(ops.one_hot(inputs, 6))
        )
        outputs = layers.Dense(1, use_bias=False)(layers.Flatten()(hidden))
        model = keras.Model(inputs, outputs)
        rng = np.random.default_rng(3)
        for variable in model.trainable_variables:
            variable.assign(rng.standard_normal(variable.shape))
        model.compile(optimizer=DiagonalNewton(**options), loss="mse")
        model.fit(
            tokens,
            np.arange(8.0)[:, None],
            batch_size=2,
            epochs=3,
            shuffle=False,
            verbose=0,
            callbacks=[Deliver()],
        )
        ends.append([v.numpy() for v in model.trainable_variables])
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, 1e-4, 1e-6)


def test_learning_rate_can_be_set():
    """The rate is read at each step, not when the step is traced."""
    model = mlp(DiagonalNewton(0.1))
    fit(model)
    before = [v.numpy() for v in model.trainable_variables]
    model.optimizer.learning_rate = 0.0
    fit(model)
    assert_same(before, [v.numpy() for v in model.trainable_variables])


def test_frozen_layers_and_several_fits():
    """Frozen before compiling; unfrozen later by compiling anew."""
    model = mlp(DiagonalNewton())
    model.layers[0].trainable = False
    model.compile(optimizer=DiagonalNewton(), loss="mse")
    frozen = model.layers[0].kernel.numpy()
    deliver = Deliver()
    fit(model, callbacks=[deliver])
    fit(model, callbacks=[deliver])
    # The second fit goes on counting: 4 batches each, and one before the first step.
    assert deliver.delivered == list(range(9))
    np.testing.assert_array_equal(model.layers[0].kernel.numpy(), frozen)
    model.layers[0].trainable = True
    with pytest.raises(ValueError, match="compile the model again"):
        Deliver.deliver(deliver)
    model.compile(optimizer=DiagonalNewton(), loss="mse")
    fit(model)
    assert not np.array_equal(model.layers[0].kernel.numpy(), frozen)


@pytest.mark.parametrize("axes", ["layer", None])
def test_trains_without_curvature(axes):
    """One warning in a whole `fit`, none where there are axes; the loss goes down."""
    model = mlp(DiagonalNewton(axes=axes))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        history = fit(model, 20, callbacks=[])
    told = [w for w in warned if "CurvatureFeed" in str(w.message)]
    assert len(told) == (axes is None)
    assert history.history["loss"][-1] < 0.7 * history.history["loss"][0]


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch runs each step as it is")
def test_deliveries_do_not_retrace():
    model = mlp(DiagonalNewton())
    traces = []
    original = model.optimizer.update_step
    model.optimizer.update_step = lambda *a: (traces.append(1), original(*a))[1]
    fit(model)
    once = len(traces)
    fit(model, 3)
    assert len(traces) == once


@pytest.mark.parametrize(
    ("mixed", "axes"),
    [(False, None), (False, "layer"), (True, "layer")],
    ids=["entries", "axes", "mixed_float16"],
)
@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's own distribution")
def test_two_replicas(request, mixed, axes):
    """`MirroredStrategy`: as on one device; deliveries come from outside its scope."""
    import tensorflow as tf

    mirrored = request.getfixturevalue("mirrored")
    keras.config.set_dtype_policy("mixed_float16" if mixed else "float32")
    try:
        ends = []
        for strategy in (mirrored, tf.distribute.get_strategy()):
            with strategy.scope():
                optimizer = newton = DiagonalNewton(weight_decay=0.01, axes=axes)
                if mixed:
                    # Keras looks for overflow in the first replica alone: start low.
                    optimizer = keras.optimizers.LossScaleOptimizer(newton, 16.0)
                model = mlp(optimizer, jit_compile=False)
            fit(model, 2)
            assert newton.curvature_updates == 9
            assert newton.statistics()["curvature_age"] == 0
            ends.append(weights(model))
            for variable in newton.variables + model.trainable_variables:
                copies = getattr(variable.value, "values", [variable.value])
                assert_same([copies[0].numpy()] * len(copies), copies)
    finally:
        keras.config.set_dtype_policy("float32")
    # Sums in another order; half precision's eps is 1e-3.
    rtol = 2e-2 if mixed else 1e-4
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, rtol, rtol)
