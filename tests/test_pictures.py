"""The pictures of the docs are no older than what they show."""

import pathlib

import pytest
import scripts

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def pictures():
    return scripts.loaded(ROOT / "docs" / "pictures.py")


def test_every_picture_is_known_and_up_to_date(pictures):
    drawn = {path.name for path in (ROOT / "docs" / "images").glob("*.png")}
    assert drawn == set(pictures.PICTURES) == set(pictures.noted())
    assert pictures.stale() == [], "run `make pictures`"


def test_sources_are_what_a_picture_shows(pictures):
    def names(picture):
        return {path.name for path in pictures.sources(picture)}

    assert {"index.js", "curvature.css"} <= names("page.png")
    assert names("demo.png") == {"demo.py"}
    assert names("pruning.png") == {"pruning.py"}
    assert names("monitor_any_model.png") == {"monitor_any_model.py", "plots.py"}
    assert {"report.py", "cnn.json"} <= names("optimizer_steps.png")


def test_code_counts_and_words_about_it_do_not(pictures, tmp_path):
    source = '"""Doc."""\n\nx = 1  # said\n\n\ndef f():\n    """Doc."""\n    return 2\n'
    path = tmp_path / "a.py"

    def digest(text):
        path.write_text(text)
        return pictures.digest([path])

    same = source.replace("Doc.", "Other\nwords.").replace("def", "# Why.\ndef")
    assert digest(source) == digest(same)
    assert digest(source) != digest(source.replace("2", "3"))
    assert digest(source) != digest(source + "y = 'text'\n")


def test_what_was_drawn_is_noted(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "NOTES", tmp_path / "notes.json")
    assert pictures.stale() == list(pictures.PICTURES)
    drawn = []
    monkeypatch.setattr(pictures, "draw", drawn.append)
    monkeypatch.setattr("sys.argv", ["pictures.py", "demo.png", "page.png"])
    pictures.main()
    assert drawn == ["demo.png", "page.png"]
    monkeypatch.setattr("sys.argv", ["pictures.py", "--keep", "laplace.png"])
    pictures.main()
    assert drawn == ["demo.png", "page.png"]
    assert not {"demo.png", "page.png", "laplace.png"} & set(pictures.stale())
    # The pictures of the report are drawn together, once.
    monkeypatch.setattr("sys.argv", ["pictures.py"])
    pictures.main()
    assert len([name for name in drawn if name.startswith("optimizer")]) == 1
    assert pictures.stale() == []
