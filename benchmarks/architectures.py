"""What was tried on architectures in use, in float64: products, diagonals and samples.

    python benchmarks/architectures.py [NAME …]

Those of keras.applications are made for 32×32 pixels (or what they take) and three
classes, those of `tests/small_architectures.py` as small as they can be. Each is
measured in a process of its own, and its row takes the place of the one that was there.
Diagonals are compared with the dense Hessian, that of a few small variables where there
are more than a thousand parameters.
"""

import json
import os
import pathlib
import subprocess
import sys
import time
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

import cases
import keras
import measure
import numpy as np
import small_architectures as small

import keras_curvature as kc

#: Of keras.applications: pixels along an edge, and arguments.
APPLICATIONS = {
    "MobileNetV2": (32, {"alpha": 0.35}),
    "MobileNetV3Small": (32, {"alpha": 0.75}),
    "EfficientNetV2B0": (32, {}),
    "ResNet50": (32, {}),
    "ConvNeXtTiny": (32, {}),
    "DenseNet121": (32, {}),
    "Xception": (71, {}),
    "InceptionV3": (75, {}),
    "NASNetMobile": (32, {}),
}
NAMES = (*small.ARCHITECTURES, *APPLICATIONS)

#: Dense Hessians are compared with up to so many parameters. Of what has more, a few
#: variables are looked at.
DENSE = 1_000

#: So many of them, with at most so many entries each.
FEW, SMALL = 3, 64

#: The large one whose trace is sampled too, which takes minutes to compile.
SAMPLED = ("MobileNetV3Small",)

#: A process is given up after so many seconds.
LIMIT = 1_500


def made(name):
    """The case of a name."""
    if name in small.ARCHITECTURES:
        return small.ARCHITECTURES[name]()
    size, arguments = APPLICATIONS[name]
    model = getattr(keras.applications, name)(
        weights=None,
        input_shape=(size, size, 3),
        classes=3,
        classifier_activation=None,
        **arguments,
    )
    model.compile("sgd", cases._cross_entropy())
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        # Away from zero, where biases begin and relu has no derivative.
        variable.assign(variable + 0.05 * rng.standard_normal(variable.shape))
    return cases.Case(model, cases._numbers(2, size, size, 3), cases._labels(2, 3))


def timed(function):
    """What a function returns, and the seconds that it took."""
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def row(name):
    """The row of one architecture."""
    keras.utils.set_random_seed(0)
    with cases.floatx("float64"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, x, y, *_ = made(name)
        caught.clear()
        op = kc.HessianOperator(model, x, y, training=False)
        v = np.random.default_rng(0).standard_normal(op.shape[0])
        _, gradient_seconds = timed(op.value_and_gradient)
        product, product_seconds = timed(lambda: op @ v)
        expected = small.differences(op, v, 2e-2 if name in small.ROUNDED else 1e-5)
        little, trace, trace_seconds = op.shape[0] <= DENSE, None, None
        if little or name in SAMPLED:
            trace, trace_seconds = timed(
                lambda: kc.hessian_trace(
                    op, method="layerwise", num_matvecs=4, verbose=False
                )
            )
        found = {
            "architecture": name,
            "parameters": op.shape[0],
            "gradient, first (s)": gradient_seconds,
            "product, first (s)": product_seconds,
            "product, again (s)": timed(lambda: op @ v)[1],
            "off differences": float(
                np.linalg.norm(product - expected) / np.linalg.norm(expected)
            ),
            "trace": trace and trace.value,
            "its error": trace and trace.standard_error,
            "trace, first (s)": trace_seconds,
        }
        found |= against_dense(
            op
            if little
            else kc.HessianOperator(
                model, x, y, training=False, variables=some(op.variables)
            )
        )
        monitor = kc.CurvatureMonitor(
            (x, y), num_matvecs=4, training=False, on_error="raise"
        )
        if little:
            # Not in `fit`, where keras-hub's T5 is not made for float64.
            monitor.set_model(model)
            monitor.probe(step=0)
        told = {str(w.message) for w in caught if w.category is UserWarning}
    found["first probe (s)"] = (
        monitor.history[0]["seconds"] if monitor.history else None
    )
    found["warnings"] = len(told)
    for text in sorted(told):
        print(f"{name}: {text}", file=sys.stderr)
    return found


def some(variables):
    """A few small variables from all depths of a model."""
    small = [v for v in variables if np.prod(v.shape) <= SMALL]
    at = np.linspace(0, len(small) - 1, min(FEW, len(small))).astype(int)
    return [small[i] for i in at]


def against_dense(op):
    """How far exact diagonals and samples are from the dense Hessian's diagonal."""
    truth = np.diag(op.to_dense())
    scale = np.abs(truth).max()
    if not scale:
        # A softmax that is saturated.
        return {
            "diagonal of": 0,
            "exact diagonal off": None,
            "samples off (s.e.)": None,
        }
    exact = kc.hessian_diagonal(op, method="exact", verbose=False)
    sampled = kc.hessian_diagonal(
        op, method="layerwise", num_matvecs=32, control_variate=False, verbose=False
    )
    distance = np.abs(op.flatten(sampled.value) - truth)
    error = op.flatten(sampled.standard_error) + 1e-7 * scale
    return {
        "diagonal of": len(truth),
        "exact diagonal off": float(
            np.abs(op.flatten(exact.value) - truth).max() / scale
        ),
        "samples off (s.e.)": float((distance / error).max()),
    }


def run(names=NAMES):
    """Measures architectures, each in a process of its own; returns all rows."""
    path = measure.RESULTS / "architectures.json"
    rows = json.loads(path.read_text())["results"] if path.exists() else []
    rows = {row["architecture"]: row for row in rows}
    for name in names:
        command = [sys.executable, __file__, "--row", name]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, timeout=LIMIT, check=True
        )
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        ordered = [rows[name] for name in NAMES if name in rows]
        measure.save("architectures", ordered)
        measure.print_table(name, [rows[name]])
    return ordered


if __name__ == "__main__":
    if sys.argv[1:2] == ["--row"]:
        print(json.dumps(row(sys.argv[2])))
    else:
        measure.print_table(__doc__.split("\n")[0], run(sys.argv[1:] or NAMES))
