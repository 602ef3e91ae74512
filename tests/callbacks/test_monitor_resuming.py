"""Trainings that are cut into pieces, killed, resumed, or repeated in one `log_dir`."""

import warnings

import keras
import numpy as np
import pytest
from event_files import read
from tensorboard.backend.event_processing import event_accumulator
from training import (
    BATCHES,
    ON_TORCH,
    assert_same,
    data,
    fit,
    monitor,
    network,
    state,
    steps,
    told,
)

import keras_curvature as kc

X, Y = data()

#: A delivery to the optimizer is due at the very step at which it is saved.
FREQ = 5


class Killed(Exception):
    """The end of a process, as far as the files are concerned."""


class Kill(keras.callbacks.Callback):
    """Ends training after a number of batches."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            raise Killed


@pytest.fixture(autouse=True)
def no_failure():
    """A probe or a record that fails warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def shown_steps(directory, tag="hessian/trace"):
    """The steps that TensorBoard shows of a run."""
    events = event_accumulator.EventAccumulator(
        str(directory), size_guidance={event_accumulator.TENSORS: 0}
    ).Reload()
    return [event.step for event in events.Tensors(tag)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training by curvature over two epochs, and what was saved after the first.

    Returns the state at its end, the monitor, and the directory of model and logs.
    """
    path = tmp_path_factory.mktemp("whole")

    class Save(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                self.model.save(path / "model.keras")

    model, watch = newton_network(), feed(path)
    fit(model, watch, Save(), epochs=2)
    return state(model), watch, path


def newton_network():
    """Several steps in an execution, where Keras knows of such."""
    per_execution = 1 if ON_TORCH else 4
    return network(
        optimizer=kc.DiagonalNewton(0.05),
        activation="tanh",
        steps_per_execution=per_execution,
    )


def feed(path=None):
    return kc.CurvatureFeed((X, Y), FREQ, 8, log_dir=path)


def test_training_by_curvature_resumes_bit_for_bit(whole):
    """From a file: rows and directions are those that it would have had."""
    expected, watched, path = whole
    model, watch = keras.models.load_model(path / "model.keras"), feed(path)
    fit(model, watch, initial_epoch=1, epochs=2)
    assert_same(state(model), expected)
    # The second epoch was recorded before, and is recorded again.
    assert steps(watch) == [s for s in steps(watched) if s > BATCHES]
    assert shown_steps(path / "curvature") == steps(watched)


def test_several_fits_are_one(whole):
    expected, *_ = whole
    model, watch = newton_network(), feed()
    for _ in range(2):
        fit(model, watch)
    assert_same(state(model), expected)


@pytest.mark.parametrize("anew", [True, False], ids=["new monitor", "same monitor"])
def test_records_and_event_files_continue(anew, tmp_path):
    """Nothing doubled, nothing lost, and no trace of what was taken back."""
    log_dir = tmp_path / "logs"
    watch, model = monitor(log_dir=log_dir), network()
    backup = tmp_path / "backup"
    with pytest.raises(Killed):
        restore = keras.callbacks.BackupAndRestore(backup)
        fit(model, watch, restore, Kill(after=17), epochs=3)
    assert steps(watch) == shown_steps(log_dir / "curvature") == [0, 4, 8, 12, 16]
    first = read(log_dir)["probe/loss"]
    if anew:
        watch = monitor(log_dir=log_dir)
    restore = keras.callbacks.BackupAndRestore(backup)
    fit(network(), watch, restore, epochs=3)
    # After the backup at step 10.
    again = [12, 16, 20, 24, 28]
    assert steps(watch) == again if anew else [0, 4, 8, *again]
    assert [p.name for p in log_dir.iterdir()] == ["curvature"]
    assert shown_steps(log_dir / "curvature") == [0, 4, 8, *again]
    losses = read(log_dir)["probe/loss"]
    for step in first:  # The killed training's, or the same again.
        np.testing.assert_allclose(losses[step], first[step], rtol=1e-5)


def test_two_trainings_in_one_directory_stay_apart(tmp_path, capsys):
    for epochs in (1, 2):
        watch = monitor(log_dir=tmp_path)
        fit(network(), watch, epochs=epochs, verbose=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curvature", "curvature_2"]
    assert shown_steps(tmp_path / "curvature") == [0, 4, 8]
    assert shown_steps(tmp_path / "curvature_2") == [0, 4, 8, 12, 16, 20]
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "is taken" in x]
    assert line.endswith(
        f"writing to {tmp_path / 'curvature_2'}: {tmp_path / 'curvature'} is taken"
    )


def test_another_model_is_another_run(tmp_path):
    """One monitor, two models: `history` holds both, the files keep them apart."""
    watch = monitor(log_dir=tmp_path)
    for _ in range(2):
        fit(network(), watch)
    assert steps(watch) == [0, 4, 8, 0, 4, 8]
    for name in ("curvature", "curvature_2"):
        assert shown_steps(tmp_path / name) == [0, 4, 8]


def test_early_stopping_that_restores_weights(tmp_path):
    """The best weights come back, the count of steps goes on."""
    watch, model = monitor(log_dir=tmp_path), network()
    for _ in range(2):
        stop = keras.callbacks.EarlyStopping(
            "hessian_trace", 1e9, 1, mode="min", restore_best_weights=True
        )
        history = fit(model, watch, stop, epochs=5)
        assert len(history["loss"]) == 2
    assert steps(watch) == shown_steps(tmp_path / "curvature")
    assert steps(watch) == list(range(0, 4 * BATCHES + 1, 4))


def test_a_layer_more(tmp_path):
    """A model that grows between two fits is another one, in records and files."""
    model, watch = network(), monitor(log_dir=tmp_path)
    fit(model, watch)
    model.add(keras.layers.Dense(3, name="more"))
    model.compile("sgd", model.loss)
    fit(model, watch)
    assert steps(watch) == [0, 4, 8] * 2
    assert [len(r["layers"]) for r in watch.history] == [2] * 3 + [3] * 3
    assert shown_steps(tmp_path / "curvature_2") == [0, 4, 8]


def test_figures_are_lost_one_by_one(tmp_path):
    """Not a number in the middle, no memory for a probe, a disk that is full."""
    model, watch = network(), monitor(log_dir=tmp_path, update_freq=2)
    look, write = watch._look, watch._writer.write

    def failing_look(step):
        if step == 4:
            raise MemoryError("no room for 3 vectors")
        return look(step)

    def failing_write(record):
        if record["step"] == 6:
            raise OSError("No space left on device")
        write(record)

    watch._look, watch._writer.write = failing_look, failing_write
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, watch)
    first, second = told(caught)
    assert "The curvature probe at step 4 failed and training goes on" in first
    assert "no room for 3 vectors" in first
    assert "Writing the figures of step 6 for TensorBoard failed" in second
    assert "No space left on device" in second
    assert steps(watch) == [0, 2, 6, 8, 10]
    assert shown_steps(tmp_path / "curvature") == [0, 2, 8, 10]
