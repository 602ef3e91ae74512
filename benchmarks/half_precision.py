"""What it costs a model in bfloat16 to stay in bfloat16 while it is probed.

Two blocks of GPT-2 that were trained on text, and a ViT and MobileNetV2 with random
weights, all with weights and layers in bfloat16. Each figure of `half_precision=True`
is compared with the one that the same weights give in float32, at the same random
directions: what is told is rounding alone. Memory is the peak of a process that
computes a gradient and a product, beyond what it takes before.
"""

import json
import os
import subprocess
import sys
import tempfile

import keras
import large_models
import measure
import numpy as np
import sequences

import keras_curvature as kc

BACKENDS = ("tensorflow", "jax", "torch")

#: Images that the memory is measured for.
SAMPLES = 64


def _trained():
    model, x, y = sequences.built("GPT-2")
    model.fit(x, y, epochs=3, batch_size=32, verbose=0)
    return model, x[:32], y[:32]


NETWORKS = {
    "GPT-2, 2 blocks, trained": _trained,
    "ViT, 6 blocks": large_models.images(
        large_models.vision_transformer, samples=SAMPLES
    ),
    "MobileNetV2": large_models.images(large_models.mobilenet, samples=SAMPLES),
}


def run(networks=tuple(NETWORKS), backends=BACKENDS):
    """Measures networks on backends; yields rows."""
    for network in networks:
        for backend in backends:
            with tempfile.TemporaryDirectory() as folder:
                full, half = (
                    _in_process(network, backend, kind, folder)
                    for kind in ("float32", "bfloat16")
                )
            row = {"network": network, "backend": backend}
            for name, value in full["figures"].items():
                row[f"{name}, error"] = _distance(half["figures"][name], value)
            row["MiB in float32"] = round(full["MiB"])
            row["MiB in bfloat16"] = round(half["MiB"])
            print(row, flush=True)
            yield row


def _in_process(network, backend, kind, folder):
    path = os.path.join(folder, f"{kind}.npz")
    done = subprocess.run(
        [sys.executable, __file__, "--work", network, kind, path],
        env={**os.environ, "KERAS_BACKEND": backend},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    with np.load(path) as figures:
        known = json.loads(done.stdout.splitlines()[-1])
        return {"figures": dict(figures), **known}


def _distance(value, truth):
    return float(np.linalg.norm(value - truth) / np.linalg.norm(truth))


def _in_bfloat16(model):
    """The same model with weights and layers in bfloat16."""
    keras.config.set_dtype_policy("bfloat16")
    again = keras.models.clone_model(model, clone_function=_layer_in_bfloat16)
    again.set_weights(model.get_weights())
    again.compile(
        keras.optimizers.SGD(1e-3),
        # The loss itself is computed in float32, as in training.
        keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float32"),
    )
    return again


def _layer_in_bfloat16(layer):
    config = layer.get_config()
    if "dtype" in config:
        config["dtype"] = "bfloat16"
    return type(layer).from_config(config)


def work(network, kind, path):
    """Computes the figures of a network in this process, and saves them."""
    keras.utils.set_random_seed(0)
    model, x, y = NETWORKS[network]()
    model = _in_bfloat16(model)
    before = measure.peak_bytes()
    op = kc.HessianOperator(model, x, y, half_precision=kind == "bfloat16")
    direction = np.random.default_rng(0).standard_normal(op.shape[0]).astype("float32")
    figures = {
        "gradient": measure.on_host(op.value_and_gradient()[1]),
        "product": measure.on_host(op @ direction),
    }
    memory = (measure.peak_bytes() - before) / 2**20
    for method in ("hutchinson", "shrunk"):
        if method == "shrunk" and network == "MobileNetV2":
            # Its default is random signs.
            continue
        found = kc.hessian_diagonal(op, method=method, num_matvecs=4, verbose=False)
        figures[f"diagonal ({method})"] = np.concatenate(
            [np.ravel(measure.on_host(part)) for part in found.value]
        )
    largest = kc.hessian_eigenvalues(op, k=1, tolerance=1e-3, verbose=False)
    figures["largest eigenvalue"] = np.array(largest.value)
    trace = kc.hessian_trace(op, method="hutchinson", num_matvecs=4, verbose=False)
    figures["trace"] = np.array(trace.value)
    np.savez(path, **figures)
    return {"MiB": memory}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        print(json.dumps(work(*sys.argv[2:])))
    else:
        chosen = [a for a in sys.argv[1:] if a in NETWORKS] or tuple(NETWORKS)
        backends = [a for a in sys.argv[1:] if a in BACKENDS] or BACKENDS
        results = list(run(chosen, backends))
        measure.save("half_precision", results)
        measure.print_table("Staying in bfloat16", results)
