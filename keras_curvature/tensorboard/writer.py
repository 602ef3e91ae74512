"""Writes the monitor's records into event files."""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event

from keras_curvature.tensorboard import event_file, summaries, tags
from keras_curvature.tensorboard.density_image import density_image
from keras_curvature.tensorboard.event_file import EventFile
from keras_curvature.tensorboard.heat_map import HeatMap

_HEAT_MAP_DESCRIPTION = (
    "Mean absolute value of each layer's part of the Hessian's diagonal; one row a "
    "layer, one column a probe, on a logarithmic colour scale."
)
_DENSITY_DESCRIPTION = (
    "Density of the eigenvalues of the Hessian, on a logarithmic scale: by stochastic "
    "Lanczos quadrature, each eigenvalue a Gaussian of 1 % of the spectrum's width."
)
_HEAT = next(f for f in tags.LAYER_FIGURES if f.key == "diagonal_mean_abs")
# Each record has some of these.
_SCALARS = {figure.tag for figure in tags.GLOBAL_FIGURES}
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
    TensorFlow is not needed, and not loaded.

    Two trainings in one `log_dir` are two runs, if `begin` is told of each: the second
    lies in `<log_dir>/curvature_2`. One that goes on where another ended, as after
    `BackupAndRestore`, continues its run.

    `log_dir` may be an address. Where TensorFlow is loaded anyway, it writes to those
    it knows (gs://); all others, and gs:// without TensorFlow, need the package fsspec
    and what it asks for: gcsfs for gs://, s3fs for s3://, adlfs for abfs://, pyarrow
    for hdfs://. An object in a store can only be replaced as a whole, so each record
    sends up to four megabytes there.

    Example:
    ```python
    with CurvatureWriter("logs/run1") as writer:
        writer.write({"step": 0, "hessian_trace": 12.5, "layers": []})
    ```

    Args:
        log_dir: The directory given to TensorBoard, or a run's directory below it.
        per_variable: Whether each variable gets its own tags, besides its layer's.
            Defaults to `False`: a deep model has hundreds of variables.

    Raises:
        ValueError: If `log_dir` is an address that no installed package can write to.
    """

    def __init__(
        self, log_dir: str | os.PathLike[str], per_variable: bool = False
    ) -> None:
        self._log_dir = os.fspath(log_dir)
        self._per_variable = per_variable
        self._file: EventFile | None = None
        self._started = False
        self._directory = self._directory_of(1)
        self._forget()
        event_file.check_reachable(self._directory)

    def begin(self, step: int, anew: bool = False) -> int | None:
        """Says that training begins, or goes on, at a step; before any record of it.

        From step 0 on it is a run of its own. Later it goes on with the newest run in
        `log_dir`. What that holds beyond the step is removed: training was taken back
        to what was saved at the step, and makes these records again.

        Args:
            step: The steps taken so far.
            anew: Whether another training begins than that of the records so far.

        Returns:
            The last step that the run has a record of, `None` if it has none.

        Raises:
            OSError: If `log_dir` cannot be read or written.
        """
        first, self._started = not self._started, True
        if first or anew or (self._last is not None and step < self._last):
            self.close()
            if first or anew:
                runs = self._count_runs()
                self._directory = self._directory_of(runs if step else runs + 1)
            self._recall(step)
        return self._last

    @property
    def directory(self) -> str:
        """Where the event files of the present run lie."""
        return self._directory

    def _directory_of(self, run: int) -> str:
        name = tags.SUBDIRECTORY if run <= 1 else f"{tags.SUBDIRECTORY}_{run}"
        return os.path.join(self._log_dir, name)

    def _count_runs(self) -> int:
        numbers = itertools.count(1)
        directories = map(self._directory_of, numbers)
        return sum(1 for _ in itertools.takewhile(event_file.event_paths, directories))

    def _forget(self) -> None:
        self._last: int | None = None
        self._heat_map = HeatMap()
        self._probes = 0
        self._next_drawing = 1.0
        self._undrawn_step: int | None = None

    def _recall(self, step: int) -> None:
        """Goes on from what the event files hold up to a step; the rest goes."""
        self._forget()
        columns = _columns(event_file.taken_back(self._directory, step))
        for at, column in sorted(columns.items()):
            self._last = at
            if column:
                self._heat_map.add(at, column)
                self._probes += 1
        self._next_drawing = max(1.0, _HEAT_MAP_GROWTH * self._probes)

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one record, and hands it to the file system at once.

        Args:
            record: One probe of the monitor, with at least `"step"`. A figure that is
                missing or None is left out.

        Raises:
            ValueError: If the record has no step, or a histogram of it is malformed.
            OSError: If it cannot be written: the disk is full, the directory
                read-only. The file then holds what it held before, and further records
                may be written.
        """
        step = _step_of(record)
        values = list(summaries.record_values(record, self._per_variable))
        self._add_to_heat_map(step, record)
        drawn = self._undrawn_step == step and self._probes >= self._next_drawing
        if drawn:
            values.append(self._draw())
        density = record.get("spectral_density")
        if density is not None:
            pixels = density_image(density)
            values.append(
                summaries.image(tags.SPECTRAL_DENSITY, pixels, _DENSITY_DESCRIPTION)
            )
        self._open().write(values, step, list(_standing(record)))
        self._last = step
        if drawn:
            self._next_drawing = _HEAT_MAP_GROWTH * self._probes
            self._undrawn_step = None

    def flush(self) -> None:
        """Draws the heat map up to the last record.

        Raises:
            OSError: If it cannot be written.
        """
        if self._undrawn_step is not None:
            self._open().write([self._draw()], self._undrawn_step)
            self._undrawn_step = None

    def close(self) -> None:
        """Flushes and closes the file; a later record opens another in the same run.

        Raises:
            OSError: If the last image cannot be written. The file is closed even so.
        """
        try:
            self.flush()
        finally:
            if self._file is not None:
                self._file.release()
                self._file = None

    def __enter__(self) -> "CurvatureWriter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _open(self) -> EventFile:
        if self._file is None:
            self._file = EventFile.acquire(self._directory)
        return self._file

    def _add_to_heat_map(self, step: int, record: Mapping[str, Any]) -> None:
        key = _HEAT.key
        layers = record.get("layers") or ()
        column = {p["name"]: float(p[key]) for p in layers if p.get(key) is not None}
        if column:
            self._heat_map.add(step, column)
            self._probes += 1
            self._undrawn_step = step

    def _draw(self) -> summaries.Value:
        return summaries.image(
            tags.HEAT_MAP, self._heat_map.render(), _HEAT_MAP_DESCRIPTION
        )


def _columns(events: Iterable[Event]) -> dict[int, dict[str, float]]:
    """The heat map's columns by step, one for each record."""
    columns: dict[int, dict[str, float]] = {}
    prefix = _HEAT.of("")
    for event in events:
        for value in event.summary.value:
            if value.tag in _SCALARS:
                columns.setdefault(event.step, {})
            elif value.tag.startswith(prefix):
                name = value.tag.removeprefix(prefix)
                columns.setdefault(event.step, {})[name] = value.tensor.float_val[0]
    return columns


def _standing(record: Mapping[str, Any]) -> Iterator[summaries.Value]:
    """What a record says of the model and not of its curvature."""
    layers = record.get("layers") or ()
    sizes = tuple((layer["name"], int(layer.get("size") or 0)) for layer in layers)
    yield summaries.layer_table(sizes)
    if record.get("mode"):
        yield summaries.text(tags.MODE, record["mode"], tags.MODE_DESCRIPTION)


def _step_of(record: Mapping[str, Any]) -> int:
    step = record.get("step")
    if step is None:
        raise ValueError(
            "A record needs the training step it was made at. "
            f"Received: record with keys {sorted(record)}"
        )
    return int(step)
