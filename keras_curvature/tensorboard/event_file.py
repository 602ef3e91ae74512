"""Event files: whole records, on disk at once, and never TensorFlow loaded for them."""

import contextlib
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.io import gfile

from keras_curvature.tensorboard import summaries
from keras_curvature.tensorboard.record_format import framed, unframed

_PREFIX = "events.out.tfevents."
# Readers know the format by this.
_VERSION = "brain.Event:2"
# A remote file is sent whole with each record, so another one is begun in time.
_LONGEST_REMOTE = 4 * 2**20
_numbers = itertools.count()


class EventFile:
    """The one open event file of a directory, shared by all who write there.

    TensorBoard follows one file of a run at a time: of two that grow side by side it
    would show only the newer.

    A record that cannot be written raises an error and leaves nothing in the file; the
    records before and after it are not touched. If somebody deletes the file, the next
    record begins another.
    """

    _open: ClassVar[dict[str, "EventFile"]] = {}
    _opening: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._users = 0
        self._writing = threading.Lock()
        self._file: _LocalFile | _RemoteFile
        self._described: set[str]
        self._standing: dict[str, bytes]
        self._begin()

    @classmethod
    def acquire(cls, directory: str) -> "EventFile":
        """The open file of a directory; each call asks for one `release`.

        Raises:
            OSError: If no file can be made there.
        """
        if not _is_remote(directory):
            directory = os.path.realpath(directory)
        with cls._opening:
            if directory not in cls._open:
                cls._open[directory] = cls(directory)
            file = cls._open[directory]
            file._users += 1
            return file

    def release(self) -> None:
        """Ends the file when its last user leaves; a later one begins another."""
        with self._opening:
            self._users -= 1
            if self._users == 0:
                del self._open[self._directory]

    def write(
        self,
        values: Iterable[Summary.Value],
        step: int,
        standing: Sequence[Summary.Value] = (),
    ) -> None:
        """Writes values of one step as one event, which is on disk afterwards.

        Args:
            values: The values.
            step: The step.
            standing: Values that seldom change. Each is written unless it is what was
                written last under its tag.

        Raises:
            OSError: If the file cannot be written.
        """
        with self._writing:
            if not self._file.can_grow():
                self._begin()
            summary = Summary(value=values)
            for value in summary.value:
                # TensorBoard takes a tag's description from its first event.
                if value.tag in self._described:
                    value.metadata.summary_description = ""
            known = {value.tag: value.SerializeToString() for value in standing}
            summary.value.extend(
                value
                for value in standing
                if known[value.tag] != self._standing.get(value.tag)
            )
            self._file.append(_event(step=step, summary=summary))
            self._described.update(value.tag for value in summary.value)
            self._standing.update(known)

    def _begin(self) -> None:
        kind = _RemoteFile if _is_remote(self._directory) else _LocalFile
        file = kind(self._directory)
        layout = Summary(value=summaries.layout_values())
        file.append(_event(file_version=_VERSION) + _event(step=0, summary=layout))
        self._file = file
        self._described = set()
        self._standing = {}


def taken_back(directory: str, step: int) -> Iterator[Event]:
    """The events of a directory up to a step, from the oldest on; later ones go.

    TensorBoard has a mark for what is void from some step on, but most of what reads
    event files does not know it: it would show these steps twice. So they are removed.
    No writer may have the directory's file open.

    Args:
        directory: The directory.
        step: The last step that stays.

    Raises:
        OSError: If the files cannot be read or written.
    """
    for path in event_paths(directory):
        records = list(unframed(_read(path)))
        events = [Event.FromString(record) for record in records]
        kept = [event.step <= step for event in events]
        if not all(kept):
            _replace(path, b"".join(map(framed, itertools.compress(records, kept))))
        yield from itertools.compress(events, kept)


def event_paths(directory: str) -> list[str]:
    """The event files in a directory, from the oldest on; none if there is none.

    Raises:
        OSError: If the directory cannot be read.
    """
    if _is_remote(directory):
        files = _file_system(directory)
        names = files.listdir(directory) if files.exists(directory) else []
    else:
        names = os.listdir(directory) if os.path.isdir(directory) else []
    names = sorted(os.path.basename(name) for name in names)
    return [os.path.join(directory, n) for n in names if n.startswith(_PREFIX)]


def _read(path: str) -> bytes:
    opened = _file_system(path).GFile if _is_remote(path) else open
    with opened(path, "rb") as file:
        content: bytes = file.read()
    return content


def _replace(path: str, content: bytes) -> None:
    """Gives a file another content: all of it, or none."""
    if _is_remote(path):
        with _file_system(path).GFile(path, "wb") as file:
            file.write(content)
        return
    # No event file by its name, should it ever stay behind.
    draft = os.path.join(os.path.dirname(path), f".{os.getpid()}.draft")
    try:
        with open(draft, "wb") as file:
            file.write(content)
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)
        raise


def check_reachable(directory: str) -> None:
    """Refuses an address that no installed package can write to.

    Raises:
        ValueError: If there is no such package.
    """
    if _is_remote(directory):
        _file_system(directory)


def _is_remote(directory: str) -> bool:
    return "://" in directory


def _file_system(address: str) -> Any:
    """The module `gfile` that can write to an address, TensorFlow's or TensorBoard's.

    TensorFlow knows gs:// by itself, so it is asked first, but only where it runs
    anyway. TensorBoard's needs fsspec, and what fsspec needs for the address.
    """
    scheme = address.partition("://")[0]
    tensorflow = sys.modules.get("tensorflow")
    if tensorflow and scheme in tensorflow.io.gfile.get_registered_schemes():
        return tensorflow.io.gfile
    try:
        gfile.get_filesystem(address)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"No event files can be written to {scheme}:// ({error}). Install fsspec "
            "and the package that it needs for this address, such as gcsfs for gs://, "
            "s3fs for s3:// or pyarrow for hdfs://, or use a local directory. "
            f"Received: {address!r}"
        ) from error
    return gfile


def _event(**content: Any) -> bytes:
    return framed(Event(wall_time=time.time(), **content).SerializeToString())


def _new_path(directory: str) -> str:
    """A path that no other process has, and sorted behind those before it."""
    name = (
        f"{_PREFIX}{int(time.time()):010d}.{socket.gethostname()}"
        f".{os.getpid()}.{next(_numbers):06d}.v2"
    )
    return os.path.join(directory, name)


class _LocalFile:
    """A file on disk, which is open only while it is written."""

    def __init__(self, directory: str) -> None:
        os.makedirs(directory, exist_ok=True)
        self._path = _new_path(directory)

    def can_grow(self) -> bool:
        """Whether the next record goes here too, and not into another file."""
        return os.path.exists(self._path)

    def append(self, data: bytes) -> None:
        """Writes all of the data, or nothing and raises an `OSError`."""
        with open(self._path, "ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            rest = memoryview(data)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except BaseException:
                # Half a record would be the end of what TensorBoard reads.
                file.truncate(end)
                if end == 0:
                    os.unlink(self._path)
                raise


class _RemoteFile:
    """A file behind an address, sent whole each time: object stores cannot append.

    Some pretend to. With gcsfs a file opened for appending to gs:// loses what it held.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._path = _new_path(directory)
        self._content = b""

    def can_grow(self) -> bool:
        """Whether the next record goes here too, and not into another file."""
        return len(self._content) < _LONGEST_REMOTE

    def append(self, data: bytes) -> None:
        """Writes all of the data, or nothing and raises an `OSError`."""
        content = self._content + data
        try:
            files = _file_system(self._path)
            if not self._content:
                files.makedirs(self._directory)
            with files.GFile(self._path, "wb") as file:
                file.write(content)
        except Exception as error:
            # Each file system has errors of its own.
            raise OSError(
                f"The event file cannot be written: {error}. "
                f"Received: path={self._path!r}"
            ) from error
        self._content = content
