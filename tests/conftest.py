"""Fixtures for all tests: the float type, and several devices on any machine."""

import gc
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import cases
import keras
import pytest
import thorough

# These look at text and pictures, which no backend changes, or compare in float64 with
# figures that only TensorFlow reaches: elsewhere Keras rounds to float32 on its way.
collect_ignore = []
if keras.backend.backend() != "tensorflow":
    collect_ignore += [
        "benchmarks",
        "tensorboard",
        "test_analysis.py",
        "test_analysis_random.py",
        "test_api_reference.py",
        "test_architecture.py",
        "test_docs.py",
        "test_package.py",
        "test_pictures.py",
        "test_plots.py",
        "test_progress.py",
        "test_record.py",
        "test_report.py",
        "test_spectrum.py",
        "test_table.py",
    ]

# More CPU devices than one, to test placement and distribution without an accelerator.
# The frameworks take these settings only before their first operation.
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 2,
    )
elif keras.backend.backend() == "jax":
    import jax

    # XLA takes most of the time: it shall compile faster what then runs slower. That
    # rounds no worse, and what the tests run is small.
    os.environ["XLA_FLAGS"] = " ".join(
        [
            os.environ.get("XLA_FLAGS", ""),
            "--xla_force_host_platform_device_count=4",
            "--xla_backend_optimization_level=0",
            "--xla_llvm_disable_expensive_passes=true",
            "--xla_cpu_use_fusion_emitters=false",
            "--xla_cpu_parallel_codegen_split_count=1",
        ]
    )
    jax.config.update("jax_enable_x64", True)
    # Many tests compile the same small network.
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    cache = pathlib.Path(__file__).parent.parent / "build" / "jax-cache" / worker
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# Graphs are many small objects that stay: looking through them for garbage as often as
# Python does takes a tenth of the time.
gc.set_threshold(200_000, 20, 100)


def pytest_addoption(parser):
    parser.addoption("--brief", action="store_true", help=thorough.__doc__)


def pytest_collection_modifyitems(config, items):
    if config.option.brief:
        names = thorough.left_out([item.nodeid for item in items])
        left = [item for item in items if item.nodeid in names]
        items[:] = [item for item in items if item.nodeid not in names]
        config.hook.pytest_deselected(items=left)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """What shares something expensive runs in one process, if there are several."""
    from xdist.scheduler import LoadScopeScheduling

    class Sharing(LoadScopeScheduling):
        """Tests of a named case share what is compiled of it, a file's its fixtures."""

        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            return next(iter(cases.named_in(test)), file)

    return Sharing(config, log)


@pytest.fixture(scope="session")
def mirrored():
    """The one strategy over both devices, on TensorFlow.

    Each `MirroredStrategy` numbers its collective operations from the same start, so
    the second one to train in a process meets the first one's shapes.
    """
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture
def float64():
    """Keras computes in float64 during the test."""
    with cases.floatx("float64"):
        yield


@pytest.fixture(scope="module")
def module_float64():
    """Keras computes in float64 during all tests of a module."""
    with cases.floatx("float64"):
        yield
