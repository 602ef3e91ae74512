"""A real TensorBoard, and a browser in front of it."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request

from patience import PATIENCE

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
)


class Server:
    """A running TensorBoard, asked over HTTP."""

    def __init__(self, url, pid):
        self.url = url
        self.pid = pid

    def get(self, route, **query):
        """The body of a response, parsed if it is JSON."""
        address = f"{self.url}data/{route}"
        if query:
            address += "?" + urllib.parse.urlencode(query)
        with urllib.request.urlopen(address, timeout=PATIENCE) as response:
            body = response.read()
            kind = response.headers["Content-Type"]
        return json.loads(body) if kind.startswith("application/json") else body

    def wait_for_run(self, run, shown=True):
        """Returns when the server has read something of a run, or forgotten it."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if (run in self.get("runs")) == shown:
                return
            time.sleep(0.2)
        raise TimeoutError(f"Waited for {run!r}; TensorBoard has {self.get('runs')}")

    def wait_for_steps(self, steps):
        """Returns when the page's runs, sorted by name, have been read up to steps."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            runs = self.get("plugin/curvature/runs")["runs"]
            if [run["last_step"] for run in runs] == steps:
                return
            time.sleep(0.2)
        raise TimeoutError(f"Waited for steps {steps}; the page has {runs}")


@contextlib.contextmanager
def tensorboard_server(log_dir, load_fast, without=("tensorflow", "keras")):
    """Starts TensorBoard on a directory.

    Args:
        log_dir: What to show.
        load_fast: "true" or "false": which of its two loaders reads the files.
        without: Packages that are as if they were not installed. TensorFlow takes ten
            seconds to load, and neither TensorBoard nor the page needs it.
    """
    hidden = dict.fromkeys(without)
    start = f"import sys; sys.modules.update({hidden}); import tensorboard.main as main"
    command = [sys.executable, "-c", f"{start}; main.run_main()"]
    command += ["--logdir", str(log_dir)]
    command += ["--port", "0", "--reload_interval", "1", "--load_fast", load_fast]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""},
    )
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            address = re.search(r"(http://localhost:\d+/)", line)
            if address:
                break
        else:
            raise RuntimeError("TensorBoard did not start:\n" + "".join(said))
        # What it says later must not fill the pipe.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield Server(address[1], process.pid)
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def start_browser(profile, size="1500,1300"):
    """Chromium without a window; None where it or its driver is not installed.

    Args:
        profile: An empty directory.
        size: Width and height of the window.
    """
    from selenium import webdriver

    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        return None
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--window-size={size}", f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(driver))
