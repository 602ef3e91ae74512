"""Long trainings, deep models and many runs: 2,000 probes, 200 layers, 20 of them."""

import os
import pathlib
import time

import pytest
from large_logs import write_runs

PROBES, LAYERS, RUNS = 2000, 200, 20
LAST = 10 * (PROBES - 1)

#: Seconds of processor time for the figures of all runs, and for a layer of six runs.
LIMITS = 2.0, 1.0


def cpu_seconds(pid):
    """Of a process and those that it started: what other processes do is no matter."""
    ticks = 0
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        fields = text.rpartition(")")[2].split()
        if int(stat.parent.name) == pid or int(fields[1]) == pid:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def large_logs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("large")
    return directory, write_runs(directory, RUNS, PROBES, LAYERS)


@pytest.fixture(scope="module")
def server(large_logs, serve):
    directory, _ = large_logs
    with serve(directory, load_fast="true") as running:
        running.wait_for_steps([LAST] * RUNS)
        yield running


@pytest.fixture
def page(browser, server):
    from curvature_page import Page

    opened = Page(browser).open(server.url)
    yield opened
    # Before its server goes.
    opened.leave()


def test_the_answers_that_open_the_page_come_at_once(server, large_logs):
    _, names = large_logs
    if not pathlib.Path("/proc/self/stat").exists():
        pytest.skip("processor time is read where Linux tells it")
    start, clock = cpu_seconds(server.pid), time.perf_counter()
    server.get("plugin/curvature/runs")
    tables = [server.get("plugin/curvature/table", run=run) for run in names]
    matrix = server.get("plugin/curvature/layers", run=names[0], figure="trace")
    first, clock = cpu_seconds(server.pid) - start, time.perf_counter() - clock
    layer = tables[0]["layers"][7]
    start = cpu_seconds(server.pid)
    for run in names[:6]:
        server.get("plugin/curvature/layer", run=run, layer=layer)
    layers = cpu_seconds(server.pid) - start
    print(f"\n{first:.2f} s ({clock:.2f} s passed); layers of six runs {layers:.2f} s")
    assert first < LIMITS[0] and layers < LIMITS[1]
    # Thinned out for a screen, all figures at the same steps, and the last one there.
    assert tables[0]["steps"] == [*range(0, LAST, 40), LAST]
    assert tables[0]["num_probes"] == PROBES
    assert all(len(column) == 501 for column in tables[0]["figures"].values())
    assert len(matrix) == 4 * 501 * LAYERS


def test_many_layers_fold_and_many_runs_have_short_names(page):
    assert page.text("#run-prefix") == "All begin with sweep/"
    shown = page.texts(".run-name")
    assert sorted(shown) == sorted(f"rate={0.1 * (i + 1):.1f}" for i in range(RUNS))
    assert len(page.lines("trace")) == 6
    for i in range(6, 10):
        page.all(".runs input")[i].click()
    page.until(lambda: len(page.lines("trace")) == 10)
    # Beyond eight runs colours come again, with another stroke.
    dashed = page.all("[data-chart=trace] path.line[stroke-dasharray]")
    assert len(dashed) == 2
    page.one("#run-filter").send_keys("0.3")
    assert page.texts(".run-name") == ["rate=0.3"]
    page.settle()
    rows = page.texts(".row-label")
    assert all(row.startswith("▸ model/stage") for row in rows)
    page.all(".row-label")[0].click()
    unfolded = page.texts(".row-label")
    assert len(unfolded) == len(rows) + 4
    assert unfolded[1] == "model/stage1/block1/conv_0"
    assert page.chosen["folds"] == "+model/stage1/block1"
    # The steps stay in sight below the rows that scroll.
    scroll = page.one("#heat-map .scroll").rect
    steps = page.one("#heat-map .steps").rect
    assert steps["y"] >= scroll["y"] + scroll["height"] - 1


def test_long_runs_of_deep_models_open_and_draw_what_changes(page):
    # More probes than a screen has room for: some are shown, the last one too.
    assert f"501 of {PROBES} probes" in page.text("#heat-map h3")
    assert f"At step {LAST} " in page.text("#answer")
    page.one("#fold-all").click()
    rows = page.texts(".row-label")
    assert len([row for row in rows if "conv_" in row]) == LAYERS
    page.one("#all-runs").click()
    page.until(lambda: len(page.lines("layer")) == len(page.lines("loss")) == RUNS)
    # What does not change is not drawn again: neither map nor other charts.
    script = """
        const charts = [...document.querySelectorAll('.chart svg[role=img]')];
        for (const chart of charts) chart.dataset.before = 'yes';
        const pen = document.querySelector('#heat-map canvas').getContext('2d');
        pen.fillStyle = 'rgb(1, 2, 3)';
        pen.fillRect(0, 0, 3, 3);
        document.querySelector(arguments[0]).click();
        return [
          document.querySelectorAll('.chart svg[data-before=yes]').length,
          charts.length, [...pen.getImageData(1, 1, 1, 1).data].slice(0, 3)];
    """
    kept, count, corner = page.browser.execute_script(script, "#live")
    assert kept == count >= 8 and corner == [1, 2, 3]
    other = ".row-label.inner[aria-selected=false]"
    _, count, corner = page.browser.execute_script(script, other)
    assert corner != [1, 2, 3]
    kept = ".chart svg[data-before=yes]"
    page.until(lambda: len(page.all(kept)) == count - 1)
