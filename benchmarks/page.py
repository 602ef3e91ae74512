"""Seconds until the page "Curvature" has opened long runs of a deep model.

2,000 probes, 200 layers, 20 runs. The first page asks TensorBoard for what it was never
asked for; the same page again finds what its server keeps. Beside it is what pressing a
button costs, from the press until the page is laid out.
"""

import pathlib
import sys
import tempfile
import time

import numpy as np

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))

from large_logs import write_runs  # noqa: E402
from servers import start_browser, tensorboard_server  # noqa: E402

PROBES, LAYERS, RUNS = 2000, 200, 20
ROUNDS = 5
PRESSED = {
    "another axis for all curves": "#logarithmic",
    "another layer": ".row-label:not(.group):not([aria-selected=true])",
    "all groups unfolded": "#fold-all",
}


def opened(browser, url):
    """Seconds until the map and six runs' curves are drawn, and until all is read."""
    browser.get("about:blank")
    start = time.perf_counter()
    browser.get(url)
    drawn = """
        return document.querySelectorAll('.row-label').length > 0 &&
          document.querySelectorAll('[data-chart=loss] path.line').length === 6;
    """
    settled = "return document.querySelector('.content[aria-busy=false]') !== null"
    seconds = []
    for script in (drawn, settled):
        while not browser.execute_script(script):
            time.sleep(0.01)
        seconds.append(time.perf_counter() - start)
    return seconds


def pressed(browser, selector):
    """Milliseconds of a press, the middle of a few."""
    script = """
        const start = performance.now();
        document.querySelector(arguments[0]).click();
        document.body.offsetHeight;
        return performance.now() - start;
    """
    times = []
    for _ in range(ROUNDS):
        times.append(browser.execute_script(script, selector))
        time.sleep(0.3)
    return float(np.median(times))


def run():
    """One row for each way to open the page, and one for each press."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        logs = pathlib.Path(directory) / "logs"
        write_runs(logs, RUNS, PROBES, LAYERS)
        first, again = [], []
        for number in range(ROUNDS):
            # With all that is installed, as users start it.
            with tensorboard_server(logs, load_fast="true", without=()) as server:
                server.wait_for_steps([10 * (PROBES - 1)] * RUNS)
                browser = start_browser(pathlib.Path(directory) / f"profile{number}")
                if browser is None:
                    raise RuntimeError(
                        "No browser was found. Install chromium and chromium-driver."
                    )
                url = f"{server.url}data/plugin_entry.html?name=curvature"
                try:
                    first.append(opened(browser, url))
                    again.append(opened(browser, url))
                    if number == ROUNDS - 1:
                        presses = {
                            what: pressed(browser, selector)
                            for what, selector in reversed(PRESSED.items())
                        }
                finally:
                    browser.quit()
    for what, found in (("first time", first), ("again", again)):
        drawn, settled = np.median(found, axis=0)
        times = {"drawn_s": float(drawn), "settled_s": float(settled)}
        rows.append({"what": f"opened, {what}", **times, "press_ms": None})
    nothing = {"drawn_s": None, "settled_s": None}
    rows += [{"what": k, **nothing, "press_ms": ms} for k, ms in presses.items()]
    return rows
