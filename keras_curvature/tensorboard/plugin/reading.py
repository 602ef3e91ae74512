"""Reads curvature from TensorBoard's data provider, whichever loader is behind it.

A run is many tags of ours, each with a few probes; all figures of a probe lie in one
tensor. So nothing is left out at random, as TensorBoard does it with curves of more
than a thousand points. Of a run that is too much for a screen every second probe is
read, or every fourth, and so on, the same ones for all figures: see `groups.py`.
"""

import collections
import concurrent.futures
import csv
import dataclasses
import io
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from tensorboard import errors
from tensorboard.context import RequestContext
from tensorboard.data.provider import (
    DataProvider,
    RunTagFilter,
    TensorDatum,
    TensorTimeSeries,
)
from tensorboard.plugins.histogram.metadata import PLUGIN_NAME as HISTOGRAMS
from tensorboard.plugins.text.metadata import PLUGIN_NAME as TEXTS

from keras_curvature.tensorboard import groups, tags
from keras_curvature.tensorboard.groups import Group

# As many answers are kept in memory: figures of the layers take about 5 megabytes for
# 500 probes of a model with 200 layers.
_KEPT = 64
# The page shows as many runs at first.
_FIRST = 6
# About as many probes of a run are read, unless all are asked for.
_ENOUGH = 500
_ALL = 10**6

# Seconds for which a listing of all runs serves: a page asks for many things at once,
# and each question to TensorBoard's fast loader may take 40 milliseconds of waiting.
_LISTED = 1.0

Tags = Mapping[str, TensorTimeSeries]
Names = tuple[list[str], list[int]]


@dataclasses.dataclass(frozen=True)
class Part:
    """What is asked for of a run.

    Attributes:
        run: Its name.
        every: Every how many probes are wanted; `None` for about as many probes as a
            screen has room for.
        last: The step of the last one; `None` for the newest. What was read before will
            do if it ends there: a page stays with the steps of its table.
    """

    run: str
    every: int | None = None
    last: int | None = None


def _no_layers() -> np.ndarray:
    return np.empty((0, 0, len(tags.LAYER_KEYS)), "f4")


@dataclasses.dataclass
class Run:
    """A run, or every so many of its probes and the last one.

    Attributes:
        every: Every how many probes were read.
        num_probes: How many there are.
        steps: The steps of the probes that were read, increasing.
        layers: The layers' names, in the order of the model.
        sizes: The number of parameters of each layer, 0 where it is not known.
        figures: For each global figure its values by step, `(steps,)`, NaN where there
            is none.
        layer_keys: The figures of layers that there are.
        histograms: Tags of the histograms.
        has_density: Whether there are spectral densities.
        mode: How the layers ran; empty if the run does not tell.
        tables: Steps, and the layers' names and sizes from there on.
        by_layer: All figures of the layers, `(steps, layers, keys)`, NaN where there is
            none; the keys are `tags.LAYER_KEYS`. Empty where they were not asked for.
    """

    every: int
    num_probes: int
    steps: np.ndarray
    layers: list[str]
    sizes: list[int]
    figures: dict[str, np.ndarray]
    layer_keys: list[str]
    histograms: list[str]
    has_density: bool
    mode: str
    tables: list[tuple[int, Names]]
    by_layer: np.ndarray = dataclasses.field(default_factory=_no_layers)

    def of_layers(self, key: str) -> np.ndarray:
        """One figure of all layers, `(steps, layers)`."""
        return self.by_layer[:, :, tags.LAYER_KEYS.index(key)]


class Reader:
    """What the page asks the server.

    Args:
        data_provider: TensorBoard's source of data.
    """

    def __init__(self, data_provider: DataProvider) -> None:
        self._provider = data_provider
        self._lock = threading.Lock()
        self._reading: dict[Any, threading.Lock] = {}
        self._kept: collections.OrderedDict[Any, tuple[Any, Run]]
        self._kept = collections.OrderedDict()
        self._listing = threading.Lock()
        self._listed: dict[str, tuple[float, Mapping[str, Tags]]] = {}
        self._helpers = concurrent.futures.ThreadPoolExecutor(4)
        # Not one of these: it waits for them.
        self._ahead = concurrent.futures.ThreadPoolExecutor(1)

    def runs(self, ctx: RequestContext, experiment: str) -> list[dict[str, Any]]:
        """Name and last step of each run with curvature in it, sorted by name.

        What is asked for afterwards is at least as new.
        """
        return [
            {"run": run, "last_step": max(s.max_step for s in known.values())}
            for run, known in sorted(self._tags(ctx, experiment).items())
        ]

    def read_ahead(self, ctx: RequestContext, experiment: str) -> None:
        """Begins to read what a page asks for first; who asks for it waits for this."""

        def read() -> None:
            first = [Part(one["run"]) for one in self.runs(ctx, experiment)[:_FIRST]]
            # Curves of the whole model are drawn before those of a layer.
            for part in first:
                self.run(ctx, experiment, part)
            for part in first:
                self.layers(ctx, experiment, part)

        self._ahead.submit(read)

    def run(self, ctx: RequestContext, experiment: str, part: Part) -> Run:
        """One run but for its layers' figures.

        Raises:
            NotFoundError: If there is no such run.
        """
        return self._once(self._run, ctx, experiment, part)

    def layers(self, ctx: RequestContext, experiment: str, part: Part) -> Run:
        """One run with its layers' figures.

        Raises:
            NotFoundError: If there is no such run.
        """
        return self._once(self._layers, ctx, experiment, part)

    def _once(
        self,
        read: Callable[..., Run],
        ctx: RequestContext,
        experiment: str,
        part: Part,
    ) -> Run:
        """What is read of a run, unless it was read and nothing was added since."""
        known = self._tags(ctx, experiment, part.run).get(part.run)
        if not known:
            raise errors.NotFoundError(
                f"There is no run with this name that has curvature. "
                f"Received: run={part.run!r}"
            )
        enough = groups.stride_for(map(Group.of, known), _ENOUGH)
        every = part.every or enough
        state = {tag: (s.max_step, s.max_wall_time) for tag, s in known.items()}
        key = read, experiment, part.run, every
        with self._lock:
            reading = self._reading.setdefault(key, threading.Lock())
        # Who asks for what is being read waits for it.
        with reading:
            with self._lock:
                then, kept = self._kept.get(key, (None, None))
                if kept and (then == state or kept.steps[-1:].tolist() == [part.last]):
                    self._kept.move_to_end(key)
                    return kept
            found = read(ctx, experiment, part.run, known, every)
            with self._lock:
                # More than suits a screen only the CSV asks for.
                if every >= enough:
                    self._kept[key] = state, found
                    self._kept.move_to_end(key)
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            return found

    def density(
        self, ctx: RequestContext, experiment: str, run: str
    ) -> list[tuple[int, np.ndarray]]:
        """Steps and spectral densities: eigenvalue, density and error in rows."""
        known = self._tags(ctx, experiment, run).get(run, {})
        wanted = [tag for tag in known if tag.startswith(f"{tags.PAGE_DENSITY}/")]
        points = self._tensors(ctx, experiment, run, wanted)
        return sorted(
            ((p.step, p.numpy) for found in points.values() for p in found),
            key=lambda pair: pair[0],
        )

    def histograms(
        self, ctx: RequestContext, experiment: str, run: str, tag: str
    ) -> list[tuple[int, np.ndarray]]:
        """Steps and histograms, in rows of lower end, upper end and count.

        TensorBoard keeps 500 of a tag, or 100 with its fast loader.
        """
        found = self._tensors(ctx, experiment, run, [tag], HISTOGRAMS).get(tag, ())
        return [(point.step, point.numpy) for point in found]

    def _tags(
        self, ctx: RequestContext, experiment: str, run: str | None = None
    ) -> Mapping[str, Tags]:
        """Our tags by run, as of a moment ago; as they are now if a run is missing."""
        with self._listing:
            when, listed = self._listed.get(experiment, (-math.inf, {}))
            missing = run is not None and run not in listed
            if missing or time.monotonic() - when > _LISTED:
                when = time.monotonic()
                listed = self._provider.list_tensors(
                    ctx, experiment_id=experiment, plugin_name=tags.PLUGIN_NAME
                )
                self._listed[experiment] = when, listed
            return listed

    def _tensors(
        self,
        ctx: RequestContext,
        experiment: str,
        run: str,
        wanted: list[str],
        plugin: str = tags.PLUGIN_NAME,
        downsample: int = _ALL,
    ) -> Mapping[str, list[TensorDatum]]:
        if not wanted:
            return {}
        found: Mapping[str, list[TensorDatum]] = self._provider.read_tensors(
            ctx,
            experiment_id=experiment,
            plugin_name=plugin,
            downsample=downsample,
            run_tag_filter=RunTagFilter(runs=[run], tags=wanted),
        ).get(run, {})
        return found

    def _run(
        self, ctx: RequestContext, experiment: str, run: str, known: Tags, every: int
    ) -> Run:
        # Answers that take a while, most of it waiting.
        asked, help_with = (ctx, experiment, run, known), self._helpers.submit
        layer_keys = help_with(self._layer_keys, *asked)
        histograms = help_with(self._histogram_tags, *asked)
        mode = help_with(self._mode, *asked)
        wanted = _wanted(known, tags.PAGE_FIGURES, every)
        table = [tags.LAYER_TABLE] if tags.LAYER_TABLE in known else []
        points = dict(self._tensors(ctx, experiment, run, [*wanted, *table]))
        tables = [(p.step, _names(p.numpy)) for p in points.pop(tags.LAYER_TABLE, ())]
        count, points = _thinned(points, every)
        steps = sorted({point.step for found in points.values() for point in found})
        column = {step: i for i, step in enumerate(steps)}
        figures: dict[str, np.ndarray] = {}
        for tag, found in points.items():
            at = [column[point.step] for point in found]
            values = np.stack([point.numpy for point in found])
            keys = json.loads(known[tag].plugin_content)
            for key, own in zip(keys, values.T, strict=True):
                empty = np.full(len(steps), np.nan, "f4")
                figures.setdefault(key, empty)[at] = own
        names, sizes = tables[-1][1] if tables else ([], [])
        return Run(
            every,
            max(count, len(steps)),
            np.array(steps, "int64"),
            names,
            sizes,
            {k: v for k, v in figures.items() if np.isfinite(v).any()},
            layer_keys.result(),
            histograms.result(),
            any(tag.startswith(f"{tags.PAGE_DENSITY}/") for tag in known),
            mode.result(),
            tables,
        )

    def _layers(
        self, ctx: RequestContext, experiment: str, run: str, known: Tags, every: int
    ) -> Run:
        told = self.run(ctx, experiment, Part(run, every))
        steps, tables, names = told.steps.tolist(), told.tables, told.layers
        shape = len(steps), len(names), len(tags.LAYER_KEYS)
        values = np.full(shape, np.nan, "f4")
        place = {step: i for i, step in enumerate(steps)}
        wanted = _wanted(known, tags.PAGE_LAYERS, every)
        for tag, found in self._tensors(ctx, experiment, run, wanted).items():
            keys = json.loads(known[tag].plugin_content)
            columns = [tags.LAYER_KEYS.index(key) for key in keys]
            for point in found:
                # Not all are wanted; one may have come after the steps were read, or
                # before its names.
                if point.step not in place:
                    continue
                own = [table[0] for step, table in tables if step <= point.step]
                if own:
                    rows = _in_order(point.numpy, own[-1], names)
                    values[place[point.step]][:, columns] = rows
        return dataclasses.replace(told, by_layer=values)

    def _layer_keys(
        self, ctx: RequestContext, experiment: str, run: str, known: Tags
    ) -> list[str]:
        """The figures of layers that a run has, as its last probe shows."""
        wanted = [tag for tag in known if tag.startswith(f"{tags.PAGE_LAYERS}/")]
        if not wanted:
            return []
        tag = max(wanted, key=lambda tag: known[tag].max_step)
        found = self._tensors(ctx, experiment, run, [tag], downsample=1)
        keys = json.loads(known[tag].plugin_content)
        there = np.isfinite(found[tag][-1].numpy).any(axis=0)
        return [key for key, known in zip(keys, there, strict=True) if known]

    def _histogram_tags(
        self, ctx: RequestContext, experiment: str, run: str, known: Tags
    ) -> list[str]:
        there = self._provider.list_tensors(
            ctx,
            experiment_id=experiment,
            plugin_name=HISTOGRAMS,
            run_tag_filter=RunTagFilter(runs=[run]),
        ).get(run, {})
        groups = (f"{tags.LAYER_HISTOGRAM}/", f"{tags.GRADIENT_HISTOGRAM}/")
        return sorted(tag for tag in there if tag.startswith(groups))

    def _mode(self, ctx: RequestContext, experiment: str, run: str, known: Tags) -> str:
        points = self._tensors(ctx, experiment, run, [tags.MODE], TEXTS).get(tags.MODE)
        return _text(points[-1].numpy.item()) if points else ""


def columns(count: int, most: int) -> np.ndarray:
    """Which of so many steps to show: all, or evenly some, with the first and last.

    Args:
        count: How many there are.
        most: How many there is room for, at least two.
    """
    if count <= most:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, most).round().astype("int64"))


def plain(values: np.ndarray) -> Any:
    """An array as lists of numbers of four digits, and None where there is none.

    JSON knows no infinity and no NaN, and a screen shows no more digits.
    """
    values = np.asarray(values, "float64")
    known = np.isfinite(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = 10.0 ** (3 - np.floor(np.log10(np.abs(values))))
        # Small numbers divide: multiples of 1e-7 are none in binary.
        rounded = np.where(unit < 1e15, np.round(values * unit) / unit, values)
    rounded = np.where(known & (values != 0), rounded, 0.0).astype(object)
    rounded[~known] = None
    return rounded.tolist()


def to_csv(runs: Iterable[tuple[str, Run]]) -> Iterator[str]:
    """Runs as one long table, which a spreadsheet or pandas can pivot.

    Args:
        runs: Names and runs, with their layers' figures.

    Yields:
        Parts of a CSV with the columns run, step, layer (empty for global figures),
        figure, value: every figure of every probe.
    """
    yield "run,step,layer,figure,value\n"
    for name, run in runs:
        columns = [("", key, values) for key, values in sorted(run.figures.items())]
        for i, layer in enumerate(run.layers):
            for key in sorted(run.layer_keys):
                values = run.of_layers(key)[:, i]
                columns.append((layer, key, values))
        steps = run.steps.tolist()
        for layer, key, values in columns:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(
                (name, step, layer, key, f"{value:.7g}")
                for step, value in zip(steps, values.tolist(), strict=True)
                if value == value and abs(value) != float("inf")
            )
            yield text.getvalue()


def _wanted(known: Tags, prefix: str, every: int) -> list[str]:
    """The tags with every so many probes of a run, and the one with its last."""
    own = [tag for tag in known if tag.startswith(f"{prefix}/")]
    newest = max((known[tag].max_step for tag in own), default=None)
    return [
        tag
        for tag in own
        if known[tag].max_step == newest or Group.of(tag).has_some(every)
    ]


def _thinned(
    points: Mapping[str, list[TensorDatum]], every: int
) -> tuple[int, dict[str, list[TensorDatum]]]:
    """The number of all probes, and every so many of them with the last one, by tag."""
    last = max((p.step for found in points.values() for p in found), default=None)
    thinned, count = {}, 0
    for tag, found in points.items():
        numbers = [Group.of(tag).number_of(place) for place in range(len(found))]
        count = max(count, numbers[-1] + 1)
        thinned[tag] = [
            point
            for number, point in zip(numbers, found, strict=True)
            if number % every == 0 or point.step == last
        ]
    return count, {tag: found for tag, found in thinned.items() if found}


def _names(table: np.ndarray) -> Names:
    return [_text(name) for name, _ in table], [int(size) for _, size in table]


def _in_order(rows: np.ndarray, own: list[str], names: list[str]) -> np.ndarray:
    """Rows that belong to some names, in the order of others."""
    if own == names:
        return rows
    place = {name: i for i, name in enumerate(own)}
    missing = np.full((1, rows.shape[1]), np.nan, rows.dtype)
    rows = np.concatenate([rows, missing])
    ordered: np.ndarray = rows[[place.get(name, -1) for name in names]]
    return ordered


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
