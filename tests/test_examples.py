"""Every example runs, as a script, from anywhere.

The demo runs in a process of its own, as users start it. The others run in this one:
to load the frameworks takes longer than some of what they do.
"""

import ast
import importlib
import os
import pathlib
import re
import runpy
import subprocess
import sys

import keras
import pytest
from patience import PATIENCE

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What the examples share, and no example itself.
SHARED = {"pictures.py"}
# What is tested with what it shows.
ELSEWHERE = {"distributed_torch.py"}
# Each runs on one backend: TensorFlow, or where it is done in half of the time.
ON_TORCH = {"diagonal_newton.py"}
BACKEND = keras.backend.backend()
EXAMPLES = {
    "demo.py": ("--epochs", "1", "--log-dir", "logs", "--picture", "demo.png"),
    "monitor_any_model.py": ("--picture", "picture.png"),
    "diagonal_newton.py": ("--picture", "picture.png"),
    "edge_of_stability.py": ("--picture", "picture.png"),
    "pruning.py": ("--picture", "picture.png"),
    "laplace.py": ("--picture", "picture.png"),
    "quantisation.py": ("--picture", "picture.png"),
    "custom_train_step.py": ("--picture", "picture.png"),
    "transformer_on_text.py": ("--picture", "picture.png"),
}
# What each prints about what it found.
FINDINGS = {
    "monitor_any_model.py": r"accuracy on the test data: 9\d",
    "diagonal_newton.py": r"as measured +DiagonalNewton +0.6 +360 .* 0\.0[345]",
    "pruning.py": r" 50% pruned +0\.\d+ +9\d",
    "laplace.py": r"\n  Laplace +9\d\.\d% +[67]\d",
    "quantisation.py": r"correlation of logarithms: 0\.9",
    "custom_train_step.py": r"\n  decoder/pixels +\d",
    "transformer_on_text.py": r" \d+0 +\d\.\d+ +\d+\.\d +\d+%\n(.*\n)+  norm3 +96 ",
    "edge_of_stability.py": r"λ₀ = [23]\.\d+: stable",
}


def test_every_example_is_tested():
    assert {p.name for p in (ROOT / "examples").glob("*.py")} == {
        *EXAMPLES,
        *SHARED,
        *ELSEWHERE,
    }


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    if BACKEND != "tensorflow":
        pytest.skip("Seen on TensorFlow.")
    directory = tmp_path_factory.mktemp("demo")
    for name in ("SGD", "Adam"):  # Left by an earlier demo, and by somebody else.
        (directory / "logs" / name / "curvature").mkdir(parents=True)
    old = directory / "logs" / "SGD" / "curvature" / "events.out.tfevents.1.old"
    kept = directory / "logs" / "Adam" / "notes.txt"
    old.touch()
    kept.touch()
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), *EXAMPLES["demo.py"]],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert kept.exists() and not old.exists()
    return directory, result.stdout, result.stderr


def test_demo_prints_what_happened(demo):
    _, output, errors = demo
    assert "Warning" not in errors
    for name in ("SGD", "Adam", "DiagonalNewton", "conv1", "conv2", "logits"):
        assert f"\n  {name} " in output
    assert "tensorboard --logdir logs\n" in output
    assert "nan" not in output
    assert max(map(len, output.splitlines())) <= 90


def test_demo_writes_event_files(demo):
    files = [p.relative_to(demo[0]) for p in demo[0].glob("logs/**/events.*")]
    names = ["Adam", "DiagonalNewton", "SGD"]
    assert sorted(str(f.parent) for f in files) == [
        f"logs/{n}/curvature" for n in names
    ]


def test_demo_draws_a_picture(demo):
    from matplotlib import image

    assert image.imread(demo[0] / "demo.png").std() > 0.05


@pytest.mark.parametrize(
    "name",
    [n for n in FINDINGS if BACKEND == ("torch" if n in ON_TORCH else "tensorflow")],
)
def test_example_finds_what_it_says_and_draws_it(
    name, tmp_path, monkeypatch, capsys, recwarn
):
    from matplotlib import image

    # A script finds what lies beside it, and its own arguments.
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(sys, "argv", [name, *EXAMPLES[name]])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    output = capsys.readouterr().out
    shown = [
        str(w.message) for w in recwarn if w.category in (UserWarning, RuntimeWarning)
    ]
    # How long a probe takes beside a step is a matter of what else the machine does.
    assert [m for m in shown if not m.startswith("Probing the curvature takes")] == []
    assert re.search(FINDINGS[name], output), output
    assert "nan" not in output
    assert max(map(len, output.splitlines())) <= 90 + len(str(ROOT))
    assert image.imread(tmp_path / "picture.png").std() > 0.05


def test_a_text_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """In a line, not in a traceback; and no network is asked for one."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    example = importlib.import_module("transformer_on_text")
    with pytest.raises(SystemExit, match=r"nowhere.txt cannot be read as a text"):
        example.load_text(tmp_path / "nowhere.txt")
    short = tmp_path / "short.txt"
    short.write_text("Speak, speak.")
    with pytest.raises(SystemExit, match=r"13 characters, too few"):
        example.load_text(short)
    short.write_text("Speak, speak. " * 40)
    x, y, num_characters = example.load_text(short)
    assert num_characters == len(set("Speak, speak. "))
    assert x.shape == y.shape == (example.STEPS * example.BATCH, example.LENGTH)
    assert 30_000 < example.EXCERPT.stat().st_size < 100_000


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - {"demo.py"}))
def test_committed_picture_is_small_and_in_the_gallery(name):
    picture = ROOT / "docs" / "images" / name.replace(".py", ".png")
    assert picture.stat().st_size < 120_000
    gallery = (ROOT / "docs" / "gallery.md").read_text()
    assert f"](images/{picture.name})" in gallery
    assert f"](../examples/{name})" in gallery


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_example_opens_with_formula_and_symbols(name):
    doc = ast.get_docstring(ast.parse((ROOT / "examples" / name).read_text()))
    for part in ("What you learn:", "| symbol | meaning |", "Usage:", "--picture"):
        assert part in doc
