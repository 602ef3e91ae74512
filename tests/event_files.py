"""What is in the event files of a run, read as TensorBoard reads them."""

import glob
import os

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util


def event_files(log_dir):
    return sorted(glob.glob(os.path.join(log_dir, "curvature", "*")))


def events(*paths):
    return [event for path in paths for event in EventFileLoader(path).Load()]


def values(*paths):
    """Everything in some event files: `{tag: {step: array}}`."""
    found = {}
    for event in events(*paths):
        for value in event.summary.value:
            array = tensor_util.make_ndarray(value.tensor)
            found.setdefault(value.tag, {})[event.step] = array
    return found


def read(log_dir):
    """Everything in the run's event files."""
    return values(*event_files(log_dir))


def scalars(log_dir, tag):
    return {step: float(v) for step, v in read(log_dir)[tag].items()}
