"""From one record of the monitor to TensorBoard's messages, without any file.

All values of a step go into one `Summary` message, so that a probe costs one write
however many layers there are.
"""

import functools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from tensorboard.compat.proto import types_pb2
from tensorboard.compat.proto.summary_pb2 import (
    DATA_CLASS_TENSOR,
    Summary,
    SummaryMetadata,
)
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.histogram import metadata as histogram_metadata
from tensorboard.plugins.scalar import metadata as scalar_metadata
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.util import tensor_util

from keras_curvature.tensorboard import signed_log, tags
from keras_curvature.tensorboard.layout import layout

Value: TypeAlias = Summary.Value


def scalar(tag: str, value: float, description: str | None = None) -> Value:
    """One number."""
    # What `make_tensor_proto` gives, ten times as fast: a probe has hundreds of these.
    tensor = TensorProto(
        dtype=types_pb2.DT_FLOAT,
        tensor_shape=TensorShapeProto(),
        float_val=[float(value)],
    )
    metadata = scalar_metadata.create_summary_metadata(None, description)
    return Value(tag=tag, metadata=metadata, tensor=tensor)


def histogram(
    tag: str, edges: np.ndarray, counts: np.ndarray, description: str | None = None
) -> Value:
    """Counts between edges of curvature, drawn on the signed logarithmic axis.

    Args:
        tag: The tag.
        edges: Curvature at the bins' edges, increasing, shape `(bins + 1,)`.
        counts: Entries in each bin, shape `(bins,)`.
        description: What the chart's information mark shows.

    Raises:
        ValueError: If the shapes don't fit, or the edges don't increase.
    """
    edges, counts = np.asarray(edges, "float64"), np.asarray(counts, "float64")
    if edges.ndim != 1 or counts.shape != (edges.size - 1,) or counts.size == 0:
        raise ValueError(
            "A histogram needs one more edge than counts, both as flat arrays. "
            f"Received: edges of shape {edges.shape}, counts of shape {counts.shape}"
        )
    if not np.all(np.diff(edges) > 0):
        raise ValueError(
            f"The edges of a histogram must increase. Received: edges={edges}"
        )
    # The axis in TensorBoard ends where the data does: empty bins outside are left out.
    filled = np.flatnonzero(counts)
    if filled.size:
        first, last = filled[0], filled[-1] + 1
        edges, counts = edges[first : last + 1], counts[first:last]
    place = signed_log.to_axis(edges)
    return _value(
        tag,
        np.stack([place[:-1], place[1:], counts], axis=1),
        histogram_metadata.create_summary_metadata(None, description),
    )


def text(tag: str, markdown: str, description: str | None = None) -> Value:
    """A text, which TensorBoard shows in its Text tab."""
    return _value(
        tag,
        np.array(markdown.encode(), dtype=object),
        text_metadata.create_summary_metadata(None, description),
    )


@functools.lru_cache(maxsize=8)
def layer_table(layers: tuple[tuple[str, int], ...]) -> Value:
    """Names and sizes of the layers, for TensorBoard forgets the order of the tags.

    Made once of the same layers: each probe asks for it, and it seldom changes.
    """
    table = np.empty((len(layers), 2), dtype=object)
    for i, (name, size) in enumerate(layers):
        table[i] = name.encode(), str(size).encode()
    return _of_the_page(tags.LAYER_TABLE, table)


def page_values(record: Mapping[str, Any], group: str) -> Iterator[Value]:
    """A record as the page reads it: a few tensors, whose parts are never apart.

    Args:
        record: One probe of the monitor.
        group: The name of the group of probes that share the tags.
    """
    figures = {key: record.get(key) for key in PAGE_KEYS}
    for key, value in (record.get("optimizer") or {}).items():
        figures[f"{tags.OPTIMIZER}/{key}"] = value
    yield _of_the_page(
        f"{tags.PAGE_FIGURES}/{group}", _row(figures, list(figures)), list(figures)
    )
    layers = record.get("layers")
    if layers:
        rows = np.stack([_row(layer, tags.LAYER_KEYS) for layer in layers])
        yield _of_the_page(f"{tags.PAGE_LAYERS}/{group}", rows, tags.LAYER_KEYS)
    density = record.get("spectral_density")
    if density is not None:
        grid, value = density["grid"], density["density"]
        error = density.get("standard_error") or [0.0] * len(grid)
        table = np.array([grid, value, error], "float32")
        yield _of_the_page(f"{tags.PAGE_DENSITY}/{group}", table)


PAGE_KEYS = (*(f.key for f in tags.GLOBAL_FIGURES), *tags.ERROR_KEYS)


def _row(figures: Mapping[str, Any], keys: Sequence[str]) -> np.ndarray:
    values = [figures.get(key) for key in keys]
    return np.array([np.nan if v is None else v for v in values], "float32")


def _of_the_page(tag: str, tensor: np.ndarray, keys: Sequence[str] = ()) -> Value:
    """A value that belongs to our own page, which finds its runs by such values."""
    plugin = SummaryMetadata.PluginData(
        plugin_name=tags.PLUGIN_NAME, content=json.dumps(keys).encode()
    )
    metadata = SummaryMetadata(plugin_data=plugin, data_class=DATA_CLASS_TENSOR)
    return _value(tag, tensor, metadata)


def layout_values() -> Iterator[Value]:
    """The arrangement of TensorBoard's Custom Scalars tab."""
    yield _value(
        layout_metadata.CONFIG_SUMMARY_TAG,
        np.array(layout().SerializeToString(), dtype=object),
        layout_metadata.create_summary_metadata(),
    )


def record_values(
    record: Mapping[str, Any], layers: Collection[str], per_variable: bool = False
) -> Iterator[Value]:
    """What TensorBoard's own tabs show of a record.

    Args:
        record: One probe of the monitor. Figures that are missing or None are left out.
        layers: Names of the layers that have tags of their own.
        per_variable: Whether each of their variables has its tags too.
    """
    yield from _scalars(record, tags.GLOBAL_FIGURES)
    for band in tags.BANDS:
        value = record.get(band.key)
        if value is not None:
            # A margin chart shows no curve without a margin: one of no width, then.
            margin = band.factor * float(record.get(band.error_key) or 0.0)
            yield scalar(band.lower, float(value) - margin, _LOWER)
            yield scalar(band.upper, float(value) + margin, _UPPER)
    for key, figure in (record.get("optimizer") or {}).items():
        if figure is not None:
            tag = f"{tags.OPTIMIZER}/{key}"
            yield scalar(tag, figure, tags.optimizer_description(key))

    every = record.get("layers") or ()
    shown = [part for part in every if part["name"] in layers]
    for part in shown:
        yield from _scalars(part, tags.LAYER_FIGURES, part["name"])
    for key, group, of in _HISTOGRAMS:
        yield from _histograms(shown, "name", key, group, of)
        yield from _histograms([_whole(every, key)], "name", key, group, of)
    if per_variable:
        variables = record.get("variables") or ()
        shown = [part for part in variables if part["layer"] in layers]
        for part in shown:
            yield from _scalars(part, tags.VARIABLE_FIGURES, part["path"])
        (key, _, of), group = _HISTOGRAMS[0], tags.VARIABLE_HISTOGRAM
        yield from _histograms(shown, "path", key, group, of)


_LOWER = (
    "Lower end of the margin around the figure, for Custom Scalars: 2 standard errors "
    "below it, or an eigenvalue's bound. The figure itself where no error is known."
)
_UPPER = _LOWER.replace("Lower", "Upper").replace("below", "above")
# The key of a part's counts, the group of tags, and what was counted.
_HISTOGRAMS = (
    ("histogram", tags.LAYER_HISTOGRAM, "Entries of the Hessian's diagonal"),
    ("gradient_histogram", tags.GRADIENT_HISTOGRAM, "Entries of the gradient"),
)


def _whole(parts: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    """One part in place of all, with the counts of all of them."""
    counted = [part[key] for part in parts if part.get(key) is not None]
    if not counted:
        return {}
    counts = np.sum([one["counts"] for one in counted], axis=0)
    whole = {"edges": counted[0]["edges"], "counts": counts}
    return {"name": tags.WHOLE_MODEL, key: whole}


def _value(tag: str, tensor: np.ndarray, metadata: SummaryMetadata) -> Value:
    return Value(
        tag=tag, metadata=metadata, tensor=tensor_util.make_tensor_proto(tensor)
    )


def _scalars(
    figures: Mapping[str, Any], wanted: tuple[tags.Figure, ...], name: str | None = None
) -> Iterator[Value]:
    for figure in wanted:
        value = figures.get(figure.key)
        if value is not None:
            tag = figure.tag if name is None else figure.of(name)
            yield scalar(tag, value, figure.description)


def _histograms(
    parts: Sequence[Mapping[str, Any]], name: str, key: str, group: str, of: str
) -> Iterator[Value]:
    for part in parts:
        counted = part.get(key)
        if counted is not None:
            yield histogram(
                f"{group}/{part[name]}",
                counted["edges"],
                counted["counts"],
                f"{of} {signed_log.DESCRIPTION}",
            )
