"""Fixtures for all tests: the float type, and two devices on any machine."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import cases
import pytest
import tensorflow as tf

# A second CPU device, to test placement and distribution without a GPU. TensorFlow
# takes this setting only before its first operation.
_CPU = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(
    _CPU, [tf.config.LogicalDeviceConfiguration()] * 2
)


@pytest.fixture(scope="session")
def mirrored():
    """The one strategy over both devices.

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
