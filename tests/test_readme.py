"""Every Python block of the README runs, one after the other as a reader would."""

import pathlib
import re

import keras
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the README's snippets have defined after the last one."""
    names = {"__name__": "readme"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        keras.utils.set_random_seed(0)
        for number, snippet in enumerate(SNIPPETS, start=1):
            exec(compile(snippet, f"README.md, snippet {number}", "exec"), names)
        names["event files"] = list(pathlib.Path("logs").glob("**/events.*"))
    return names


def test_fit_snippet_trains_and_logs(names):
    losses = names["history"].history["loss"]
    assert losses[-1] < 0.3 < 0.6 < losses[0]
    assert len(names["history"].history["hessian_trace"]) == 16
    assert names["monitor"].history[0]["step"] == 0
    assert [str(p.parent) for p in names["event files"]] == ["logs/spiral/curvature"]


def test_fit_snippet_shows_what_the_text_says(names):
    """The eigenvalue gets several times as large, near 2 / learning rate."""
    probes = names["monitor"].history
    eigenvalues = [probe["hessian_max_eigenvalue"] for probe in probes]
    assert max(eigenvalues) > 3 * eigenvalues[0]
    assert 0.5 < max(eigenvalues) / probes[0]["two_over_learning_rate"] < 1.5


def test_fit_snippet_needs_nothing_but_what_is_installed_with_the_package():
    (snippet,) = [s for s in SNIPPETS if ".fit(" in s]
    imported = set(re.findall(r"^(?:import|from) (\w+)", snippet, re.MULTILINE))
    assert imported == {"keras", "numpy", "keras_curvature"}


def test_fit_snippet_has_ten_lines_of_its_own():
    """Ten statements besides the imports: what makes the package easy to try."""
    (snippet,) = [s for s in SNIPPETS if ".fit(" in s]
    lines = re.findall(r"^(?!import|from|#)\S.*", snippet, re.MULTILINE)
    assert len(lines) <= 10


def test_figures_are_estimates(names):
    assert names["norm"].relative_standard_error <= 0.05
    assert len(names["diagonal"].value) == 6
    assert names["trace"].value > 0


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="how far the figure lags behind depends on the weights one starts from",
)
def test_largest_eigenvalue_agrees_with_the_monitor(names):
    """The operator has the probe data of the monitor, at the weights it saw last."""
    record = names["monitor"].history[-1]
    assert record["step"] == 512 == int(names["model"].optimizer.iterations)
    np.testing.assert_allclose(
        names["eigenvalues"].max(), record["hessian_max_eigenvalue"], rtol=0.5
    )


def test_matrix_of_a_function(names):
    expected = [[6, 0, 2], [0, 0, 0], [2, 0, 0]]
    np.testing.assert_allclose(names["matrix"], expected, atol=1e-6)
    np.testing.assert_allclose(names["by_parameter"]["a"], [6, 0], atol=1e-6)


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    for target in targets:
        assert "://" in target or (ROOT / target).exists(), target


def test_no_private_names():
    for snippet in SNIPPETS:
        assert not re.search(r"\bkc\._|keras_curvature\._", snippet)
