"""What is specific to JAX: custom derivatives, jaxprs, loops on a CPU, devices."""

import json
import os
import re
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest

if keras.backend.backend() != "jax":
    pytest.skip("Needs KERAS_BACKEND=jax", allow_module_level=True)

import jax
from jax import lax
from jax import numpy as jnp

from keras_curvature import backend
from keras_curvature.backend import jax_jaxprs


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def dense_product(function, point, moved, wanted):
    """Products with unit vectors, stacked: `{wanted: (size of moved, …)}`."""
    product = backend.record(function, point).product([moved], [wanted])
    x = point[moved]
    basis = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape)
    return jax.vmap(lambda e: product({moved: e})[wanted])(basis)


# Derivatives


@jax.custom_vjp
def cube(x):
    return x**3


def _cube_forward(x):
    # It calls itself, as many do: forward mode cannot pass through.
    return cube(x), x


cube.defvjp(_cube_forward, lambda x, g: (3 * x**2 * g,))


def square(x):
    """A derivative of its own which forward mode can differentiate."""
    return _square(x)


@jax.custom_vjp
def _square(x):
    return x**2


_square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))


@pytest.mark.parametrize("own", [cube, square])
@pytest.mark.parametrize("compiled", [backend.compiled, lambda f: f])
def test_derivatives_that_a_function_brings(own, compiled, monkeypatch):
    """`L = Σ own(x)² y`, by blocks: what moves need not be wanted."""
    if own is square:
        # Forward mode does, which is several times faster where convolutions are.
        monkeypatch.setattr(backend.record, "_backward", None)
    plain = {cube: lambda x: x**3, square: lambda x: x**2}[own]
    point = {"x": numbers(3), "y": numbers(3, seed=1)}

    def of(f):
        return lambda p: (jnp.sum(f(p["x"]) ** 2 * p["y"]), {})

    def everything(point):
        return [
            dense_product(of(own), point, moved, wanted)
            for moved in point
            for wanted in point
        ]

    expected = jax.hessian(lambda p: of(plain)(p)[0])(point)
    expected = [expected[wanted][moved].T for moved in point for wanted in point]
    for found, known in zip(compiled(everything)(point), expected, strict=True):
        np.testing.assert_allclose(found, known, rtol=1e-12, atol=1e-12)


@jax.custom_vjp
def opaque(x):
    return x**2


def _opaque_backward(x, g):
    return (jax.pure_callback(lambda x, g: 2 * np.asarray(x) * g, x, x, g),)


opaque.defvjp(lambda x: (x**2, x), _opaque_backward)


def test_what_is_not_twice_differentiable_is_named():
    point = {"x": numbers(3)}

    def function(p):
        return jnp.sum(opaque(p["x"])), {}

    recording = backend.record(function, point)
    np.testing.assert_allclose(recording.gradient["x"], 2 * point["x"])
    with pytest.raises(backend.NotTwiceDifferentiable, match="callbacks") as caught:
        recording.product(["x"], ["x"])
    assert 'hvp="finite_difference"' in str(caught.value)


def test_held_cotangents_leave_the_curvature_of_the_model():
    """A net of two layers: `H = Σ_c g_c ∂²f_c`, with `g = ∂L/∂f` held."""
    x, y = numbers(5, 2), numbers(5, 3, seed=1)
    point = {"first": numbers(2, 4, seed=2), "second": numbers(4, 3, seed=3)}

    def model(p):
        return jnp.tanh(x @ p["first"]) @ p["second"]

    def loss(f):
        return jnp.sum(jnp.exp(f - y))

    def held(p):
        return loss(backend.hold_cotangent(model(p))), {}

    g = jax.grad(loss)(model(point))
    expected = jax.hessian(lambda p: jnp.sum(g * model(p)))(point)
    blocks = [(moved, wanted) for moved in point for wanted in point]
    run = backend.compiled(lambda p: [dense_product(held, p, *b) for b in blocks])
    for (moved, wanted), found in zip(blocks, run(point), strict=True):
        known = jnp.reshape(expected[wanted][moved], (*point[wanted].shape, -1))
        np.testing.assert_allclose(found, jnp.moveaxis(known, -1, 0), atol=1e-12)
    np.testing.assert_allclose(
        backend.record(held, point).gradient["first"],
        jax.grad(lambda p: loss(model(p)))(point)["first"],
        rtol=1e-12,
    )


def test_nothing_is_computed_for_what_does_not_move_or_is_not_wanted():
    x = numbers(64, 64)
    point = {"a": numbers(64, 64, seed=1), "b": numbers(64, 64, seed=2)}

    def function(p):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) ** 2), {}

    def flops(moved, wanted):
        def product(point, v):
            made = backend.record(function, point).product(moved, wanted)
            return made({n: v[n] for n in moved})

        return jax.jit(product).lower(point, point).compile().cost_analysis()["flops"]

    # Products of matrices. With `b` alone: 2 forward, then their tangents: 1 forward
    # and 1 in the gradient by `b`. The slope of the loss needs none.
    one = 2 * 64**3
    assert 4 * one < flops(["b"], ["b"]) < 4.5 * one
    # With both: 2 forward and 1 backward, tangents of 3 forward and 5 backward.
    assert 11 * one < flops(["a", "b"], ["a", "b"]) < 11.5 * one


def test_products_are_precise_where_matrices_are_not_by_default():
    point = {"x": numbers(3, 3)}

    def product(p):
        return backend.record(
            lambda p: (jnp.sum((p["x"] @ p["x"]) ** 2), {}), p
        ).product(["x"], ["x"])(p)

    with backend.twice_differentiable():
        traced = jax.make_jaxpr(product)(point)
    products = [
        equation
        for equation in traced.jaxpr.eqns
        if equation.primitive is lax.dot_general_p
    ]
    assert products
    for equation in products:
        assert equation.params["precision"] == (lax.Precision.HIGHEST,) * 2


# What a jaxpr tells

LOOPS = {
    # The second carry reaches the first one in two steps only.
    "while": lambda x, y, z: lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] + c[2], c[3], c[3]), (0, x, y, z)
    )[1:],
    "asked": lambda x, y, z: lax.while_loop(
        lambda c: c[0] < z, lambda c: (c[0] + 1, c[1] * 2), (0.0, x)
    ),
    "scan": lambda x, y, z: lax.scan(
        lambda c, r: ((c[0] + r, c[1] * 2), c[1]), (x[0], z), y
    ),
    "cond": lambda x, y, z: lax.cond(z > 0, lambda: (x, x), lambda: (y, x + 1)),
    "calls": lambda x, y, z: (
        jax.jit(lambda a, b: (a, b * 2))(x, y),
        jax.checkpoint(lambda a, b: (jnp.sin(a), b))(x, y),
        jax.nn.relu(x),
        square(y),
    ),
}
ORIGINS = {
    "while": ({0, 1, 2}, {1, 2}, {2}),
    "asked": ({2}, {0, 2}),
    "scan": (({0, 1}, {2}), {2}),
    "cond": ({0, 1, 2}, {0, 2}),
    "calls": (({0}, {1}), ({0}, {1}), {0}, {1}),
}


@pytest.mark.parametrize("name", LOOPS)
def test_origins_through_calls_and_loops(name):
    x, y = numbers(2), numbers(2, seed=1)
    z = x if name == "while" else jnp.asarray(1.0)
    assert backend.outline(LOOPS[name], x, y, z).origins == ORIGINS[name]


def test_examine_follows_what_is_differentiable_alone():
    paths = {
        "used": lambda x: x,
        "relu": jax.nn.relu,
        "own": cube,
        "checkpoint": jax.checkpoint(jnp.sin),
        "scan": lambda x: lax.scan(lambda c, r: (c + r, r), 0.0, x)[0],
        "branch": lambda x: lax.cond(x[0] > 0, lambda: x * 2, lambda: x),
        "stopped": lax.stop_gradient,
        "sign": jnp.sign,
        "floor": jnp.floor,
        "compared": lambda x: jnp.where(x > 0, 1.0, 0.0),
        "integers": lambda x: x.astype("int32").astype("float32"),
        "position": lambda x: jnp.argmax(x),
        "shape": lambda x: jnp.ones_like(x),
        "stopped in a scan": lambda x: lax.scan(
            lambda c, r: (c + lax.stop_gradient(r), r), 0.0, x
        )[0],
    }
    connected = {"used", "relu", "own", "checkpoint", "scan", "branch"}
    point = {name: numbers(3) for name in paths}

    def function(p):
        return sum(jnp.sum(path(p[name])) for name, path in paths.items()), {}

    findings = backend.examine(function, point)
    assert set(point) - findings.unconnected == connected
    assert findings.caveats == ()


# Traces


def test_each_body_is_a_trace_of_its_own():
    seen = {}

    def body(name):
        def note(x, *_):
            seen.setdefault(name, backend.current_trace())
            assert seen[name] == backend.current_trace()
            return x

        return note

    def function(x):
        body("outside")(x)
        jax.vmap(body("vmap"))(x)
        lax.map(body("map"), x)
        jax.checkpoint(body("checkpoint"))(x)
        lax.cond(x[0] > 0, body("cond"), lambda x: x, x)
        lax.while_loop(lambda x: x[0] > 0, body("while"), x)
        backend.gradient(lambda p: (jnp.sum(body("gradient")(p["x"])), {}), {"x": x})
        return backend.current_trace() == seen["outside"]

    before = backend.current_trace()
    same = []
    jax.jit(lambda x: same.append(function(x)))(numbers(2))
    assert same == [True]
    traces = [before, *seen.values()]
    assert len(traces) == 8
    for i, trace in enumerate(traces):
        assert all(trace != other for other in traces[:i])
    assert backend.current_trace() == before


def test_compiled_anew_for_other_shapes_alone():
    function = backend.compiled(lambda p: p["x"] * 2, jit_compile=True)
    assert function.traces() == 0
    for size in (2, 3, 2, 3):
        function({"x": np.ones(size, "float32")})
    assert function.traces() == 2


# Loops on a CPU


def convolutions(groups):
    """Loss of two convolutions, `(function, point)`."""
    x = numbers(2, 8, 8, 4).astype("float32")
    point = {
        "first": numbers(3, 3, 4 // groups, 8, seed=1).astype("float32"),
        "second": numbers(3, 3, 8 // groups, 4, seed=2).astype("float32"),
    }

    def convolve(x, kernel, strides):
        return lax.conv_general_dilated(
            x,
            kernel,
            (strides, strides),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    def function(p):
        z = convolve(jnp.tanh(convolve(x, p["first"], 2)), p["second"], 1)
        return jnp.sum(jnp.tanh(z) ** 2), {}

    return function, point


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions_in_loops(groups):
    function, point = convolutions(groups)
    directions = {
        n: numbers(3, *x.shape, seed=5).astype(x.dtype) for n, x in point.items()
    }

    @backend.compiled
    def all_of_them(point, directions):
        product = backend.record(function, point).product(point, point)

        def flat(i):
            parts = product({n: v[i] for n, v in directions.items()})
            return jnp.concatenate([parts[n].ravel() for n in point])

        def part(i):
            return [jnp.where(i < 3, flat(i), 0)]

        expected = jnp.stack([flat(i) for i in range(3)])
        products = [backend.loop_range(flat, 3), backend.map_range(flat, 3)]
        sums = [backend.sum_range(part, 3, at_once)[0] for at_once in (1, 2, 3)]
        return expected, products, sums

    expected, products, sums = all_of_them(point, directions)
    scale = jnp.abs(expected).max()
    for found in products:
        np.testing.assert_allclose(found, expected, atol=1e-5 * scale)
    for total in sums:
        np.testing.assert_allclose(total, expected.sum(0), atol=1e-5 * scale)


def _order(equation):
    numbers = equation.params["dimension_numbers"]
    return numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec


def test_convolutions_in_loops_are_in_the_order_that_is_quick():
    """A hundred times slower otherwise; seen in the text, as times vary."""
    function, point = convolutions(1)

    def gradients(ws):
        return backend.loop_range(
            lambda i: backend.gradient(function, {**point, "first": ws[i]})[2]["first"],
            3,
        )

    jaxpr = jax.make_jaxpr(gradients)(jnp.stack([point["first"]] * 3)).jaxpr
    (loop,) = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    orders = [
        _order(e)
        for e in jax_jaxprs.equations(loop.params["jaxpr"].jaxpr)
        if e.primitive is lax.conv_general_dilated_p
    ]
    # Two forward, and backward the kernels' and the one that leads to the first.
    assert len(orders) == 5
    assert set(orders) == {((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))}


def test_gradients_by_kernels_of_groups_are_never_taken_at_once():
    """170 times slower otherwise."""

    def loops(groups, run):
        function, point = convolutions(groups)

        def gradient(i):
            moved = {**point, "first": point["first"] * i}
            return backend.gradient(function, moved)[2]["second"]

        jaxpr = jax.make_jaxpr(lambda: run(gradient))().jaxpr
        return [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"]

    for run in (
        lambda f: backend.map_range(f, 6),
        lambda f: backend.sum_range(lambda i: [f(i)], 6, 6),
    ):
        assert loops(1, run) == []
        assert loops(2, run) == [6]


def test_sums_over_chunks_keep_the_devices_apart():
    """Rows of a chunk are as far apart as there are chunks."""
    x = jnp.arange(10.0)
    seen = []

    def function(x):
        jax.debug.callback(lambda x: seen.append(x.tolist()), x)
        return x.sum()

    assert backend.sum_chunks(function, [x], 3) == 45
    jax.effects_barrier()
    assert sorted(seen) == [[0, 3, 6], [1, 4, 7], [2, 5, 8], [9]]


# Arrays and places


def test_arrays_of_other_frameworks():
    torch = pytest.importorskip("torch")
    for x in (
        torch.ones(2, requires_grad=True),
        np.ones(2, "float32"),
        [1.0, 1.0],
        keras.Variable([1.0, 1.0]),
    ):
        found = backend.array(x, "float32")
        assert isinstance(found, jax.Array) and found.dtype == "float32"
        np.testing.assert_array_equal(found, [1, 1])


def test_wide_float_follows_the_setting():
    assert backend.wide_float() == "float64"
    with jax.enable_x64(False):
        assert backend.wide_float() == "float32"


def test_signs_of_any_shape():
    shapes = [(), (1,), (0,), (31,), (33,), (3, 65), (2, 3, 1)]
    drawn = backend.compiled(
        lambda: [backend.signs(shape, (1, 2), "float32") for shape in shapes]
    )()
    assert [signs.shape for signs in drawn] == shapes
    assert all(np.isin(signs, [-1, 1]).all() for signs in drawn)
    # Each bit of a word is as likely up as down, and no two go together.
    drawn = np.asarray(backend.signs((40_000, 40), (1, 2), "float32"))
    correlations = drawn.T @ drawn / 40_000 - np.eye(40)
    # Standard deviations 0.005, 780 pairs.
    assert np.abs(correlations).max() < 0.03 and np.abs(drawn.mean(0)).max() < 0.03


def test_tracers_are_tensors():
    seen = []
    jax.jit(lambda x: seen.append(backend.is_tensor(x)))(1.0)
    jax.vmap(lambda x: seen.append(backend.is_tensor(x)))(jnp.ones(2))
    assert seen == [True, True]


def test_devices():
    first, second = jax.devices()[:2]
    with jax.default_device(second):
        variable = keras.Variable([1.0])
    assert backend.place_of(variable) == second
    assert backend.place_of(3.0) is None and backend.place_of(keras.Variable(1.0))
    with backend.on(second):
        assert backend.array(np.ones(2)).devices() == {second}
    with backend.on(None):
        assert backend.array(np.ones(2)).devices() == {first}
    for x in (np.ones(2), jnp.ones(2), 3):
        assert backend.placed(x, second).devices() == {second}
        assert backend.placed(x, None).devices() == {first}
    # What is placed decides where it is computed.
    double = backend.compiled(lambda x: 2 * x)
    assert double(backend.placed(np.ones(2), second)).devices() == {second}


@pytest.fixture
def distribution():
    """Data parallelism over all devices, until the test ends."""
    devices = keras.distribution.list_devices("cpu")
    assert len(devices) == 4
    keras.distribution.set_distribution(
        keras.distribution.DataParallel(devices=devices)
    )
    yield
    keras.distribution.set_distribution(None)


def test_data_are_spread_as_fit_spreads_them(distribution):
    place = backend.place_of(keras.Variable(np.ones((3, 2), "float32")))
    assert len(place.device_set) == 4
    for x in (np.ones((8, 3)), jnp.ones((8, 3))):
        spread = backend.placed(x, place)
        assert {s.data.shape for s in spread.addressable_shards} == {(2, 3)}
        again = backend.placed(spread, place)
        assert again.sharding == spread.sharding
    # What does not divide is on all of them.
    for x in (np.ones((6, 3)), np.ones(()), 3):
        whole = backend.placed(x, place)
        assert whole.sharding.is_fully_replicated and len(whole.devices()) == 4
    with backend.on(place):
        assert backend.array(np.ones(2)).shape == (2,)


def test_products_of_spread_data_are_those_of_one_device(distribution):
    x, kernel = numbers(8, 3), numbers(3, 2, seed=1)
    place = backend.place_of(keras.Variable(kernel))

    def function(p, x):
        return jnp.mean(jnp.tanh(x @ p["kernel"]) ** 2), {}

    @backend.compiled
    def product(point, x):
        recording = backend.record(lambda p: function(p, x), point)
        return recording.product(["kernel"], ["kernel"])(point)["kernel"]

    everywhere = backend.placed(kernel[0, 0], place).sharding
    point = {"kernel": jax.device_put(kernel, everywhere)}
    found = product(point, backend.placed(x, place))
    assert len(found.devices()) == 4
    np.testing.assert_allclose(found, product({"kernel": kernel}, x), rtol=1e-12)


def test_chunks_of_spread_data_stay_where_they_are(distribution):
    place = backend.place_of(keras.Variable(1.0))
    x = backend.placed(numbers(32, 3), place)

    def total(x):
        return backend.sum_chunks(lambda x: jnp.sum(x**2, 0), [x], 8)

    compiled = jax.jit(total).lower(x).compile()
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_allclose(compiled(x), (np.asarray(x) ** 2).sum(0), rtol=1e-12)


def test_without_float64_and_without_tensorflow():
    """In a process of its own, as users have it."""
    script = """
        import json, sys
        import jax, numpy as np, keras
        from keras_curvature import backend

        point = {"x": backend.array(np.arange(3.0)), 1: backend.array(2)}
        found = backend.compiled(
            lambda x: backend.record(
                lambda p: (keras.ops.sum(p["x"] ** 3), {}), {"x": x}
            ).product(["x"], ["x"])({"x": backend.signs((3,), (1, 2), "float32")})
        )(point["x"])["x"]
        print(json.dumps({
            "dtypes": [str(point["x"].dtype), str(found.dtype), backend.wide_float()],
            "product": np.abs(found).tolist(),
            "tensorflow": "tensorflow" in sys.modules,
        }))
    """
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    printed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**environment, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert json.loads(printed) == {
        "dtypes": ["float32", "float32", "float32"],
        "product": [0, 6, 12],
        "tensorflow": False,
    }


# Blocks


def test_graphs_of_blocks_do_not_grow_with_their_number():
    def size(count):
        sizes = tuple(range(1, count + 1))
        traced = jax.make_jaxpr(
            lambda rows: (
                backend.over_blocks("sum", rows, sizes),
                backend.block_numbers(sizes),
            )
        )(jnp.zeros((2, sum(sizes))))
        return len(list(jax_jaxprs.equations(traced.jaxpr)))

    assert size(200) == size(5)


def test_the_compiler_does_not_count_blocks():
    """It would take it a minute for 10^6 entries, and make a constant of them."""
    sizes = (10_000, 5, 10_000)
    numbers = jax.jit(lambda x: x + backend.block_numbers(sizes))
    text = numbers.lower(jnp.int32(0)).compile().as_text()
    assert not re.search(r"s32\[20005\]\S* constant", text)
