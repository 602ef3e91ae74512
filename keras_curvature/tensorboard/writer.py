"""Writes the monitor's records into event files."""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event

from keras_curvature.tensorboard import event_file, groups, summaries, tags
from keras_curvature.tensorboard.event_file import EventFile
from keras_curvature.tensorboard.groups import Group


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
        per_variable: Whether the variables of these layers get their own tags too.
            Defaults to `False`.
        top_layers: How many layers get charts and histograms of their own in
            TensorBoard's own tabs: those with most of the squared Frobenius norm, or
            of the trace, in the run's first record; they stay the same, so that their
            curves are whole. `None` for all. The page "Curvature" has all in any case.

    Raises:
        ValueError: If `log_dir` is an address that no installed package can write to.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str],
        per_variable: bool = False,
        top_layers: int | None = 8,
    ) -> None:
        self._log_dir = os.fspath(log_dir)
        self._per_variable = per_variable
        self._top_layers = top_layers
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
        # Layers with tags of their own; None until a record names its layers.
        self._shown: set[str] | None = None
        # How many records the run has.
        self._number = 0
        # By stride the group that the page's tags are named after, and how many records
        # it holds. A tag names its figures once, and an optimizer may tell others than
        # before.
        self._groups: dict[int | None, tuple[Group, int]] = {}
        self._of_optimizer: list[str] = []

    def _recall(self, step: int) -> None:
        """Goes on from what the event files hold up to a step; the rest goes."""
        self._forget()
        events = event_file.taken_back(self._directory, step)
        self._last, self._number, shown = _recalled(events)
        self._shown = shown or None

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
        of_optimizer = list(record.get("optimizer") or ())
        if of_optimizer != self._of_optimizer:
            self._groups, self._of_optimizer = {}, of_optimizer
        begun = Group.beginning(self._number, step)
        group, held = self._groups.get(begun.stride, (begun, 0))
        if held == groups.PROBES:
            group, held = begun, 0
        values = [
            *summaries.record_values(record, self._layers(record), self._per_variable),
            *summaries.page_values(record, group.name),
        ]
        self._open().write(values, step, list(_standing(record)))
        self._groups[group.stride] = group, held + 1
        self._number += 1
        self._last = step

    def _layers(self, record: Mapping[str, Any]) -> set[str]:
        """The layers with tags of their own, chosen at the first record."""
        layers = record.get("layers") or ()
        if self._top_layers is None:
            return {layer["name"] for layer in layers}
        if self._shown is None and layers:
            first = sorted(layers, key=_weight, reverse=True)[: self._top_layers]
            self._shown = {layer["name"] for layer in first}
        return self._shown or set()

    def close(self) -> None:
        """Closes the file; a later record opens another in the same run."""
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


def _weight(layer: Mapping[str, Any]) -> tuple[float, float, float]:
    """By what layers are ranked: what is known of their part in the curvature."""
    share, trace, size = (layer.get(k) for k in ("frobenius_share", "trace", "size"))
    return share or 0.0, abs(trace or 0.0), size or 0


def _recalled(events: Iterable[Event]) -> tuple[int | None, int, set[str]]:
    """Step of the last record, number of records, layers that have their own tags."""
    last, number, layers = None, 0, set()
    prefixes = tuple(figure.of("") for figure in tags.LAYER_FIGURES)
    for event in events:
        for value in event.summary.value:
            if value.tag.startswith(f"{tags.PAGE_FIGURES}/"):
                last = max(event.step, -1 if last is None else last)
                number += 1
            elif value.tag.startswith(prefixes):
                layers.add(value.tag.partition("/")[2])
    return last, number, layers


def _standing(record: Mapping[str, Any]) -> Iterator[summaries.Value]:
    """What a record says of the model and not of its curvature."""
    layers = record.get("layers") or ()
    sizes = tuple((layer["name"], int(layer.get("size") or 0)) for layer in layers)
    if sizes:
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
