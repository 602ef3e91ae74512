"""What users pass as data, on whichever backend Keras runs."""

import contextlib

import keras
import numpy as np
import pytest
from cases import floatx
from data_sources import (
    SOURCES,
    Batches,
    X,
    Y,
    batches,
    data_loader,
    tf_data,
    tf_dataset,
)
from keras import ops

from keras_curvature import backend
from keras_curvature.data import ProbeData

BACKEND = keras.backend.backend()
FRAMEWORKS = ("tensorflow", "jax", "torch")


def dtype_of(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


def tensor_of(framework, array):
    """A tensor of a framework, which need not be the one that Keras runs on."""
    module = pytest.importorskip(framework)
    if framework == "tensorflow":
        return module.constant(array)
    return module.numpy.asarray(array) if framework == "jax" else module.tensor(array)


# Arrays


def test_arrays_are_one_batch_of_tensors():
    data = ProbeData(X, Y)
    assert data.num_batches == 1
    ((x, y, sample_weight), size) = next(iter(data))
    assert backend.is_tensor(x) and backend.is_tensor(y)
    assert dtype_of(x) == "float32" and "int" in dtype_of(y)
    assert sample_weight is None and size == 5
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, Y)


def test_floats_follow_keras_and_other_numbers_stay():
    with floatx("float16"):
        data = ProbeData([X, X.astype("float32"), Y.astype("uint8"), Y > 2])
    types = [dtype_of(a) for a in data.first()[0]]
    assert types == ["float16", "float16", "uint8", "bool"]


def test_tensors_stay_as_they_are():
    x = backend.array(X, "float16")
    placed, y, _ = ProbeData(x, backend.array(Y, "int32")).first()
    assert dtype_of(placed) == "float16" and dtype_of(y) == "int32"
    assert ProbeData(x).first()[0] is placed


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_tensors_of_any_framework(framework, dtype):
    x = tensor_of(framework, X.astype(dtype))
    (found, _, _), n = next(iter(ProbeData({"x": x}, batch_size=3)))
    assert backend.is_tensor(found["x"]) and n == 3
    assert dtype_of(found["x"]) == dtype
    np.testing.assert_array_equal(found["x"], X[:3])


def test_tensors_with_a_gradient_and_in_bfloat16():
    torch = pytest.importorskip("torch")
    x = ProbeData(torch.tensor(X, dtype=torch.float32, requires_grad=True)).first()[0]
    np.testing.assert_array_equal(ops.convert_to_numpy(x), X)
    jax = pytest.importorskip("jax")
    x = ProbeData(jax.numpy.asarray(X, "bfloat16")).first()[0]
    assert dtype_of(x) == ("bfloat16" if BACKEND == "jax" else "float32")
    np.testing.assert_array_equal(np.asarray(ops.cast(x, "float32")), X)


def test_variables():
    x = ProbeData(keras.Variable(X, dtype="float32")).first()[0]
    assert backend.is_tensor(x)
    np.testing.assert_array_equal(x, X)


def test_arrays_are_copied():
    # Spread over devices, JAX takes over memory that begins at a multiple of 64 bytes.
    memory = np.zeros(1040, "float32")
    start = -memory.ctypes.data % 64 // 4
    x = memory[start : start + 1024].reshape(8, 128)

    def check(place):
        for data in (
            ProbeData(x, place=place),
            ProbeData(x, batch_size=6, place=place),
        ):
            found = data.first()[0]
            x[:] = 1
            np.testing.assert_array_equal(found, np.zeros_like(found))
            x[:] = 0

    check(None)
    if BACKEND == "jax":
        with keras.distribution.DataParallel().scope():
            check(backend.place_of(keras.Variable(0.0)))


def test_structures():
    data = ProbeData({"a": X, "b": [Y, Y]}, (Y, {"c": X}), (Y, {"c": Y}), batch_size=3)
    (first, n), (second, m) = batches(data)
    assert (n, m) == (3, 2)
    x, y, weight = second
    np.testing.assert_array_equal(x["b"][1], Y[3:])
    np.testing.assert_array_equal(y[1]["c"], X[3:])
    np.testing.assert_array_equal(weight[0], Y[3:])


@pytest.mark.parametrize("size, sizes", [(1, [1] * 5), (2, [2, 2, 1]), (5, [5])])
def test_batch_size(size, sizes):
    data = ProbeData(X, Y, batch_size=size)
    assert [n for _, n in data] == sizes
    assert data.num_batches == len(sizes)
    assert [n for _, n in data] == sizes  # A second pass.


@pytest.mark.parametrize("size", [0, -1, 2.0, "2"])
def test_bad_batch_size(size):
    with pytest.raises(ValueError, match=f"positive integer. Received: .*{size!r}"):
        ProbeData(X, Y, batch_size=size)


@pytest.mark.parametrize(
    "size, start, sizes",
    [
        (1, 0, [2, 2, 1]),
        (1, 1, [1, 2, 2]),
        (2, 0, [2, 2, 1]),
        (2, 1, [1, 2, 2]),
        (3, 0, [3, 2]),
        (3, 1, [1, 3, 1]),
        (4, 0, [4, 1]),
        (4, 1, [2, 3]),
        (5, 0, [5]),
        (5, 1, [2, 3]),
    ],
)
def test_in_pairs(size, start, sizes):
    data = ProbeData(X, Y, Y, class_weight={4: 2.0}, batch_size=size)
    found = list(data.in_pairs(start))
    assert [n for _, n in found] == sizes
    columns = zip(*[batch for batch, _ in batches(found)], strict=True)
    x, y, weight = (np.concatenate(column) for column in columns)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, Y)
    np.testing.assert_array_equal(weight, [0, 1, 2, 3, 8])  # Not weighted again.


def test_in_pairs_as_far_as_shapes_allow():
    data = ProbeData(Sequences())
    shapes = [
        [tuple(x.shape) for (x, _, _), _ in data.in_pairs(start)] for start in (0, 1)
    ]
    assert shapes[0] == [(2, 3), (2, 3), (2, 7), (1, 9)]
    assert shapes[1] == [(1, 3), (2, 3), (1, 3), (1, 7), (1, 7), (1, 9)]


class Sequences(keras.utils.PyDataset):
    """Batches of sequences, padded each to its own length."""

    SHAPES = (2, 3), (2, 3), (2, 7), (1, 9)
    num_batches = len(SHAPES)

    def __getitem__(self, i):
        return np.ones(self.SHAPES[i]), np.ones(self.SHAPES[i][0])


class Frame:
    """Stands for the tables of pandas and its like, which NumPy can read."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)


def test_whatever_numpy_can_read():
    (((x, y, _), n),) = batches(ProbeData(Frame(X), Frame(Y)))
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, Y)
    with pytest.raises(ValueError, match="arrays of numbers.*dtype <U1"):
        ProbeData(Frame(["a", "b"]), Y[:2])


@pytest.mark.parametrize(
    "x, message",
    [
        (np.array(["a", "b"]), "dtype <U1.*Encode text"),
        (np.array([[1], [2, 3]], dtype=object), "dtype object.*pad rows"),
        ([[1.0, 2.0], [3.0, 4.0]], "A list stands for several inputs"),
        ("text", "Received: 'text' of type str"),
        (np.float32(3.0), "same number of samples"),
        (np.zeros((0, 2)), r"at least one.*dimensions \[0\]"),
        ({1.0, 2.0}, "an object of type set"),
        ((i for i in range(3)), "generator can be read only once"),
        (iter([X]), "generator can be read only once.*a PyTorch `DataLoader`"),
        (lambda: X, "generator can be read only once"),
    ],
    ids=[
        *["text", "ragged", "lists", "string", "scalar", "empty", "set"],
        *["generator", "iterator", "call"],
    ],
)
def test_refused(x, message):
    with pytest.raises(ValueError, match=message):
        ProbeData(x)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match=r"Received: first dimensions \[4, 5\]"):
        ProbeData(X, Y[:4])
    with pytest.raises(ValueError, match=r"Received: first dimensions \[3, 5\]"):
        ProbeData(X, Y, Y[:3], class_weight={0: 2.0})


def test_text_and_ragged_tensors():
    tf = pytest.importorskip("tensorflow")
    text = tf.constant(["a", "b"])
    for x in (text, tf.data.Dataset.from_tensors((text, Y[:2]))):
        if BACKEND == "tensorflow":
            np.testing.assert_array_equal(ProbeData(x).first()[0], text)
        else:
            with pytest.raises(ValueError, match="dtype object.*Encode text"):
                ProbeData(x).first()
    ragged = tf.ragged.constant([[1.0], [2.0, 3.0]])
    for x in (ragged, tf.data.Dataset.from_tensors((ragged, Y[:2]))):
        with pytest.raises(ValueError, match="type RaggedTensor.*pad rows"):
            ProbeData(x).first()


# Means


def test_mean_is_weighted_by_size():
    calls = []
    everything = [
        ProbeData(X, X),
        ProbeData(X, X, batch_size=2),
        ProbeData(data_loader(X, X, batch_size=2)),
        ProbeData(tf_data(X, X).batch(2).filter(lambda x, y: True)),
    ]
    for data in everything:
        result = data.mean(
            lambda batch, factor: {
                "a": factor * ops.mean(batch[0]),
                "b": (ops.mean(batch[1], axis=0),),
            },
            2.0,
            on_batch=lambda *args: calls.append(args),
        )
        np.testing.assert_allclose(result["a"], 2 * X.mean(), rtol=1e-6)
        np.testing.assert_allclose(result["b"][0], X.mean(axis=0), rtol=1e-6)
        assert backend.is_tensor(result["a"])
    assert calls[:4] == [(1, 1), (1, 3), (2, 3), (3, 3)]
    assert calls[-1] == (3, 3)


def test_mean_keeps_its_type():
    with floatx("float16"):
        data = ProbeData(X, batch_size=2)
    assert dtype_of(data.mean(lambda batch: ops.mean(batch[0]))) == "float16"


def test_mean_does_not_remember_how_it_was_computed():
    if BACKEND != "torch":
        pytest.skip("Only PyTorch's tensors remember.")
    import torch

    weights = torch.nn.Parameter(torch.ones(2))
    for data in (ProbeData(X), ProbeData(X, batch_size=2)):
        mean = data.mean(lambda b: {"loss": (b[0] @ weights).mean(), "none": None})
        assert not mean["loss"].requires_grad and mean["none"] is None
        np.testing.assert_allclose(mean["loss"], X.sum(1).mean(), rtol=1e-6)


def test_numbered_batches():
    numbers = []

    def function(batch, scale, number):
        assert scale == 2.0 and backend.is_tensor(number)
        numbers.append(int(number))
        return ops.zeros(())

    ProbeData(X, Y, batch_size=2).mean(function, 2.0, numbered=True)
    assert numbers == [1, 2, 3]


def test_no_data():
    data = ProbeData.none()
    assert data.num_batches == 1
    assert data.mean(lambda batch: batch) == (None, None, None)


# Class weights


@pytest.mark.parametrize(
    "y",
    [Y, Y[:, None], Y.astype("float32"), np.eye(5, dtype="float32")],
    ids=["indices", "column", "floats", "one_hot"],
)
def test_class_weights_are_those_of_keras(y):
    weights = {0: 0.5, 3: 2.0}
    seen = []

    class Spy(keras.Model):
        def call(self, x):
            return x

        def train_step(self, *args):
            seen.append(np.asarray(args[-1][2]))
            logs = {"loss": ops.zeros(())}
            return (logs, args[0]) if BACKEND == "jax" else logs

    model = Spy()
    model.compile(run_eagerly=True)
    model.fit(X, y, batch_size=5, class_weight=weights, shuffle=False, verbose=0)
    for labels in (y, backend.array(y)):
        weight = ProbeData(X, labels, class_weight=weights).first()[2]
        np.testing.assert_array_equal(weight, seen[0])
        assert dtype_of(weight) == "float32" and backend.is_tensor(weight)


@SOURCES
def test_class_weights_multiply_sample_weights(source):
    scale = {1: 10.5}
    for arguments in ((X, Y, Y), (X, Y, backend.array(Y)), (source(X, Y, Y),)):
        data = ProbeData(*arguments, class_weight=scale)
        weights = np.concatenate([b[2] for b, _ in batches(data)])
        np.testing.assert_array_equal(weights, [0, 10.5, 2, 3, 4])


def test_class_weights_with_a_weight_for_each_step():
    weight = np.arange(10).reshape(5, 2)
    weight = ProbeData(X, Y, weight, class_weight={1: 0.5}).first()[2]
    np.testing.assert_array_equal(weight, [[0, 1], [1, 1.5], [4, 5], [6, 7], [8, 9]])


def test_class_weights_that_are_refused():
    for y in (None, {"a": Y}):
        with pytest.raises(ValueError, match="single output and its labels"):
            ProbeData(X, y, class_weight={0: 1.0})
    with pytest.raises(ValueError, match="one label per sample"):
        ProbeData(X, np.zeros((5, 3, 4)), class_weight={0: 1.0})


# Places


@contextlib.contextmanager
def elsewhere():
    """A variable that is not where tensors are by default."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.device("CPU:1"):
            yield tf.Variable(0.0)
    elif BACKEND == "jax":
        import jax

        yield jax.device_put(0.0, jax.devices()[1])
    else:
        import torch

        # It holds no numbers, but shows where they would be.
        yield torch.nn.Parameter(torch.zeros((), device="meta"))


def where(tensor):
    return tensor.devices() if BACKEND == "jax" else tensor.device


def test_batches_are_placed():
    with elsewhere() as variable:
        home = where(variable)
    place = backend.place_of(variable)
    assert where(backend.array(0.0)) != home
    data = ProbeData(X, Y, place=place, batch_size=2)
    everything = [
        data,
        ProbeData(X, Y, batch_size=2).moved_to(place),
        ProbeData(backend.array(X), place=place),
        ProbeData(tf_dataset(X, Y), place=place),
        ProbeData(data_loader(X, Y), place=place),
    ]
    assert all(where(x) == home for (x, _, _), _ in data.in_pairs(1))
    for data in everything:
        for (x, y, _), _ in data:
            assert where(x) == home and (y is None or where(y) == home)
        assert where(data.mean(lambda batch: batch[0][0])) == home
        assert where(data.mean(lambda batch: backend.array(1.0))) == home


def test_data_spread_over_devices():
    if BACKEND != "jax":
        pytest.skip("`keras.distribution` works on JAX only.")
    numbers = np.random.default_rng(0).standard_normal((22, 3)).astype("float32")
    # Neither part is linear in the rows: it would show if some were added or lost.
    loss = backend.compiled(lambda b, w: (ops.mean((b[0] @ w) ** 2), ops.max(b[1])))

    def means(variable):
        place = backend.place_of(variable)
        everything = [
            ProbeData(numbers, np.arange(22), place=place),
            ProbeData(numbers, np.arange(22), place=place, batch_size=8),
            ProbeData(backend.array(numbers), np.arange(22), place=place),
            ProbeData(Batches(numbers, np.arange(22), length=8), place=place),
        ]
        everything.insert(2, ProbeData._of(list(everything[1].in_pairs(1)), place))
        (weights,) = backend.values([variable])
        return [data.mean(loss, weights) for data in everything], everything[1]

    expected, _ = means(keras.Variable(numbers[0]))
    distribution = keras.distribution.DataParallel()
    with distribution.scope():
        variable = keras.Variable(numbers[0])
        found, data = means(variable)
    assert len(variable.value.devices()) == 4
    # The first two batches have a part on each device; 6 samples are not four parts.
    parts = [{s.data.shape for s in x.addressable_shards} for (x, _, _), _ in data]
    assert parts == [{(2, 3)}, {(2, 3)}, {(6, 3)}]
    assert all(len(y.devices()) == 4 for (_, y, _), _ in data)
    # float32: sums of 22 numbers in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-6)
