"""What the page's server reads, and how often: without a server and a browser."""

import concurrent.futures
import threading
import time

import numpy as np
import pytest
from tensorboard import context
from tensorboard.backend.event_processing import (
    data_ingester,
    data_provider,
    plugin_event_multiplexer,
)
from tensorboard.plugins import base_plugin
from werkzeug.test import Client

from keras_curvature.tensorboard import groups
from keras_curvature.tensorboard.plugin import reading
from keras_curvature.tensorboard.plugin.plugin import CurvaturePlugin
from keras_curvature.tensorboard.writer import CurvatureWriter

CONTEXT = context.RequestContext()
LAYERS = ("first", "second")


def record(step):
    layers = [{"name": n, "trace": float(step + i)} for i, n in enumerate(LAYERS)]
    return {"step": step, "loss": float(step), "layers": layers}


def write(directory, steps):
    with CurvatureWriter(directory / "run", top_layers=0) as writer:
        writer.begin(steps[0])
        for step in steps:
            writer.write(record(step))


class Provider:
    """TensorBoard's slow loader, which loads when asked to, and notes what is read."""

    def __init__(self, directory):
        self._runs = plugin_event_multiplexer.EventMultiplexer(
            size_guidance=data_ingester.DEFAULT_SIZE_GUIDANCE,
            tensor_size_guidance=data_ingester.DEFAULT_TENSOR_SIZE_GUIDANCE,
        )
        self._directory = str(directory)
        self.provider = data_provider.MultiplexerDataProvider(
            self._runs, self._directory
        )
        self.read, self.seconds = [], 0.0
        self.load()

    def load(self):
        self._runs.AddRunsFromDirectory(self._directory)
        self._runs.Reload()
        return self

    def list_tensors(self, *args, **kwargs):
        return self.provider.list_tensors(*args, **kwargs)

    def read_tensors(self, ctx, **kwargs):
        self.read += sorted(kwargs["run_tag_filter"].tags)
        time.sleep(self.seconds)
        return self.provider.read_tensors(ctx, **kwargs)

    def read_of_layers(self):
        """Tags of the layers' figures, but for what tells which figures there are."""
        return [tag for tag in self.read if tag.startswith("curvature_layers/")]


@pytest.fixture
def always_listed(monkeypatch):
    """A listing serves for no time: what was loaded is seen at once."""
    monkeypatch.setattr(reading, "_LISTED", -1.0)


def steps_of(table):
    return table.get_json()["steps"]


def traces(answer):
    return np.frombuffer(answer.data, "<f4").reshape(len(LAYERS), -1)


@pytest.fixture
def page(tmp_path):
    """Asks the routes of the page on some logs: `page(steps)` writes and loads them."""

    def made(steps):
        write(tmp_path, steps)
        provider = Provider(tmp_path)
        plugin = CurvaturePlugin(base_plugin.TBContext(data_provider=provider))
        routes = plugin.get_plugin_apps()

        def ask(route, **query):
            return Client(routes[route]).get("/", query_string=query)

        ask.provider, ask.reader = provider, plugin._reader
        return ask

    return made


RUN = {"run": "run/curvature"}


def test_a_long_run_is_not_read_as_a_whole(page):
    ask = page(range(1100))
    steps = steps_of(ask("/table", **RUN))
    assert steps == [*range(0, 1100, 4), 1099]
    figures = [t for t in ask.provider.read if t.startswith("curvature_figures/")]
    strides = {groups.Group.of(tag).stride for tag in figures}
    # That of the last probe, which is shown too.
    assert {tag for tag in figures if "every_1/" in tag} == {
        "curvature_figures/every_1/1091/1091"
    }
    assert strides == {None, 1, 4, 8, 16, 32, 64}
    of = {"every": 4, "last": 1099, **RUN}
    rows = traces(ask("/layers", figure="trace", **of))
    np.testing.assert_array_equal(rows, [steps, np.add(steps, 1)])


def test_logs_without_strides_are_read_as_a_whole_and_thinned_out(page, monkeypatch):
    """As they were written before."""
    monkeypatch.setattr(groups, "stride_of", lambda number: None)
    ask = page(range(1100))
    monkeypatch.undo()
    table = ask("/table", **RUN).get_json()
    assert table["every"] == 1 and table["num_probes"] == 1100
    assert len(table["steps"]) == 550
    assert table["steps"][0] == 0 and table["steps"][-1] == 1099
    rows = traces(ask("/layers", figure="trace", every=1, last=1099, **RUN))
    np.testing.assert_array_equal(rows[1], np.add(table["steps"], 1))


@pytest.mark.parametrize("read_before", [True, False])
def test_a_page_stays_with_the_steps_of_its_table(
    page, tmp_path, always_listed, read_before
):
    """While the run goes on; the last of them may be missing if it is read late."""
    ask = page(range(700))
    table = ask("/table", **RUN).get_json()
    assert table["steps"] == [*range(0, 700, 2), 699]
    of = {"every": table["every"], "last": 699, "figure": "trace", **RUN}
    if read_before:
        ask("/layers", **of)
    write(tmp_path, range(700, 1100))
    ask.provider.load()
    count = 351 if read_before else 350
    rows = traces(ask("/layers", **of))
    np.testing.assert_array_equal(rows[0], table["steps"][:count])
    assert steps_of(ask("/table", **RUN)) == [*range(0, 1100, 4), 1099]


def test_what_is_asked_for_twice_at_once_is_read_once(page):
    ask = page(range(30))
    ask.provider.seconds = 0.05
    started = threading.Barrier(2)

    def layers(key):
        started.wait()
        return ask("/layers", figure=key, **RUN).data

    with concurrent.futures.ThreadPoolExecutor(2) as both:
        list(both.map(layers, ("trace", "diagonal_mean")))
    read = ask.provider.read_of_layers()
    # The last probe tells which figures there are.
    assert sorted(read) == sorted([*set(read), "curvature_layers/every_1/11/11"])


def test_what_the_page_asks_for_first_is_read_while_its_scripts_load(page):
    ask = page(range(30))
    assert b"export async function render" in ask("/index.js").data
    ask.reader._ahead.submit(lambda: None).result()
    before = list(ask.provider.read)
    steps = steps_of(ask("/table", **RUN))
    rows = traces(ask("/layers", figure="trace", every=1, last=29, **RUN))
    np.testing.assert_array_equal(rows[0], steps)
    assert steps == list(range(30)) and ask.provider.read == before


def test_only_the_csv_reads_a_long_run_as_a_whole_and_it_is_not_kept(page):
    ask = page(range(600))
    ask("/table", **RUN)
    lines = ask("/csv", **RUN).text.splitlines()
    assert len(lines) == 1 + 3 * 600
    kept = {len(run.steps) for _, run in ask.reader._kept.values()}
    assert kept == {301}
