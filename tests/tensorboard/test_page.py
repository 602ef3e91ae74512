"""The page "Curvature" in a real browser, on a real TensorBoard."""

import csv
import io
import math
import re
import shutil
import time
import urllib.request

import pytest
from patience import PATIENCE
from records import LAYERS, MODE, synthetic_record

from keras_curvature.tensorboard.writer import CurvatureWriter

selenium = pytest.importorskip("selenium", reason="selenium drives the browser")

from selenium import webdriver  # noqa: E402
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

STEPS = tuple(range(0, 1000, 100))
RUNS = {"newton": 0.1, "sgd": 0.02}
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1500,1300",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no browser: install chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in FLAGS:
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield started
    started.quit()


def run_of(name, step):
    seed = list(RUNS).index(name)
    record = synthetic_record(step, seed, learning_rate=RUNS[name])
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


class Page:
    """What a reader sees, and does."""

    def __init__(self, browser):
        self.browser = browser

    def open(self, url, state="ready"):
        self.browser.switch_to.default_content()
        self.browser.get("about:blank")
        self.browser.get(url + "#curvature")
        self.enter()
        self.until(lambda: self.one("#page").get_attribute("data-state") == state)
        return self

    def enter(self):
        frame = self.until(lambda: self.all("iframe[src*='name=curvature']"))[0]
        self.browser.switch_to.frame(frame)
        self.until(lambda: self.all("#page"))

    def until(self, condition):
        wait = WebDriverWait(
            self.browser, PATIENCE, 0.1, [StaleElementReferenceException]
        )
        return wait.until(lambda _: condition())

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector):
        return [element.text for element in self.all(selector)]

    def text(self, selector):
        # Steps are grouped by thin spaces.
        return self.one(selector).text.replace("\u2009", "")

    def point_at_cell(self, layer, step):
        """Moves the pointer to the middle of a cell; returns the tooltip's lines."""
        canvas = self.one("#heat-map canvas")
        box = canvas.rect
        across = (STEPS.index(step) + 0.5) / len(STEPS) - 0.5
        down = (LAYERS.index(layer) + 0.5) / len(LAYERS) - 0.5
        ActionChains(self.browser).move_to_element_with_offset(
            canvas, round(across * box["width"]), round(down * box["height"])
        ).perform()
        self.until(lambda: layer in self.text("#tooltip"))
        return self.text("#tooltip").split("\n")

    def lightness(self, layer, step):
        """Of a cell's colour: the sum of red, green and blue."""
        return self.browser.execute_script(
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

    def lines(self, chart):
        return [
            (line.get_attribute("data-run"), line.get_attribute("data-name"))
            for line in self.all(f"[data-chart={chart}] path.line")
        ]


@pytest.fixture
def page(browser, server):
    opened = Page(browser).open(server.url)
    yield opened
    browser.switch_to.default_content()
    severe = [e for e in browser.get_log("browser") if e["level"] == "SEVERE"]
    assert severe == []


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
        tile.get_attribute("data-figure"): tile.text.split("\n")[1]
        for tile in page.all(".tile")
    }
    assert set(tiles) == {
        "loss",
        "hessian_trace",
        "hessian_frobenius_norm",
        "hessian_max_eigenvalue",
        "hessian_preconditioned_max_eigenvalue",
        "stability_threshold",
        "num_matvecs",
        "overhead",
    }
    assert tiles["overhead"] == "4 %"
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
        name, at, value = page.point_at_cell(layer, step)
        assert (name, at) == (layer, f"step {step}")
        shown, error = value.removeprefix("Mean: ").split(" ± ")
        assert float(shown) == pytest.approx(part["diagonal_mean"], rel=0.01)
        assert float(error) == pytest.approx(
            part["diagonal_mean_standard_error"], rel=0.06
        )
    cells = [(layer, step) for layer in LAYERS for step in (0, 500, 900)]
    by_lightness = sorted(cells, key=lambda cell: page.lightness(*cell))
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
        "Largest eigenvalue against 2 / learning rate",
    ]


def test_choosing_a_figure(page):
    page.one("input[value=negative_share]").click()
    assert "Share of negative entries" in page.text("#heat-map h3")
    assert page.texts(".legend-marks span")[0] == "0 %"
    share = run_of("newton", 200)["layers"][1]["negative_share"]
    shown = page.point_at_cell("conv2", 200)[2].removeprefix("Share negative: ")
    assert float(shown.removesuffix(" %")) == pytest.approx(100 * share, abs=0.06)
    assert "has the largest share of negative curvature" in page.text("#answer")
    page.one("input[value=diagonal_max]").click()
    highest = run_of("newton", 200)["layers"][1]["diagonal_max"]
    shown = float(page.point_at_cell("conv2", 200)[2].removeprefix("Maximum: "))
    assert shown == pytest.approx(highest, rel=0.006)


def test_curves_of_the_selected_layer_compare_runs(page):
    page.all(".row-label")[2].click()
    assert page.text("[data-chart=layer] h3") == "Mean · block/attention"
    both = [("newton/curvature", "newton"), ("sgd/curvature", "sgd")]
    assert page.lines("layer") == both
    assert page.lines("trace") == page.lines("frobenius_norm") == both
    assert len(page.all("[data-chart=layer] path.band")) == 2
    page.one("#bands").click()
    assert page.all("path.band") == []
    page.one("[data-run='sgd/curvature'] input").click()
    assert page.lines("layer") == both[:1]
    # The other run goes into the heat map when its name is chosen.
    page.all(".run-name")[1].click()
    assert page.lines("layer") == both
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
    ActionChains(page.browser).move_to_element(plot).perform()
    page.until(lambda: "step" in page.text("#tooltip"))
    heading, line, _ = page.text("#tooltip").split("\n")
    record = run_of("newton", int(heading.removeprefix("step ")))
    seen, limit = "hessian_preconditioned_max_eigenvalue", record["stability_threshold"]
    shown = [float(part.removesuffix(" %")) for part in line[8:].split(" ± ")]
    expected = [100 * record[key] / limit for key in (seen, f"{seen}_error")]
    assert shown == pytest.approx(expected, rel=0.05)


def test_eigenvalue_has_the_limit_of_plain_gradient_descent(page, log_dir):
    """The limit belongs to the Hessian itself only without a preconditioner."""
    assert page.all("[data-chart=max_eigenvalue] path.line[stroke-dasharray]") == []
    with CurvatureWriter(log_dir / "plain") as writer:
        for step in STEPS:
            record = synthetic_record(step, seed=5)
            if step == STEPS[0]:
                record["hessian_max_eigenvalue"] = -1.0
            writer.write({k: v for k, v in record.items() if "preconditioned" not in k})

    def reloaded():
        page.browser.switch_to.default_content()
        page.one("app-header-reload button").click()
        page.enter()
        time.sleep(0.5)
        return ("plain/curvature", "plain") in page.lines("max_eigenvalue")

    page.until(reloaded)
    dashed = page.all("[data-chart=max_eigenvalue] path.line[stroke-dasharray]")
    assert [line.get_attribute("data-name") for line in dashed] == [
        "plain: 2 / learning rate"
    ]
    # A negative first guess leaves the logarithmic axis, not the other way round.
    points = {
        line.get_attribute("data-name"): line.get_attribute("d").count(",")
        for line in page.all("[data-chart=max_eigenvalue] path.line")
    }
    assert points["plain"] == len(STEPS) - 1
    assert points["sgd"] == points["plain: 2 / learning rate"] == len(STEPS)
    shutil.rmtree(log_dir / "plain")


def test_hovering_a_curve_names_every_run(page):
    plot = page.one("[data-chart=trace] .plot")
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
    assert len(page.all(".cursor")) == 6


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


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_follows_the_theme(page, server, theme):
    features = [{"name": "prefers-color-scheme", "value": theme}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.open(server.url)
    page.until(lambda: page.one("html").get_attribute("data-theme") == theme)
    ground = page.one("body").value_of_css_property("background-color")
    red = int(ground.split("(")[1].split(",")[0])
    assert red < 80 if theme == "dark" else red > 200


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
