"""Makes docs/images/page.png: the page "Curvature" on the runs of examples/demo.py.

    python docs/page.py          # trains, shows, takes the picture; about two minutes
    python docs/page.py LOGS     # of runs that are there already

Needs Chromium, its driver and selenium, as the tests of the page do. The picture holds
a digest of what it shows; a test tells when that has changed since.
"""

import hashlib
import io
import pathlib
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "page.png"
STATIC = ROOT / "keras_curvature" / "tensorboard" / "plugin" / "static"
#: Where the digest is in the picture.
KEY = "made-of"


def digest():
    """Of everything that decides how the page looks."""
    content = hashlib.sha256()
    for path in sorted(STATIC.iterdir()):
        content.update(path.read_bytes())
    return content.hexdigest()[:16]


def train(directory):
    """The runs of the demo."""
    sys.path.insert(0, str(ROOT / "examples"))
    import demo

    for name, make_optimizer in demo.OPTIMIZERS.items():
        demo.train(make_optimizer(), directory / name, epochs=8)
        print(f"  {name} has trained", flush=True)


def take(logs, profile):
    """The page as PNG."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait
    from servers import start_browser, tensorboard_server

    browser = start_browser(profile, "1500,1240")
    if browser is None:
        sys.exit("Install chromium and chromium-driver: no picture without a browser.")
    try:
        with tensorboard_server(logs, load_fast="true") as server:
            for name in sorted(path.name for path in logs.iterdir()):
                server.wait_for_run(f"{name}/curvature")
            browser.get(f"{server.url}?p.curvature.run=SGD%2Fcurvature#curvature")
            wait = WebDriverWait(browser, 60, 0.2)
            frame = "iframe[src*='name=curvature']"
            found = wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, frame))
            browser.switch_to.frame(found[0])
            line = "[data-chart=layer] path.line"
            wait.until(lambda b: len(b.find_elements(By.CSS_SELECTOR, line)) == 3)
            time.sleep(1)
            return browser.get_screenshot_as_png()
    finally:
        browser.quit()


def main():
    """Trains if need be, and writes the picture."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    with tempfile.TemporaryDirectory() as directory:
        directory = pathlib.Path(directory)
        logs = directory / "logs"
        if len(sys.argv) > 1:
            logs = pathlib.Path(sys.argv[1])
        else:
            train(logs)
        image = Image.open(io.BytesIO(take(logs, directory / "profile")))
        about = PngInfo()
        about.add_text(KEY, digest())
        # Few colours are on it, and a palette takes a third of the bytes.
        image.convert("RGB").quantize(192).save(PICTURE, pnginfo=about, optimize=True)
    print(f"The picture is in {PICTURE}.")


if __name__ == "__main__":
    main()
