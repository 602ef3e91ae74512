"""Gathers the pages of the documentation site from where they are read on GitHub.

`make site` runs this, and then MkDocs, whose pages must all lie in one directory. Links
between files stay as they are, for the directory looks like the repository; what is no
Markdown becomes a page: examples, the notebook, and the list of the benchmarks.

The API reference is docs/api.md here as well. mkdocstrings would leave a page of
directives in its place, which nobody could read on GitHub, and our docstrings hold
tables in Markdown already.
"""

import ast
import configparser
import json
import pathlib
import re
import shutil
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = ROOT / "build" / "site" / "pages"

_DIRECTORY = re.compile(r"\]\(((?:\.\./)?benchmarks)(?:/results)?/?\)")
_SCRIPT = re.compile(r"\]\(((?:\.\./)?examples/\w+)\.py\)")


def gather(directory: pathlib.Path) -> None:
    """Writes all pages, and what they show, into an empty directory."""
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        write(directory / name, linked((ROOT / name).read_text(encoding="utf-8")))
    for page in sorted((ROOT / "docs").glob("*.md")):
        write(directory / "docs" / page.name, linked(page.read_text(encoding="utf-8")))
    shutil.copytree(ROOT / "docs" / "images", directory / "docs" / "images")
    for notebook in sorted((ROOT / "docs").glob("*.ipynb")):
        text = notebook.read_text(encoding="utf-8")
        write(directory / "docs" / f"{notebook.stem}.md", from_notebook(text))
    for script in sorted((ROOT / "examples").glob("*.py")):
        text = script.read_text(encoding="utf-8")
        write(directory / "examples" / f"{script.stem}.md", from_script(script, text))
    results = directory / "benchmarks" / "results"
    shutil.copytree(ROOT / "benchmarks" / "results", results)
    write(directory / "benchmarks" / "index.md", list_of_benchmarks())


def linked(text: str) -> str:
    """Links to directories, scripts and notebooks lead to the pages made of them."""
    text = _DIRECTORY.sub(r"](\1/index.md)", text)
    text = _SCRIPT.sub(r"](\1.md)", text)
    return re.sub(r"\]\(((?:docs/)?\w+)\.ipynb\)", r"](\1.md)", text)


def from_notebook(text: str) -> str:
    """A notebook as Markdown."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "code":
            source = f"```python\n{source}\n```"
        parts.append(source)
    return linked("\n\n".join(parts)) + "\n"


def from_script(script: pathlib.Path, text: str) -> str:
    """A script as a page."""
    return f"# {script.name}\n\n```python\n{text.strip()}\n```\n"


def list_of_benchmarks() -> str:
    """What each benchmark tells, with its results."""
    lines = [
        "# Benchmarks",
        "",
        "`make bench` runs them. The results tell the machine they were measured on.",
        "",
    ]
    for script in sorted((ROOT / "benchmarks").glob("*.py")):
        doc = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
        first = doc.split("\n\n")[0].replace("\n", " ")
        results = ROOT / "benchmarks" / "results" / f"{script.stem}.json"
        name = f"`{script.stem}`"
        if results.exists():
            name = f"[{name}](results/{results.name})"
        lines.append(f"- {name}: {first}")
    return "\n".join(lines) + "\n"


def requirements() -> list[str]:
    """What builds the site: the extra `docs` of the package, without the package."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config["options.extras_require"]["docs"].split()


def write(path: pathlib.Path, text: str) -> None:
    """Writes a file, and makes its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--requirements"]:
        print("\n".join(requirements()))
    else:
        shutil.rmtree(PAGES, ignore_errors=True)
        gather(PAGES)
