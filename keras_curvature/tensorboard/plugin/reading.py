"""Reads curvature from TensorBoard's data provider, whichever loader is behind it."""

import csv
import dataclasses
import io
import math
from collections.abc import Iterable

from tensorboard.context import RequestContext
from tensorboard.data.provider import DataProvider, RunTagFilter
from tensorboard.plugins.scalar.metadata import PLUGIN_NAME as SCALARS
from tensorboard.plugins.text.metadata import PLUGIN_NAME as TEXTS

from keras_curvature.tensorboard import tags

Column = list[float | None]

_GLOBAL = {figure.tag: figure.key for figure in tags.GLOBAL_FIGURES}
_BY_LAYER = [(figure.of(""), figure.key) for figure in tags.LAYER_FIGURES]


@dataclasses.dataclass
class Table:
    """All figures of one run, in columns that belong to the same steps.

    Attributes:
        steps: The steps, increasing.
        layers: The layers' names, in the order of the model.
        sizes: The number of parameters of each layer, 0 where it is not known.
        figures: A column for each global figure; None at a step without a value.
        layer_figures: For each figure and layer a column.
        mode: How the layers ran; empty if the run does not tell.
    """

    steps: list[int]
    layers: list[str]
    sizes: list[int]
    figures: dict[str, Column]
    layer_figures: dict[str, dict[str, Column]]
    mode: str = ""


class Reader:
    """What the page asks the server.

    Args:
        data_provider: TensorBoard's source of data.
        downsample: At most so many steps of a run are read.
    """

    def __init__(self, data_provider: DataProvider, downsample: int) -> None:
        self._provider = data_provider
        self._downsample = downsample

    def runs(self, ctx: RequestContext, experiment: str) -> list[dict[str, object]]:
        """Name and last step of each run with curvature in it, sorted by name."""
        names = sorted(
            self._provider.list_tensors(
                ctx, experiment_id=experiment, plugin_name=tags.PLUGIN_NAME
            )
        )
        if not names:
            return []
        last = self._provider.read_scalars(
            ctx,
            experiment_id=experiment,
            plugin_name=SCALARS,
            downsample=1,
            run_tag_filter=RunTagFilter(runs=names, tags=list(_GLOBAL)),
        )
        return [
            {
                "run": name,
                "last_step": max(
                    (series[-1].step for series in last.get(name, {}).values()),
                    default=None,
                ),
            }
            for name in names
        ]

    def table(self, ctx: RequestContext, experiment: str, run: str) -> Table | None:
        """All figures of one run, or None if there is no such run."""
        layers = self._layers(ctx, experiment, run)
        if layers is None:
            return None
        known = self._provider.list_scalars(
            ctx,
            experiment_id=experiment,
            plugin_name=SCALARS,
            run_tag_filter=RunTagFilter(runs=[run]),
        ).get(run, {})
        wanted = {tag: place for tag in known if (place := _place(tag)) is not None}
        series = self._provider.read_scalars(
            ctx,
            experiment_id=experiment,
            plugin_name=SCALARS,
            downsample=self._downsample,
            run_tag_filter=RunTagFilter(runs=[run], tags=list(wanted)),
        ).get(run, {})

        steps = sorted({point.step for points in series.values() for point in points})
        row = {step: i for i, step in enumerate(steps)}
        table = Table(steps, list(layers), list(layers.values()), {}, {})
        for tag, points in series.items():
            figure, layer = wanted[tag]
            column: Column = [None] * len(steps)
            for point in points:
                column[row[point.step]] = _number(point.value)
            if layer is None:
                table.figures[figure] = column
            else:
                table.layer_figures.setdefault(figure, {})[layer] = column
        table.mode = self._mode(ctx, experiment, run)
        return table

    def _mode(self, ctx: RequestContext, experiment: str, run: str) -> str:
        texts = self._provider.read_tensors(
            ctx,
            experiment_id=experiment,
            plugin_name=TEXTS,
            downsample=1,
            run_tag_filter=RunTagFilter(runs=[run], tags=[tags.MODE]),
        )
        points = texts.get(run, {}).get(tags.MODE)
        return _text(points[-1].numpy.item()) if points else ""

    def _layers(
        self, ctx: RequestContext, experiment: str, run: str
    ) -> dict[str, int] | None:
        tables = self._provider.read_tensors(
            ctx,
            experiment_id=experiment,
            plugin_name=tags.PLUGIN_NAME,
            downsample=1,
            run_tag_filter=RunTagFilter(runs=[run], tags=[tags.LAYER_TABLE]),
        )
        points = tables.get(run, {}).get(tags.LAYER_TABLE)
        if not points:
            return None
        return {_text(name): int(size) for name, size in points[-1].numpy}


def to_csv(tables: Iterable[tuple[str, Table]]) -> str:
    """Runs as one long table, which a spreadsheet or pandas can pivot.

    Args:
        tables: Pairs of a run's name and its table.

    Returns:
        CSV with the columns run, step, layer (empty for global figures), figure, value.
    """
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["run", "step", "layer", "figure", "value"])
    for run, table in tables:
        columns = [("", figure, c) for figure, c in sorted(table.figures.items())]
        for layer in table.layers:
            for figure, by_layer in sorted(table.layer_figures.items()):
                if layer in by_layer:
                    columns.append((layer, figure, by_layer[layer]))
        for layer, figure, column in columns:
            for step, value in zip(table.steps, column, strict=True):
                if value is not None:
                    out.writerow([run, step, layer, figure, value])
    return text.getvalue()


def _place(tag: str) -> tuple[str, str | None] | None:
    """The figure and the layer a tag belongs to, or None if it is not ours."""
    if tag in _GLOBAL:
        return _GLOBAL[tag], None
    for prefix, key in _BY_LAYER:
        if tag.startswith(prefix):
            return key, tag.removeprefix(prefix)
    return None


def _number(value: float) -> float | None:
    """Seven digits, which is what the files hold; JSON knows no infinity and no NaN."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
