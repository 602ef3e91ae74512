"""What one look at the curvature found, as plain numbers.

A *record* is a dictionary that pandas, a CSV file and the event files can be made
from. It is put together here, for the monitor and for the report alike.
"""

import functools
import math

import numpy as np
from keras import ops

from keras_curvature import backend

#: Figures of the diagonal, in the order in which they are computed.
_STATISTICS = (
    "diagonal_mean",
    "diagonal_mean_abs",
    "diagonal_max",
    "diagonal_min",
    "negative_share",
)

#: A variable's rows of the diagonal block of its layer.
_IN_LAYER = "layer_block_share"


def scalar_figures(diagonal=None, subspace=None):
    """Trace, Frobenius norm and largest eigenvalue with their errors.

    Args:
        diagonal: `Moments` with diagonal and trace.
        subspace: `DeflatedMoments`.

    Returns:
        Dictionary from the names of figures to floats, `None` where there is no
        standard error.
    """
    figures = {}
    # The diagonal's own trace has far less noise than one from parameter directions.
    if diagonal is not None or subspace is not None:
        trace = (diagonal or subspace).trace
        figures["hessian_trace"] = trace.value
        figures["hessian_trace_standard_error"] = trace.standard_error
    if subspace is not None:
        norm = subspace.frobenius_norm
        figures["hessian_frobenius_norm"] = norm.value
        figures["hessian_frobenius_norm_standard_error"] = norm.standard_error
        figures["hessian_max_eigenvalue"] = None
        figures["hessian_max_eigenvalue_error"] = None
        if len(subspace.eigenvalues):  # None at a first look with very few products.
            largest = subspace.eigenvalues.argmax()
            figures["hessian_max_eigenvalue"] = float(subspace.eigenvalues[largest])
            figures["hessian_max_eigenvalue_error"] = float(
                subspace.residual_norms[largest]
            )
    return figures


def variable_figures(operator, diagonal=None, subspace=None, edges=None):
    """One dictionary per variable.

    Args:
        operator: the `HessianOperator` that was looked at.
        diagonal: `Moments` with a flat diagonal, its blocks the variables.
        subspace: `DeflatedMoments` whose blocks are the variables.
        edges: increasing edges of a histogram; entries beyond them count in the
            outermost bins.

    Returns:
        A list of dictionaries with `"path"`, `"layer"`, `"size"` and the figures
        that are known. `"frobenius_share"` is the share of the squared norm in the
        variable's rows of H; `"block_share"` that in its own diagonal block, and
        `"layer_block_share"` that in its rows of its layer's diagonal block.
    """
    records = []
    layout = operator.evaluation.loss.layout
    for name, size in zip(layout.names, layout.sizes, strict=True):
        path = _without_model(name, operator)
        layer = path.rpartition("/")[0] or path
        records.append({"path": path, "layer": layer, "size": size})
    if diagonal is not None:
        _add_diagonal(records, operator, diagonal.diagonal, edges)
    if diagonal is not None or subspace is not None:
        for record, trace in zip(
            records, (diagonal or subspace).trace.blocks, strict=True
        ):
            record["trace"] = trace.value
            record["trace_standard_error"] = trace.standard_error
            if diagonal is not None:
                error, size = trace.standard_error, record["size"]
                record["diagonal_mean_standard_error"] = (
                    None if error is None else error / size
                )
    if subspace is not None:
        squared = subspace.squared_frobenius_norm
        scale = 1 / squared.value if squared.value else 0.0
        for record, part in zip(records, squared.blocks, strict=True):
            record["frobenius_share"] = part.value * scale
        if squared.pairs is not None:
            _add_blocks(records, squared.pairs, scale)
    return records


def add_gradient(variables, operator, look, edges=None):
    """Adds what the gradient tells to the figures of the variables.

    Args:
        variables: list from `variable_figures`, which is changed.
        operator: the `HessianOperator` that was looked at.
        look: a `GradientLook`.
        edges: increasing edges of a histogram of the gradient.

    Returns:
        The figures of all variables together, a dictionary.
    """
    for i, record in enumerate(variables):
        record["gradient_norm"] = float(look.squared_norms[i]) ** 0.5
        record["weight_norm"] = float(look.squared_weights[i]) ** 0.5
        update = look.squared_updates
        record["update_norm"] = None if update is None else float(update[i]) ** 0.5
        record["update_ratio"] = _ratio(record)
    if edges is not None:
        edges = _as_list(tuple(edges))
        count = _summarize(tuple(operator.sizes), tuple(edges[1:-1]))
        counts = ops.convert_to_numpy(count(look.gradient)[1])
        for record, own in zip(variables, counts, strict=True):
            record["gradient_histogram"] = {"edges": edges, "counts": own.tolist()}
    whole = _together(variables)
    return {
        "gradient_norm": whole["gradient_norm"],
        "gradient_noise_scale": look.noise_scale,
        "update_ratio": whole["update_ratio"],
    }


def _together(records):
    """Norms of several variables as of one vector."""
    norms = {}
    for key in ("gradient_norm", "weight_norm", "update_norm"):
        values = [record[key] for record in records]
        norms[key] = None if None in values else math.hypot(*values)
    return norms | {"update_ratio": _ratio(norms)}


def _ratio(norms):
    """How far weights move in a step, as a share of them; biases begin at zero."""
    update, weights = norms["update_norm"], norms["weight_norm"]
    return None if update is None or not weights else update / weights


def _add_blocks(records, pairs, scale):
    """Shares of the squared norm in diagonal blocks, the variables' and the layers'."""
    layers = np.array([r["layer"] for r in records])
    # Of a layer's block each of its variables holds some rows.
    within = layers[:, None] == layers
    for key, part in (("block_share", np.eye(len(layers))), (_IN_LAYER, within)):
        shares = (pairs.value * part).sum(1) * scale
        errors = [None] * len(layers)
        if pairs.standard_error is not None:
            errors = ((pairs.standard_error * part).sum(1) * scale).tolist()
        for record, share, error in zip(records, shares, errors, strict=True):
            record[key] = float(share)
            record[f"{key}_standard_error"] = error


def _without_model(path, operator):
    """A variable's path without the name of the model in front of all of them."""
    model = getattr(operator.evaluation.loss, "model", None)
    return path.removeprefix(f"{model.name}/") if model is not None else path


def layer_figures(variables):
    """The figures of the variables, put together by layer.

    Standard errors of sums are at most the sums of the standard errors; that is what
    is given.

    Args:
        variables: list from `variable_figures`.

    Returns:
        A list of dictionaries with `"name"` in place of path and layer. What the
        `"block_share"`s of all layers leave of one lies between layers.
    """
    layers = {}
    for record in variables:
        layers.setdefault(record["layer"], []).append(record)
    return [_one_layer(name, records) for name, records in layers.items()]


def _one_layer(name, records):
    size = sum(r["size"] for r in records)
    layer = {"name": name, "size": size}
    for key in ("diagonal_mean", "diagonal_mean_abs", "negative_share"):
        if key in records[0]:
            layer[key] = sum(r[key] * r["size"] for r in records) / size
    for key, choose in (("diagonal_max", max), ("diagonal_min", min)):
        if key in records[0]:
            layer[key] = choose(r[key] for r in records)
    sums = {key: key for key in ("trace", "trace_standard_error", "frobenius_share")}
    for key in ("", "_standard_error"):
        sums[f"block_share{key}"] = f"{_IN_LAYER}{key}"
    for key, source in sums.items():
        if source in records[0]:
            values = [r[source] for r in records]
            layer[key] = None if None in values else sum(values)
    if "diagonal_mean_standard_error" in records[0]:
        error = layer["trace_standard_error"]
        layer["diagonal_mean_standard_error"] = None if error is None else error / size
    if "gradient_norm" in records[0]:
        layer.update(_together(records))
    for key in ("histogram", "gradient_histogram"):
        if records[0].get(key) is not None:
            counts = [r[key]["counts"] for r in records]
            layer[key] = {
                "edges": records[0][key]["edges"],
                "counts": [sum(column) for column in zip(*counts, strict=True)],
            }
    return layer


def _add_diagonal(records, operator, diagonal, edges):
    # One list for all records: histories get long.
    edges = None if edges is None else _as_list(tuple(edges))
    inner = () if edges is None else tuple(edges[1:-1])
    statistics, counts = _summarize(tuple(operator.sizes), inner)(diagonal.value)
    statistics = ops.convert_to_numpy(statistics)
    counts = ops.convert_to_numpy(counts)
    for i, record in enumerate(records):
        record.update(zip(_STATISTICS, map(float, statistics[i]), strict=True))
        if edges is not None:
            record["histogram"] = {
                "edges": edges,
                "counts": counts[i].tolist(),
            }


@functools.lru_cache(maxsize=64)
def _as_list(edges):
    return [float(edge) for edge in edges]


#: Entries that are counted at once.
_ENTRIES = 2**18


@functools.lru_cache(maxsize=64)
def _summarize(sizes, inner_edges):
    """Compiled: statistics and counts of each block of a flat diagonal.

    Only these leave the device.
    """

    def over_blocks(kind, flat):
        return backend.over_blocks(kind, flat[None], sizes)[0]

    def summarize(flat):
        lengths = ops.convert_to_tensor(sizes, flat.dtype)
        columns = [
            over_blocks("sum", flat) / lengths,
            over_blocks("sum", ops.abs(flat)) / lengths,
            over_blocks("max", flat),
            over_blocks("min", flat),
            over_blocks("sum", ops.cast(flat < 0, flat.dtype)) / lengths,
        ]
        shape = len(sizes), len(inner_edges) + 1
        edges = ops.convert_to_tensor(inner_edges, flat.dtype)

        def counted(entries, numbers):
            bins = ops.cast(ops.searchsorted(edges, entries, side="right"), "int32")
            bins = numbers * shape[1] + bins
            return ops.segment_sum(
                ops.ones_like(bins), bins, num_segments=math.prod(shape)
            )

        # A few at a time: what is made on the way takes as much as many diagonals.
        numbers = backend.block_numbers(sizes)
        counts = backend.sum_chunks(counted, [flat, numbers], _ENTRIES)
        return ops.stack(columns, axis=1), ops.reshape(counts, shape)

    return backend.compiled(summarize)


def is_finite(record):
    """Whether the scalar figures of a record are finite."""
    values = [v for k, v in record.items() if k.startswith("hessian_")]
    return all(v is None or math.isfinite(v) for v in values)


def one_line(record):
    """A record in one line of text."""

    def figure(name, label, prefix="hessian_"):
        value = record.get(f"{prefix}{name}")
        if value is None:
            return ""
        # An eigenvalue has a bound, the others a standard error.
        error = record.get(
            f"{prefix}{name}_standard_error", record.get(f"{prefix}{name}_error")
        )
        return f" - {label} {value:.4g}" + (f" ± {error:.2g}" if error else "")

    return (
        f"curvature at step {record['step']}"
        + figure("trace", "trace")
        + figure("frobenius_norm", "norm")
        + figure("max_eigenvalue", "max eigenvalue")
        + figure("critical_sharpness", "critical sharpness", prefix="")
        + f" - {record['seconds']:.2f}s"
        + (f" - overhead {record['overhead']:.0%}" if "overhead" in record else "")
    )
