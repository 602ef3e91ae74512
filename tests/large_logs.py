"""Logs of long trainings of a deep model, many of them."""

import os

import numpy as np

from keras_curvature.tensorboard import tags
from keras_curvature.tensorboard.writer import CurvatureWriter


def write_runs(directory, runs=20, probes=2000, layers=200):
    """Writes one run, and gives it all names: their files are one on the disk.

    Returns:
        The runs' names.
    """
    names = [f"sweep/rate={0.1 * (i + 1):.1f}" for i in range(runs)]
    first = directory / names[0]
    # The curves of TensorBoard's own tabs are not what is timed.
    with CurvatureWriter(first, top_layers=0) as writer:
        for record in records(probes, layers):
            writer.write(record)
    (source,) = (first / "curvature").iterdir()
    for name in names[1:]:
        (directory / name / "curvature").mkdir(parents=True)
        os.link(source, directory / name / "curvature" / source.name)
    return [f"{name}/curvature" for name in names]


def records(probes, layers):
    """Records with all figures, drawn at once."""
    rng = np.random.default_rng(0)
    names = [
        f"model/stage{i // 50 + 1}/block{i % 50 // 4 + 1}/conv_{i}"
        for i in range(layers)
    ]
    scale = 10 ** np.linspace(-4, 0, layers)[:, None]
    for i in range(probes):
        drawn = scale * rng.lognormal(0, 0.3, (layers, len(tags.LAYER_KEYS)))
        parts = [
            dict(zip(tags.LAYER_KEYS, row, strict=True), name=name, size=1000)
            for name, row in zip(names, drawn.tolist(), strict=True)
        ]
        keys = [*(f.key for f in tags.GLOBAL_FIGURES), *tags.ERROR_KEYS]
        figures = dict(zip(keys, rng.lognormal(0, 0.2, len(keys)), strict=True))
        yield {"step": 10 * i, "layers": parts, **figures}
