"""The page "Curvature" in a real browser, on a real TensorBoard."""

import csv
import io
import json
import math
import re
import shutil
import time
import urllib.request

import pytest
from patience import PATIENCE
from records import LAYERS, MODE, synthetic_record

from keras_curvature.tensorboard.writer import CurvatureWriter

pytest.importorskip("selenium", reason="selenium drives the browser")

from curvature_page import Page  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

STEPS = tuple(range(0, 1000, 100))
RUNS = {"newton": 0.1, "sgd": 0.02}


def run_of(name, step):
    seed = list(RUNS).index(name)
    record = synthetic_record(step, seed, learning_rate=RUNS[name])
    if step < 200:
        # No good guess as yet.
        record["hessian_max_eigenvalue_error"] = 50 * record["hessian_max_eigenvalue"]
    if step in (0, 500):
        grid = [0.1 * i - 1 for i in range(40)]
        density = [math.exp(-(g**2)) for g in grid]
        record["spectral_density"] = {"grid": grid, "density": density}
    # With a preconditioner it is no limit.
    return {**record, "two_over_learning_rate": None}


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("logs")
    for name in RUNS:
        with CurvatureWriter(directory / name) as writer:
            for step in STEPS:
                writer.write(run_of(name, step))
    return directory


@pytest.fixture(scope="module")
def server(log_dir, serve):
    with serve(log_dir, load_fast="true") as running:
        for name in RUNS:
            running.wait_for_run(f"{name}/curvature")
        yield running


def point_at_cell(page, layer, step):
    """Moves the pointer to the middle of a cell; returns the tooltip's lines."""
    canvas = page.one("#heat-map canvas")
    box = canvas.rect
    across = (STEPS.index(step) + 0.5) / len(STEPS) - 0.5
    down = (LAYERS.index(layer) + 0.5) / len(LAYERS) - 0.5
    ActionChains(page.browser).move_to_element_with_offset(
        canvas, round(across * box["width"]), round(down * box["height"])
    ).perform()
    page.until(lambda: layer in page.text("#tooltip"))
    return page.text("#tooltip").split("\n")


def lightness(page, layer, step):
    """Of a cell's colour: the sum of red, green and blue."""
    return page.browser.execute_script(
        """
        const canvas = document.querySelector('#heat-map canvas');
        const [row, rows, column, columns] = arguments;
        const x = canvas.width * (column + 0.3) / columns;
        const y = canvas.height * (row + 0.3) / rows;
        const [r, g, b] = canvas.getContext('2d').getImageData(x, y, 1, 1).data;
        return r + g + b;
        """,
        *(LAYERS.index(layer), len(LAYERS), STEPS.index(step), len(STEPS)),
    )


def forget(page, server, directory):
    """Takes a run away again, before a page could ask for what is gone."""
    page.browser.switch_to.default_content()
    page.browser.get("about:blank")
    shutil.rmtree(directory)
    server.wait_for_run(f"{directory.name}/curvature", shown=False)


@pytest.fixture
def page(browser, server, request):
    """The page by itself, or in TensorBoard's own, which takes longer."""
    opened = Page(browser).open(server.url, framed=getattr(request, "param", False))
    yield opened
    opened.leave()


framed = pytest.mark.parametrize("page", [True], ids=["framed"], indirect=True)


@framed
def test_first_sight(page):
    assert page.texts(".run-name") == ["newton", "sgd"]
    last = run_of("newton", STEPS[-1])
    answer = page.text("#answer")
    assert answer.startswith("At step 900 of newton, the stiffest layer is logits")
    share = last["hessian_preconditioned_max_eigenvalue"] / last["stability_threshold"]
    shown = re.search(r"exceeds its stability threshold \((\d+) % of it\)", answer)
    assert float(shown[1]) == pytest.approx(100 * share, abs=0.51)
    assert answer.endswith(f"Layers ran as in {MODE}.")
    tiles = {
        tile.get_attribute("data-figure"): tile.text.split("\n")[-1]
        for tile in page.all(".tile")
    }
    # Each of them says in plain words what it is.
    assert len(page.all(".tile .help")) == len(tiles)
    assert set(tiles) == {
        "loss",
        "hessian_trace",
        "hessian_frobenius_norm",
        "hessian_max_eigenvalue",
        "hessian_preconditioned_max_eigenvalue",
        "stability_threshold",
        "gradient_norm",
        "gradient_noise_scale",
        "update_ratio",
        "num_matvecs",
        "overhead",
        "seconds",
        "first_seconds",
    }
    assert tiles["overhead"] == "4 %"
    assert tiles["seconds"] == "0.4 s"
    noise = last["gradient_noise_scale"]
    assert tiles["gradient_noise_scale"] == f"{noise:.3g} samples"
    value, error = tiles["hessian_trace"].split(" ± ")
    assert float(error) == pytest.approx(last["hessian_trace_standard_error"], rel=0.05)
    # Rounded to the error's second digit.
    assert float(value) == pytest.approx(last["hessian_trace"], abs=0.1 * float(error))
    assert tiles["stability_threshold"] == "380"
    assert page.texts(".row-label") == list(LAYERS)
    assert "Mean of the Hessian’s diagonal" in page.text("#heat-map h3")


def test_heat_map_shows_values_and_colours_by_size(page):
    for layer, step in (("conv1", 0), ("block/norm", 300), ("logits", 900)):
        part = run_of("newton", step)["layers"][LAYERS.index(layer)]
        name, at, value = point_at_cell(page, layer, step)
        assert (name, at) == (layer, f"step {step}")
        shown, error = value.removeprefix("Mean: ").split(" ± ")
        assert float(shown) == pytest.approx(part["diagonal_mean"], rel=0.01)
        assert float(error) == pytest.approx(
            part["diagonal_mean_standard_error"], rel=0.06
        )
    cells = [(layer, step) for layer in LAYERS for step in (0, 500, 900)]
    by_lightness = sorted(cells, key=lambda cell: lightness(page, *cell))
    means = [
        run_of("newton", step)["layers"][LAYERS.index(layer)]["diagonal_mean"]
        for layer, step in by_lightness
    ]
    # Colours are rounded, so neighbours may change places.
    assert all(b > 0.85 * a for a, b in zip(means, means[1:], strict=False))
    assert means[-1] > 50 * means[0]


def test_custom_scalars_begin_with_the_trace(browser, server):
    """In the order in which TensorBoard's own page puts them."""
    titles = """
        const found = [];
        const walk = (node) => {
          for (const child of node.children ?? []) {
            if (child.localName === 'tf-card-heading') found.push(child.displayName);
            walk(child);
          }
          if (node.shadowRoot) walk(node.shadowRoot);
        };
        walk(document.body);
        return found;
    """
    browser.switch_to.default_content()
    browser.get("about:blank")
    browser.get(server.url + "#custom_scalars")
    shown = WebDriverWait(browser, PATIENCE, 0.2).until(
        lambda _: (found := browser.execute_script(titles))[8:] and found
    )
    assert [title.split(",")[0] for title in shown[:4]] == [
        "Trace",
        "Frobenius norm",
        "Largest eigenvalue",
        "Curvature that the optimizer sees over its stability threshold",
    ]


def test_choosing_a_figure(page):
    page.one("input[value=negative_share]").click()
    page.settle()
    assert "Share of negative entries" in page.text("#heat-map h3")
    assert page.texts(".legend-marks span")[0] == "0 %"
    share = run_of("newton", 200)["layers"][1]["negative_share"]
    shown = point_at_cell(page, "conv2", 200)[2].removeprefix("Share negative: ")
    assert float(shown.removesuffix(" %")) == pytest.approx(100 * share, abs=0.06)
    assert "has the largest share of negative curvature" in page.text("#answer")
    page.one("input[value=diagonal_max]").click()
    page.settle()
    highest = run_of("newton", 200)["layers"][1]["diagonal_max"]
    shown = float(point_at_cell(page, "conv2", 200)[2].removeprefix("Maximum: "))
    assert shown == pytest.approx(highest, rel=0.006)


def test_curves_of_the_selected_layer_compare_runs(page):
    page.all(".row-label")[2].click()
    assert page.text("[data-chart=layer] h3") == "Mean · block/attention"
    both = [("newton/curvature", "newton"), ("sgd/curvature", "sgd")]
    page.lines_of("layer", both)
    assert page.lines("trace") == page.lines("frobenius_norm") == both
    assert len(page.all("[data-chart=layer] path.band")) == 2
    page.one("#bands").click()
    assert page.all("path.band") == []
    page.one("[data-run='sgd/curvature'] input").click()
    assert page.lines("layer") == both[:1]
    # The other run goes into the heat map when its name is chosen.
    page.all(".run-name")[1].click()
    page.lines_of("layer", both)
    assert page.text("#answer").startswith("At step 900 of sgd")
    assert page.text("#heat-map h3").endswith("· sgd")


def test_stability_is_what_the_optimizer_sees_as_a_share_of_its_threshold(page):
    assert [name for _, name in page.lines("stability")] == ["newton", "sgd"]
    assert len(page.all("[data-chart=stability] line.limit")) == 1
    assert page.texts("[data-chart=stability] .key-entry") == [
        "newton",
        "sgd",
        "unstable above",
    ]
    plot = page.one("[data-chart=stability] .plot")
    page.browser.execute_script("arguments[0].scrollIntoView()", plot)
    ActionChains(page.browser).move_to_element(plot).perform()
    page.until(lambda: "step" in page.text("#tooltip"))
    heading, line, _ = page.text("#tooltip").split("\n")
    record = run_of("newton", int(heading.removeprefix("step ")))
    seen, limit = "hessian_preconditioned_max_eigenvalue", record["stability_threshold"]
    shown = [float(part.removesuffix(" %")) for part in line[8:].split(" ± ")]
    expected = [100 * record[key] / limit for key in (seen, f"{seen}_error")]
    assert shown == pytest.approx(expected, rel=0.05)


@framed
def test_eigenvalue_has_the_limit_of_plain_gradient_descent(page, server, log_dir):
    """The limit belongs to the Hessian itself only without a preconditioner."""
    assert page.all("[data-chart=max_eigenvalue] path.line[stroke-dasharray]") == []
    with CurvatureWriter(log_dir / "plain") as writer:
        for step in STEPS:
            record = synthetic_record(step, seed=5)
            if step == STEPS[0]:
                record["hessian_max_eigenvalue"] = -1.0
            writer.write({k: v for k, v in record.items() if "preconditioned" not in k})

    def points():
        return {
            line.get_attribute("data-name"): line.get_attribute("d").count(",")
            for line in page.all("[data-chart=max_eigenvalue] path.line")
        }

    def reloaded():
        page.browser.switch_to.default_content()
        page.one("app-header-reload button").click()
        page.enter()
        time.sleep(0.5)
        # The server shows of a run what it has read by then.
        return points().get("plain: 2 / learning rate") == len(STEPS)

    page.until(reloaded)
    dashed = page.all("[data-chart=max_eigenvalue] path.line[stroke-dasharray]")
    assert [line.get_attribute("data-name") for line in dashed] == [
        "plain: 2 / learning rate"
    ]
    # A negative first guess leaves the logarithmic axis, not the other way round.
    assert points()["plain"] == len(STEPS) - 1
    assert points()["sgd"] == len(STEPS)
    forget(page, server, log_dir / "plain")


def test_hovering_a_curve_names_every_run(page):
    plot = page.one("[data-chart=trace] .plot")
    page.browser.execute_script("arguments[0].scrollIntoView()", plot)
    ActionChains(page.browser).move_to_element(plot).perform()
    page.until(lambda: "step" in page.text("#tooltip"))
    heading, *lines = page.text("#tooltip").split("\n")
    step = int(heading.removeprefix("step "))
    assert step in STEPS
    for name, line in zip(RUNS, lines, strict=True):
        record = run_of(name, step)
        shown = line.removeprefix(f"{name}: ").split(" ± ")[0]
        # Rounded to the second digit of twice the standard error.
        digit = 0.1 * record["hessian_trace_standard_error"]
        assert float(shown) == pytest.approx(record["hessian_trace"], abs=digit)
    # The same step is marked in the other charts.
    assert len(page.all(".cursor")) == 9


def test_csv_of_the_shown_runs(page):
    address = page.one("#csv").get_attribute("href")
    with urllib.request.urlopen(address) as response:
        assert "attachment" in response.headers["Content-Disposition"]
        rows = list(csv.DictReader(io.StringIO(response.read().decode())))
    assert {row["run"] for row in rows} == {"newton/curvature", "sgd/curvature"}
    trace = {
        int(r["step"]): float(r["value"])
        for r in rows
        if r["run"] == "sgd/curvature" and r["figure"] == "hessian_trace"
    }
    assert list(trace) == list(STEPS)
    assert all(
        math.isclose(trace[s], run_of("sgd", s)["hessian_trace"], rel_tol=1e-6)
        for s in STEPS
    )


def test_what_has_not_converged_is_hollow_and_does_not_stretch_the_scale(page):
    rough = 2 * sum(step < 200 for step in STEPS)
    assert len(page.all("[data-chart=max_eigenvalue] circle.hollow")) == rough
    ticks = page.texts("[data-chart=max_eigenvalue] .tick[text-anchor=end]")
    # Bounds are fifty times as large as the values.
    assert max(map(float, ticks)) <= 100


def test_dragging_over_a_curve_zooms_all_panes(page):
    page.drag("trace", 0.3, 0.6)
    first, last = map(int, page.chosen["steps"].split("-"))
    assert 150 < first < 350 and 450 < last < 650
    shown = [step for step in STEPS if first <= step <= last]
    assert page.text("#heat-map .steps span") == str(shown[0])
    assert len(page.all("#heat-map .steps span")) == len(shown)
    ticks = page.texts("[data-chart=loss] .tick[text-anchor=middle]")
    assert all(first <= int(tick.replace("\u2009", "")) <= last for tick in ticks)
    page.one("#unzoom").click()
    assert "steps" not in page.chosen
    assert not page.one("#unzoom").is_displayed()


@framed
def test_a_link_shows_what_was_chosen(page, server):
    page.all(".run-name")[1].click()
    page.one("input[value=trace]").click()
    page.one("#bands").click()
    page.settle()
    page.all(".row-label")[1].click()
    chosen = page.chosen
    assert chosen == {
        "run": "sgd/curvature",
        "figure": "trace",
        "bands": "0",
        "layer": "conv2",
    }
    page.open(server.url, framed=True, **chosen)
    assert page.text("#answer").startswith("At step 900 of sgd")
    assert page.text("[data-chart=layer] h3") == "Trace · conv2"
    assert page.all("path.band") == []


def test_smoothing_keeps_the_values_in_sight(page, server):
    page.open(server.url, smooth="0.8")
    assert len(page.all("[data-chart=trace] path.raw")) == 2
    shown = page.one("[data-chart=trace] path.line").get_attribute("d")
    assert shown != page.one("[data-chart=trace] path.raw").get_attribute("d")


def test_layers_are_found_by_name_and_sorted_by_value(page, server):
    page.one("#layer-filter").send_keys("BLOCK")
    assert page.texts(".row-label") == ["block/attention", "block/norm"]
    page.one("#layer-filter").clear()
    page.one("#layer-filter").send_keys("x")
    assert page.text("#heat-map .note-line") == "No layer has this in its name."
    page.open(server.url, sort="value")
    last = run_of("newton", STEPS[-1])["layers"]
    by_value = sorted(last, key=lambda part: -part["diagonal_mean"])
    assert page.texts(".row-label") == [part["name"] for part in by_value]


def test_arrow_keys_go_from_row_to_row_and_from_step_to_step(page):
    page.all(".row-label")[0].click()
    page.browser.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    assert page.text("[data-chart=layer] h3") == "Mean · conv2"
    assert page.browser.switch_to.active_element.text == "conv2"
    page.one("[data-chart=trace] .plot").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page.text("#tooltip").startswith("step 100\n")


def test_distributions_over_steps(page):
    for chart, columns in (("density", 2), ("histogram", 10)):
        page.until(lambda c=chart: page.all(f"[data-chart={c}] rect"))
        steps = page.texts(f"[data-chart={chart}] .tick[text-anchor=middle]")
        assert steps[0] == "0" and 1 < len(steps) <= columns
    assert "logits" in page.text("[data-chart=gradient_histogram] h3")


def test_what_changed_between_two_runs(page):
    versus = page.one("#versus")
    versus.send_keys("sgd")
    page.until(lambda: page.all(".change"))
    here, there = (run_of(name, STEPS[-1])["layers"] for name in ("newton", "sgd"))
    ratios = {
        a["name"]: a["diagonal_mean"] / b["diagonal_mean"]
        for a, b in zip(here, there, strict=True)
    }
    shown = {
        row.get_attribute("data-layer"): float(
            row.find_element(By.CSS_SELECTOR, "b").text.removesuffix("×")
        )
        for row in page.all(".change")
    }
    # What changed most comes first.
    assert list(shown) == sorted(ratios, key=lambda k: -abs(math.log(ratios[k])))
    for layer, ratio in ratios.items():
        assert shown[layer] == pytest.approx(ratio, rel=0.01)
    assert page.chosen["versus"] == "sgd/curvature"


def test_panes_are_saved_with_the_look_they_have(page):
    script = """
        const done = arguments[arguments.length - 1];
        import(new URL('picture.js', location.origin + '/data/plugin/curvature/'))
          .then(({asSvg}) => {
            const all = document.querySelectorAll('.card[data-chart], #heat-map');
            const cards = [...all];
            const filled = (card) => card.querySelector('.plot > svg, canvas');
            done(cards.filter((card) => !card.hidden && filled(card)).map(asSvg));
          });
    """
    pictures = page.browser.execute_async_script(script)
    assert len(pictures) >= 12
    for picture in pictures:
        assert picture.startswith("<svg") and "step" in picture
    assert any("data:image/png" in picture for picture in pictures)
    # The colour of the first run, which only the style sheet knows else.
    assert any("stroke: rgb(0, 114, 178)" in picture for picture in pictures)


@framed
def test_a_pane_of_zeros_says_so(page, server, log_dir):
    with CurvatureWriter(log_dir / "zero") as writer:
        for step in (0, 100):
            layers = [{"name": "dense", "trace": 0.0, "diagonal_mean": 0.0}]
            writer.write({"step": step, "loss": 0.0, "layers": layers})

    def reloaded():
        page.browser.switch_to.default_content()
        page.one("app-header-reload button").click()
        page.enter()
        time.sleep(0.5)
        return "zero" in page.texts(".run-name")

    page.until(reloaded)
    page.one("#no-runs").click()
    page.one("[data-run='zero/curvature'] .run-name").click()
    page.until(lambda: page.text("#answer").startswith("At step 100 of zero"))
    page.until(lambda: page.text("#heat-map .note-line") == "All values are zero.")
    assert page.text("[data-chart=loss] .note") == "All values are zero."
    forget(page, server, log_dir / "zero")


def test_narrow_windows_have_one_column_that_scrolls_as_a_whole(page, server):
    size = {"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        # Without TensorBoard's own bar around it.
        page.browser.switch_to.default_content()
        page.browser.get(f"{server.url}data/plugin_entry.html?name=curvature")
        page.until(lambda: page.all(".content[aria-busy=false] .row-label"))
        script = """
            const box = (name) => document.querySelector(name).getBoundingClientRect();
            const wide = [...document.querySelectorAll('#page *')].filter((node) =>
              node.getBoundingClientRect().right > innerWidth);
            return [wide.length, box('main').top - box('aside').bottom,
              document.documentElement.scrollHeight > 2 * innerHeight];
        """
        assert page.browser.execute_script(script) == [0, 0, True]
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.browser.get_log("browser")  # A page by itself has no icon.


def test_what_is_being_read_is_not_said_to_be_missing(page, server):
    page.browser.execute_cdp_cmd("Network.enable", {})
    hold = {"urls": ["*plugin/curvature/layers?*"]}
    page.browser.execute_cdp_cmd("Network.setBlockedURLs", hold)
    try:
        page.browser.switch_to.default_content()
        page.browser.get(f"{server.url}data/plugin_entry.html?name=curvature")
        page.until(lambda: page.all("#page[data-state=ready]"))
        page.until(lambda: page.text("[data-chart=layer] .note") == "Reading …")
        assert page.text("#heat-map .note-line") == "Reading the layers …"
        # No colours and no steps of nothing.
        assert not page.one(".legend").is_displayed()
        assert not page.one(".under").is_displayed()
    finally:
        page.browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
        page.browser.get_log("browser")


def test_layers_of_two_models_are_matched_without_the_counters_of_keras(page):
    """By name if there is one, or else by place among names that are alike."""
    script = """
        const [layers, others, done] = arguments;
        import(new URL('layers.js', location.origin + '/data/plugin/curvature/'))
          .then(({matched}) => done(JSON.stringify([...matched(layers, others)])));
    """
    layers = ["conv", "dense", "dense_1", "block_2/norm", "extra"]
    others = ["conv", "dense_4", "dense_5", "block_7/norm"]
    found = page.browser.execute_async_script(script, layers, others)
    assert dict(json.loads(found)) == {
        "conv": "conv",
        "dense": "dense_4",
        "dense_1": "dense_5",
        "block_2/norm": "block_7/norm",
        "extra": None,
    }


def test_steps_are_written_with_their_digits_in_threes(page):
    script = """
        const [steps, done] = arguments;
        import(new URL('format.js', location.origin + '/data/plugin/curvature/'))
          .then(({formatStep}) => done(steps.map(formatStep)));
    """
    steps = [0, 999, 1000, 1234567, 0.25, 1234.56789]
    found = page.browser.execute_async_script(script, steps)
    grouped = [f"{step:,.3f}".rstrip("0").rstrip(".") for step in steps]
    assert found == [text.replace(",", "\u2009") for text in grouped]


@pytest.mark.parametrize("theme", ["dark", "light"])
@framed
def test_follows_the_theme(page, server, theme):
    features = [{"name": "prefers-color-scheme", "value": theme}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.open(server.url)
    page.until(lambda: page.one("html").get_attribute("data-theme") == theme)
    ground = page.one("body").value_of_css_property("background-color")
    red = int(ground.split("(")[1].split(",")[0])
    assert red < 80 if theme == "dark" else red > 200


@framed
def test_new_records_appear_when_tensorboard_reloads(page, log_dir):
    with CurvatureWriter(log_dir / "later") as writer:
        for step in (0, 100):
            writer.write(synthetic_record(step, seed=7))
    # Not by the page's own clock.
    page.one("#live").click()

    def reloaded():
        page.browser.switch_to.default_content()
        page.one("app-header-reload button").click()
        page.enter()
        time.sleep(0.5)
        return "later" in page.texts(".run-name")

    page.until(reloaded)
    page.until(lambda: ("later/curvature", "later") in page.lines("trace"))
    # What was chosen before stays.
    assert page.text("#answer").startswith("At step 900 of newton")


@framed
def test_says_so_when_the_server_does_not_answer(page):
    page.browser.execute_script(
        "window.fetch = () => Promise.reject(new Error('gone'))"
    )
    page.browser.switch_to.default_content()
    page.one("app-header-reload button").click()
    page.enter()
    page.until(lambda: "does not answer (gone)" in page.text("#problem"))
    # What was read stays in sight.
    assert page.one("#page").get_attribute("data-state") == "ready"


def test_an_empty_directory_is_told_how_to_begin(browser, empty_server):
    page = Page(browser).open(empty_server.url, state="empty")
    assert "No curvature was found" in page.text("#message")
    assert "CurvatureMonitor" in page.text("#message pre")
    assert not page.one(".content").is_displayed()
