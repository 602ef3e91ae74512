"""What only the PyTorch backend must do: see `test_contract` for the rest."""

import gc
import itertools
import weakref

import keras
import numpy as np
import pytest

if keras.backend.backend() != "torch":
    pytest.skip("PyTorch's own", allow_module_level=True)

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from keras_curvature import backend
from keras_curvature.backend import torch_derivatives

L = keras.layers


def numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def product(function, x, v=None):
    """`H v` of a scalar function of one tensor; `v` is 1 if not given."""
    recording = backend.record(lambda p: (function(p["x"]), {}), {"x": x})
    v = torch.ones_like(x) if v is None else v
    return recording.product(["x"], ["x"])({"x": v})["x"]


# Second derivatives of PyTorch's layers


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


def sequential(*layers):
    return lambda: torch.nn.Sequential(*[layer() for layer in layers])


MODULES = {
    "attention": (Attention, (2, 3, 4)),
    "lstm": (lambda: Recurrent(torch.nn.LSTM(3, 2, batch_first=True)), (2, 4, 3)),
    "gru": (lambda: Recurrent(torch.nn.GRU(3, 2, bidirectional=True)), (4, 2, 3)),
    "rnn": (lambda: Recurrent(torch.nn.RNN(3, 2)), (4, 2, 3)),
    "batch norm": (
        sequential(lambda: torch.nn.Linear(3, 4), lambda: torch.nn.BatchNorm1d(4)),
        (5, 3),
    ),
    "layer norm": (
        sequential(lambda: torch.nn.Linear(3, 4), lambda: torch.nn.LayerNorm(4)),
        (2, 3),
    ),
    "group norm": (
        sequential(lambda: torch.nn.Conv1d(2, 4, 2), lambda: torch.nn.GroupNorm(2, 4)),
        (2, 2, 5),
    ),
    "convolution": (
        sequential(
            lambda: torch.nn.Conv2d(2, 2, 2),
            torch.nn.SiLU,
            lambda: torch.nn.MaxPool2d(2),
            lambda: torch.nn.ConvTranspose2d(2, 2, 2),
        ),
        (2, 2, 5, 5),
    ),
    "resize": (
        sequential(
            lambda: torch.nn.Conv2d(1, 1, 2),
            lambda: torch.nn.Upsample(scale_factor=2, mode="bilinear"),
        ),
        (1, 1, 4, 4),
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_second_derivatives(name):
    """Against differences of the gradient, one after the other and all at once."""
    make, shape = MODULES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make().double()
    x = numbers(*shape)

    def function(point):
        return (torch.func.functional_call(module, point, x) ** 3).sum(), {}

    point = {n: p.detach() for n, p in module.named_parameters()}
    ways = [{n: numbers(*p.shape, seed=s) for n, p in point.items()} for s in range(2)]
    h = 1e-5  # Truncation is of the order of h², rounding of 1e-16 / h.
    with backend.twice_differentiable():
        run = backend.record(function, point).product(point, point)
        products = [run(v) for v in ways]
        stacked = {n: torch.stack([v[n] for v in ways]) for n in point}
        rows = [
            backend.map_range(
                lambda i, n=n: run({k: v[i] for k, v in stacked.items()})[n], 2
            )
            for n in point
        ]
        for v, found in zip(ways, products, strict=True):
            up, down = (
                backend.gradient(function, {n: p + s * v[n] for n, p in point.items()})
                for s in (h, -h)
            )
            expected = {n: (up[2][n] - down[2][n]) / (2 * h) for n in point}
            scale = max(float(e.abs().max()) for e in expected.values())
            for n in point:
                np.testing.assert_allclose(found[n], expected[n], atol=1e-7 * scale)
    for n, row in zip(point, rows, strict=True):
        np.testing.assert_allclose(
            row, torch.stack([p[n] for p in products]), atol=1e-12 * scale
        )


def test_sparse_gradients_are_made_dense():
    ids, table = torch.tensor([0, 2, 2]), numbers(3, 2)

    def loss(table):
        return (functional.embedding(ids, table, sparse=True) ** 2).sum()

    _, _, gradient = backend.gradient(lambda p: (loss(p["x"]), {}), {"x": table})
    assert not gradient["x"].is_sparse
    expected = table * torch.tensor([[2.0], [0.0], [4.0]])
    np.testing.assert_allclose(gradient["x"], expected)


def test_derivatives_where_no_graphs_are_built():
    x = numbers(3)
    expected = 6 * x
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            np.testing.assert_allclose(product(lambda x: (x**3).sum(), x), expected)
            assert not backend.examine(
                lambda p: ((p["x"] ** 3).sum(), {}), {"x": x}
            ).unconnected


# Graphs


class Mark:
    """Something that a graph keeps, whose life can be watched."""


class Marked(torch.autograd.Function):
    """The identity."""

    marks = weakref.WeakSet()

    @staticmethod
    def forward(ctx, x):
        ctx.mark = Mark()
        Marked.marks.add(ctx.mark)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g


def test_graphs_die_with_what_needs_them():
    """By counting references: memory must not wait for the garbage collector."""

    def function(p):
        hidden = torch.tanh(Marked.apply(p["x"]) @ p["x"])
        return (hidden**2).sum(), {"hidden": hidden}

    point = {"x": numbers(3, 3)}
    gc.collect()
    gc.disable()
    try:
        recording = backend.record(function, point)
        run = recording.product(["x"], ["x"])
        results = [run(point), run(point), recording.taps, recording.gradient]
        results += recording.pull_back(["hidden"], ["x"])(recording.taps).values()
        del recording
        assert len(Marked.marks) == 1 and run(point)
        del run
        assert not Marked.marks
        results.append(backend.gradient(function, point))
        results.append(backend.examine(function, point))
        results.append(backend.outline(lambda p: backend.gradient(function, p), point))
        results.append(backend.compiled(lambda p: function(p))(point))
        assert not Marked.marks
    finally:
        gc.enable()


def test_results_have_no_graph():
    parameter = torch.nn.Parameter(numbers(2))
    point = {"x": parameter, "idle": numbers(1), "slope": numbers(2)}

    def function(p):
        return (p["x"] ** 3).sum() + p["slope"].sum(), {
            "x": p["x"],
            "square": p["x"] ** 2,
        }

    recording = backend.record(function, point)
    results = [
        recording.loss,
        recording.taps,
        recording.gradient,
        recording.product(point, point)(point),
        recording.pull_back(["x", "square"], point)(recording.taps),
        backend.gradient(function, point),
        backend.compiled(lambda x: {"same": x, "other": [2 * x, None]})(parameter),
        backend.values([parameter, keras.Variable([1.0])]),
        backend.array(parameter),
        backend.array(parameter, "float32"),
        backend.array(keras.Variable([1.0])),
    ]
    tensors = [t for t in keras.tree.flatten(results) if t is not None]
    assert len(tensors) == 25 and not any(t.requires_grad for t in tensors)
    assert parameter.grad is None


# What derivatives leave out


class Opaque(torch.autograd.Function):
    """`Σ x³`, with a gradient that no graph sees, like a kernel's."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x**3).sum()

    @staticmethod
    def backward(ctx, g):
        with torch.no_grad():
            return 3 * ctx.saved_tensors[0] ** 2 * g


class Once(Opaque):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Noted(Opaque):
    """Keeps what it needs where nobody can see it."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return (x**3).sum()

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.x**2 * g.detach()


class Twice(Opaque):
    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


@pytest.mark.parametrize(
    "function, silent",
    [
        (Opaque.apply, "Opaque"),
        (lambda x: Opaque.apply(x) ** 2, "Opaque"),
        (lambda x: Opaque.apply(Doubled.apply(x)), "Opaque"),
        (lambda x: Noted.apply(x) ** 2, "Noted"),
        (Once.apply, "Once"),
        (lambda x: Once.apply(2 * x) ** 2, "Once"),
        (lambda x: Twice.apply(x) ** 2, None),
        (lambda x: Twice.apply(x), None),
        (lambda x: Doubled.apply(x).sum(), None),
        (lambda x: (Doubled.apply(x) ** 2).sum(), None),
        (lambda x: backend.hold_cotangent(x**2).pow(2).sum(), None),
        (lambda x: (x**2).sum() + 0 * Opaque.apply(x.detach()), None),
    ],
)
def test_silent_errors(function, silent):
    x = numbers(3)
    caveats = backend.examine(lambda p: (function(p["x"]), {}), {"x": x}).caveats
    assert [caveat.operation for caveat in caveats] == ([silent] if silent else [])
    if silent:
        assert caveats[0].kind == "second_derivative"
        assert caveats[0].name == f"{Opaque.__module__}.{silent}"
    if function in (Opaque.apply, Once.apply):
        # When this fails, PyTorch says so itself.
        np.testing.assert_array_equal(product(function, x), np.zeros(3))


@pytest.mark.parametrize(
    "function, operation",
    [
        (lambda x: torch.cdist(x, x + 1).sum(), "_cdist_backward"),
        (lambda x: functional.scaled_dot_product_attention(x, x, x).sum(), "attention"),
    ],
)
def test_missing_derivatives_are_named(function, operation):
    x = numbers(1, 1, 2, 2)
    recording = backend.record(lambda p: (function(p["x"]), {}), {"x": x})
    run = recording.product(["x"], ["x"])
    for call in (run, lambda v: backend.map_range(lambda i: run(v)["x"] * i, 2)):
        with pytest.raises(backend.NotTwiceDifferentiable, match=operation) as caught:
            call({"x": x})
        assert 'hvp="finite_difference"' in str(caught.value)
        assert isinstance(caught.value.__cause__, RuntimeError)


def test_other_errors_are_left_alone():
    recording = backend.record(lambda p: ((p["x"] ** 3).sum(), {}), {"x": numbers(2)})
    with pytest.raises(RuntimeError, match="shape") as caught:
        recording.product(["x"], ["x"])({"x": numbers(3)})
    assert not isinstance(caught.value, backend.NotTwiceDifferentiable)


# Exact second derivatives


def _asking_for_a_fused_kernel(x):
    """As Keras does on a GPU, in a context right around the call."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return functional.scaled_dot_product_attention(x, x, x).pow(2).sum()


def _by_a_name_of_its_own(x):
    return scaled_dot_product_attention(x, x, x).pow(2).sum()


@pytest.mark.parametrize("loss", [_asking_for_a_fused_kernel, _by_a_name_of_its_own])
def test_fused_attention_is_replaced(loss):
    x = numbers(1, 1, 3, 2)
    with backend.twice_differentiable():
        assert torch.isfinite(product(loss, x)).all()
    assert functional.scaled_dot_product_attention is scaled_dot_product_attention
    with pytest.raises(backend.NotTwiceDifferentiable):
        product(loss, x)


@pytest.mark.parametrize(
    "arguments",
    [
        {"reduction": "none"},
        {"blank": 2, "reduction": "none"},
        {},
        {"reduction": "sum"},
    ],
    ids=str,
)
def test_ctc_loss_has_the_values_of_the_original(arguments):
    """Plain for the arguments that Keras hands over, else the original itself."""
    x = numbers(6, 2, 5).log_softmax(-1)
    labels, lengths = (
        torch.tensor([[1, 3, 3], [3, 1, 0]]),
        torch.tensor([[6, 4], [3, 2]]),
    )
    expected = functional.ctc_loss(x, labels, *lengths, **arguments)
    with backend.twice_differentiable():
        actual = functional.ctc_loss(x, labels, *lengths, **arguments)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("layer", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
def test_recurrent_layers_run_without_cudnn(layer):
    module, x, seen = layer(2, 2), torch.ones(3, 1, 2), []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (torch.lstm, torch.gru, torch.rnn_tanh, torch.conv1d):
                seen.append(torch.backends.cudnn.enabled)
            return func(*args, **(kwargs or {}))

    before = torch.backends.cudnn.enabled
    with Watch():
        module(x)
        with backend.twice_differentiable():
            module(x)
            functional.conv1d(x, torch.ones(1, 1, 1))
        module(x)
    assert seen == [True, False, True, True]
    assert torch.backends.cudnn.enabled is before is True


def _settings():
    """Every setting of float32 precision, and what reading it says."""

    def read(setting):
        try:
            return setting()
        except RuntimeError:
            return "contradictory"

    return [product.fp32_precision for product in torch_derivatives._PRODUCTS] + [
        read(setting)
        for setting in (
            torch.get_float32_matmul_precision,
            lambda: torch.backends.cudnn.allow_tf32,
            lambda: torch.backends.cuda.matmul.allow_tf32,
        )
    ]


def _newer(precision):
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision


@pytest.mark.parametrize(
    "setting",
    [
        lambda: None,
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
        lambda: _newer("tf32"),
        lambda: _newer("ieee"),
    ],
)
def test_float32_is_not_rounded(setting):
    with torch_derivatives._full_precision():  # Restores what the setting changes.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
        setting()
        before = _settings()
        exact = ["ieee"] * len(torch_derivatives._PRODUCTS) + ["highest", False, False]
        with backend.twice_differentiable():
            assert _settings() == exact
            with backend.twice_differentiable():
                assert _settings() == exact
            assert _settings() == exact
        assert _settings() == before
        with pytest.raises(KeyError), backend.twice_differentiable():
            raise KeyError
        assert _settings() == before


# What results are computed from


def _in_place(x, y, z):
    w = x.clone()
    w[0] = y[0]
    return w


def _out(x, y, z):
    w = torch.zeros(3)
    torch.add(x, y, out=w)
    return w


def _foreach(x, y, z):
    w = [x.clone(), z.clone()]
    torch._foreach_add_(w, [y, y])
    return w[0]


def _through_python(x, y, z):
    return z * float(x[0])


def _branch(x, y, z):
    return 1 * y if x[0] > 100 else 2 * z


def _gradient(x, y, z):
    return backend.gradient(_loss(y, z), {"x": x})[2]["x"]


def _product(x, y, z):
    return backend.record(_loss(y, z), {"x": x}).product("x", "x")({"x": x})["x"]


def _loss(y, z):
    return lambda p: ((p["x"] * p["x"] * y + z * p["x"]).sum(), {})


ORIGINS = {
    "in place": (_in_place, {0, 1}),
    "written to": (_out, {0, 1}),
    "several written to": (_foreach, {0, 1, 2}),
    "view": (lambda x, y, z: x[None].expand(2, 3).T.flatten(), {0}),
    "detached": (lambda x, y, z: x.detach() + y.data, {0, 1}),
    "Python number": (_through_python, {0, 2}),
    "NumPy": (
        lambda x, y, z: torch.from_numpy(x.__array__() + y.numpy()),
        {0, 1},
    ),
    "list": (lambda x, y, z: torch.tensor(x.tolist()), {0}),
    "branch": (_branch, {0, 2}),
    "equal": (lambda x, y, z: 3 * z if torch.equal(x, y) else 2 * z, {0, 1, 2}),
    "like": (
        lambda x, y, z: torch.zeros_like(x) + x.new_ones(3) + torch.empty_like(y) + z,
        {2},
    ),
    # All sparse tensors count as one.
    "sparse": (lambda x, y, z: [x.to_sparse(), y.to_sparse()][0].to_dense(), {0, 1}),
    "gradient": (_gradient, {0, 1, 2}),
    "product": (_product, {0, 1}),
    "vmap": (lambda x, y, z: torch.vmap(torch.mul)(x, y), {0, 1}),
    "saved output": (
        lambda x, y, z: backend.gradient(
            lambda p: (p["x"].mul(x).tanh().sum(), {}), {"x": y}
        )[2]["x"],
        {0, 1},
    ),
}


@pytest.mark.parametrize("name", ORIGINS)
def test_origins(name):
    function, expected = ORIGINS[name]
    same = torch.arange(1.0, 4.0)  # One memory for all arguments.

    def all_results(x, y, z):
        before = 2 * x, 2 * y
        result = function(x, y, z)
        return before, result, None

    before, origins, none = backend.outline(all_results, same, same, same).origins
    assert before == (frozenset({0}), frozenset({1})) and none is None
    assert origins == expected
    np.testing.assert_array_equal(same, [1, 2, 3])


def test_arguments_of_in_place_operations_are_not_changed():
    def function(x, y):
        x.clone().add_(y).mul_(y)
        return y * 2

    assert backend.outline(function, numbers(2), numbers(2)).origins == {1}


class SelfAttention(L.Layer):
    def __init__(self):
        super().__init__()
        self.attention = L.MultiHeadAttention(2, 2)

    def call(self, x):
        return self.attention(x, x)


KERAS_LAYERS = {
    "dense": ((3,), L.Dense(2)),
    "convolution": ((4, 4, 1), L.Conv2D(2, 2)),
    "attention": ((3, 4), SelfAttention()),
    "lstm": ((3, 2), L.LSTM(2)),
    "embedding": ((3,), L.Embedding(4, 2)),
    "batch norm": ((3,), L.BatchNormalization()),
    "dropout": ((3,), L.Dropout(0.5, seed=1)),
    "time distributed": ((3, 2), L.TimeDistributed(L.Dense(2))),
}


@pytest.mark.parametrize("name", KERAS_LAYERS)
def test_origins_through_keras_layers(name):
    shape, layer = KERAS_LAYERS[name]
    last = L.Dense(1)
    model = keras.Sequential([keras.Input(shape), layer, L.Flatten(), last])
    variables = model.trainable_variables
    rest = model.non_trainable_variables
    fixed = backend.values(rest)

    def outputs(values, x):
        state = zip(variables + rest, values + fixed, strict=True)
        with keras.StatelessScope(state_mapping=list(state)):
            first = layer(x, training=True) if name == "dropout" else layer(x)
            return first, model(x, training=True)

    def derivatives(values, x):
        def loss(point):
            return outputs([point[i] for i in sorted(point)], x)[1].square().sum(), {}

        recording = backend.record(loss, dict(enumerate(values)))
        v = {i: torch.ones_like(value) for i, value in enumerate(values)}
        return recording.gradient, recording.product(v, v)(v)

    x = torch.arange(2 * np.prod(shape)).reshape(2, *shape) % 4
    x = x if name == "embedding" else x.float()
    values = backend.values(variables)
    data = len(values)
    own = len(layer.trainable_variables)
    with backend.twice_differentiable():
        shapes, (first, output) = backend.outline(outputs, values, x)
        assert first == {*range(own), data}
        assert output == {*range(data + 1)}
        assert shapes[1] == backend.Shape((2, 1), "float32")
        gradient, product = backend.outline(derivatives, values, x).origins
    for i in range(data):
        assert {*range(data + 1)} - {data - 1} <= gradient[i]
    # The output's bias moves the gradient, but no second derivative of a square.
    assert data in product[0]


# Loops


def test_map_range_runs_all_at_once_or_one_after_the_other():
    calls = []

    def function(i):
        calls.append(i)
        return x[i] * 2

    def with_branch(i):
        calls.append(i)
        return x[i] * (2 if i % 2 else 1)

    x = torch.arange(4.0)
    np.testing.assert_array_equal(backend.map_range(function, 4), 2 * x)
    assert len(calls) == 1
    np.testing.assert_array_equal(backend.map_range(with_branch, 4), [0, 2, 2, 6])
    assert len(calls) == 1 + 1 + 4
    calls.clear()
    (total,) = backend.sum_range(lambda i: [function(i)], 4, 3)
    assert total == 12 and len(calls) == 2
    (total,) = backend.sum_range(lambda i: [with_branch(i)], 4, 3)
    assert total == 10 and len(calls) == 2 + 1 + 4


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError, TypeError])
def test_errors_in_ranges_are_the_functions_own(error):
    def function(i):
        raise error("Mine.")

    for run in (
        lambda: backend.map_range(function, 2),
        lambda: backend.loop_range(function, 2),
        lambda: backend.sum_range(function, 2, 2),
    ):
        with pytest.raises(error, match="Mine"):
            run()


def test_current_trace_tells_what_runs_all_at_once():
    """As in a layer that calls `ops.vectorized_map`: tensors cannot leave it."""
    outside, seen = backend.current_trace(), []

    def body(i):
        seen.append(backend.current_trace() == outside)
        return i * torch.ones(2)

    backend.map_range(body, 3)
    backend.loop_range(body, 1)
    keras.ops.vectorized_map(body, torch.ones(3))
    assert seen == [False, True, False] and backend.current_trace() == outside


def test_nothing_is_compiled():
    calls = []

    def function(x):
        calls.append(torch.is_grad_enabled())
        return x + 1

    run = backend.compiled(function, jit_compile=True)
    for n in (1, 2, 2):
        np.testing.assert_array_equal(run(torch.ones(n)), 2 * np.ones(n))
    assert calls == [False] * 3
    assert run.traces() == backend.num_traces() == 0


# Random numbers


def test_random_states_are_left_alone():
    state = torch.get_rng_state()
    backend.signs((3,), (1, 2), "float32")
    backend.normal((3,), backend.fold_in((1, 2), 3), "float32")
    np.testing.assert_array_equal(torch.get_rng_state(), state)


def test_keys_and_numbers_of_any_kind():
    kinds = (
        (-3, 2**31 - 1),
        np.array([-3, 2**31 - 1], "int32"),
        torch.tensor([-3, 2**31 - 1], dtype=torch.int32),
    )
    counted = (5, np.int64(5), torch.tensor(5, dtype=torch.int32))
    folded = [
        backend.fold_in(key, n).tolist() for key, n in itertools.product(kinds, counted)
    ]
    assert all(pair == folded[0] for pair in folded)
    drawn = [backend.signs((64,), key, "float64") for key in kinds]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[0], drawn[2])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_draws_in_any_type(dtype):
    signs = backend.signs((64,), (0, 1), dtype)
    assert keras.backend.standardize_dtype(signs.dtype) == dtype
    assert set(signs.tolist()) == {-1, 1}
    assert backend.normal((2,), (0, 1), dtype).dtype == signs.dtype


# Tensors and places


def test_values_are_copies():
    raw = torch.nn.Parameter(torch.ones(2))
    value, plain = backend.values([raw, raw.data])
    with torch.no_grad():
        raw.mul_(3)
    np.testing.assert_array_equal(value, [1, 1])
    np.testing.assert_array_equal(plain, [1, 1])


def test_array_keeps_graphs_and_types():
    x = torch.ones(2, requires_grad=True)
    assert backend.array(2 * x).requires_grad
    assert backend.array(np.ones(2)).dtype == torch.float64
    assert backend.array(1.0).dtype == torch.float32
    with keras.StatelessScope([(v := keras.Variable([0.0, 0.0]), x)]):
        assert backend.array(v).requires_grad


def test_places():
    meta = torch.device("meta")
    parameter = torch.nn.Parameter(torch.ones(2))
    assert backend.place_of(parameter) == torch.device("cpu")
    assert backend.place_of(torch.ones(2, device=meta)) == meta
    assert backend.place_of(1.0) is None
    with backend.on(meta):
        assert backend.array([1.0]).device == meta
        # PyTorch's own functions do what they do in the user's training.
        assert torch.ones(2).device.type == "cpu"
    assert backend.array([1.0]).device.type == "cpu"
    x = torch.ones(2, device=meta)
    assert backend.placed(x, None) is x
    assert backend.placed(np.ones(2), None).device.type == "cpu"
    assert backend.placed(np.ones(2), meta).device == meta
    assert backend.placed(torch.ones(2), meta).device == meta
