"""What `import keras_curvature` does, and what it leaves for later."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

import keras_curvature as kc

SOURCE = pathlib.Path(kc.__file__).read_text()

#: Imports of these fail.
WITHOUT = "import sys; sys.modules.update(dict.fromkeys({missing}));"


def run(code, backend="tensorflow", missing=()):
    """Runs code in a fresh process, without some packages; returns what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(missing=missing) + code],
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_name_is_there_and_listed():
    for name in kc.__all__:
        assert getattr(kc, name).__module__.startswith("keras_curvature.")
    assert set(kc.__all__) | {"__version__"} <= set(dir(kc))
    with pytest.raises(AttributeError, match="no attribute 'hessian_trase'"):
        kc.hessian_trase  # noqa: B018


def test_the_rooms_are_attributes_of_the_package():
    names = "estimators", "layerwise", "operators", "optimizers"
    asked = ", ".join(f"kc.{name}.__name__" for name in names)
    expected = tuple(f"keras_curvature.{name}" for name in names)
    assert run(f"import keras_curvature as kc; print(({asked}))") == f"{expected}\n"


def test_readers_of_the_source_see_the_same_names():
    """Editors and type checkers read the imports that do not run."""
    (block,) = [n for n in ast.parse(SOURCE).body if isinstance(n, ast.If)][:1]
    seen = {
        alias.name: node.module.removeprefix("keras_curvature.")
        for node in block.body
        for alias in node.names
    }
    assert seen == kc._ROOMS
    assert sorted(seen) == sorted(kc.__all__)


def test_the_server_loads_the_page_and_no_framework():
    # As TensorBoard does it, whose module with the entry points is loaded then.
    code = (
        "import tensorboard.default, keras_curvature.tensorboard.plugin.plugin;"
        "print({'keras', 'tensorflow', 'jax', 'torch'} & set(sys.modules),"
        "sorted(m for m in sys.modules if m.startswith('keras_curvature')))"
    )
    page = "keras_curvature.tensorboard"
    names = ["groups", "plugin", "plugin.plugin", "plugin.reading", "tags"]
    expected = ["keras_curvature", page, *(f"{page}.{name}" for name in names)]
    assert run(code) == f"set() {expected}\n"


@pytest.mark.parametrize(
    "backend, missing",
    [("openvino", ()), ("jax", ("keras", "tensorflow", "jax", "torch"))],
    ids=["backend_that_is_not_ours", "no_keras"],
)
def test_the_page_loads_whatever_is_installed(backend, missing):
    # TensorBoard loads the plugins of everything that is installed, and an import that
    # fails ends the server: for all who train with another backend than ours, say.
    code = (
        "import keras_curvature.tensorboard.plugin.plugin, keras_curvature as kc\n"
        "try: kc.hessian_trace\n"
        "except ImportError as error: print(error)"
    )
    assert run(code, backend, missing).startswith("keras_curvature.hessian_trace: ")


def test_keras_knows_the_optimizer_of_a_saved_model():
    """Whichever is imported first, and though none of the names is used."""
    code = (
        "import keras_curvature, keras;"
        "print(keras.saving.get_registered_object('keras_curvature>DiagonalNewton'))"
    )
    assert "DiagonalNewton" in run(code, missing=("tensorboard",))
