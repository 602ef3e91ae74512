"""From one record of the monitor to TensorBoard's messages, without any file.

All values of a step go into one `Summary` message, so that a probe costs one write
however many layers there are.
"""

import io
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
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
from tensorboard.plugins.image import metadata as image_metadata
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


def image(tag: str, pixels: np.ndarray, description: str | None = None) -> Value:
    """One image.

    Args:
        tag: The tag.
        pixels: Red, green and blue, uint8 of shape `(height, width, 3)`.
        description: What the image's information mark shows.
    """
    height, width, _ = pixels.shape
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    parts = [str(width).encode(), str(height).encode(), png.getvalue()]
    return _value(
        tag,
        np.array(parts, dtype=object),
        image_metadata.create_summary_metadata(None, description),
    )


def text(tag: str, markdown: str, description: str | None = None) -> Value:
    """A text, which TensorBoard shows in its Text tab."""
    return _value(
        tag,
        np.array(markdown.encode(), dtype=object),
        text_metadata.create_summary_metadata(None, description),
    )


def layer_table(layers: tuple[tuple[str, int], ...]) -> Value:
    """Names and sizes of the layers, for TensorBoard forgets the order of the tags.

    The value belongs to our own page, which finds its runs by it.
    """
    table = np.empty((len(layers), 2), dtype=object)
    for i, (name, size) in enumerate(layers):
        table[i] = name.encode(), str(size).encode()
    return _value(
        tags.LAYER_TABLE,
        table,
        SummaryMetadata(
            plugin_data=SummaryMetadata.PluginData(plugin_name=tags.PLUGIN_NAME),
            data_class=DATA_CLASS_TENSOR,
        ),
    )


def layout_values() -> Iterator[Value]:
    """The arrangement of TensorBoard's Custom Scalars tab."""
    yield _value(
        layout_metadata.CONFIG_SUMMARY_TAG,
        np.array(layout().SerializeToString(), dtype=object),
        layout_metadata.create_summary_metadata(),
    )


def record_values(
    record: Mapping[str, Any], per_variable: bool = False
) -> Iterator[Value]:
    """Everything one record says, except for the heat map, which needs all of them.

    Args:
        record: One probe of the monitor. Figures that are missing or None are left out.
        per_variable: Whether each variable gets its tags too, besides its layer.
    """
    yield from _scalars(record, tags.GLOBAL_FIGURES)
    for band in tags.BANDS:
        value = record.get(band.key)
        if value is not None:
            # A margin chart shows no curve without a margin: one of no width, then.
            margin = band.factor * float(record.get(band.error_key) or 0.0)
            yield scalar(band.lower, float(value) - margin)
            yield scalar(band.upper, float(value) + margin)
    for key, figure in (record.get("optimizer") or {}).items():
        if figure is not None:
            yield scalar(f"{tags.OPTIMIZER}/{key}", figure)

    yield from _parts(record, "layers", "name", tags.LAYER_FIGURES)
    yield from _histograms(record, "layers", "name", tags.LAYER_HISTOGRAM)
    if per_variable:
        yield from _parts(record, "variables", "path", tags.VARIABLE_FIGURES)
        yield from _histograms(record, "variables", "path", tags.VARIABLE_HISTOGRAM)


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


def _parts(
    record: Mapping[str, Any],
    parts: str,
    name: str,
    wanted: tuple[tags.Figure, ...],
) -> Iterator[Value]:
    for part in record.get(parts) or ():
        yield from _scalars(part, wanted, part[name])


def _histograms(
    record: Mapping[str, Any], parts: str, name: str, group: str
) -> Iterator[Value]:
    for part in record.get(parts) or ():
        counted = part.get("histogram")
        if counted is not None:
            yield histogram(
                f"{group}/{part[name]}",
                counted["edges"],
                counted["counts"],
                signed_log.DESCRIPTION,
            )
