"""The routes of the page "Curvature", asked over HTTP under both loaders."""

import csv
import importlib.metadata
import io
import pathlib
import urllib.error

import numpy as np
import pytest
from records import LAYERS, MODE, SERVED_STEPS, synthetic_record

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
        {"run": "sparse/curvature", "last_step": 2},
    ]


def test_a_table_holds_what_was_written(server):
    table = server.get("plugin/curvature/table", run="b/curvature")
    records = [synthetic_record(step, seed=1) for step in SERVED_STEPS]
    assert table["steps"] == list(SERVED_STEPS)
    # The model's order, not the alphabet's.
    assert table["layers"] == list(LAYERS)
    assert table["sizes"] == [layer["size"] for layer in records[0]["layers"]]
    expected = {f.key for f in tags.GLOBAL_FIGURES}
    assert set(table["figures"]) == expected
    for figure in tags.GLOBAL_FIGURES:
        np.testing.assert_allclose(
            table["figures"][figure.key],
            [record[figure.key] for record in records],
            rtol=1e-6,
        )
    assert table["mode"] == MODE
    assert set(table["layer_figures"]) == {f.key for f in tags.LAYER_FIGURES}
    for figure in tags.LAYER_FIGURES:
        for i, layer in enumerate(LAYERS):
            np.testing.assert_allclose(
                table["layer_figures"][figure.key][layer],
                [record["layers"][i][figure.key] for record in records],
                rtol=1e-6,
            )


def test_what_is_missing_is_null(server):
    table = server.get("plugin/curvature/table", run="sparse/curvature")
    assert table == {
        "steps": [1, 2],
        "layers": [],
        "sizes": [],
        "figures": {
            "loss": [0.5, None],
            "hessian_trace": [None, 4.0],
            "two_over_learning_rate": [None, 4.0],
        },
        "layer_figures": {},
        "mode": "",
    }


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
    per_run = len(tags.GLOBAL_FIGURES) * len(SERVED_STEPS)
    per_run += len(tags.LAYER_FIGURES) * len(LAYERS) * len(SERVED_STEPS)
    assert sum(r["run"] == "a/curvature" for r in rows) == per_run


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
