"""Where records go, whatever happens to the disk, and that nothing is lost."""

import contextlib
import glob
import importlib.util
import io
import itertools
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from event_files import event_files, events, read, scalars, values
from records import LAYERS, synthetic_record
from tensorboard.summary.writer.record_writer import RecordWriter

from keras_curvature.tensorboard import event_file
from keras_curvature.tensorboard.event_file import EventFile
from keras_curvature.tensorboard.record_format import crc32c, framed, unframed
from keras_curvature.tensorboard.writer import CurvatureWriter


@pytest.mark.parametrize("size", [8, 9, 255, 256, 257, 511, 512, 513, 5000])
def test_records_are_framed_as_tensorboard_frames_them(size):
    data = np.random.default_rng(size).bytes(size)
    theirs = io.BytesIO()
    RecordWriter(theirs).write(data)
    assert framed(data) == theirs.getvalue()


def test_records_are_read_as_far_as_they_are_whole():
    records = [b"first", b"second record"]
    content = b"".join(map(framed, records))
    assert list(unframed(content)) == records
    for length in range(len(framed(records[0])), len(content)):
        assert list(unframed(content[:length])) == records[:1]
    assert list(unframed(b"")) == []


def test_checksum_of_the_catalogue():
    # The check value of CRC-32C in every table of such checks.
    assert crc32c(b"123456789") == 0xE3069283


def test_tensorflow_reads_the_files(tmp_path):
    tf = pytest.importorskip("tensorflow")
    with CurvatureWriter(tmp_path) as writer:
        for step in (0, 10):
            writer.write(synthetic_record(step))
    [path] = event_files(tmp_path)
    theirs = list(tf.compat.v1.train.summary_iterator(path))
    assert theirs[0].file_version == "brain.Event:2"
    written = read(tmp_path)
    found = {}
    for event in theirs:
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = tf.make_ndarray(value.tensor)
    assert set(found) == set(written)
    for tag, series in written.items():
        assert list(found[tag]) == list(series)
        for step, array in series.items():
            np.testing.assert_array_equal(found[tag][step], array)


WRITE_EVERYTHING = """
import sys
sys.path.insert(0, sys.argv[2])
from records import synthetic_record
from keras_curvature.tensorboard.writer import CurvatureWriter
grid, shares = [-1.0, 0.0, 1.0], [0.1, 0.8, 0.1]
density = {"grid": grid, "density": shares, "sigma": 0.1, "size": 9}
with CurvatureWriter(sys.argv[1], per_variable=True) as writer:
    for step in range(3):
        writer.write({**synthetic_record(step), "spectral_density": density})
loaded = sorted(name for name in sys.modules if name.split(".")[0] in sys.argv[3:])
sys.exit(f"loaded: {loaded[:5]}" if loaded else 0)
"""


def run(code, log_dir, *modules, backend):
    tests = pathlib.Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code, str(log_dir), str(tests), *modules],
        env={**os.environ, "KERAS_BACKEND": backend},
        cwd=tests.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_tensorflow_is_never_loaded(tmp_path, backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    run(WRITE_EVERYTHING, tmp_path, "tensorflow", backend=backend)
    found = read(tmp_path)
    for tag in ("hessian/trace", "curvature_figures/0", "curvature_density/0"):
        assert list(found[tag]) == [0, 1, 2]


def test_neither_keras_nor_a_backend_is_needed(tmp_path):
    missing = ("keras", "tensorflow", "jax", "torch")
    without = f"import sys\nsys.modules.update(dict.fromkeys({missing}))\n"
    run(without + WRITE_EVERYTHING, tmp_path, backend="jax")
    assert list(read(tmp_path)["hessian/trace"]) == [0, 1, 2]


def test_one_writer_over_several_fits_continues_the_run(tmp_path):
    writer = CurvatureWriter(tmp_path)
    for step in (0, 10):
        writer.write(synthetic_record(step))
        writer.close()
    writer.close()
    assert len(event_files(tmp_path)) == 2
    found = read(tmp_path)
    assert set(found["hessian/trace"]) == {0, 10}
    assert set(found["hessian_diagonal_signed_log10/logits"]) == {0, 10}


def in_two_processes(log_dir, resumed_at, first=(0, 10, 20, 30), second=(20, 30, 40)):
    """What one writer wrote, and another one that goes on at a step."""
    writer = CurvatureWriter(log_dir)
    assert writer.begin(first[0]) is None
    for step in first:
        writer.write(synthetic_record(step))
    # Killed: nobody closes it.
    EventFile._open.clear()
    writer = CurvatureWriter(log_dir)
    last = writer.begin(resumed_at)
    for step in second:
        writer.write(synthetic_record(step, seed=1))
    writer.close()
    return last, writer


def steps_in(directory):
    """Steps of the trace, each as often as it is there."""
    return [
        event.step
        for path in sorted(glob.glob(os.path.join(directory, "*")))
        for event in events(path)
        if any(value.tag == "hessian/trace" for value in event.summary.value)
    ]


def test_what_training_took_back_is_removed(tmp_path):
    last, writer = in_two_processes(tmp_path, resumed_at=15)
    assert last == 10
    assert os.listdir(tmp_path) == ["curvature"]
    assert steps_in(writer.directory) == [0, 10, 20, 30, 40]
    assert len(event_files(tmp_path)) == len(os.listdir(writer.directory)) == 2
    found = read(tmp_path)
    again = synthetic_record(20, seed=1)["hessian_trace"]
    np.testing.assert_allclose(found["hessian/trace"][20], again, rtol=1e-6)
    # The layout, and what the page reads up to there, are still in the first file.
    assert {"custom_scalars__config__", "curvature_layers/0"} < set(
        values(event_files(tmp_path)[0])
    )


def test_the_page_reads_each_step_once_after_a_resumption(tmp_path):
    in_two_processes(tmp_path, resumed_at=15)
    found = read(tmp_path)
    # A tag of its own, for what it holds need not be told again.
    assert list(found["curvature_figures/0"]) == [0, 10]
    assert list(found["curvature_figures/20"]) == [20, 30, 40]


def test_two_runs_of_one_directory_stay_apart(tmp_path):
    for number in (1, 2, 3):
        _, writer = in_two_processes(
            tmp_path, resumed_at=20, first=(0, 10, 20), second=(30,)
        )
        name = "curvature" if number == 1 else f"curvature_{number}"
        assert writer.directory == str(tmp_path / name)
        assert steps_in(writer.directory) == [0, 10, 20, 30]
    assert len(os.listdir(tmp_path)) == 3


def test_a_file_that_cannot_be_shortened_stays_as_it_was(tmp_path):
    with CurvatureWriter(tmp_path) as writer:
        for step in (0, 10, 20):
            writer.write(synthetic_record(step))
    (path,) = event_files(tmp_path)
    size = os.path.getsize(path)
    writer = CurvatureWriter(tmp_path)
    with files_no_longer_than(1000), pytest.raises(OSError, match="File too large"):
        writer.begin(15)
    assert os.listdir(writer.directory) == [os.path.basename(path)]
    assert os.path.getsize(path) == size


def test_runs_in_a_store_go_on_and_stay_apart(store, tmp_path):
    address = "store://bucket/run"
    last, _ = in_two_processes(address, resumed_at=15)
    assert last == 10
    paths = fetched(store, tmp_path)
    assert steps_in(tmp_path) == [0, 10, 20, 30, 40] and len(paths) == 2
    writer = CurvatureWriter(address)
    assert writer.begin(0) is None
    assert writer.directory == f"{address}/curvature_2"


def test_files_of_one_second_are_sorted_as_they_were_written(tmp_path, monkeypatch):
    # TensorBoard never goes back to a file that is sorted before the one it follows.
    monkeypatch.setattr(event_file, "_numbers", itertools.count(98))
    for step in range(4):
        with CurvatureWriter(tmp_path) as writer:
            writer.write({"step": step, "loss": 1.0})
    assert list(scalars(tmp_path, "probe/loss")) == [0, 1, 2, 3]


def test_two_open_writers_of_a_directory_share_one_file(tmp_path):
    first, second = CurvatureWriter(tmp_path), CurvatureWriter(str(tmp_path) + "/.")
    first.write({"step": 1, "loss": 1.0})
    second.write({"step": 2, "loss": 2.0})
    first.close()
    second.write({"step": 3, "loss": 3.0})
    second.close()
    assert len(event_files(tmp_path)) == 1
    assert scalars(tmp_path, "probe/loss") == {1: 1.0, 2: 2.0, 3: 3.0}


def test_writers_in_many_threads_share_one_file(tmp_path, monkeypatch):
    steps, threads = 3, 4
    ready = threading.Barrier(threads)
    append = event_file._LocalFile.append

    def slowly(self, data):
        # So that threads meet at every place where they could.
        time.sleep(0.01)
        append(self, data)

    def write(number):
        with CurvatureWriter(tmp_path) as writer:
            ready.wait()
            for step in range(number * steps, (number + 1) * steps):
                writer.write({"step": step, "hessian_trace": 1.0})
            # The file is not closed while others write on.
            ready.wait()

    monkeypatch.setattr(event_file._LocalFile, "append", slowly)
    started = [threading.Thread(target=write, args=(i,)) for i in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    [path] = event_files(tmp_path)
    assert sorted(values(path)["hessian/trace"]) == list(range(steps * threads))
    described = [
        value.tag
        for event in events(path)
        for value in event.summary.value
        if value.metadata.summary_description
    ]
    assert len(described) == len(set(described))


def test_records_are_on_disk_before_the_file_is_closed(tmp_path):
    writer = CurvatureWriter(tmp_path)
    writer.write({"step": 1, "loss": 1.0})
    assert scalars(tmp_path, "probe/loss") == {1: 1.0}
    writer.close()


def test_nothing_is_opened_before_the_first_record(tmp_path):
    CurvatureWriter(tmp_path).close()
    assert os.listdir(tmp_path) == []


@contextlib.contextmanager
def files_no_longer_than(size):
    """No file of this process may grow longer: a write beyond that ends half-way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_what_does_not_fit_and_no_more(tmp_path):
    writer = CurvatureWriter(tmp_path)
    writer.write({"step": 0, "loss": 1.0})
    [path] = event_files(tmp_path)
    size = os.path.getsize(path)
    with files_no_longer_than(size + 1000):
        for _ in range(2):
            with pytest.raises(OSError, match="File too large"):
                writer.write(synthetic_record(1))
        assert os.path.getsize(path) == size
    writer.write(synthetic_record(2))
    writer.close()
    assert event_files(tmp_path) == [path]
    found = read(tmp_path)
    assert list(found["probe/loss"]) == [0, 2]
    # What is written but once comes with the first record that fits.
    assert [name.decode() for name, _ in found["curvature_layer_table"][2]] == list(
        LAYERS
    )
    [described] = [
        event.step
        for event in events(path)
        for value in event.summary.value
        if value.tag == "hessian/trace" and value.metadata.summary_description
    ]
    assert described == 2


def test_a_disk_that_is_full_from_the_start_is_not_littered(tmp_path):
    writer = CurvatureWriter(tmp_path)
    with files_no_longer_than(10):
        for _ in range(2):
            with pytest.raises(OSError, match="File too large"):
                writer.write(synthetic_record(1))
        writer.close()
    assert event_files(tmp_path) == []


def test_a_directory_that_cannot_be_made_may_be_made_later(tmp_path):
    (tmp_path / "curvature").touch()
    writer = CurvatureWriter(tmp_path)
    with pytest.raises(OSError):
        writer.write({"step": 1, "loss": 1.0})
    (tmp_path / "curvature").unlink()
    writer.write({"step": 2, "loss": 2.0})
    writer.close()
    assert scalars(tmp_path, "probe/loss") == {2: 2.0}


def test_a_run_whose_directory_was_deleted_goes_on(tmp_path):
    writer = CurvatureWriter(tmp_path / "run")
    writer.write(synthetic_record(1))
    shutil.rmtree(tmp_path / "run")
    writer.write(synthetic_record(2))
    writer.close()
    found = read(tmp_path / "run")
    assert {"custom_scalars__config__", "curvature_layer_table"} < set(found)
    assert list(found["hessian/trace"]) == [2]


@pytest.fixture
def store():
    """An object store behind store://: what is opened for appending is replaced."""
    fsspec = pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem

    class Store(MemoryFileSystem):
        protocol = "store"
        store, pseudo_dirs = {}, [""]
        works = True

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.replace("store://", "memory://"))

        def _open(self, path, mode="rb", **options):
            if "r" not in mode and not self.works:
                raise RuntimeError("the store is shut")
            return super()._open(path, mode.replace("a", "w"), **options)

    fsspec.register_implementation("store", Store, clobber=True)
    return Store


def fetched(store, tmp_path):
    paths = []
    for name, content in sorted(store.store.items()):
        paths.append(str(tmp_path / os.path.basename(name)))
        with open(paths[-1], "wb") as file:
            file.write(content.getvalue())
    return paths


def test_an_object_store_holds_every_record(store, tmp_path):
    with CurvatureWriter("store://bucket/run") as writer:
        for step in range(3):
            writer.write(synthetic_record(step))
            # Sent before the next one starts.
            found = values(*fetched(store, tmp_path))
            assert list(found["hessian/trace"]) == list(range(step + 1))
    [name] = store.store
    assert name.startswith("/bucket/run/curvature/events.out.tfevents.")


def test_a_long_file_in_a_store_is_followed_by_another(store, tmp_path, monkeypatch):
    monkeypatch.setattr(event_file, "_LONGEST_REMOTE", 60_000)
    with CurvatureWriter("store://bucket/run") as writer:
        for step in range(12):
            writer.write(synthetic_record(step))
    paths = fetched(store, tmp_path)
    assert 2 <= len(paths) <= 6
    assert list(values(*paths)["hessian/trace"]) == list(range(12))
    for path in paths:
        assert "curvature_layer_table" in values(path)


def test_a_store_that_fails_loses_the_record_and_no_more(store, tmp_path):
    writer = CurvatureWriter("store://bucket/run")
    writer.write({"step": 0, "loss": 1.0})
    store.works = False
    with pytest.raises(OSError, match="the store is shut. Received: path='store://"):
        writer.write({"step": 1, "loss": 1.0})
    store.works = True
    writer.write({"step": 2, "loss": 1.0})
    writer.close()
    assert list(values(*fetched(store, tmp_path))["probe/loss"]) == [0, 2]


def test_where_tensorflow_is_loaded_its_file_systems_serve_too(tmp_path):
    tf = pytest.importorskip("tensorflow")
    with CurvatureWriter("ram://run") as writer:
        for step in range(3):
            writer.write({"step": step, "loss": 1.0})
    [name] = tf.io.gfile.listdir("ram://run/curvature")
    tf.io.gfile.copy(f"ram://run/curvature/{name}", str(tmp_path / name))
    assert list(values(str(tmp_path / name))["probe/loss"]) == [0, 1, 2]


def test_an_address_that_nothing_can_write_to_is_refused_at_once():
    with pytest.raises(ValueError, match="Install fsspec.*Received: 'nowhere://run"):
        CurvatureWriter("nowhere://run")
