"""Loops without `fit`: callbacks called by hand, or `probe` and nothing else."""

import pathlib
import re

import keras
import numpy as np
import pytest
from event_files import read
from keras import layers, ops
from training import (
    BATCH,
    BATCHES,
    assert_same,
    data,
    fit,
    monitor,
    network,
    state,
    steps,
)

import keras_curvature as kc
from keras_curvature.tensorboard import summaries, tags

X, Y = data()
GUIDE = pathlib.Path(__file__).parents[2] / "docs" / "guide.md"


def crossentropy(model, x, y):
    losses = keras.losses.sparse_categorical_crossentropy(y, model(x), from_logits=True)
    return ops.mean(losses)


def by_hand(model, *callbacks, epochs=1):
    """What `fit` does, with nothing more than `train_on_batch` and the callbacks."""
    callbacks = keras.callbacks.CallbackList(list(callbacks), model=model)
    callbacks.on_train_begin()
    for epoch in range(epochs):
        callbacks.on_epoch_begin(epoch)
        for batch in range(BATCHES):
            rows = slice(BATCH * batch, BATCH * batch + BATCH)
            callbacks.on_train_batch_begin(batch)
            model.train_on_batch(X[rows], Y[rows])
            callbacks.on_train_batch_end(batch)
        callbacks.on_epoch_end(epoch)
    callbacks.on_train_end()


def timeless(record):
    """A record without what the clock decides."""
    clocked = "seconds", "overhead", "epoch"
    return {k: v for k, v in record.items() if k not in clocked}


def newton_network():
    keras.utils.set_random_seed(0)  # Layers draw their seeds when they are made.
    stack = layers.Dense(4, "tanh", name="a"), layers.Dense(3, name="b")
    return network(*stack, optimizer=kc.DiagonalNewton(0.05))


def figures(tmp_path, name):
    """What is delivered, and what goes by the weights of the probe before."""
    return monitor(
        diagonal="gauss_newton",
        num_matvecs=0,
        gradients=True,
        log_dir=tmp_path / name,
        verbose=0,
    )


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """What `fit` makes of a network, records and event files."""
    path = tmp_path_factory.mktemp("fitted")
    model, watch = newton_network(), figures(path, "fit")
    fit(model, watch, epochs=2)
    return model, watch, read(path / "fit")


@pytest.mark.parametrize("probes", ["by callbacks", "by probe"])
def test_a_loop_sees_what_fit_sees(probes, fitted, tmp_path):
    expected, watched, files = fitted
    model, watch = newton_network(), figures(tmp_path, "loop")
    if probes == "by callbacks":
        by_hand(model, watch, epochs=2)
    else:
        watch.set_model(model)
        for step in range(2 * BATCHES + 1):
            if step % 4 == 0:
                record = watch.probe(step)
                assert record is watch.history[-1] and record["step"] == step
            if step < 2 * BATCHES:
                rows = slice(BATCH * (step % 10), BATCH * (step % 10) + BATCH)
                model.train_on_batch(X[rows], Y[rows])
        watch.on_train_end()
    assert steps(watch) == [0, 4, 8, 12, 16, 20]
    assert_same(state(model), state(expected))
    for record, other in zip(watch.history, watched.history, strict=True):
        assert timeless(record) == timeless(other)
    found = read(tmp_path / "loop")
    assert set(found) == set(files)
    for tag in set(files) - {"probe/seconds", "probe/overhead"}:
        assert list(found[tag]) == list(files[tag])
        pair = [list(one.values()) for one in (found[tag], files[tag])]
        if tag.startswith(tags.PAGE_FIGURES):
            # All figures of a probe in a row, those of the clock among them.
            timed = [summaries.PAGE_KEYS.index(k) for k in ("seconds", "overhead")]
            pair = [[np.delete(row, timed) for row in one] for one in pair]
        assert_same(*pair)


def test_a_model_that_was_never_compiled():
    """Its steps are the batches that were seen, or what the loop says."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([layers.Input((3,)), layers.Dense(3)])
    watch = monitor(loss_fn=crossentropy, num_matvecs=12)
    callbacks = keras.callbacks.CallbackList([watch], model=model)
    callbacks.on_train_begin()
    for epoch in range(2):
        callbacks.on_epoch_begin(epoch)
        for batch in range(5):
            callbacks.on_train_batch_end(batch)
        logs = {}
        callbacks.on_epoch_end(epoch, logs)
    assert steps(watch) == [0, 4, 8]
    assert [r["epoch"] for r in watch.history] == [0, 0, 1]
    last = watch.probe(11)
    assert last["step"] == 11 and last["learning_rate"] is None
    h = kc.hessian_matrix(model, X[:20], Y[:20], loss_fn=crossentropy)
    np.testing.assert_allclose(last["hessian_trace"], np.trace(h), rtol=1e-4)


def test_batches_that_are_counted_through():
    """A loop may count batches from its beginning, whatever the epoch."""
    watch = monitor()
    watch.set_model(network())
    watch.on_train_begin()
    for batch in range(12):
        if batch % 6 == 0:
            watch.on_epoch_begin(batch // 6)
        watch.on_train_batch_end(batch)
    assert steps(watch) == [0, 4, 8, 12]


def test_a_loop_that_was_taken_back(tmp_path):
    watch = monitor(log_dir=tmp_path, verbose=0)
    watch.set_model(network())
    for step in (0, 4, 8, 12, 8, 12, 16):
        watch.probe(step)
    watch.on_train_end()
    assert steps(watch) == [0, 4, 8, 12, 16]
    assert list(read(tmp_path)["probe/loss"]) == [0, 4, 8, 12, 16]
    watch.probe(0)  # From the beginning.
    assert steps(watch) == [0, 4, 8, 12, 16, 0]
    assert len(list(tmp_path.iterdir())) == 2


def test_probe_checks_what_it_is_given():
    with pytest.raises(ValueError, match=r"`monitor.set_model\(model\)` first"):
        monitor().probe(0)
    watch = monitor()
    watch.set_model(network())
    with pytest.raises(ValueError, match="`step` must be.*Received: step=-1"):
        watch.probe(-1)
    watch = monitor(probe_data=(X[:, :2], Y))
    watch.set_model(network())
    with pytest.raises(ValueError, match="cannot probe the model"):
        watch.probe(0)


def test_a_failed_probe_is_none(monkeypatch):
    watch = monitor(verbose=0)
    watch.set_model(network())
    watch.probe(0)
    monkeypatch.setattr(watch, "_look", lambda step: 1 / 0)
    with pytest.warns(UserWarning, match="probe at step 3 failed"):
        assert watch.probe(3) is None
    assert steps(watch) == [0]


def loops_of_the_guide():
    """The guide's loops for this framework, by their first line."""
    section = GUIDE.read_text().split("## Loops of your own")[1].split("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    names = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
    this, loops = names.pop(keras.backend.backend()), []
    for block in blocks:
        title = block.splitlines()[0]
        if this in title or not any(name in title for name in names.values()):
            loops.append(pytest.param(block, id=title.removeprefix("# ")))
    return loops


@pytest.mark.parametrize("block", loops_of_the_guide())
def test_loops_of_the_guide(block, tmp_path):
    """Each trains, and its monitor has seen it."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([layers.Input((3,)), layers.Dense(3)])
    batches = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 40, 4)] * 21
    names = {"kc": kc, "keras": keras, "np": np, "model": model, "batches": batches}
    names |= {"x_probe": X[:20], "y_probe": Y[:20], "log_dir": tmp_path}
    exec(compile(block, "docs/guide.md", "exec"), names)
    watch = names["monitor"]
    assert steps(watch) == [0, 100, 200]
    losses = [record["loss"] for record in watch.history]
    assert losses[2] < losses[1] < losses[0]
    assert len(read(tmp_path)["hessian/trace"]) == 3
