"""What an installed wheel must do, away from the source tree.

Run by `make wheel` with the Python of an environment that holds the wheel with its
dependencies and nothing else.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import re
import runpy
import sys
import tempfile
from typing import NoReturn

ROOT = pathlib.Path(__file__).resolve().parent.parent
STATIC = "keras_curvature/tensorboard/plugin/static"


def fail(message: str) -> NoReturn:
    """Ends the check with a reason."""
    sys.exit(f"The wheel is not in order: {message}")


def readme_fit_snippet() -> str:
    """The first Python block of the README that trains a model."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    for block in blocks:
        if ".fit(" in block:
            return block
    fail("README.md has no ```python block that calls `.fit(`.")


def main() -> None:
    """Imports the package, looks for its files, runs the README's snippet."""
    # The script's own directory is on the path; the source tree must not be.
    sys.path[:] = [p for p in sys.path if pathlib.Path(p).resolve() != ROOT]
    import keras_curvature

    # What a newcomer does not have must not be what makes the example work.
    extras = [
        name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name)
    ]
    if extras:
        fail(f"{extras} are installed, which no dependency of the package asks for.")

    place = pathlib.Path(keras_curvature.__file__).resolve()
    if pathlib.Path(sys.prefix).resolve() not in place.parents:
        fail(f"keras_curvature was imported from {place}, not from {sys.prefix}.")
    installed = importlib.metadata.version("keras_curvature")
    if installed != keras_curvature.__version__:
        fail(f"the metadata says {installed}, the code {keras_curvature.__version__}.")

    wanted = sorted(path.name for path in (ROOT / STATIC).iterdir())
    shipped = sorted(path.name for path in (place.parent.parent / STATIC).iterdir())
    if wanted != shipped:
        fail(f"the plugin's files are {shipped}, and should be {wanted}.")
    plugins = importlib.metadata.entry_points(group="tensorboard_plugins")
    if "curvature" not in plugins.names:
        fail("TensorBoard would not find the plugin: no entry point.")
    plugins["curvature"].load()

    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        snippet = pathlib.Path(directory, "snippet.py")
        snippet.write_text(readme_fit_snippet())
        runpy.run_path(str(snippet), run_name="__main__")
        os.chdir(ROOT)
    print(f"keras_curvature {installed}: the wheel works.")


if __name__ == "__main__":
    main()
