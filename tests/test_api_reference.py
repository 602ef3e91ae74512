"""docs/api.md is complete, and what the docstrings say."""

import pathlib

import pytest
import scripts

import keras_curvature as kc

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def api():
    return scripts.loaded(ROOT / "docs" / "api.py")


def test_every_public_name_and_argument_is_described(api):
    assert api.missing() == []


def test_the_page_is_up_to_date(api):
    written = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert written == api.page(), "run `make api`"
    for name in kc.__all__:
        assert f"### `kc.{name}`" in written


def test_what_is_missing_is_told(api, monkeypatch):
    def bare(x):
        pass

    def silent(x, y):
        pass

    silent.__doc__ = "Says nothing about y.\n\nArgs:\n    x: a number."
    monkeypatch.setattr(api, "SECTIONS", {"All": [bare, silent]})
    found = api.missing()
    assert "bare has no docstring." in found
    assert "silent does not say what `y` is." in found
    assert not any("silent" in line and "`x`" in line for line in found)
    assert "HessianOperator is in no section of docs/api.py." in found


def test_docstrings_become_lists(api):
    doc = """First line.

    Args:
        x: a number, which
            goes on.
        **options: the rest.

    Returns:
        A float.
    """
    assert api.markdown(doc).splitlines() == [
        "First line.",
        "",
        "**Args**",
        "",
        "- `x`: a number, which",
        "  goes on.",
        "- `**options`: the rest.",
        "",
        "**Returns**",
        "",
        "A float.",
    ]
