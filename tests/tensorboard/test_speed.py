"""Long trainings, deep models and many runs: 2,000 probes, 200 layers, 20 of them."""

import csv
import io
import os
import pathlib
import time

import pytest
from large_logs import write_runs

PROBES, LAYERS, RUNS = 2000, 200, 20

#: Seconds of processor time to answer what opens the page, and all runs' curves.
LIMIT = 4.0


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
    directory, names = large_logs
    with serve(directory, load_fast="true") as running:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            found = running.get("plugin/curvature/runs")["runs"]
            last = [run["last_step"] for run in found]
            if last == [10 * (PROBES - 1)] * RUNS:
                break
            time.sleep(0.5)
        assert [run["run"] for run in found] == sorted(names)
        yield running


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
    assert first < LIMIT and layers < 2 * LIMIT
    # Thinned out for a screen, all figures at the same steps, and the last one there.
    assert len(tables[0]["steps"]) == 500 and tables[0]["num_probes"] == PROBES
    assert tables[0]["steps"][-1] == 10 * (PROBES - 1)
    assert all(len(column) == 500 for column in tables[0]["figures"].values())
    assert len(matrix) == 4 * 500 * LAYERS


def test_csv_is_complete(server, large_logs):
    """Whatever TensorBoard keeps of curves: a thousand points, at random."""
    _, names = large_logs
    text = server.get("plugin/curvature/csv", run=names[3]).decode()
    rows = csv.reader(io.StringIO(text))
    assert next(rows) == ["run", "step", "layer", "figure", "value"]
    trace = [int(row[1]) for row in rows if row[2] == "" and row[3] == "hessian_trace"]
    assert trace == list(range(0, 10 * PROBES, 10))
    last = "model/stage4/block13/conv_199"
    assert text.count(f",{last},block_share,") == PROBES
