"""What users pass as data."""

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_curvature.data import ProbeData


def batches(data):
    """All batches as NumPy arrays, with their sizes."""
    return [
        (
            keras.tree.map_structure(
                lambda a: None if a is None else np.asarray(a), batch
            ),
            size,
        )
        for batch, size in data
    ]


X = np.arange(10.0).reshape(5, 2)
Y = np.arange(5)


def test_arrays_are_one_batch_of_tensors():
    data = ProbeData(X, Y)
    assert data.num_batches == 1
    ((x, y, sample_weight), size) = next(iter(data))
    assert isinstance(x, tf.Tensor) and isinstance(y, tf.Tensor)
    assert x.dtype == tf.float32 and y.dtype == tf.int64
    assert sample_weight is None and size == 5
    np.testing.assert_array_equal(x, X)


def test_floats_follow_keras_and_other_numbers_stay(float64):
    data = ProbeData([X.astype("float32"), Y.astype("uint8"), Y > 2])
    (x, _, _), _ = next(iter(data))
    assert [a.dtype for a in x] == [tf.float64, tf.uint8, tf.bool]


def test_tensors_stay_as_they_are():
    x = tf.constant(X, tf.float64)
    (placed, y, _), _ = next(iter(ProbeData(x, Y)))
    assert placed.dtype == tf.float64 and y.dtype == tf.int64
    (placed, _, _), _ = next(iter(ProbeData(tf.Variable(X))))
    assert isinstance(placed, tf.Tensor)


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
    "size, sizes", [(1, [2, 2, 1]), (2, [1, 1, 1, 1, 1]), (4, [2, 2, 1]), (5, [3, 2])]
)
def test_halved(size, sizes):
    halved = ProbeData(X, Y, batch_size=size).halved()
    assert [n for _, n in halved] == sizes
    x = np.concatenate([b[0] for b, _ in batches(halved)])
    np.testing.assert_array_equal(x, X)


def test_pandas():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=["a", "b"])
    (((x, y, _), n),) = batches(ProbeData(frame, pandas.Series(Y)))
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, Y)
    frame["c"] = list("abcde")
    with pytest.raises(ValueError, match="arrays of numbers"):
        ProbeData(frame, Y)


@pytest.mark.parametrize(
    "x, message",
    [
        (np.array(["a", "b"]), "dtype <U1.*Encode text"),
        (np.array([[1], [2, 3]], dtype=object), "dtype object.*pad rows"),
        ([[1.0, 2.0], [3.0, 4.0]], "A list stands for several inputs"),
        ("text", "Received: 'text' of type str"),
        (np.float32(3.0), "same number of samples"),
        (np.zeros((0, 2)), r"at least one.*dimensions \[0\]"),
        ((i for i in range(3)), "generator can be read only once"),
        (lambda: X, "generator can be read only once"),
    ],
    ids=["text", "ragged", "lists", "string", "scalar", "empty", "generator", "call"],
)
def test_refused(x, message):
    with pytest.raises(ValueError, match=message):
        ProbeData(x)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match=r"Received: first dimensions \[4, 5\]"):
        ProbeData(X, Y[:4])
    with pytest.raises(ValueError, match=r"Received: first dimensions \[3, 5\]"):
        ProbeData(X, Y, Y[:3])


class Batches(keras.utils.PyDataset):
    """Two batches, or endlessly many."""

    def __init__(self, length=2):
        super().__init__()
        self.length = length

    @property
    def num_batches(self):
        return self.length

    def __getitem__(self, i):
        return X[3 * i : 3 * i + 3], Y[3 * i : 3 * i + 3]


def test_py_dataset():
    data = ProbeData(Batches())
    assert data.num_batches == 2
    for _ in range(2):
        (first, n), (second, m) = batches(data)
        assert (n, m) == (3, 2)
        np.testing.assert_array_equal(second[0], X[3:])
        np.testing.assert_array_equal(second[1], Y[3:])


@pytest.mark.parametrize("arrays", [(X,), (X, Y), (X, Y, Y)])
def test_dataset_with_and_without_targets_and_weights(arrays):
    if len(arrays) == 1:
        source = tf.data.Dataset.from_tensor_slices(X).batch(3)
    else:
        source = tf.data.Dataset.from_tensor_slices(arrays).batch(3)
    data = ProbeData(source)
    assert data.num_batches == 2
    (batch, n), (_, m) = data
    assert (n, m) == (3, 2)
    assert [a is not None for a in batch] == [i < len(arrays) for i in range(3)]


def test_dataset_of_dictionaries():
    source = tf.data.Dataset.from_tensors(({"a": X, "b": Y}, {"c": Y}))
    (((x, y, weight), n),) = batches(ProbeData(source))
    assert set(x) == {"a", "b"} and set(y) == {"c"} and weight is None and n == 5


def test_data_sets_that_are_refused():
    source = tf.data.Dataset.from_tensor_slices((X, Y))
    with pytest.raises(ValueError, match=r"never ends.*take\(10\)"):
        ProbeData(source.batch(2).repeat())
    with pytest.raises(ValueError, match="never ends"):
        ProbeData(Batches(None))
    for name in ("y", "sample_weight", "batch_size"):
        with pytest.raises(ValueError, match=f"leave `{name}` out"):
            ProbeData(source.batch(2), **{name: 2})
    with pytest.raises(ValueError, match="must be batched"):
        next(iter(ProbeData(source)))


def test_empty_data_sets():
    source = tf.data.Dataset.from_tensor_slices((X, Y)).batch(2)
    for empty in (source.take(0), source.filter(lambda x, y: False)):
        with pytest.raises(ValueError, match="gives no batch"):
            ProbeData(empty).first()
        with pytest.raises(ValueError, match="gives no batch"):
            ProbeData(empty).mean(lambda batch: batch[0])


def test_mean_is_weighted_by_size():
    calls = []
    source = tf.data.Dataset.from_tensor_slices((X, X)).batch(2)
    everything = [
        ProbeData(X, X),
        ProbeData(X, X, batch_size=2),
        ProbeData(source),
        ProbeData(source.filter(lambda x, y: True)),
    ]
    for data in everything:
        result = data.mean(
            lambda batch, factor: {
                "a": factor * tf.reduce_mean(batch[0]),
                "b": (tf.reduce_mean(batch[1], axis=0),),
            },
            2.0,
            on_batch=lambda *args: calls.append(args),
        )
        np.testing.assert_allclose(result["a"], 2 * X.mean(), rtol=1e-6)
        np.testing.assert_allclose(result["b"][0], X.mean(axis=0), rtol=1e-6)
    assert calls[:4] == [(1, 1), (1, 3), (2, 3), (3, 3)]
    assert calls[-1] == (3, None)


def test_numbered_batches():
    data = ProbeData(X, Y, batch_size=2)
    numbers = []
    data.mean(lambda batch, n: numbers.append(int(n)) or tf.zeros(()), numbered=True)
    assert numbers == [1, 2, 3]


def test_no_data():
    data = ProbeData.none()
    assert data.num_batches == 1
    assert data.mean(lambda batch: batch) == (None, None, None)


@pytest.mark.parametrize(
    "y",
    [Y, Y[:, None], Y.astype("float32"), np.eye(5, dtype="float32")],
    ids=["indices", "column", "floats", "one_hot"],
)
def test_class_weights_are_those_of_keras(y):
    weights = {0: 0.5, 3: 2.0}
    seen = []

    class Spy(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def train_step(self, data):
            seen.append(data[2].numpy())
            return {"loss": tf.constant(0.0)}

    model = Spy()
    model.compile(run_eagerly=True)
    model.fit(X, y, batch_size=5, class_weight=weights, shuffle=False, verbose=0)
    (_, _, weight), _ = next(iter(ProbeData(X, y, class_weight=weights)))
    np.testing.assert_array_equal(weight, seen[0])
    assert weight.dtype == tf.float32


def test_class_weights_multiply_sample_weights():
    data = ProbeData(X, Y, Y, class_weight={1: 10.0}, batch_size=3)
    weights = np.concatenate([b[2] for b, _ in batches(data)])
    np.testing.assert_array_equal(weights, [0, 10, 2, 3, 4])
    source = tf.data.Dataset.from_tensor_slices((X, Y, Y)).batch(3)
    data = ProbeData(source, class_weight={1: 10.0})
    weights = np.concatenate([b[2] for b, _ in batches(data)])
    np.testing.assert_array_equal(weights, [0, 10, 2, 3, 4])


def test_class_weights_that_are_refused():
    for y in (None, {"a": Y}):
        with pytest.raises(ValueError, match="single output and its labels"):
            ProbeData(X, y, class_weight={0: 1.0})
    with pytest.raises(ValueError, match="one label per sample"):
        ProbeData(X, np.zeros((5, 3, 4)), class_weight={0: 1.0})


def test_batches_are_placed_on_the_device():
    data = ProbeData(X, Y, device="CPU:1", batch_size=2)
    for batch in (data, data.halved(), ProbeData(tf.constant(X), device="CPU:1")):
        for (x, _, _), _ in batch:
            assert "CPU:1" in x.device
    source = tf.data.Dataset.from_tensor_slices((X, Y)).batch(3)
    for (x, y, _), _ in ProbeData(source, device="CPU:1"):
        assert "CPU:1" in x.device and "CPU:1" in y.device
    mean = ProbeData(source, device="CPU:1").mean(lambda b: tf.reduce_mean(b[0]))
    assert "CPU:1" in mean.device


def test_cases_fit_in():
    for name in ("two_outputs", "two_inputs", "sample_weights"):
        case = cases.CASES[name]()
        ProbeData(case.x, case.y, case.sample_weight, batch_size=2)
