"""Draws the pictures in docs/images, and notes what each was drawn from.

    python docs/pictures.py                 # those that are older than what they show
    python docs/pictures.py page.png        # these
    python docs/pictures.py --keep demo.png # none: it would come out as it is

`make pictures` runs the first. docs/images/drawn_from.json holds a digest of each
picture's sources, without comments, docstrings and blank lines; a test tells which ones
have changed since.
"""

import argparse
import ast
import contextlib
import hashlib
import io
import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
NOTES = IMAGES / "drawn_from.json"
EXAMPLES = (
    "demo",
    "monitor_any_model",
    "diagonal_newton",
    "edge_of_stability",
    "pruning",
    "laplace",
    "quantisation",
    "custom_train_step",
    "transformer_on_text",
)
REPORTS = ("optimizer_steps", "optimizer_seconds", "optimizer_learning_rates")
PICTURES = tuple(f"{name}.png" for name in ("page", *EXAMPLES, *REPORTS))

#: Width and height of the browser's window.
WINDOW = "1500,1240"


def sources(picture):
    """The files that decide what a picture shows, sorted."""
    name = picture.removesuffix(".png")
    if name == "page":
        static = ROOT / "keras_curvature" / "tensorboard" / "plugin" / "static"
        return sorted(static.iterdir())
    if name in REPORTS:
        results = ROOT / "benchmarks" / "results" / "optimizers"
        drawing = ROOT / "benchmarks" / "optimizers" / "report.py"
        return [drawing, *sorted(results.glob("*.json"))]
    example = ROOT / "examples" / f"{name}.py"
    # Most take no more than colours from there.
    plots = "plots.plot_" in example.read_text(encoding="utf-8")
    return [example, *([ROOT / "keras_curvature" / "plots.py"] if plots else [])]


def digest(paths):
    """A digest of what files do, which comments and docstrings do not change."""
    whole = hashlib.sha256()
    for path in paths:
        text = path.read_text(encoding="utf-8")
        whole.update((code(text) if path.suffix == ".py" else text).encode())
    return whole.hexdigest()[:16]


def code(text):
    """A Python source without docstrings, comments of their own, and blank lines."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                for i in range(body[0].lineno - 1, body[0].end_lineno):
                    lines[i] = ""
    kept = [line for line in lines if line.strip() and line.strip()[0] != "#"]
    return "\n".join(kept)


def noted():
    """What is noted of each picture."""
    return json.loads(NOTES.read_text(encoding="utf-8")) if NOTES.exists() else {}


def stale():
    """The pictures whose sources are others than those they were drawn from."""
    notes = noted()
    return [name for name in PICTURES if notes.get(name) != digest(sources(name))]


def note(pictures):
    """Notes that pictures show what their sources are now."""
    notes = noted() | {name: digest(sources(name)) for name in pictures}
    text = json.dumps(dict(sorted(notes.items())), indent=1)
    NOTES.write_text(text + "\n", encoding="utf-8")


def run(*command):
    """Runs a script of this project as its users do."""
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def draw(picture):
    """Draws one picture; those of a report come together."""
    name = picture.removesuffix(".png")
    if name == "page":
        draw_page(IMAGES / picture)
    elif name in REPORTS:
        run("benchmarks/optimizers", "--report")
    else:
        run(f"examples/{name}.py", "--picture")


def draw_page(path):
    """The page "Curvature" on the runs of the demo, in the browser of its tests."""
    sys.path.insert(0, str(ROOT / "tests"))
    from PIL import Image
    from selenium.webdriver.support.ui import WebDriverWait
    from servers import start_browser, tensorboard_server

    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        browser = start_browser(f"{directory}/chromium", WINDOW)
        if browser is None:
            sys.exit("There is no browser: install chromium and chromium-driver.")
        stack.callback(browser.quit)
        logs = pathlib.Path(directory, "logs")
        run("examples/demo.py", "--log-dir", logs)
        server = stack.enter_context(tensorboard_server(logs, load_fast="true"))
        names = sorted(path.name for path in logs.iterdir())
        for name in names:
            server.wait_for_run(f"{name}/curvature")
        browser.get(f"{server.url}?p.curvature.run={names[-1]}%2Fcurvature#curvature")
        wait = WebDriverWait(browser, 120, 0.2)
        frame = "iframe[src*='name=curvature']"
        found = wait.until(lambda b: b.find_elements("css selector", frame))
        browser.switch_to.frame(found[0])
        line = "[data-chart=layer] path.line"
        wait.until(lambda b: len(b.find_elements("css selector", line)) == len(names))
        image = Image.open(io.BytesIO(browser.get_screenshot_as_png()))
        # Few colours are on it, and a palette takes a third of the bytes.
        image.convert("RGB").quantize(192).save(path, optimize=True)


def main():
    """Draws what was asked for, or what is stale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", nargs="*", metavar="picture")
    parser.add_argument(
        "--keep", action="store_true", help="only note that they are up to date"
    )
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.pictures) - set(PICTURES))
    if unknown:
        parser.error(f"{', '.join(unknown)}: not among {', '.join(PICTURES)}")
    pictures = arguments.pictures or stale()
    reported = False
    for picture in pictures:
        report = picture.removesuffix(".png") in REPORTS
        if not arguments.keep and not (report and reported):
            print(f"Drawing {picture}", flush=True)
            draw(picture)
        reported |= report
        note([picture])


if __name__ == "__main__":
    main()
