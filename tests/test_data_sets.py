"""Data sets of every framework, on whichever one Keras runs."""

import random
import sys

import keras
import numpy as np
import pytest
from data_sources import SOURCES, Batches, X, Y, batches, data_loader, stream, tf_data
from keras import ops

from keras_curvature import backend
from keras_curvature.data import ProbeData, endless_batches

BACKEND = keras.backend.backend()


@SOURCES
@pytest.mark.parametrize("arrays", [(X,), (X, Y), (X, Y, Y)])
def test_data_sets_with_and_without_targets_and_weights(source, arrays):
    data = ProbeData(source(*arrays))
    assert data.num_batches == 2
    for _ in range(2):
        (first, n), (second, m) = batches(data)
        assert (n, m) == (3, 2)
        assert [a is not None for a in second] == [i < len(arrays) for i in range(3)]
        for found, array in zip(second, arrays, strict=False):
            np.testing.assert_array_equal(found, array[3:])
    assert all(backend.is_tensor(a) for a in data.first()[: len(arrays)])


def structured():
    """A batch of nested arrays: `(x, y)`."""
    return {"a": X, "b": [Y, Y]}, {"c": Y}


def test_data_sets_of_dictionaries():
    tf, torch = pytest.importorskip("tensorflow"), pytest.importorskip("torch")
    samples = [
        keras.tree.map_structure(lambda a, i=i: a[i], structured()) for i in range(5)
    ]

    class One(Batches):
        def __getitem__(self, i):
            return structured()

    a_tuple = {"a": X, "b": (Y, Y)}, {"c": Y}
    for source in (
        One(length=1),
        tf.data.Dataset.from_tensors(a_tuple),
        torch.utils.data.DataLoader(samples, batch_size=5),
    ):
        (((x, y, weight), n),) = batches(ProbeData(source))
        assert set(x) == {"a", "b"} and set(y) == {"c"} and weight is None and n == 5
        np.testing.assert_array_equal(x["b"][1], Y)
        assert type(x["b"]) is tuple  # As `fit` hands it to the model.


@SOURCES
@pytest.mark.parametrize("name", ["y", "sample_weight", "batch_size"])
def test_data_sets_come_alone(source, name):
    with pytest.raises(ValueError, match=f"leave `{name}` out"):
        ProbeData(source(X, Y), **{name: 2})


def test_endless_data_sets_are_refused():
    with pytest.raises(ValueError, match=r"never ends.*take\(10\)"):
        ProbeData(tf_data(X, Y).batch(2).repeat())
    with pytest.raises(ValueError, match="never ends.*`num_batches` be a number"):
        ProbeData(Batches(X, Y, length=None))
    torch = pytest.importorskip("torch")
    loader = torch.utils.data.DataLoader(stream(torch), batch_size=2)
    with pytest.raises(ValueError, match="does not tell its length.*`__len__`"):
        ProbeData(loader)
    type(loader.dataset).__len__ = lambda self: 3
    assert [n for _, n in ProbeData(loader)] == [2, 1]


def test_data_sets_must_be_batched():
    for source in (tf_data(X, Y), data_loader(X, Y, batch_size=None)):
        with pytest.raises(ValueError, match="must be batched"):
            ProbeData(source).first()


def test_empty_data_sets():
    source = tf_data(X, Y).batch(2)
    for empty in (
        source.take(0),
        source.filter(lambda x, y: False),
        Batches(X, Y, length=0),
        data_loader(X[:0], Y[:0]),
    ):
        with pytest.raises(ValueError, match="gives no batch"):
            ProbeData(empty).first()
        with pytest.raises(ValueError, match="gives no batch"):
            ProbeData(empty).mean(lambda batch: batch[0])


@SOURCES
def test_data_sets_cannot_be_halved(source):
    with pytest.raises(TypeError, match="Only arrays can be halved"):
        ProbeData(source(X, Y)).halved()


@SOURCES
def test_endless_batches(source):
    found = endless_batches(source(X, Y))
    for rows in (X[:3], X[3:], X[:3], X[3:]):
        x, y, sample_weight = next(found)
        np.testing.assert_array_equal(np.asarray(x), rows)
        assert ProbeData(x, y).num_batches == 1 and sample_weight is None


def test_endless_batches_of_endless_data():
    torch = pytest.importorskip("torch")
    loader = torch.utils.data.DataLoader(stream(torch), batch_size=2)
    for source, lengths in (
        (tf_data(X).batch(4).repeat(), [4, 1, 4, 1]),
        (Batches(np.zeros(99), length=None), [3, 3, 3, 3]),
        (loader, [2, 1, 2, 1]),
    ):
        found = endless_batches(source)
        assert [len(next(found)[0]) for _ in range(4)] == lengths


def test_endless_batches_that_are_refused():
    for x in ((X, Y), (X,), (iter([X]),), (Batches(X), Y)):
        with pytest.raises(ValueError, match="needs a data set to take it from: a `tf"):
            endless_batches(*x)
    with pytest.raises(ValueError, match="gave no batch"):
        next(endless_batches(Batches(X, length=0)))


def test_data_sets_of_samples_are_refused():
    torch = pytest.importorskip("torch")
    # NumPy would read them as an array with the samples' parts side by side.
    samples = torch.utils.data.TensorDataset(torch.arange(3), torch.arange(3))
    with pytest.raises(ValueError, match="an object of type TensorDataset"):
        ProbeData(samples)


def test_data_sets_that_give_more_than_they_tell():
    torch = pytest.importorskip("torch")
    dataset = stream(torch)
    type(dataset).__len__ = lambda self: 2
    data = ProbeData(torch.utils.data.DataLoader(dataset, batch_size=2))
    assert data.num_batches == 1
    mean = data.mean(lambda batch: ops.mean(ops.cast(batch[0], "float32")))
    np.testing.assert_allclose(mean, 2.0, rtol=1e-6)


def test_neither_tensorflow_nor_torch_is_imported(monkeypatch):
    for name in {"tensorflow", "torch", "torch.utils.data"}:
        if name.split(".")[0] != BACKEND:
            monkeypatch.setitem(sys.modules, name, None)
    for data in (ProbeData(X, Y, batch_size=3), ProbeData(Batches(X, Y))):
        np.testing.assert_allclose(
            data.mean(lambda b: ops.mean(b[0])), X.mean(), rtol=1e-6
        )


# Random numbers


class Noise(keras.utils.PyDataset):
    """Batches that are drawn from the global random states when they are read."""

    num_batches = 3

    def __getitem__(self, i):
        return np.array([[random.random(), np.random.standard_normal()]])


def shuffled(**options):
    return data_loader(np.arange(30.0), shuffle=True, **options)


def own_generator():
    torch = pytest.importorskip("torch")
    return shuffled(generator=torch.Generator().manual_seed(0))


def own_sampler():
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    sampler = torch.utils.data.RandomSampler(range(30), generator=generator)
    return data_loader(np.arange(30.0), sampler=sampler)


RANDOM = pytest.mark.parametrize(
    "source",
    [lambda: Noise(), shuffled, own_generator, own_sampler],
    ids=["py_dataset", "data_loader", "generator", "sampler"],
)


@RANDOM
def test_reading_leaves_random_numbers_alone(source):
    torch = pytest.importorskip("torch")
    source = source()

    def draws():
        """What training would draw: its own order of the data, and anything else."""
        order = [np.asarray(batch[0]).tolist() for batch in source]
        return order, random.random(), np.random.random(), float(torch.rand(()))

    def seed():
        keras.utils.set_random_seed(0)
        torch.manual_seed(0)
        for owner in (source, getattr(source, "sampler", None)):
            if getattr(owner, "generator", None) is not None:
                owner.generator.manual_seed(0)

    seed()
    expected = draws()
    seed()
    data = ProbeData(source)
    for _ in data:
        pass
    data.first()
    next(endless_batches(source))
    assert draws() == expected


@RANDOM
def test_passes_are_alike_and_their_batches_are_not(source):
    data = ProbeData(source())
    first, second = ([x for (x, _, _), _ in batches(data)] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first[0], first[1])


@RANDOM
def test_fresh_batches_are_fresh(source):
    source = source()
    found = endless_batches(source)
    number = len(list(source))
    first, second = ([np.asarray(next(found)[0]) for _ in range(number)] for _ in "12")
    assert not np.array_equal(first, second)


def test_training_may_read_the_same_data_loader():
    if BACKEND != "torch":
        pytest.skip("It takes seconds, and is the same everywhere.")
    # PyTorch gives such a loader one iterator for all that read it.
    # JAX has threads by now, which a forked process would miss.
    loader = data_loader(
        Y, num_workers=1, persistent_workers=True, multiprocessing_context="spawn"
    )
    training = iter(loader)
    assert next(training)[0].tolist() == [0, 1, 2]
    assert [n for _, n in ProbeData(loader)] == [3, 2]
    assert [b[0].tolist() for b in training] == [[3, 4]]
