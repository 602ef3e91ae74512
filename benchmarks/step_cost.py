"""What a step of training costs with each optimizer, on networks of real size.

A step is Keras' own: forward pass, gradient and update of a batch of 32 images, medians
of steps that are measured in turn. Axes are renewed every ten steps, whose time is a
tenth of the steps' here as in training: means are told beside the medians.
"""

import pathlib
import sys

import keras
import large_models
import measure
import numpy as np

import keras_curvature as kc

sys.path.append(str(pathlib.Path(__file__).resolve().parent / "optimizers"))

import references

NETWORKS = {
    "MobileNetV2": large_models.mobilenet,
    "ViT, 6 blocks": large_models.vision_transformer,
    "ResNet-50": large_models.resnet,
}

OPTIMIZERS = {
    "AdamW": lambda: keras.optimizers.AdamW(1e-4),
    "Muon": lambda: keras.optimizers.Muon(1e-4),
    "SOAP": lambda: references.SOAP(1e-4),
    "DiagonalNewton, entries": lambda: kc.DiagonalNewton(1e-3, axes=None),
    "DiagonalNewton, axes": lambda: kc.DiagonalNewton(1e-3, axes="layer"),
}

SAMPLES = 32
#: Steps that are timed: each tenth one renews the axes.
STEPS = 20


def run(networks=tuple(NETWORKS)):
    """Times the optimizers on each network, and yields a row for each pair."""
    for network in networks:
        steps = {
            name: _step(NETWORKS[network], OPTIMIZERS[name]) for name in OPTIMIZERS
        }
        seconds = measure.all_seconds(steps, STEPS, warm_up=1)
        base = np.median(seconds["AdamW"]), np.mean(seconds["AdamW"])
        for name, times in seconds.items():
            row = {"network": network, "optimizer": name, "step s": np.median(times)}
            row["median / AdamW's"] = np.median(times) / base[0]
            row["mean / AdamW's"] = np.mean(times) / base[1]
            yield row


def _step(build, optimizer):
    """A function without arguments that takes a step of training."""
    model, x, y = large_models.images(build, samples=SAMPLES)()
    model.compile(
        optimizer(), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return lambda: model.train_on_batch(x, y)


if __name__ == "__main__":
    results = list(run([n for n in NETWORKS if n in sys.argv] or tuple(NETWORKS)))
    measure.save("step_cost", results)
    measure.print_table("Steps of training", results)
