"""The notebook runs from top to bottom, and so does the code of the recipes."""

import json
import pathlib
import re

import keras
import numpy as np
import pytest

import keras_curvature as kc

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"
RECIPES = (DOCS / "recipes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", RECIPES, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cells():
    notebook = json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return [
        "".join(cell["source"])
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]


def test_the_notebook_runs(elsewhere, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    names = {"__name__": "tour"}
    for number, source in enumerate(cells(), start=1):
        exec(compile(source, f"tour.ipynb, cell {number}", "exec"), names)
    matplotlib.pyplot.close("all")
    said = capsys.readouterr().out
    assert "SGD turns unstable at 3.8 / λ" in said
    assert "Curvature of the training loss" in said
    # As the text says: the loss falls, and the valley gets several times as narrow.
    probes = names["monitor"].history
    assert names["history"].history["loss"][-1] < 0.2
    eigenvalues = [probe["hessian_max_eigenvalue"] for probe in probes]
    assert max(eigenvalues) > 3 * eigenvalues[0]
    assert min(x.min() for x in names["density"].nodes) < 0
    assert list(elsewhere.glob("logs/tour/curvature/events.*"))


def test_the_notebook_holds_no_output():
    notebook = json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count")


def test_the_recipes_run(elsewhere):
    rng = np.random.default_rng(0)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    data = {"x": rng.standard_normal((96, 4)), "y": rng.integers(0, 3, 96)}
    names = {"keras": keras, "kc": kc, "model": model, **data}
    for number, block in enumerate(BLOCKS, start=1):
        exec(compile(block, f"recipes.md, block {number}", "exec"), names)
    probes = names["monitor"].history
    assert sorted(names["logged"]) == sorted({probe["step"] for probe in probes})
    assert "hessian_trace" in names["logged"][0]


def test_the_logs_have_the_keys_that_the_recipes_name():
    keys = set(re.findall(r"^\| `(hessian_\w+)`(?:, `(\w+)`)?", RECIPES, re.MULTILINE))
    named = {key for pair in keys for key in pair if key}
    monitor = kc.CurvatureMonitor((np.ones((2, 2)), np.ones(2)))
    logs = {}
    monitor.on_epoch_end(0, logs)
    assert named == set(logs)


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_lead_somewhere(page):
    """To files that exist, and to headings that they have."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = DOCS / file if file else DOCS / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(
                r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE
            )
            slugs = {
                re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings
            }
            assert anchor in slugs, target
