"""Data sets of every framework, on whichever one Keras runs."""

import itertools
import random
import sys
import warnings
import weakref

import keras
import numpy as np
import pytest
from data_sources import SOURCES, Batches, X, Y, batches, data_loader, stream, tf_data
from keras import ops

from keras_curvature import backend
from keras_curvature import data as module
from keras_curvature.data import ProbeData, endless_batches

BACKEND = keras.backend.backend()

#: What a small batch counts as.
LEAST = 2**16


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


def test_data_sets_must_be_batched():
    for source in (tf_data(X, Y), data_loader(X, Y, batch_size=None)):
        with pytest.raises(ValueError, match="must be batched"):
            ProbeData(source)


def test_empty_data_sets():
    source = tf_data(X, Y).batch(2)
    for empty in (
        source.take(0),
        source.filter(lambda x, y: False),
        Batches(X, Y, length=0),
        data_loader(X[:0], Y[:0]),
    ):
        with pytest.raises(ValueError, match="gives no batch"):
            ProbeData(empty)


@SOURCES
def test_data_sets_are_taken_in_pairs_like_arrays(source):
    found = list(ProbeData(source(X, Y)).in_pairs(1))
    assert [n for _, n in found] == [1, 3, 1]
    x = np.concatenate([x for (x, _, _), _ in batches(found)])
    np.testing.assert_array_equal(x, X)


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
    assert data.num_batches == 2
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


# Data that moves


class Moving(keras.utils.PyDataset):
    """Batches that nobody gave before: they are numbered through all passes."""

    num_batches = 2

    def __init__(self, height=1):
        super().__init__()
        self.height = height
        self.given = itertools.count(1)

    def __getitem__(self, i):
        return np.full((self.height, 8), next(self.given), "float32")


def moving_tf_dataset():
    tf = pytest.importorskip("tensorflow")
    given = tf.Variable(0.0)
    return (
        tf_data(np.ones((2, 8), "float32"))
        .map(lambda x: x * given.assign_add(1.0), num_parallel_calls=1)
        .batch(1)
    )


def moving_data_loader():
    torch = pytest.importorskip("torch")
    given = itertools.count(1)
    return torch.utils.data.DataLoader(
        [np.ones(8, "float32")] * 2,
        collate_fn=lambda rows: torch.tensor(rows[0][None] * next(given)),
    )


MOVING = pytest.mark.parametrize(
    "source, remedy",
    [
        (Moving, r"Let its `__getitem__\(i\)` return the same"),
        (moving_tf_dataset, r"`x.cache\(\)`, after shuffling"),
        (moving_data_loader, "`shuffle=False`, and no random augmentation"),
    ],
    ids=["py_dataset", "tf_data", "data_loader"],
)


def seen(passes):
    """The numbers that a pass over `Moving` or its like gives."""
    return [int(np.asarray(x)[0, 0]) for (x, _, _), _ in passes]


@MOVING
def test_batches_are_read_once(source, remedy):
    probe = ProbeData(source())
    assert seen(probe) == seen(probe) == [1, 2]
    assert int(probe.first()[0][0, 0]) == 1
    assert probe.num_batches == 2


@MOVING
def test_large_data_sets_that_move_are_refused(source, remedy, monkeypatch):
    monkeypatch.setattr(module, "KEPT_BYTES", LEAST)
    source = source()
    probe = ProbeData(source)
    message = f"another batch number 1 when it was read again.*Received: .*{remedy}"
    with pytest.raises(ValueError, match=message):
        probe.first()
    with pytest.raises(ValueError, match=message):
        probe.mean(lambda batch: ops.sum(batch[0]))


@MOVING
def test_data_sets_that_moved_between_readings_are_told_of(source, remedy):
    source = source()
    ProbeData(source)
    with pytest.warns(UserWarning, match=f"other batches than.*{remedy}"):
        ProbeData(source)


def test_data_sets_that_rest_are_read_again_without_a_word(monkeypatch):
    source = tf_data(X, Y).batch(2).shuffle(9).cache()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (batches(ProbeData(source)) for _ in range(2))
        monkeypatch.setattr(module, "KEPT_BYTES", LEAST)
        large = Batches(np.arange(12.0), length=4)
        third, fourth = (batches(ProbeData(large)) for _ in range(2))
    for a, b in ((first, second), (third, fourth)):
        np.testing.assert_array_equal(a[0][0][0], b[0][0][0])


@pytest.mark.parametrize("pass_of", [2, 4])
def test_shuffled_takes_are_the_same_in_each_pass(pass_of):
    source = tf_data(np.arange(50.0)).shuffle(50).batch(3).take(pass_of)
    probe = ProbeData(source)
    first, second = (np.concatenate([b[0] for b, _ in batches(probe)]) for _ in "12")
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(probe.first()[0], first[:3])


@SOURCES
def test_large_data_sets_are_read_anew_and_not_kept(source, monkeypatch):
    made, most = [], []
    placed = backend.placed

    def alive():
        return sum(tensor() is not None for tensor in made)

    def watched(x, place):
        tensor = placed(x, place)
        made.append(weakref.ref(tensor))
        most.append(alive())
        return tensor

    monkeypatch.setattr(backend, "placed", watched)
    rows = np.arange(40 * 3.0).reshape(-1, 1)
    source = source(rows)
    if isinstance(source, Batches):
        source.length = 40
    monkeypatch.setattr(module, "KEPT_BYTES", 4 * LEAST)
    probe = ProbeData(source)
    assert probe.num_batches == 40
    assert alive() <= 1  # What was kept until it turned out too large is gone.
    most.clear()
    for _ in range(2):
        mean = probe.mean(lambda batch: ops.mean(batch[0]))
        np.testing.assert_allclose(mean, rows.mean(), rtol=1e-6)
        assert [n for _, n in probe.in_pairs(1)] == [1, *[3] * 39, 2]
    assert len(most) >= 160 and max(most) <= 6
    monkeypatch.setattr(module, "KEPT_BYTES", 40 * LEAST)
    kept = ProbeData(source)
    assert kept.num_batches == 40 and alive() >= 40


def test_large_data_sets_are_compared_from_the_first_batch_read(monkeypatch):
    monkeypatch.setattr(module, "KEPT_BYTES", 2 * LEAST)
    source = Batches(np.arange(15.0), length=5)
    probe = ProbeData(source)  # Has read three of them.
    passing = iter(probe)
    for _ in range(4):
        next(passing)
    passing.close()
    source.arrays[0][0] = -1
    with pytest.raises(ValueError, match="another batch number 1 "):
        probe.first()
    source.arrays[0][0] = 0
    source.arrays[0][14] = -1
    assert len(list(probe)) == 5  # The last one was not met before.
    source.arrays[0][14] = 14
    with pytest.raises(ValueError, match="another batch number 5 "):
        list(probe)
    source.arrays[0][14] = -1
    source.length = 4
    with pytest.raises(ValueError, match="gave 4 batches and not 5 when"):
        list(probe)
    source.arrays, source.length = (np.append(source.arrays[0], [0.0] * 3),), 6
    with pytest.raises(ValueError, match="gave more than 5 batches when"):
        list(probe)


def test_an_interrupted_reading_keeps_nothing():
    class Interrupted(Batches):
        broken = True

        def __getitem__(self, i):
            if i == 1 and self.broken:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    source = Interrupted(X, Y)
    with pytest.raises(KeyboardInterrupt):
        ProbeData(source)
    source.broken = False
    assert [n for _, n in ProbeData(source)] == [3, 2]


def test_lengths_that_are_not_told(monkeypatch):
    torch = pytest.importorskip("torch")

    def loader():
        return torch.utils.data.DataLoader(stream(torch), batch_size=1)

    def filtered(samples):
        return samples.batch(1).filter(lambda x: True)

    monkeypatch.setattr(module, "KEPT_BYTES", 3 * LEAST)
    for source in (loader(), filtered(tf_data(np.arange(3)))):
        assert ProbeData(source).num_batches == 3
    monkeypatch.setattr(module, "KEPT_BYTES", 2 * LEAST)
    message = "not end within 3 batches.*maybe it never does. Received: "
    with pytest.raises(ValueError, match=message + ".*__len__"):
        ProbeData(loader())
    endless = filtered(tf_data(np.arange(3)).repeat())
    with pytest.raises(ValueError, match=message + ".*assert_cardinality"):
        ProbeData(endless)


@pytest.mark.parametrize(
    "a, b",
    [
        (X, X.astype("float32")),
        (X, X.reshape(2, 5)),
        (X, X + np.eye(5, 2) * 1e-9),
        (np.array(["a", "b"], object), np.array(["a", "c"], object)),
        ((X, None), (X, X)),
    ],
    ids=["type", "shape", "number", "text", "weight"],
)
def test_what_moves_is_seen(a, b):
    first, second, again = (module._digest((x, Y, None)) for x in (a, b, a))
    assert first == again != second


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
