"""Next to PyHessian, curvlinops and hessian-eigenthings on networks of real size.

ResNet-50 (23.6 million parameters, eight digits of 64×64, BatchNormalization in
inference mode) and a GPT-2 (14 million: six blocks, width 384, 8 192 words, two windows
of 64 characters), both after some steps of training. It is one Keras model on PyTorch
for all packages, and each figure has the same number of products. Every package and
figure has a process of its own, on one thread: seconds are those of the processor, from
the first call on, and memory is the peak of the process over that of the same process
with one gradient.

    KERAS_BACKEND=torch python benchmarks/large_peers.py [NETWORK …]
"""

import json
import os
import subprocess
import sys
import time

import measure
import numpy as np

#: Products of each figure; Hutch++ takes multiples of three.
PRODUCTS = 21

#: Products of the figures that others are compared with.
REFERENCE = 63

STEPS = 30


def resnet_50():
    """A trained ResNet-50, digits, and their labels."""
    from large_models import resnet
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = images[:64].reshape(-1, 8, 8, 1).astype("float32") / 8 - 1
    x = np.repeat(np.kron(x, np.ones((1, 8, 8, 1), "float32")), 3, axis=-1)
    return trained(resnet(x.shape[1:]), x, labels[:64].astype("int32"), batch=8)


def gpt2(positions=64, words=8192, width=384):
    """A trained GPT-2, characters, and those that follow."""
    import keras
    import keras_hub
    from sequences import windows

    x, y, _ = windows(positions)
    tokens = keras.Input((positions,), dtype="int32")
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=words,
        num_layers=6,
        num_heads=6,
        hidden_dim=width,
        intermediate_dim=4 * width,
        max_sequence_length=positions,
        dropout=0,
    )
    inputs = {"token_ids": tokens, "padding_mask": keras.ops.ones_like(tokens)}
    scores = backbone.token_embedding(backbone(inputs), reverse=True)
    return trained(keras.Model(tokens, scores), x, y, batch=2)


def trained(model, x, y, batch):
    """The model after some steps, and one batch."""
    import keras

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-4), loss)
    count = STEPS * batch
    x, y = (np.resize(a, (count, *a.shape[1:])) for a in (x, y))
    model.fit(x, y, batch_size=batch, verbose=0)
    return model, x[:batch], y[:batch]


NETWORKS = {"ResNet-50": resnet_50, "GPT-2": gpt2}
FIGURES = ("trace", "largest eigenvalue", "density")


def own(model, x, y):
    """The figures of this package."""
    import keras_curvature as kc

    op = kc.HessianOperator(model, x, y, training=False)
    return {
        "trace": lambda n: kc.hessian_trace(op, num_matvecs=n).value,
        "largest eigenvalue": lambda n: kc.hessian_eigenvalues(
            op, k=1, num_matvecs=n
        ).value[0],
        "density": lambda n: kc.hessian_spectral_density(
            op, num_steps=n, num_vectors=1
        ),
    }


def in_torch(model, x, y):
    """The model as a module from inputs to rows of scores, inputs and labels.

    PyTorch's fused attention, which has no second derivatives, is off.
    """
    import torch

    torch.backends.cuda.enable_flash_sdp(False)

    class Rows(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, inputs):
            scores = self.model(inputs, training=False)
            return torch.reshape(scores, (-1, scores.shape[-1]))

    labels = torch.as_tensor(np.int64(y.ravel()))
    return Rows(), torch.as_tensor(x), labels


def pyhessian(model, x, y):
    """Its trace stops when it changes little, its eigenvalue likewise: both may not."""
    import torch
    from pyhessian import hessian

    module, x, y = in_torch(model, x, y)
    of = hessian(module, torch.nn.CrossEntropyLoss(), data=(x, y), cuda=False)
    return {
        "trace": lambda n: np.mean(of.trace(maxIter=n, tol=0)),
        "largest eigenvalue": lambda n: of.eigenvalues(maxIter=n, tol=0)[0][0],
        "density": lambda n: of.density(iter=n, n_v=1),
    }


def curvlinops(model, x, y):
    """Its operator, with SciPy's Lanczos method for the eigenvalue."""
    import torch
    from curvlinops import HessianLinearOperator, hutchpp_trace
    from curvlinops.papyan2020traces.spectrum import fast_lanczos
    from scipy.sparse.linalg import ArpackNoConvergence, eigsh

    module, x, y = in_torch(model, x, y)
    params = [p for p in module.parameters() if p.requires_grad]
    op = HessianLinearOperator(module, torch.nn.CrossEntropyLoss(), params, [(x, y)])

    def largest(n):
        # With so many vectors the first round takes as many products.
        linear = op.to_scipy()
        start = np.random.default_rng(0).standard_normal(linear.shape[0])
        try:
            return eigsh(
                linear,
                k=1,
                ncv=n,
                maxiter=1,
                tol=1e-2,
                v0=start.astype(np.float32),
                return_eigenvectors=False,
            )[0]
        except ArpackNoConvergence as error:
            return error.eigenvalues[0] if len(error.eigenvalues) else np.nan

    return {
        "trace": lambda n: float(hutchpp_trace(op, num_matvecs=n)),
        "largest eigenvalue": largest,
        "density": lambda n: fast_lanczos(op, n),
    }


def eigenthings(model, x, y):
    """hessian-eigenthings."""
    import torch
    from hessian_eigenthings import algorithms
    from hessian_eigenthings.loss_fns.standard import supervised_loss
    from hessian_eigenthings.operators.hessian import HessianOperator

    module, x, y = in_torch(model, x, y)
    loss = supervised_loss(torch.nn.CrossEntropyLoss())
    op = HessianOperator(module, [(x, y)], loss)
    return {
        "trace": lambda n: float(algorithms.trace(op, num_matvecs=n, seed=0).estimate),
        "largest eigenvalue": lambda n: float(
            algorithms.lanczos(op, k=1, max_iter=n, seed=0).eigenvalues[0]
        ),
        "density": lambda n: algorithms.spectral_density(
            op, num_runs=1, lanczos_steps=n, seed=0
        ),
    }


PACKAGES = {
    "keras_curvature": own,
    "PyHessian": pyhessian,
    "curvlinops": curvlinops,
    "hessian-eigenthings": eigenthings,
}


def run(networks=tuple(NETWORKS)):
    """Measures all packages that are installed; returns a list of rows."""
    rows = []
    for network in networks:
        alone = _process(network, "keras_curvature", "gradient", 1)
        for figure in FIGURES:
            reference = None
            if figure != "density":
                found = _process(network, "keras_curvature", figure, REFERENCE)
                reference = found["value"]
            for package in PACKAGES:
                row = {"network": network, "figure": figure, "package": package}
                found = _process(network, package, figure, PRODUCTS)
                value = found.pop("value", None)
                if "peak" in found:
                    found["GiB over a gradient's"] = found.pop("peak") - alone["peak"]
                if None not in (value, reference):
                    row["relative difference"] = abs(value / reference - 1)
                rows.append(row | found)
                print(rows[-1], flush=True)
    return rows


def _process(network, package, figure, products):
    done = subprocess.run(
        [sys.executable, __file__, "--work", network, package, figure, str(products)],
        env={**os.environ, "KERAS_BACKEND": "torch", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        return {"cannot run": lines[-1][:120]}
    return json.loads(done.stdout.splitlines()[-1])


def work(network, package, figure, products):
    """One figure of one package, in this process."""
    import keras

    keras.utils.set_random_seed(0)
    model, x, y = NETWORKS[network]()
    figures = PACKAGES[package](model, x, y)
    if figure == "gradient":
        model.evaluate(x, y, verbose=0)
        return {"peak": measure.peak_bytes() / 2**30}
    start = time.process_time()
    value = figures[figure](products)
    seconds = time.process_time() - start
    found = {"CPU seconds": seconds, "peak": measure.peak_bytes() / 2**30}
    return found | ({} if figure == "density" else {"value": float(value)})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        print(json.dumps(work(*sys.argv[2:5], int(sys.argv[5]))))
    else:
        results = run(tuple(sys.argv[1:]) or tuple(NETWORKS))
        measure.save("large_peers", results)
        measure.print_table("Next to PyTorch's tools, real sizes", results)
