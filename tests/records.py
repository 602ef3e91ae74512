"""Records as the monitor makes them: plausible numbers, and no model behind them."""

import math

import numpy as np

from keras_curvature.tensorboard import signed_log

SERVED_STEPS = (0, 100, 200, 300)
# More than the thousand points that TensorBoard keeps of a curve.
LONG_STEPS = range(0, 12_000, 10)
MODE = "training without noise, BatchNormalization over 64 samples"
LAYERS = ("conv1", "conv2", "block/attention", "block/norm", "head/dense", "logits")


def synthetic_record(step, seed=0, layers=LAYERS, learning_rate=0.05, stiffness=1.0):
    """One probe of a run whose sharpness climbs towards 2 / learning rate."""
    rng = np.random.default_rng([seed, step])
    progress = 1 - math.exp(-step / 900)
    limit = 2 / learning_rate
    variables, parts = [], []
    for i, name in enumerate(layers):
        depth = i / max(len(layers) - 1, 1)
        scale = stiffness * 10 ** (-3.2 + 2.4 * depth + (0.9 - 0.8 * depth) * progress)
        size = int(400 * (i + 1))
        diagonal = scale * rng.lognormal(0, 1.2, size)
        negative = 0.25 * (1 - progress) + 0.15 * depth
        diagonal[rng.random(size) < negative] *= -0.3
        for variable, share in (("kernel", slice(16, None)), ("bias", slice(16))):
            variables.append(
                {
                    "path": f"{name}/{variable}",
                    "layer": name,
                    **_figures(diagonal[share], i),
                }
            )
        parts.append({"name": name, **_figures(diagonal, i)})
    total = sum(part["trace"] ** 2 for part in parts)
    for part in parts + variables:
        part["frobenius_share"] = part["trace"] ** 2 / total
        part["block_share"] = 0.7 * part["frobenius_share"]
        part["block_share_standard_error"] = 0.01
    trace = sum(part["trace"] for part in parts)
    sharpness = limit * (0.15 + 0.9 * progress) * stiffness
    return {
        "step": step,
        "epoch": step // 400,
        "loss": 2.3 * math.exp(-step / 700) + 0.1,
        "mode": MODE,
        "learning_rate": learning_rate,
        "two_over_learning_rate": limit,
        "hessian_trace": trace,
        "hessian_trace_standard_error": 0.04 * trace,
        "hessian_frobenius_norm": 1.6 * sharpness,
        "hessian_frobenius_norm_standard_error": 0.08 * sharpness,
        "hessian_max_eigenvalue": sharpness * (1 + 0.02 * rng.normal()),
        "hessian_max_eigenvalue_error": 0.02 * sharpness,
        "hessian_preconditioned_max_eigenvalue": 30 * sharpness,
        "hessian_preconditioned_max_eigenvalue_error": sharpness,
        "critical_sharpness": 20 * sharpness,
        "critical_sharpness_error": sharpness,
        "stability_threshold": 38 / learning_rate,
        "stability_ratio": 30 * sharpness * learning_rate / 38,
        "gradient_norm": 0.4 * math.exp(-step / 800),
        "gradient_noise_scale": 40 * math.exp(step / 700),
        "update_ratio": 2e-3 * math.exp(-step / 900) if step else None,
        "seconds": 0.4,
        "overhead": 0.04,
        "num_matvecs": 32,
        "variables": variables,
        "layers": parts,
        "optimizer": {"clipped_share": 0.1 * (1 - progress)},
    }


def _figures(diagonal, i):
    counts, _ = np.histogram(diagonal, bins=signed_log.bin_edges())
    mean = float(diagonal.mean())
    return {
        "size": diagonal.size,
        "diagonal_mean": mean,
        "diagonal_mean_standard_error": abs(mean) * (0.05 + 0.03 * i),
        "diagonal_mean_abs": float(np.abs(diagonal).mean()),
        "diagonal_max": float(diagonal.max()),
        "diagonal_min": float(diagonal.min()),
        "negative_share": float((diagonal < 0).mean()),
        "trace": float(diagonal.sum()),
        "trace_standard_error": abs(float(diagonal.sum())) * (0.05 + 0.03 * i),
        "gradient_norm": 0.02 * (i + 1),
        "update_ratio": 1e-3 * (i + 1),
        "histogram": {"edges": signed_log.bin_edges().tolist(), "counts": counts},
        "gradient_histogram": {
            "edges": signed_log.bin_edges().tolist(),
            "counts": counts[::-1],
        },
    }
