"""The backend's contract: the same tests for TensorFlow, JAX and PyTorch.

Written against `keras_curvature.backend`, `keras.ops` and NumPy alone.
"""

import functools
import inspect
import random
import re

import keras
import numpy as np
import pytest
from keras import ops, tree
from recorded_functions import FUNCTIONS, flat, like, numbers, truth, unflat

from keras_curvature import backend

NAME = keras.backend.backend()
DTYPES = sorted({"float32", backend.wide_float()})


def key(a=1, b=2):
    return backend.array([a, b], "int32")


def arrays(structure):
    """Tensors of a nested structure as NumPy arrays."""
    return tree.map_structure(
        lambda t: t if t is None else ops.convert_to_numpy(t), structure
    )


def tensors(point, dtype="float32"):
    """NumPy arrays of a dictionary as tensors."""
    return {name: backend.array(x, dtype) for name, x in point.items()}


def assert_close(actual, expected, dtype="float32", scale=None):
    """Equal up to rounding, relative to the largest number.

    In float64 the differences in `truth` leave about 1e-8, in float32 a few hundred
    roundings add up.
    """
    expected = np.asarray(expected, "float64")
    scale = np.max(np.abs(expected), initial=0) if scale is None else scale
    tolerance = {"float32": 1e-4, "float64": 1e-7}[dtype] * max(scale, 1e-3)
    np.testing.assert_allclose(
        ops.convert_to_numpy(actual), expected, rtol=0, atol=tolerance
    )


def is_of(tensor, shape, dtype):
    """Whether shape and type are these, and it is a tensor."""
    same_type = keras.backend.standardize_dtype(tensor.dtype) == dtype
    return backend.is_tensor(tensor) and tuple(tensor.shape) == shape and same_type


def test_the_table_holds():
    """Names and arguments are those of the contract's table."""
    rows = re.findall(r"^\| `(\w+)(\(.*?\))?` \|", backend.contract.__doc__, re.M)
    names = {name for name, _ in rows}
    assert names <= set(backend.__all__) <= names | set(vars(backend.contract))
    assert all(hasattr(backend, name) for name in backend.__all__)
    for name, signature in rows:
        if signature:
            actual = inspect.signature(getattr(backend, name))
            parameters = [
                p.replace(annotation=p.empty) for p in actual.parameters.values()
            ]
            actual = actual.replace(
                parameters=parameters, return_annotation=actual.empty
            )
            assert str(actual) == signature, name


# Derivatives


@functools.cache
def recorded(name, dtype):
    """All derivatives of a function, computed in one compiled function.

    Returns:
        Loss, taps, gradient, dense Hessian by `map_range` and by `loop_range` (rows
        are products with unit vectors), and Jacobians (rows are pulled back).
    """
    function, names = FUNCTIONS[name].recorded, list(FUNCTIONS[name].point)

    def everything(point):
        recording = backend.record(function, point)
        product = recording.product(names, names)
        size = sum(int(np.prod(x.shape)) for x in point.values())

        def row(i):
            parts = product(unflat(ops.one_hot(i, size, dtype=dtype), point))
            return ops.concatenate([ops.reshape(parts[n], (-1,)) for n in names])

        def jacobian(tap):
            pull_back = recording.pull_back([tap], names)
            met = recording.taps[tap]
            count = int(np.prod(met.shape))

            def row(i):
                e = ops.reshape(ops.one_hot(i, count, dtype=dtype), met.shape)
                parts = pull_back({tap: like(e, met)})
                return ops.concatenate([ops.reshape(parts[n], (-1,)) for n in names])

            return backend.map_range(row, count)

        return (
            recording.loss,
            recording.taps,
            recording.gradient,
            backend.map_range(row, size),
            backend.loop_range(row, size),
            {tap: jacobian(tap) for tap in recording.taps},
        )

    with backend.twice_differentiable():
        return backend.compiled(everything)(tensors(FUNCTIONS[name].point, dtype))


#: Keras itself does so, off TensorFlow.
COMPUTED_IN_FLOAT32 = () if NAME == "tensorflow" else ("attention", "cross_entropy")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n != "message_passing"])
def test_record(name, dtype):
    loss, taps, gradient, mapped, looped, jacobians = recorded(name, dtype)
    value, slopes, hessian, tap_slopes = truth(name)
    point = FUNCTIONS[name].point
    assert {n: tuple(g.shape) for n, g in gradient.items()} == {
        n: x.shape for n, x in point.items()
    }
    assert all(is_of(g, tuple(g.shape), dtype) for g in gradient.values())
    assert is_of(loss, (), dtype) or name in COMPUTED_IN_FLOAT32
    dtype = "float32" if name in COMPUTED_IN_FLOAT32 else dtype
    assert_close(loss, value, dtype)
    assert_close(flat(arrays({n: gradient[n] for n in point})), slopes, dtype)
    assert_close(mapped, hessian, dtype)
    assert_close(looped, hessian, dtype)
    assert set(taps) == set(jacobians) == set(tap_slopes)
    for tap, expected in tap_slopes.items():
        assert_close(jacobians[tap], expected, dtype)
    for tap, expected in FUNCTIONS[name].twin(point)[1].items():
        assert_close(taps[tap], expected, dtype)


def test_product_along_the_edges_of_a_graph():
    """All of its derivatives would take long to compile."""
    case = FUNCTIONS["message_passing"]
    value, slopes, hessian, _ = truth("message_passing")
    direction = numbers(slopes.size, seed=5)

    def derivatives(point, direction):
        recording = backend.record(case.recorded, point)
        product = recording.product(point, point)(unflat(direction, point))
        return recording.loss, recording.gradient, product

    with backend.twice_differentiable():
        loss, gradient, product = backend.compiled(derivatives)(
            tensors(case.point), backend.array(direction, "float32")
        )
    assert_close(loss, value)
    assert_close(flat(arrays({n: gradient[n] for n in case.point})), slopes)
    assert_close(flat(arrays({n: product[n] for n in case.point})), hessian @ direction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["quartic", "gather", "loop"])
def test_gradient(name, dtype):
    case = FUNCTIONS[name]
    run = backend.compiled(lambda p: backend.gradient(case.recorded, p))
    loss, taps, gradient = run(tensors(case.point, dtype))
    value, slopes, *_ = truth(name)
    assert_close(loss, value, dtype)
    assert set(gradient) == set(case.point)
    assert all(backend.is_tensor(g) for g in gradient.values())
    assert_close(flat(arrays({n: gradient[n] for n in case.point})), slopes, dtype)
    for tap, expected in case.twin(case.point)[1].items():
        assert_close(taps[tap], expected, dtype)


def test_derivatives_outside_of_compiled_functions():
    case = FUNCTIONS["tanh_net"]
    point, (value, slopes, hessian, _) = tensors(case.point), truth("tanh_net")
    recording = backend.record(case.recorded, point)
    assert_close(recording.loss, value)
    assert_close(flat(arrays(recording.gradient)), slopes)
    assert_close(backend.gradient(case.recorded, point)[0], value)
    v = numbers(len(slopes), seed=9)
    product = recording.product(point, point)
    for _ in range(2):  # As often as one likes.
        parts = arrays(product(tensors(unflat(v, case.point))))
        assert_close(flat({n: parts[n] for n in point}), hessian @ v)


BLOCKS = [
    (["kernel"], ["bias", ("out", 1)]),
    ([("out", 1), "bias"], ["bias"]),
    (["bias"], ["kernel"]),
    (["kernel", "bias", ("out", 1)], []),
    ([], ["kernel"]),
]


@pytest.mark.parametrize("last", [[], ["bias"], ["bias", "kernel"]])
def test_product_with_parts_of_the_point(last):
    """The same whatever is said to be met last, together with others too."""
    case, (*_, hessian, _) = FUNCTIONS["tanh_net"], truth("tanh_net")
    v = numbers(len(hessian), seed=9)
    blocks = [*BLOCKS, (last, last), (case.point, last), (last, case.point)]

    def products(point, v):
        recording = backend.record(case.recorded, point, last)
        return [
            recording.product(moved, wanted)({n: v[n] for n in moved})
            for moved, wanted in blocks
        ]

    found = backend.compiled(products)(
        tensors(case.point), tensors(unflat(v, case.point))
    )
    for (moved, wanted), parts in zip(blocks, arrays(found), strict=True):
        masked = {n: x * (n in moved) for n, x in unflat(v, case.point).items()}
        expected = unflat(hessian @ flat(arrays(masked)), case.point)
        assert set(parts) == set(wanted)
        for n in wanted:
            assert_close(parts[n], ops.convert_to_numpy(expected[n]), scale=1)


def test_what_is_before_the_last_is_not_differentiated_for_it():
    """Nor at all, if only taps are pulled back."""

    @ops.custom_gradient
    def before(x):
        def gradient(*args, upstream=None):
            raise AssertionError("differentiated")

        return 2 * x, gradient

    def function(p):
        met = before(p["first"]) + p["shift"]
        return ops.sum(met**3), {"met": met, "shift": 3 * p["shift"]}

    x = backend.array(np.array([1.0, 2.0]))
    recording = backend.record(function, {"first": x, "shift": x}, ["shift"])
    product = recording.product(["shift"], ["shift"])({"shift": x})
    assert_close(ops.convert_to_numpy(product["shift"]), 6 * 3 * np.array([1.0, 4.0]))
    pulled = recording.pull_back(["shift"], ["shift"])({"shift": x})
    assert_close(ops.convert_to_numpy(pulled["shift"]), [3.0, 6.0])
    with pytest.raises(AssertionError, match="differentiated"):
        recording.gradient  # noqa: B018


def test_pull_back_of_several_taps_to_part_of_the_point():
    case, (*_, jacobians) = FUNCTIONS["tanh_net"], truth("tanh_net")
    w = {
        tap: numbers(4, n, seed=n) for tap, n in {"hidden": 3, ("error", 0): 2}.items()
    }

    def pulled(point, w):
        recording = backend.record(case.recorded, point)
        return recording.pull_back(w, ["bias"])(w)

    found = arrays(backend.compiled(pulled)(tensors(case.point), tensors(w)))
    expected = sum(np.ravel(x) @ jacobians[tap] for tap, x in w.items())
    assert set(found) == {"bias"}
    assert_close(found["bias"], expected[6:9])


def test_entries_that_the_loss_does_not_or_only_linearly_depend_on():
    point = {"x": np.ones(2), "idle": np.ones(3), "slope": np.ones(2)}

    def function(p):
        return ops.sum(p["x"] ** 3) + ops.sum(p["slope"]), {"idle": 2 * p["idle"]}

    def derivatives(point):
        recording = backend.record(function, point)
        return (
            recording.gradient,
            backend.gradient(function, point)[2],
            recording.product(point, point)(point),
            recording.product(["idle"], ["x", "idle"])({"idle": point["idle"]}),
            recording.pull_back(["idle"], point)({"idle": point["idle"]}),
        )

    found = arrays(backend.compiled(derivatives)(tensors(point)))
    for gradient in found[:2]:
        np.testing.assert_array_equal(gradient["x"], [3, 3])
        np.testing.assert_array_equal(gradient["idle"], np.zeros(3))
        np.testing.assert_array_equal(gradient["slope"], np.ones(2))
    np.testing.assert_array_equal(found[2]["x"], [6, 6])
    np.testing.assert_array_equal(found[2]["idle"], np.zeros(3))
    np.testing.assert_array_equal(found[2]["slope"], np.zeros(2))
    np.testing.assert_array_equal(found[3]["x"], np.zeros(2))
    np.testing.assert_array_equal(found[3]["idle"], np.zeros(3))
    np.testing.assert_array_equal(found[4]["idle"], 2 * np.ones(3))
    np.testing.assert_array_equal(found[4]["x"], np.zeros(2))
    np.testing.assert_array_equal(found[4]["slope"], np.zeros(2))


@pytest.mark.parametrize("at_once", [1, 2, 9, 20])
def test_products_in_a_sum(at_once):
    """The diagonal, as `Σ_i e_i ⊙ H e_i`; the last pass reaches beyond the end."""
    case, (*_, hessian, _) = FUNCTIONS["moments"], truth("moments")

    def diagonal(point):
        recording = backend.record(case.recorded, point)
        product = recording.product(["x"], ["x"])

        def entry(i):
            e = ops.reshape(ops.one_hot(i, 10, dtype="float32"), (2, 5))
            return [e * product({"x": e})["x"], ops.sum(e)]

        return backend.sum_range(entry, 10, at_once)

    with backend.twice_differentiable():
        found, count = backend.compiled(diagonal)(tensors(case.point))
    assert float(count) == 10
    assert_close(
        found, np.diag(hessian)[:10].reshape(2, 5), scale=np.abs(hessian).max()
    )


def test_hold_cotangent():
    """`L = Σ_c g(f_c)`, `f = A x²`, `g = f³`: the Hessian keeps `Σ_c g'(f_c) ∂²f_c`."""
    a, x, v = np.abs(numbers(3, 2)), np.array([1.0, 2.0]), np.array([1.0, -1.0])

    def function(p):
        f = ops.cast(a, "float32") @ (p["x"] ** 2)[:, None]
        held = backend.hold_cotangent(f)
        return ops.sum(held**3), {"held": held}

    def derivatives(point, v):
        recording = backend.record(function, point)
        pulled = recording.pull_back(["held"], ["x"])({"held": recording.taps["held"]})
        return (
            recording.taps["held"],
            recording.gradient["x"],
            recording.product(["x"], ["x"])({"x": v})["x"],
            backend.gradient(function, point)[2]["x"],
            pulled["x"],
        )

    f = a @ x**2
    slopes = 3 * f**2 @ a  # ∂L/∂x² with everything but the squares held constant
    held, gradient, product, again, pulled = backend.compiled(derivatives)(
        tensors({"x": x}), backend.array(v, "float32")
    )
    assert_close(held, f[:, None])
    assert_close(gradient, slopes * 2 * x)
    assert_close(again, slopes * 2 * x)
    assert_close(product, 2 * slopes * v)
    assert_close(pulled, f @ a * 2 * x)


def _softsign(p):
    return ops.sum(ops.softsign(p["x"])), {}


def _ctc(p):
    losses = ops.ctc_loss(
        np.array([[1, 2]], "int32"),
        p["x"],
        np.array([2], "int32"),
        np.array([4], "int32"),
    )
    return ops.sum(losses), {}


@pytest.mark.skipif(NAME == "jax", reason="JAX differentiates everything twice")
def test_not_twice_differentiable():
    function = {"tensorflow": _softsign, "torch": _ctc}[NAME]
    point = {"x": backend.array(numbers(1, 4, 3), "float32")}

    def product(point):
        return backend.record(function, point).product(["x"], ["x"])(point)

    for run in (product, backend.compiled(product)):
        with pytest.raises(backend.NotTwiceDifferentiable) as caught:
            run(point)
        assert 'hvp="finite_difference"' in str(caught.value)
        assert function.__name__[1:] in str(caught.value).lower()
    gradient = backend.compiled(lambda p: backend.gradient(function, p)[2]["x"])(point)
    assert np.any(ops.convert_to_numpy(gradient))


def test_twice_differentiable_may_be_nested():
    with backend.twice_differentiable(), backend.twice_differentiable():
        pass
    with pytest.raises(KeyError), backend.twice_differentiable():
        raise KeyError
    recorded.cache_clear()
    test_record("moments", "float32")


# What is known before anything runs


def test_outline_shapes():
    def function(x, others):
        y = x @ others["kernel"]
        return {"y": y, ("sum", 0): ops.sum(y), "none": None}, [ops.argmax(y, axis=-1)]

    x, kernel = (backend.array(numbers(*s), "float32") for s in [(4, 2), (2, 3)])
    named, (position,) = backend.outline(function, x, {"kernel": kernel}).shapes
    assert set(named) == {"y", ("sum", 0), "none"}
    assert named["y"] == backend.Shape((4, 3), "float32")
    assert named["sum", 0] == backend.Shape((), "float32")
    assert named["none"] is None
    assert position.shape == (4,) and "int" in position.dtype


def _scanned(x, y):
    return ops.scan(lambda h, row: (ops.tanh(h) + row, h), y, x)[0]


ORIGINS = {
    "product": (lambda x, y, i: x * y, {0, 1}),
    "argument": (lambda x, y, i: y, {1}),
    "constant": (lambda x, y, i: ops.ones((2, 3)), set()),
    "stopped": (lambda x, y, i: ops.stop_gradient(x) * 2, {0}),
    "held": (lambda x, y, i: backend.hold_cotangent(x) * 2, {0}),
    "integers": (lambda x, y, i: ops.take(y, i, axis=0), {1, 2}),
    "comparison": (lambda x, y, i: ops.where(x > 0, 1.0, 0.0), {0}),
    "position": (lambda x, y, i: ops.argmax(x), {0}),
    "shape": (lambda x, y, i: ops.ones(ops.shape(x)) * y[0], {1}),
    "like": (lambda x, y, i: ops.zeros_like(x) + y[0], {1}),
    "reshaped": (lambda x, y, i: ops.reshape(y, ops.shape(x)[::-1]), {1}),
    "loop": (lambda x, y, i: _scanned(x, y[0]), {0, 1}),
    "map": (lambda x, y, i: backend.map_range(lambda k: x[k] * y[0], 2), {0, 1}),
    "chunks": (
        lambda x, y, i: backend.sum_chunks(lambda a, b: ops.sum(a * b), [x, y], 1),
        {0, 1},
    ),
}


@pytest.mark.parametrize("name", ORIGINS)
def test_outline_origins(name):
    function, expected = ORIGINS[name]
    x, y = (backend.array(numbers(2, 3, seed=s), "float32") for s in (0, 1))
    i = backend.array([0, 1, 0], "int32")
    outline = backend.outline(lambda *args: [function(*args), args[1]], x, y, i)
    assert outline.origins[0] == frozenset(expected)
    assert outline.origins[1] == frozenset({1})
    result = backend.compiled(function)(x, y, i)
    assert outline.shapes[0].shape == tuple(result.shape)


def test_origins_of_a_branch():
    def function(x, y, i):
        return ops.cond(i > 0, lambda: x + 1, lambda: y * 1)

    x = backend.array(numbers(2), "float32")
    origins = backend.outline(function, x, x, backend.array(0, "int32")).origins
    # PyTorch knows only the branch that it takes.
    assert ({1} if NAME == "torch" else {0, 1, 2}) <= origins


def test_origins_count_nested_arguments_and_absent_ones():
    one = backend.array(1.0, "float32")
    args = {"a": one, "b": None, "c": [one, one]}, None, (one,)
    positions = {path: i for i, (path, _) in enumerate(tree.flatten_with_path(args))}

    def function(point, absent, rest):
        assert point["b"] is None and absent is None
        return {"a": point["a"] * 2, 5: [point["c"][1] + rest[0], None]}

    origins = backend.outline(function, *args).origins
    assert origins["a"] == {positions[0, "a"]}
    assert origins[5][0] == {positions[0, "c", 1], positions[2, 0]}
    assert origins[5][1] is None


def test_examine():
    point = tensors({"x": np.ones(2), ("idle", 0): np.ones(3), "slope": np.ones(2)})

    def function(p):
        loss = ops.sum(p["x"] ** 3) + ops.sum(p["slope"])
        return loss, {"idle": p["idle", 0] * 2}

    findings = backend.examine(function, point)
    assert findings.unconnected == frozenset({("idle", 0)})
    assert findings.caveats == ()
    # Log-sum-exp stops the gradient of the maximum that it subtracts, rightly so.
    softmax = FUNCTIONS["cross_entropy"]
    findings = backend.examine(softmax.recorded, tensors(softmax.point))
    assert findings[:2] == (set(), ())
    # Nor is what `hold_cotangent` does a mistake.
    findings = backend.examine(
        lambda p: (ops.sum(backend.hold_cotangent(p["x"] ** 2) ** 3), {}),
        tensors({"x": np.ones(2)}),
    )
    assert findings == (set(), (), False)
    # Loops in a graph have bodies of their own.
    findings = backend.examine(
        lambda p: (ops.sum(ops.fori_loop(0, 3, lambda i, x: x * p["x"], p["x"])), {}),
        tensors({"x": np.ones(2)}),
    )
    assert findings.branches == (keras.backend.backend() == "tensorflow")


# Compiled functions and loops


def test_run_once():
    """As what is compiled, with nothing left of it."""

    def function(point, y):
        loss, _, slope = backend.gradient(lambda p: (ops.sum(p["x"] ** 3), {}), point)
        squares = backend.map_range(
            lambda i: slope["x"] * (y + ops.cast(i, "float32")), 2
        )
        return {"loss": loss, "squares": squares, "nothing": None}

    given = tensors({"x": np.arange(3.0)}), backend.array(1.0, "float32")
    with backend.twice_differentiable():
        found = backend.run_once(function, *given)
        expected = backend.compiled(function)(*given)
    assert found["nothing"] is None
    for name in ("loss", "squares"):
        np.testing.assert_allclose(
            *(ops.convert_to_numpy(x[name]) for x in (found, expected)), rtol=1e-6
        )


def test_compiled_once_for_a_signature():
    runs = backend.compiled(lambda p, y: {("s", 0): p["x"] + p["y", 1] * y[0], 1: p[2]})
    point = tensors({"x": np.ones(2), ("y", 1): np.ones(2), 2: np.ones(3)})
    before = backend.num_traces()
    for number in range(3):
        found = arrays(runs(point, [backend.array(float(number), "float32")]))
        assert set(found) == {("s", 0), 1}
        np.testing.assert_array_equal(found["s", 0], [1 + number] * 2)
        np.testing.assert_array_equal(found[1], np.ones(3))
        if number == 0:
            after = backend.num_traces()
            assert after <= before + 1
    assert backend.num_traces() == after


def test_compiled_functions_do_not_mix_up_names():
    """Names that have no order, in dictionaries of another order."""
    first, second = object(), (0, "x")
    third = ("x", 0)

    @backend.compiled
    def function(x):
        return {third: x[third], first: x[first], second: x[second] + 1}

    one, two, three = (backend.array(float(n), "float32") for n in (1, 2, 3))
    for point in (
        {first: one, second: two, third: three},
        {third: three, second: two, first: one},
    ):
        found = function(point)
        assert [float(found[n]) for n in (first, second, third)] == [1, 3, 3]


def test_compiled_functions_take_none():
    @backend.compiled
    def function(x, y, weights):
        assert y is None
        total = x["a"] if x["b"] is None else x["a"] * x["b"]
        return total if weights is None else total * weights

    two, three = (backend.array(float(n), "float32") for n in (2, 3))
    assert float(function({"a": two, "b": None}, None, None)) == 2
    assert float(function({"a": two, "b": three}, None, None)) == 6
    assert float(function({"a": two, "b": None}, None, three)) == 6
    assert float(function({"a": two, "b": None}, None, None)) == 2


def test_integers_say_how_often_something_is_repeated():
    x = backend.array(np.arange(6), "float32")
    repeated = backend.compiled(
        lambda x, count: backend.loop_range(lambda i: x[i] ** 2, count)
    )
    for count in (1, 2, 5, 2):
        found = ops.convert_to_numpy(repeated(x, count))
        np.testing.assert_array_equal(found, np.arange(count) ** 2.0)
    if keras.backend.backend() == "tensorflow":
        assert repeated.traces() == 1


@pytest.mark.parametrize("most", [1, 4])
def test_how_often_is_no_part_of_a_signature(most):
    x = backend.array(np.arange(6), "float32")
    repeated = backend.compiled(
        lambda x, count: backend.loop_range(lambda i: x[i] ** 2, count, most)
    )
    for count in range(1, most + 1):
        found = repeated(x, backend.array(count, "int32"))
        assert count <= len(found) <= most
        found = ops.convert_to_numpy(found)[:count]
        np.testing.assert_array_equal(found, np.arange(count) ** 2.0)
    if keras.backend.backend() != "torch":
        assert repeated.traces() == 1


@pytest.mark.parametrize("loop", [backend.map_range, backend.loop_range])
@pytest.mark.parametrize("count", [1, 4])
def test_ranges(loop, count):
    x = backend.array(numbers(5, 2), "float32")

    def function(x):
        return loop(lambda i: x[i] * ops.cast(i, "float32") + x[0], count)

    expected = np.stack([numbers(5, 2)[i] * i + numbers(5, 2)[0] for i in range(count)])
    for run in (function, backend.compiled(function)):
        assert is_of(run(x), (count, 2), "float32")
        assert_close(run(x), expected)
    same = backend.compiled(lambda x: loop(lambda i: 2 * x[0], count))(x)
    assert_close(same, [2 * numbers(5, 2)[0]] * count)


def test_what_a_range_returns_may_be_integers_or_a_scalar():
    found = backend.compiled(
        lambda x: (
            backend.map_range(lambda i: ops.cast(i, "int32") + x, 3),
            backend.loop_range(lambda i: ops.cast(i, "int32") + x, 3),
        )
    )(backend.array(5, "int32"))
    for result in found:
        np.testing.assert_array_equal(ops.convert_to_numpy(result), [5, 6, 7])


@pytest.mark.parametrize("at_once", [1, 2, 5, 7])
def test_sum_range(at_once):
    x = numbers(5, 2)

    def function(x):
        def part(i):
            here = ops.one_hot(i, 5, dtype="float32")  # Zeros beyond the end.
            return [here, ops.sum(here[:, None] * x, axis=0), ops.sum(here)]

        return backend.sum_range(part, 5, at_once)

    given = backend.array(x, "float32")
    for run in (function, backend.compiled(function)):
        each, total, count = run(given)
        np.testing.assert_array_equal(ops.convert_to_numpy(each), np.ones(5))
        assert_close(total, x.sum(0))
        assert float(count) == 5


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9])
def test_sum_chunks(rows):
    x, w = numbers(5, 2), numbers(5, seed=1)
    seen = []

    def part(x, w):
        seen.append(x.shape[0])
        return ops.sum(x * w[:, None], axis=0)

    def function(x, w):
        return backend.sum_chunks(part, [x, w], rows)

    given = [backend.array(a, "float32") for a in (x, w)]
    for run in (function, backend.compiled(function)):
        assert_close(run(*given), w @ x)
    assert all(n is None or n <= rows for n in seen)


@pytest.mark.parametrize("sizes", [(7,), (1, 5), (3, 1, 1, 20, 4), (40, 1, 2)])
@pytest.mark.parametrize("kind", ["sum", "max", "min"])
def test_over_blocks(kind, sizes):
    rows = numbers(3, sum(sizes)) - 1
    parts = np.split(rows, np.cumsum(sizes)[:-1], axis=1)
    expected = np.stack([getattr(part, kind)(axis=1) for part in parts], axis=1)

    def function(rows):
        return backend.over_blocks(kind, rows, sizes)

    for run in (function, backend.compiled(function)):
        found = run(backend.array(rows, "float32"))
        assert is_of(found, (3, len(sizes)), "float32")
        assert_close(found, expected)


def test_what_is_not_a_number_stays_in_its_block():
    rows = backend.array([[1.0, np.nan, 2.0, 3.0, np.inf, 1.0]], "float32")
    sums = backend.over_blocks("sum", rows, (2, 2, 2))
    np.testing.assert_array_equal(ops.convert_to_numpy(sums), [[np.nan, 5, np.inf]])


def test_sums_over_empty_blocks():
    sums = backend.over_blocks("sum", backend.array([[1.0, 2.0]], "float32"), (0, 2, 0))
    np.testing.assert_array_equal(ops.convert_to_numpy(sums), [[0, 3, 0]])


@pytest.mark.parametrize("sizes", [(3,), (2, 0, 1, 4), (0, 2), (1, 0)])
def test_parts(sizes):
    x = np.arange(2 * sum(sizes), dtype="float32").reshape(2, -1)
    for rows in (x, x[0]):
        found = backend.parts(backend.array(rows), sizes)
        expected = np.split(rows, np.cumsum(sizes)[:-1], axis=-1)
        for one, other in zip(found, expected, strict=True):
            assert is_of(one, other.shape, "float32")
            np.testing.assert_array_equal(ops.convert_to_numpy(one), other)


@pytest.mark.parametrize("sizes", [(3,), (2, 0, 1, 4), (0, 2), (1, 0)])
def test_block_numbers(sizes):
    for function in (backend.block_numbers, lambda sizes: compiled_numbers(sizes)):
        found = function(sizes)
        assert is_of(found, (sum(sizes),), "int32")
        expected = np.repeat(np.arange(len(sizes)), sizes)
        np.testing.assert_array_equal(ops.convert_to_numpy(found), expected)


def compiled_numbers(sizes):
    zero = backend.array(0, "int32")
    return backend.compiled(lambda zero: zero + backend.block_numbers(sizes))(zero)


def test_current_trace():
    """Where the trace is the same, tensors made earlier can be used."""
    seen = []

    def function(x):
        outside = backend.current_trace()
        assert outside == backend.current_trace()

        def body(i):
            y = x * ops.cast(i, "float32")
            seen.append((backend.current_trace(), y))
            return y

        total = ops.sum(backend.loop_range(body, 3))
        trace, y = seen[0]
        return total + y if trace == outside else total

    found = backend.compiled(function)(backend.array(2.0, "float32"))
    assert np.isfinite(float(found))


# Random numbers


@pytest.mark.parametrize("dtype", DTYPES)
def test_signs(dtype):
    signs = backend.signs((100, 100), key(), dtype)
    assert is_of(signs, (100, 100), dtype)
    first = ops.convert_to_numpy(signs)
    np.testing.assert_array_equal(np.unique(first), [-1, 1])
    # 10 000 signs: the mean has a standard deviation of 0.01, neighbours alike.
    other = ops.convert_to_numpy(backend.signs((100, 100), key(1, 3), dtype))
    for product in (first, first * other, first[1:] * first[:-1]):
        assert abs(np.mean(product)) < 0.06
    assert abs(np.mean(first[:, 1:] * first[:, :-1])) < 0.06


@pytest.mark.parametrize("dtype", DTYPES)
def test_normal(dtype):
    x = backend.normal((100, 100), key(), dtype)
    assert is_of(x, (100, 100), dtype)
    x = ops.convert_to_numpy(x)
    # Standard deviations of the mean of x, x², x³, x⁴: √(1, 2, 15, 96) / 100.
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(np.mean(x**power) - mean) < 6 * np.sqrt(variance) / 100
    assert len(np.unique(x)) > 9990


@pytest.mark.parametrize("draw", [backend.signs, backend.normal])
def test_draws_depend_on_their_key_alone(draw):
    def drawn(k):
        return draw((64,), k, "float32")

    states = random.getstate(), str(np.random.get_state())
    first = ops.convert_to_numpy(drawn(key(5, 6)))
    assert (random.getstate(), str(np.random.get_state())) == states
    keras.random.normal((3,))
    for run in (drawn, backend.compiled(drawn)):
        np.testing.assert_array_equal(ops.convert_to_numpy(run(key(5, 6))), first)


@pytest.mark.parametrize("draw", [backend.signs, backend.normal])
def test_draws_do_not_touch_the_random_state_of_keras(draw):
    def drawn():
        keras.utils.set_random_seed(3)
        draw((4,), backend.fold_in(key(), 1), "float32")
        return ops.convert_to_numpy(keras.random.normal((3,)))

    states = random.getstate(), np.random.get_state()
    try:
        keras.utils.set_random_seed(3)
        expected = ops.convert_to_numpy(keras.random.normal((3,)))
        np.testing.assert_array_equal(drawn(), expected)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@pytest.mark.parametrize("draw", [backend.signs, backend.normal])
def test_keys_are_arguments_of_compiled_functions(draw):
    function = backend.compiled(lambda k: draw((64,), backend.fold_in(k, 0), "float32"))
    first = ops.convert_to_numpy(function(key(0, 0)))
    traces = backend.num_traces()
    draws = [first] + [ops.convert_to_numpy(function(key(0, n))) for n in range(1, 8)]
    draws += [ops.convert_to_numpy(function(key(n, 0))) for n in range(1, 8)]
    assert len({d.tobytes() for d in draws}) == 15
    assert backend.num_traces() == traces


def test_folded_keys_are_independent():
    start = key(7, 8)
    keys = {"itself": start}
    for i in range(4):
        keys[f"{i}"] = backend.fold_in(start, i)
        for j in range(4):
            keys[f"{i} {j}"] = backend.fold_in(keys[f"{i}"], j)
    drawn = np.stack(
        [
            ops.convert_to_numpy(backend.signs((4000,), k, "float32"))
            for k in keys.values()
        ]
    )
    # 210 pairs, correlations with a standard deviation of 0.016: six of them.
    correlations = drawn @ drawn.T / 4000 - np.eye(len(keys))
    assert np.abs(correlations).max() < 6 / np.sqrt(4000)
    again = backend.signs((4000,), backend.fold_in(start, 2), "float32")
    np.testing.assert_array_equal(
        ops.convert_to_numpy(again), drawn[list(keys).index("2")]
    )


@pytest.mark.parametrize("loop", [backend.map_range, backend.loop_range])
@pytest.mark.parametrize("draw", [backend.signs, backend.normal])
def test_draws_in_a_range_are_those_outside(draw, loop):
    def one(k, i):
        return draw((16,), backend.fold_in(k, i), "float32")

    drawn = backend.compiled(lambda k: loop(lambda i: one(k, i), 3))(key())
    expected = [ops.convert_to_numpy(one(key(), i)) for i in range(3)]
    np.testing.assert_array_equal(ops.convert_to_numpy(drawn), expected)
    total = backend.compiled(
        lambda k: backend.sum_range(
            lambda i: [one(k, i) * ops.cast(i < 3, "float32")], 3, 2
        )
    )(key())
    assert_close(total[0], np.sum(expected, axis=0))


# Tensors and places


def test_array():
    x = backend.array([1.0, 2.0], "float32")
    assert is_of(x, (2,), "float32")
    assert backend.array(x) is x and backend.array(x, "float32") is x
    for dtype in [*DTYPES, "int32"]:
        assert is_of(backend.array(x, dtype), (2,), dtype)
        assert is_of(backend.array(np.ones(2), dtype), (2,), dtype)
        assert is_of(backend.array(3, dtype), (), dtype)
    assert not any(backend.is_tensor(a) for a in (np.ones(2), 1.0, [1.0], None))
    assert not backend.is_tensor(keras.Variable(1.0))


def test_wide_float():
    wide = backend.wide_float()
    third = float(backend.array(1 / 3, wide))
    assert wide in ("float32", "float64")
    assert abs(third - 1 / 3) < {"float32": 1e-7, "float64": 1e-16}[wide]


def test_values():
    variables = [
        keras.Variable([1.0, 2.0], dtype="float32"),
        keras.Variable(3, trainable=False, dtype="int32"),
    ]
    first, second = backend.values(variables)
    variables[0].assign([5.0, 6.0])
    assert is_of(first, (2,), "float32") and is_of(second, (), "int32")
    np.testing.assert_array_equal(ops.convert_to_numpy(first), [1, 2])
    (now,) = backend.values(variables[:1])
    np.testing.assert_array_equal(ops.convert_to_numpy(now), [5, 6])


def test_reading():
    x = keras.Variable([1.0, 2.0], dtype="float32")
    count = keras.Variable(3, trainable=False, dtype="int32")
    read = backend.reading([x, count])
    first = read()
    assert is_of(first[0], (2,), "float32") and is_of(first[1], (), "int32")
    traces = backend.num_traces()
    x.assign([5.0, 6.0])
    second = read()
    assert backend.num_traces() == traces
    # What was read before stays what it was.
    for found, expected in ((first, [1, 2]), (second, [5, 6])):
        np.testing.assert_array_equal(ops.convert_to_numpy(found[0]), expected)
        assert int(found[1]) == 3
    assert backend.reading([])() == []


def test_on_variables():
    x = keras.Variable([1.0, 2.0], dtype="float32")
    count = keras.Variable(0, trainable=False, dtype="int32")
    only_read = keras.Variable(10.0, dtype="float32")

    def function(values, added):
        x, count, factor = values
        return [x + added, count + 1], {"sum": ops.sum(x) * factor, "nothing": None}

    step = backend.on_variables(function, [x, count, only_read])
    for number, expected in enumerate((30.0, 50.0, 70.0), start=1):
        result = step(backend.array(1.0, "float32"))
        # Of the values before the step.
        assert float(result["sum"]) == expected and result["nothing"] is None
        np.testing.assert_array_equal(ops.convert_to_numpy(x), [1 + number, 2 + number])
        assert int(ops.convert_to_numpy(count)) == number
        if number == 1:
            traces = backend.num_traces()
    assert backend.num_traces() == traces
    only_read.assign(0.0)
    assert float(step(backend.array(1.0, "float32"))["sum"]) == 0


def test_places():
    place = backend.place_of(keras.Variable([1.0]))
    for where in (place, None):
        for x in (np.ones(2, "float32"), backend.array([1.0, 1.0], "float32")):
            placed = backend.placed(x, where)
            assert is_of(placed, (2,), "float32")
            np.testing.assert_array_equal(ops.convert_to_numpy(placed), [1, 1])
        with backend.on(where):
            assert is_of(backend.array([1, 2], "int32"), (2,), "int32")


def test_by_entries():
    """Rows, and numbers, whatever is done at once."""
    for size in (1, 100_000, 2**21 + 3):
        x, y = (
            np.random.default_rng(seed).standard_normal((3, size)) for seed in range(2)
        )
        given = [backend.array(a, "float32") for a in (x[0], x, y)]

        def function(row, x, y):
            return [row * y, ops.sum(x * y, axis=0)]

        found = backend.compiled(lambda *a, f=function: backend.by_entries(f, *a))
        found = [ops.convert_to_numpy(part) for part in found(*given)]
        np.testing.assert_allclose(found[0], x[0] * y, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[1], (x * y).sum(0), rtol=1e-4, atol=1e-5)
    (doubled,) = backend.by_entries(lambda x: [2 * x], backend.array(3.0, "float32"))
    assert float(doubled) == 6


def test_numbers_of_things():
    assert isinstance(backend.KEEPS_RECORDINGS, bool)
    assert backend.num_replicas() == 1
    assert backend.PRODUCTS_PER_PASS >= 1
    assert isinstance(backend.PRODUCTS_PER_PASS, int)


# The framework's own variables


@pytest.mark.skipif(NAME == "tensorflow", reason="TensorFlow can")
def test_functions_of_variables_are_refused():
    x = keras.Variable([1.0])
    with pytest.raises(ValueError, match="parameters"):
        backend.function_of_variables(lambda: ops.sum(x.value), [x])


@pytest.mark.skipif(NAME != "tensorflow", reason="Needs variables that tapes watch")
@pytest.mark.parametrize("compiled", [backend.compiled, lambda f: f])
def test_function_of_variables(compiled):
    """`L = x₀² x₁ + y³`, where the variables are and elsewhere."""
    x, y = keras.Variable([1.0, 2.0]), keras.Variable(3.0)
    function = backend.function_of_variables(
        lambda: x.value[0] ** 2 * x.value[1] + y.value**3, [x, y]
    )

    def loss(point):
        return function([point["x"], point["y"]]), {}

    here = {"x": x.value, "y": y.value}
    products = compiled(
        lambda: backend.record(loss, here).product(["x", "y"], ["x", "y"])(
            {"x": ops.ones(2), "y": ops.ones(())}
        )
    )()
    np.testing.assert_allclose(products["x"], [4 + 2, 2])
    np.testing.assert_allclose(products["y"], 18)
    there = {
        "x": backend.array([5.0, 7.0], "float32"),
        "y": backend.array(2.0, "float32"),
    }
    value, _, gradient = compiled(lambda p: backend.gradient(loss, p))(there)
    np.testing.assert_allclose(value, 25 * 7 + 8)
    np.testing.assert_allclose(gradient["x"], [70, 25])
    np.testing.assert_allclose(gradient["y"], 12)
    np.testing.assert_array_equal(x.value, [1, 2])
    np.testing.assert_array_equal(y.value, 3)


def test_a_tensor_of_the_point_that_is_also_used_beside_it_is_a_constant_there():
    x = backend.array(np.array([1.0, 2.0], "float32"))

    def function(point):
        return ops.sum(point["x"] ** 2 * x), {}

    _, _, gradient = backend.gradient(function, {"x": x})
    np.testing.assert_allclose(ops.convert_to_numpy(gradient["x"]), [2.0, 8.0])
    recording = backend.record(function, {"x": x})
    product = recording.product(["x"], ["x"])({"x": ops.ones_like(x)})
    np.testing.assert_allclose(ops.convert_to_numpy(product["x"]), [2.0, 4.0])


# Memory


def test_computed_bytes_grow_with_the_batch():
    def function(x, w, nothing):
        assert nothing is None
        return ops.mean(ops.tanh(ops.matmul(x, w)))

    def count(samples):
        x, w = (backend.array(numbers(*s), "float32") for s in ((samples, 5), (5, 8)))
        return backend.computed_bytes(function, x, w, None)

    # Of each sample a row of the product and its hyperbolic tangent.
    assert count(6) - count(4) == 2 * 2 * 8 * 4


def test_free_memory_of_the_host():
    free = backend.free_memory(backend.place_of(keras.Variable(np.ones(3))))
    if free is not None:
        assert 2**20 < free < 2**50


def test_out_of_memory_is_known():
    with pytest.raises(Exception) as caught:  # 256 TiB.
        ops.convert_to_numpy(ops.ones((2**46,), "float32"))
    assert backend.is_out_of_memory(caught.value)
    assert backend.is_out_of_memory(MemoryError())
    with pytest.raises(Exception) as caught:
        ops.matmul(ops.ones((2, 3)), ops.ones((2, 3)))
    assert not backend.is_out_of_memory(caught.value)
    assert not backend.is_out_of_memory(ValueError("out of memory"))
