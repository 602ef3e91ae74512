"""The routes of the page "Curvature", asked over HTTP under both loaders."""

import csv
import importlib.metadata
import io
import pathlib
import urllib.error

import numpy as np
import pytest
from records import LAYERS, LONG_STEPS, MODE, SERVED_STEPS, synthetic_record

from keras_curvature.tensorboard import plugin, tags
from keras_curvature.tensorboard.plugin.plugin import CurvaturePlugin


def test_tensorboard_finds_the_plugin_by_its_entry_point():
    found = importlib.metadata.entry_points(group="tensorboard_plugins")
    assert found["curvature"].load() is CurvaturePlugin


def test_the_tab_is_active(server):
    listed = server.get("plugins_listing")[tags.PLUGIN_NAME]
    assert listed["enabled"]
    assert listed["tab_name"] == "Curvature"


def test_runs_and_their_last_steps(server):
    assert server.get("plugin/curvature/runs")["runs"] == [
        {"run": "a/curvature", "last_step": 300},
        {"run": "b/curvature", "last_step": 300},
        {"run": "long/curvature", "last_step": LONG_STEPS[-1]},
        {"run": "sparse/curvature", "last_step": 2},
    ]


def test_a_table_holds_what_was_written(server):
    table = server.get("plugin/curvature/table", run="b/curvature")
    records = [synthetic_record(step, seed=1) for step in SERVED_STEPS]
    assert table["steps"] == list(SERVED_STEPS)
    # The model's order, not the alphabet's.
    assert table["layers"] == list(LAYERS)
    assert table["sizes"] == [layer["size"] for layer in records[0]["layers"]]
    keys = [*(f.key for f in tags.GLOBAL_FIGURES), *tags.ERROR_KEYS]
    assert set(table["figures"]) == {*keys, "optimizer/clipped_share"}
    # Four digits are sent.
    close = {"rtol": 5.1e-4}
    for key in keys:
        written = [record[key] for record in records]
        assert [v is None for v in table["figures"][key]] == [
            v is None for v in written
        ]
        for shown, value in zip(table["figures"][key], written, strict=True):
            assert (shown is None) == (value is None)
            if value is not None:
                np.testing.assert_allclose(shown, value, **close)
    assert table["mode"] == MODE
    assert table["num_probes"] == len(SERVED_STEPS) and table["every"] == 1
    assert not table["density"]
    parts = (*LAYERS, tags.WHOLE_MODEL)
    groups = (tags.LAYER_HISTOGRAM, tags.GRADIENT_HISTOGRAM)
    assert set(table["histograms"]) == {f"{g}/{p}" for g in groups for p in parts}
    assert set(table["layer_keys"]) == set(tags.LAYER_KEYS)
    of = {"run": "b/curvature"}
    for key in ("trace", "diagonal_mean_standard_error"):
        sent = server.get("plugin/curvature/layers", figure=key, **of)
        rows = np.frombuffer(sent, "<f4").reshape(6, len(records))
        written = [[record["layers"][i][key] for record in records] for i in range(6)]
        np.testing.assert_allclose(rows, np.array(written, "f4"))
    found = server.get("plugin/curvature/layer", layer=LAYERS[2], **of)["figures"]
    assert set(found) == set(tags.LAYER_KEYS)
    written = [record["layers"][2]["block_share"] for record in records]
    np.testing.assert_allclose(found["block_share"], written, **close)


def test_histograms(server):
    tag = f"{tags.LAYER_HISTOGRAM}/{tags.WHOLE_MODEL}"
    of = {"run": "a/curvature", "tag": tag}
    found = server.get("plugin/curvature/histogram", **of)
    assert [one["step"] for one in found] == list(SERVED_STEPS)
    for one in found:
        layers = synthetic_record(one["step"])["layers"]
        counts = sum(np.sum(layer["histogram"]["counts"]) for layer in layers)
        assert np.sum(one["bins"], axis=0)[2] == counts


def test_densities(server):
    assert server.get("plugin/curvature/density", run="a/curvature") == []
    (one,) = server.get("plugin/curvature/density", run="sparse/curvature")
    assert one == {
        "step": 2,
        "grid": [0, 1.5],
        "density": [0.5, 0.1667],
        "standard_error": [0.125, 0],
    }


def test_what_is_missing_is_null(server):
    table = server.get("plugin/curvature/table", run="sparse/curvature")
    assert table == {
        "steps": [1, 2],
        "every": 1,
        "num_probes": 2,
        "layers": [],
        "sizes": [],
        "figures": {
            "loss": [0.5, None],
            "hessian_trace": [None, 4.0],
            "two_over_learning_rate": [None, 4.0],
        },
        "layer_keys": [],
        "histograms": [],
        "density": True,
        "mode": "",
    }
    of = {"run": "sparse/curvature"}
    found = server.get("plugin/curvature/layers", figure="trace", **of)
    assert found == b""
    assert server.get("plugin/curvature/layer", layer="x", **of) == {"figures": {}}


def test_csv_holds_every_value_of_the_runs(server):
    text = server.get(
        "plugin/curvature/csv?run=a/curvature&run=sparse/curvature"
    ).decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == ["run", "step", "layer", "figure", "value"]
    found = {
        (r["run"], int(r["step"]), r["layer"], r["figure"]): float(r["value"])
        for r in rows
    }
    assert len(found) == len(rows)
    record = synthetic_record(100)
    assert found["a/curvature", 100, "", "hessian_trace"] == pytest.approx(
        record["hessian_trace"], rel=1e-6
    )
    assert found["a/curvature", 100, "block/norm", "diagonal_max"] == pytest.approx(
        record["layers"][3]["diagonal_max"], rel=1e-6
    )
    assert found["sparse/curvature", 2, "", "two_over_learning_rate"] == 4.0
    assert ("sparse/curvature", 1, "", "hessian_trace") not in found
    per_run = (len(tags.GLOBAL_FIGURES) + len(tags.ERROR_KEYS) + 1) * len(SERVED_STEPS)
    per_run -= 1  # No update before the first step.
    per_run += len(tags.LAYER_KEYS) * len(LAYERS) * len(SERVED_STEPS)
    assert sum(r["run"] == "a/curvature" for r in rows) == per_run


def test_a_long_run_is_shown_at_common_steps(server):
    """Every fourth probe, and the last one: whatever TensorBoard keeps of curves."""
    of = {"run": "long/curvature"}
    table = server.get("plugin/curvature/table", **of)
    steps = [*LONG_STEPS[::4], LONG_STEPS[-1]]
    assert table["steps"] == steps
    assert table["every"] == 4 and table["num_probes"] == len(LONG_STEPS)
    # Four digits are sent.
    np.testing.assert_allclose(table["figures"]["loss"], steps, rtol=5.1e-4)
    of |= {"every": 4, "last": steps[-1]}
    sent = server.get("plugin/curvature/layers", figure="trace", **of)
    rows = np.frombuffer(sent, "<f4").reshape(2, len(steps))
    np.testing.assert_array_equal(rows, [steps, np.add(steps, 1)])
    found = server.get("plugin/curvature/layer", layer="y", **of)["figures"]
    np.testing.assert_allclose(found["trace"], np.add(steps, 1), rtol=5.1e-4)


def test_csv_of_a_long_run_is_complete(server):
    text = server.get("plugin/curvature/csv", run="long/curvature").decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    for layer, figure, more in (("", "loss", 0), ("y", "trace", 1)):
        found = {
            int(r["step"]): float(r["value"])
            for r in rows
            if (r["layer"], r["figure"]) == (layer, figure)
        }
        assert found == {step: step + more for step in LONG_STEPS}


@pytest.mark.parametrize(
    "route, status",
    [
        ("plugin/curvature/table?run=nowhere", 404),
        ("plugin/curvature/csv?run=a/curvature&run=nowhere", 404),
        ("plugin/curvature/table", 400),
        ("plugin/curvature/../plugin.py", 404),
    ],
)
def test_bad_requests_are_refused_with_a_reason(server, route, status):
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.get(route)
    assert caught.value.code == status
    if "table" in route or "csv" in route:
        assert "Received: " in caught.value.read().decode()


def test_scripts_and_style_are_served_from_the_package(server):
    script = server.get("plugin/curvature/index.js").decode()
    assert "export async function render()" in script
    assert b"--accent" in server.get("plugin/curvature/curvature.css")


def test_no_address_outside_is_named():
    for path in (pathlib.Path(plugin.__file__).parent / "static").iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text, path.name


def test_without_any_logs_the_tab_rests(empty_server):
    assert empty_server.get("plugin/curvature/runs") == {"runs": []}
    assert not empty_server.get("plugins_listing")[tags.PLUGIN_NAME]["enabled"]
