"""The documentation site has every page, and its links lead to pages of it."""

import pathlib
import re

import pytest
import scripts

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def make_site():
    return scripts.loaded(ROOT / "docs" / "make_site.py")


@pytest.fixture(scope="module")
def pages(make_site, tmp_path_factory):
    directory = tmp_path_factory.mktemp("pages")
    make_site.gather(directory)
    return directory


def test_every_page_is_in_the_navigation(pages):
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ +- [^:\n]+: (\S+\.md)$", config, re.MULTILINE)
    there = [path.relative_to(pages).as_posix() for path in pages.rglob("*.md")]
    assert sorted(listed) == sorted(p for p in there if not p.startswith("examples/"))
    sources = [p for kind in ("*.md", "*.ipynb") for p in (ROOT / "docs").glob(kind)]
    assert {f"docs/{path.stem}.md" for path in sources} <= set(listed)


def test_links_lead_to_files_of_the_site(pages):
    found = 0
    for page in pages.rglob("*.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target or target.startswith("#"):
                continue
            path = page.parent / target.partition("#")[0]
            assert path.is_file(), f"{page.relative_to(pages)}: {target}"
            found += 1
    assert found > 50


def test_what_is_no_markdown_becomes_a_page(make_site, pages):
    tour = (pages / "docs" / "tour.md").read_text("utf-8")
    assert tour.startswith("# ") and "```python\nimport" in tour
    assert "```python" in (pages / "examples" / "demo.md").read_text("utf-8")
    listed = (pages / "benchmarks" / "index.md").read_text("utf-8")
    assert "[`exact_cost`](results/exact_cost.json): " in listed
    assert any(one.startswith("mkdocs-material") for one in make_site.requirements())
