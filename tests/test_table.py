"""The table fits its console, and says no less of the layers than there is room for."""

import re

import pytest
import rich.console

from keras_curvature.table import shortened, table_of
from keras_curvature.text import number, percent, with_error

BLOCKS = [f"conv{i // 4 + 2}_block{i % 4 + 1}" for i in range(16)]
#: As many layers, and as long names, as a ResNet has.
DEEP = [f"{block}_{i}_convolution" for block in BLOCKS for i in range(4)]
DEEP += ["stem", "norm", "predictions"]
NESTED = [
    f"transformer_encoder_block_{i}/{part}"
    for i in range(2)
    for part in ("self_attention/query", "self_attention/attention_output", "norm")
]
SMALL = ["dense", "dense_1"]
EVERY = ("Params", "Mean", "Largest", "< 0", "Trace", "of trace", "‖H‖²", "In own")


def layers_of(names, error=0.1):
    """Figures of all sizes, the later a layer the larger its share of the norm."""
    return [
        {
            "name": name,
            "size": 10 ** (i % 7) + i,
            "diagonal_mean": 1e-9 * 3**i,
            "diagonal_mean_standard_error": error and error * 1e-9 * 3**i,
            "diagonal_max": 1e-8 * 3**i,
            "negative_share": 0.25,
            "trace": (10 ** (i % 7) + i) * 1e-9 * 3**i,
            "trace_standard_error": error and error * 1e-9 * 3**i,
            "frobenius_share": 2 * i / len(names) ** 2 - 1e-4,
            "block_share": 0.5 / len(names),
        }
        for i, name in enumerate(names)
    ]


def lines(layers, width, top=20):
    console = rich.console.Console(width=width, highlight=False, force_jupyter=False)
    trace = sum(layer["trace"] for layer in layers)
    with console.capture() as capture:
        console.print(table_of(layers, trace, top, width))
    return capture.get().rstrip("\n").split("\n")


def rows(printed):
    """The cells of each row below the heading."""
    body = "\n".join(printed).split("┤", 1)[1]
    return [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in body.split("\n")
        if "│" in line
    ]


@pytest.mark.parametrize("names", [SMALL, NESTED, DEEP], ids=["2", "6", "67"])
@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_layer_has_one_line_that_fits(names, width):
    printed = lines(layers_of(names), width)
    assert max(map(len, printed)) <= width
    found = rows(printed)
    assert len(found) == (21 if names is DEEP else len(names))
    shown = [row[0] for row in found]
    assert len(set(shown)) == len(shown)
    for name in shown[:20]:
        assert any(full.endswith(name.removeprefix("…")) for full in names)
    # Nothing was cut but names.
    assert not any("…" in cell for row in found for cell in row[1:])
    assert "-0%" not in "".join(printed)


def test_columns_are_left_out_where_there_is_no_room():
    kept = []
    for width in (60, 80, 120, 200):
        heading = " ".join(lines(layers_of(NESTED), width)[:5])
        kept.append([column for column in EVERY if column in heading])
    assert kept[-1] == list(EVERY)
    assert all(set(a) <= set(b) for a, b in zip(kept, kept[1:], strict=False))
    assert {"Mean", "‖H‖²"} <= set(kept[0]) and len(kept[0]) < len(kept[1])


def test_begins_with_the_largest_share_and_puts_the_rest_together():
    layers = layers_of(DEEP)
    found = rows(lines(layers, 200, top=5))
    order = layers[::-1]
    assert [row[0] for row in found[:5]] == [layer["name"] for layer in order[:5]]
    name, size, mean, largest, negative, trace, *shares = found[5]
    rest = order[5:]
    total = sum(layer["trace"] for layer in rest)
    assert name == "62 more layers"
    assert size == f"{sum(layer['size'] for layer in rest):,}"
    assert trace.split(" ± ")[0] == number(total)
    assert mean.split(" ± ")[0] == number(total / sum(x["size"] for x in rest))
    assert largest == number(max(layer["diagonal_max"] for layer in rest))
    assert negative == "25%"
    every = sum(layer["trace"] for layer in layers)
    assert shares[0] == percent(total / every) and shares[2] == percent(62 / 67 / 2)


def test_all_layers_on_request_and_no_line_for_a_single_one():
    assert len(rows(lines(layers_of(DEEP), 100, top=None))) == 67
    assert "more" not in "".join(lines(layers_of(DEEP), 100, top=66))
    assert "2 more layers" in "".join(lines(layers_of(DEEP), 100, top=65))


def test_figures_without_errors_or_trace():
    layers = layers_of(SMALL, error=None)
    assert "±" not in "".join(lines(layers, 120))
    for layer in layers:
        layer["trace"] = 0.0
    assert all("-" in row for row in rows(lines(layers, 120)))


def test_names_lose_their_beginnings():
    names = ["a/attention/query/kernel", "b/norm"]
    assert shortened(names, 19) == ["…/query/kernel", "b/norm"]
    # Where that would be two layers' name, as much is kept as there is room for.
    names = ["block_0/attention/query", "block_1/attention/query"]
    assert shortened(names, 19) == ["…_0/attention/query", "…_1/attention/query"]
    assert shortened(["groupnormalization"], 8) == ["…ization"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-0.0, "0"),
        (1.234e-4, "1.23e-4"),
        (0.00123, "0.00123"),
        (-0.5, "-0.500"),
        (9.999, "10.0"),
        (12.345, "12.3"),
        (999.6, "1000"),
        (1234, "1230"),
        (12345, "1.23e4"),
        (1e-300, "1.00e-300"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text
    assert re.fullmatch(r"-?[\d.]+(e-?\d+)?|inf|nan", text)


def test_errors_have_one_digit_and_shares_no_negative_zero():
    assert with_error(1.234, 0.0456) == "1.23 ± 0.05"
    assert with_error(1.234, 0) == with_error(1.234, None) == "1.23"
    assert with_error(None, None) == "not known"
    assert [percent(x) for x in (-0.004, 0.004, -0.25, 1)] == [
        "0%",
        "0%",
        "-25%",
        "100%",
    ]
