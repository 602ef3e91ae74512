"""The imports go one way, as docs/architecture.md says.

The rules below are read against the source, not against loaded modules, so that an
import inside a function counts as well.
"""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "keras_curvature"

# Which rooms a room may import, besides itself.
ROOMS = {
    "backend": set(),
    "keras_internals": set(),
    "progress": set(),
    "parameters": {"backend"},
    "axes": {"backend"},
    "selection": set(),
    "data_sets": set(),
    "data": {"backend", "data_sets"},
    "loss": {"backend", "data_sets", "keras_internals", "parameters", "selection"},
    "evaluation": {"backend", "data", "data_sets", "loss"},
    "memory": {"backend", "data", "evaluation"},
    "operators": {
        "axes",
        "backend",
        "data",
        "data_sets",
        "evaluation",
        "loss",
        "memory",
        "parameters",
        "selection",
    },
    "gradients": {"backend", "evaluation"},
    "layerwise": {
        "axes",
        "backend",
        "data_sets",
        "evaluation",
        "keras_internals",
        "loss",
        "parameters",
    },
    "estimators": {"backend"},
    "record": {"backend"},
    "split_diagonal": {
        "axes",
        "backend",
        "estimators",
        "evaluation",
        "layerwise",
        "operators",
        "progress",
    },
    "deflated": {"estimators", "operators", "progress"},
    "diagonal": {
        "axes",
        "deflated",
        "estimators",
        "evaluation",
        "layerwise",
        "loss",
        "operators",
        "progress",
        "split_diagonal",
    },
    "activations": {
        "analysis",
        "diagonal",
        "estimators",
        "layerwise",
        "loss",
        "operators",
        "progress",
    },
    "analysis": {
        "axes",
        "backend",
        "deflated",
        "diagonal",
        "estimators",
        "operators",
        "progress",
    },
    "preconditioning": {
        "axes",
        "backend",
        "keras_internals",
        "operators",
        "parameters",
    },
    "critical": {
        "analysis",
        "backend",
        "loss",
        "operators",
        "parameters",
        "preconditioning",
    },
    "spectrum": {"analysis", "estimators", "progress"},
    "stability": {"preconditioning"},
    "learning_rate": {
        "analysis",
        "estimators",
        "operators",
        "preconditioning",
        "progress",
        "stability",
        "text",
    },
    "text": set(),
    "table": {"text"},
    "report": {
        "analysis",
        "deflated",
        "diagonal",
        "learning_rate",
        "progress",
        "record",
        "table",
        "text",
    },
    "plots": set(),
    "optimizers": set(),
    "tensorboard": set(),
    "callbacks": {
        "analysis",
        "axes",
        "backend",
        "critical",
        "data",
        "diagonal",
        "estimators",
        "gradients",
        "keras_internals",
        "operators",
        "parameters",
        "preconditioning",
        "record",
        "stability",
        "tensorboard",
    },
}

# What a room may import from outside the package and the standard library. A room
# that is not named may import Keras, NumPy and SciPy.
OUTSIDE = {
    "backend.__init__": {"keras"},
    "backend.contract": set(),
    "backend.ctc": {"keras"},
    "backend.host": set(),
    "backend.nested": {"jax", "keras", "optree"},
    "backend.tensorflow*": {"keras", "numpy", "tensorflow"},
    "backend.jax*": {"jax", "keras", "numpy"},
    "backend.torch*": {"keras", "torch"},
    "estimators": {"keras.ops", "keras.tree", "numpy", "scipy"},
    "optimizers": {"keras", "numpy"},
    "plots": {"matplotlib", "numpy"},
    "table": {"rich"},
    "text": set(),
    "tensorboard.tags": set(),
    "tensorboard.plugin": {"tensorboard", "werkzeug", "numpy"},
    "tensorboard": {"tensorboard", "PIL", "numpy"},
}
TWINS = [
    [name]
    for name in ("tensorflow", "jax", "torch", "contract", "ctc", "host", "nested")
]
ELSEWHERE = {"keras", "numpy", "scipy", "rich", "matplotlib"}


def imported_names(source: str, module: str) -> set[str]:
    """Every name a module imports, dotted and absolute: `from a import b` is `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: -node.level]
                base = ".".join([*package, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def is_inside(name: str, prefix: str) -> bool:
    if prefix.endswith("*"):
        return name.startswith(prefix[:-1])
    return name == prefix or name.startswith(prefix + ".")


def violations(module: str, source: str) -> list[str]:
    """What a module imports and must not.

    Args:
        module: The module's dotted name, `keras_curvature.backend.__init__` for a
            package's own file.
        source: Its text.
    """
    here = module.removeprefix(PACKAGE + ".")
    room = here.split(".")[0]
    if room == "__init__":
        return []
    if room not in ROOMS:
        return [f"the room {room!r} is not in docs/architecture.md's table"]
    matching = [key for key in OUTSIDE if is_inside(here, key)]
    outside = OUTSIDE[max(matching, key=len)] if matching else ELSEWHERE

    found = []
    for name in sorted(imported_names(source, module)):
        if is_inside(name, PACKAGE):
            target = name.removeprefix(PACKAGE).removeprefix(".")
            other = target.split(".")[0]
            if other == room or other == "__version__":
                continue
            if other not in ROOMS[room]:
                found.append(name)
            elif other == "backend" and target.split(".")[1:2] in TWINS:
                found.append(f"{name}: only the room's own names, not its modules")
        elif is_inside(name, "keras.src"):
            found.append(name)
        elif name.split(".")[0] not in sys.stdlib_module_names:
            if not any(is_inside(name, allowed) for allowed in outside):
                found.append(name)
    return found


def modules() -> dict[str, pathlib.Path]:
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths
    }


@pytest.mark.parametrize("module", modules())
def test_module_imports_only_what_its_room_may(module):
    assert violations(module, modules()[module].read_text()) == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("operators.hessian", "from keras.src import backend"),
        ("operators.hessian", "import keras.src.utils"),
        ("operators.hessian", "import tensorflow as tf"),
        ("operators.hessian", "def f():\n    from tensorflow import constant"),
        ("operators.hessian", "from keras_curvature import analysis"),
        ("operators.hessian", "from ..analysis import hessian_trace"),
        ("operators.hessian", "from keras_curvature.backend.tensorflow import array"),
        ("estimators.moments", "import keras"),
        ("estimators.moments", "from keras import Model"),
        ("estimators.moments", "from keras_curvature.operators import HessianOperator"),
        ("estimators.moments", "from keras_curvature import analysis"),
        ("optimizers.diagonal_newton", "from keras_curvature import backend"),
        ("optimizers.diagonal_newton", "import scipy"),
        ("loss", "from keras_curvature.operators import HessianOperator"),
        ("operators.hessian", "from keras_curvature.layerwise import Structure"),
        ("layerwise.exact", "from keras_curvature.operators import HessianOperator"),
        ("layerwise.exact", "import jax"),
        ("operators.hessian", "from keras_curvature.backend.jax import array"),
        ("backend.__init__", "import tensorflow"),
        ("tensorboard.tags", "import tensorflow"),
        ("tensorboard.plugin.plugin", "import keras"),
        ("tensorboard.plugin.plugin", "import tensorflow"),
        ("tensorboard.writer", "import tensorflow"),
        ("tensorboard.writer", "from keras_curvature import callbacks"),
        ("utils", "import math"),
    ],
)
def test_rules_see_what_is_forbidden(module, source):
    assert violations(f"{PACKAGE}.{module}", source) != []


@pytest.mark.parametrize(
    "module, source",
    [
        ("backend.tensorflow", "import tensorflow as tf\nimport numpy as np"),
        ("estimators.moments", "from keras import ops\nimport scipy.sparse"),
        ("estimators.moments", "from keras_curvature.estimators import estimate"),
        ("optimizers.diagonal_newton", "import keras\nfrom keras import ops"),
        ("callbacks.curvature_monitor", "from keras_curvature import analysis"),
        ("tensorboard.plugin.plugin", "from keras_curvature.tensorboard import tags"),
    ],
)
def test_rules_let_pass_what_is_allowed(module, source):
    assert violations(f"{PACKAGE}.{module}", source) == []


def test_every_room_is_in_the_picture():
    picture = (ROOT / "docs" / "architecture.md").read_text()
    assert [room for room in ROOMS if f"`{room}" not in picture] == []
