"""A table of layers that fits its console: what `curvature_summary` prints.

Where there is little room, columns are left out, those first that others tell nearly as
well; then names lose their beginnings.
"""

import rich.box
import rich.markup
import rich.table

from keras_curvature.text import number, percent, with_error

#: Name of a column, and its heading in two lines.
_HEADINGS = {
    "params": "Params",
    "mean": "Mean\ndiagonal",
    "max": "Largest\nentry",
    "negative": "Share\n< 0",
    "trace": "Trace",
    "of trace": "Share\nof trace",
    "of norm": "Share\nof ‖H‖²",
    "own": "In own\nblock",
}

#: What is left out when there is no room, from the first to the last. "±" are the
#: standard errors. The trace is the mean times the number of parameters.
_DISPENSABLE = ("trace", "negative", "own", "max", "±", "params", "of trace", "mean")

#: Names are not made shorter than this for the sake of a column, nor are columns left
#: out for names longer than this share of the width.
_LEAST, _SHARE = 24, 0.45


def table_of(layers, trace, top, width):
    """A table of layers, by their share of the squared norm.

    Args:
        layers: list of dictionaries, from `record.layer_figures`.
        trace: the sum of their traces.
        top: number of layers that are shown, the others in one line; `None` for all.
        width: columns of the console.

    Returns:
        A `rich.table.Table`.
    """
    # Traces may cancel, and their shares be anything.
    order = sorted(layers, key=lambda layer: -layer["frobenius_share"])
    shown, rest = order, []
    # A line for a single one may as well be its own.
    if top is not None and len(order) > top + 1:
        shown, rest = order[:top], order[top:]
    names, rows, last = [layer["name"] for layer in shown], shown, []
    if rest:
        rows, last = [*shown, _together(rest)], [f"{len(rest)} more layers"]
    longest = max(map(len, names + last), default=0)
    least = min(longest, max(_LEAST, min(_distinct(names), int(_SHARE * width))))
    left_out = set()
    for name in (None, *_DISPENSABLE):
        left_out.add(name)
        cells = [_cells(layer, trace, left_out) for layer in rows]
        kept = [key for key in _HEADINGS if key not in left_out]
        room = width - 4 - sum(3 + _width(key, cells) for key in kept)
        if room >= least:
            break
    table = rich.table.Table(
        title="Curvature of the training loss",
        box=rich.box.SQUARE,
        title_style="bold",
        header_style="bold",
    )
    table.add_column("Layer", no_wrap=True)
    for key in kept:
        table.add_column(_HEADINGS[key], justify="right", no_wrap=True)
    for label, row in zip(shortened(names, room) + last, cells, strict=True):
        if rest and row is cells[-1]:
            table.add_section()
        table.add_row(rich.markup.escape(label), *(row[key] for key in kept))
    return table


def shortened(names, width):
    """Names of at most `width` characters, cut at their beginnings where they must be.

    `block/attention/query` becomes `…/attention/query` where that is no other layer's
    name, and loses single letters otherwise.
    """
    width = max(width, 2)
    cut = [_cut_at_slash(name, width) for name in names]
    return [
        short if cut.count(short) == 1 else _cut(name, width)
        for name, short in zip(names, cut, strict=True)
    ]


def _distinct(names):
    """How long names must be, cut at their beginnings, to be told apart."""
    longest = max(map(len, names), default=0)
    for width in range(2, longest):
        if len({_cut(name, width) for name in names}) == len(set(names)):
            return width
    return longest


def _cells(layer, trace, left_out):
    """The entries of a layer's row, by column."""
    mean_error = trace_error = None
    if "±" not in left_out:
        mean_error = layer["diagonal_mean_standard_error"]
        trace_error = layer["trace_standard_error"]
    return {
        "params": f"{layer['size']:,}",
        "mean": with_error(layer["diagonal_mean"], mean_error),
        "max": number(layer["diagonal_max"]),
        "negative": percent(layer["negative_share"]),
        "trace": with_error(layer["trace"], trace_error),
        "of trace": percent(layer["trace"] / trace) if trace else "-",
        "of norm": percent(layer["frobenius_share"]),
        "own": percent(layer["block_share"]),
    }


def _together(layers):
    """The figures of several layers as those of one."""
    sums = ("size", "trace", "frobenius_share", "block_share")
    whole = {key: sum(layer[key] for layer in layers) for key in sums}
    errors = [layer["trace_standard_error"] for layer in layers]
    size, error = whole["size"], None if None in errors else sum(errors)
    negative = sum(layer["negative_share"] * layer["size"] for layer in layers)
    return {
        **whole,
        "trace_standard_error": error,
        "diagonal_mean": whole["trace"] / size,
        "diagonal_mean_standard_error": None if error is None else error / size,
        "diagonal_max": max(layer["diagonal_max"] for layer in layers),
        "negative_share": negative / size,
    }


def _width(key, cells):
    lines = _HEADINGS[key].split("\n")
    return max(map(len, (*lines, *(row[key] for row in cells))))


def _cut_at_slash(name, width):
    if len(name) <= width:
        return name
    places = [i for i, letter in enumerate(name) if letter == "/"]
    for place in places:
        if len(name) - place < width:
            return f"…{name[place:]}"
    return _cut(name, width)


def _cut(name, width):
    return name if len(name) <= width else f"…{name[1 - width :]}"
