"""Writes the monitor's records into event files."""

import os
import threading
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf
from tensorboard.compat.proto.summary_pb2 import Summary

from keras_curvature.tensorboard import signed_log, summaries, tags
from keras_curvature.tensorboard.density_image import density_image
from keras_curvature.tensorboard.heat_map import HeatMap

_HEAT_MAP_DESCRIPTION = (
    "Mean absolute value of each layer's part of the Hessian's diagonal; one row a "
    "layer, one column a probe, on a logarithmic colour scale."
)
_DENSITY_DESCRIPTION = (
    "Density of the eigenvalues of the Hessian, on a logarithmic scale: by stochastic "
    "Lanczos quadrature, each eigenvalue a Gaussian of 1 % of the spectrum's width."
)
# A new image is due when the map has grown by this share: the event file grows with the
# logarithm of the number of probes.
_HEAT_MAP_GROWTH = 1.1


class CurvatureWriter:
    """Writes records of curvature for TensorBoard.

    The event files lie in `<log_dir>/curvature`, a run of its own next to `train` and
    `validation` of Keras' `TensorBoard` callback, so the two never write to one file.
    Names and meanings of the tags are in `keras_curvature.tensorboard.tags`.

    The file is opened by the first record and may be closed and written to again: a
    second `fit` continues the same run. Writers of one directory share one open file.

    Example:
    ```python
    with CurvatureWriter("logs/run1") as writer:
        writer.write({"step": 0, "hessian_trace": 12.5, "layers": []})
    ```

    Args:
        log_dir: The directory given to TensorBoard, or a run's directory below it.
        per_variable: Whether each variable gets its own tags, besides its layer's.
            Defaults to `False`: a deep model has hundreds of variables.
    """

    def __init__(self, log_dir: str | os.PathLike, per_variable: bool = False) -> None:
        self.directory = os.path.join(os.fspath(log_dir), tags.SUBDIRECTORY)
        self._per_variable = per_variable
        self._file: _EventFile | None = None
        self._heat_map = HeatMap()
        self._probes = 0
        self._next_drawing = 1.0
        self._undrawn_step: int | None = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one record, and hands it to the file system at once.

        Args:
            record: One probe of the monitor, with at least `"step"`. A figure that is
                missing or None is left out.

        Raises:
            ValueError: If the record has no step, or a histogram of it is malformed.
        """
        step = _step_of(record)
        values = list(summaries.record_values(record, self._per_variable))
        values += self._drawing(step, record)
        density = record.get("spectral_density")
        if density is not None:
            pixels = density_image(density)
            values.append(_image(tags.SPECTRAL_DENSITY, pixels, _DENSITY_DESCRIPTION))
        file = self._open()
        file.write_layers(_layers_of(record), step)
        file.write(values, step)

    def write_diagonal_histogram(
        self, name: str, edges: np.ndarray, counts: np.ndarray, step: int
    ) -> None:
        """Writes one histogram of diagonal entries that were counted elsewhere.

        Args:
            name: The layer's name.
            edges: Curvature at the bins' edges, such as
                `keras_curvature.tensorboard.signed_log.bin_edges()`.
            counts: Entries in each bin, one fewer than edges.
            step: The step.

        Raises:
            ValueError: If edges and counts don't fit together.
        """
        tag = f"{tags.LAYER_HISTOGRAM}/{name}"
        value = summaries.histogram(tag, edges, counts, signed_log.DESCRIPTION)
        self._open().write([value], int(step))

    def flush(self) -> None:
        """Draws the heat map up to the last record."""
        if self._undrawn_step is not None:
            self._open().write([self._draw()], self._undrawn_step)
            self._undrawn_step = None

    def close(self) -> None:
        """Flushes and closes the file; a later record opens another in the same run."""
        self.flush()
        if self._file is not None:
            self._file.release()
            self._file = None

    def __enter__(self) -> "CurvatureWriter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _open(self) -> "_EventFile":
        if self._file is None:
            self._file = _EventFile.acquire(self.directory)
        return self._file

    def _drawing(self, step: int, record: Mapping[str, Any]) -> Iterable[Summary.Value]:
        key = "diagonal_mean_abs"
        layers = record.get("layers") or ()
        column = {p["name"]: float(p[key]) for p in layers if p.get(key) is not None}
        if not column:
            return
        self._heat_map.add(step, column)
        self._probes += 1
        self._undrawn_step = step
        if self._probes >= self._next_drawing:
            self._next_drawing = _HEAT_MAP_GROWTH * self._probes
            self._undrawn_step = None
            yield self._draw()

    def _draw(self) -> Summary.Value:
        return _image(tags.HEAT_MAP, self._heat_map.render(), _HEAT_MAP_DESCRIPTION)


class _EventFile:
    """The one open event file of a directory, shared by all who write there.

    TensorBoard follows one file of a run at a time: of two that grow side by side it
    would show only the newer.
    """

    _open: ClassVar[dict[str, "_EventFile"]] = {}
    _lock: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._users = 0
        self._described: set[str] = set()
        self._layers: tuple[tuple[str, int], ...] | None = None
        self._writer = tf.summary.create_file_writer(directory)
        self.write(summaries.layout_values(), step=0)

    @classmethod
    def acquire(cls, directory: str) -> "_EventFile":
        """The open file of a directory; each call asks for one `release`."""
        if "://" not in directory:
            directory = os.path.realpath(directory)
        with cls._lock:
            if directory not in cls._open:
                cls._open[directory] = cls(directory)
            file = cls._open[directory]
            file._users += 1
            return file

    def release(self) -> None:
        """Closes the file when its last user leaves."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                del self._open[self._directory]
                self._writer.close()

    def write_layers(self, layers: tuple[tuple[str, int], ...], step: int) -> None:
        """Writes the table of layers if it is not the one that was written last."""
        if layers != self._layers:
            self._layers = layers
            self.write([summaries.layer_table(layers)], step)

    def write(self, values: Iterable[Summary.Value], step: int) -> None:
        """Writes values of one step as one event."""
        summary = Summary()
        for value in values:
            # TensorBoard takes a tag's description from its first event.
            if value.tag in self._described:
                value.metadata.summary_description = ""
            self._described.add(value.tag)
            summary.value.append(value)
        # Keras' TensorBoard callback turns recording off between its own writes, for
        # everyone (its update_freq), so what is written here says that it is wanted.
        with self._writer.as_default(), tf.summary.record_if(True), tf.device("cpu:0"):
            tf.summary.experimental.write_raw_pb(summary.SerializeToString(), step=step)
        # Leaving `as_default` has flushed: a probe is on disk when the next one starts.


def _image(tag: str, pixels: np.ndarray, description: str) -> Summary.Value:
    height, width, _ = pixels.shape
    with tf.device("cpu:0"):
        png = tf.io.encode_png(pixels).numpy()
    return summaries.image(tag, png, width, height, description)


def _layers_of(record: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    layers = record.get("layers") or ()
    return tuple((layer["name"], int(layer.get("size") or 0)) for layer in layers)


def _step_of(record: Mapping[str, Any]) -> int:
    step = record.get("step")
    if step is None:
        raise ValueError(
            "A record needs the training step it was made at. "
            f"Received: record with keys {sorted(record)}"
        )
    return int(step)
