"""Small recorded functions, each written twice: with `keras.ops` and with NumPy.

The NumPy twin is differentiated by central differences of its values, in float64, so
that the judge shares nothing with what is judged: no operation, and no derivative.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from keras import backend as keras_backend
from keras import ops

from keras_curvature import backend

FUNCTIONS: dict[str, "Function"] = {}

#: Step of the differences. Truncation is of the order of `h⁴` times sixth derivatives,
#: rounding of `u / h²`: both stay below 1e-8 of the size of these functions.
_STEP = 1.5e-3


class Function(NamedTuple):
    """A recorded function, its NumPy twin and a point for them.

    Attributes:
        point: dictionary of NumPy arrays, by names of several types.
        recorded: function of a dictionary of tensors.
        twin: the same of a dictionary of arrays.
    """

    point: dict[Any, np.ndarray]
    recorded: Callable
    twin: Callable


def _function(point):
    def register(pair):
        FUNCTIONS[pair.__name__] = Function(point, *pair())
        return pair

    return register


def numbers(*shape, seed=0):
    """Standard normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape)


def like(x, tensor):
    """An array as a tensor of another one's type; `ops.cast` may round it first."""
    return backend.array(x, keras_backend.standardize_dtype(tensor.dtype))


def tanh(x):
    """By operators alone: `ops.tanh` may round to float32."""
    return 1 - 2 / (math.e ** (2 * x) + 1)


def flat(parts):
    """A dictionary of arrays as one vector, in the order of its names."""
    return np.concatenate([np.ravel(part) for part in parts.values()])


def unflat(vector, like):
    """The inverse of `flat`; also for tensors."""
    parts, start = {}, 0
    for name, part in like.items():
        size = int(np.prod(part.shape))
        parts[name] = ops.reshape(vector[start : start + size], part.shape)
        start += size
    return parts


@functools.cache
def truth(name):
    """Value, flat gradient, dense Hessian and the taps' Jacobians, by differences."""
    case = FUNCTIONS[name]
    at = flat(case.point)
    basis = _STEP * np.eye(at.size)

    def values(vector):
        parts, start = {}, 0
        for key, part in case.point.items():
            parts[key] = vector[start : start + part.size].reshape(part.shape)
            start += part.size
        loss, taps = case.twin(parts)
        return loss, {key: np.ravel(tap) for key, tap in taps.items()}

    def loss(vector):
        return values(vector)[0]

    def slope(function, e):
        near, far = ((function(at + s * e) - function(at - s * e)) for s in (1, 2))
        return (8 * near - far) / (12 * _STEP)

    def bend(e):
        near, far = ((loss(at + s * e) + loss(at - s * e)) for s in (1, 2))
        return (16 * near - far - 30 * loss(at)) / (12 * _STEP**2)

    hessian = np.empty((at.size, at.size))
    for i, e in enumerate(basis):
        hessian[i, i] = bend(e)
        for j, f in enumerate(basis[:i]):
            hessian[i, j] = hessian[j, i] = (bend(e + f) - bend(e - f)) / 4
    jacobians = {
        key: np.stack([slope(lambda v, k=key: values(v)[1][k], e) for e in basis], 1)
        for key in values(at)[1]
    }
    gradient = np.array([slope(loss, e) for e in basis])
    return loss(at), gradient, hessian, jacobians


@_function({"x": numbers(3), ("y", 0): numbers(2, seed=1), 7: np.ones(2)})
def quartic():
    """All coupled; the entry 7 is not used."""
    a = numbers(4, 3, seed=2)

    def recorded(p):
        z = like(a, p["x"]) @ p["x"][:, None]
        y = p["y", 0]
        return ops.sum(z**4) * y[0] + (y[0] * y[1]) ** 2, {"z": z}

    def twin(p):
        z = a @ p["x"][:, None]
        y = p["y", 0]
        return np.sum(z**4) * y[0] + (y[0] * y[1]) ** 2, {"z": z}

    return recorded, twin


@_function(
    {
        "kernel": numbers(2, 3),
        "bias": numbers(3, seed=1),
        ("out", 1): numbers(3, 2, seed=2),
    }
)
def tanh_net():
    x, y = numbers(4, 2, seed=3), numbers(4, 2, seed=4)

    def recorded(p):
        hidden = tanh(like(x, p["bias"]) @ p["kernel"] + p["bias"])
        error = hidden @ p["out", 1] - like(y, p["bias"])
        return ops.sum(error**2) / 8, {"hidden": hidden, ("error", 0): error}

    def twin(p):
        hidden = np.tanh(x @ p["kernel"] + p["bias"])
        error = hidden @ p["out", 1] - y
        return np.sum(error**2) / 8, {"hidden": hidden, ("error", 0): error}

    return recorded, twin


@_function({"table": numbers(4, 2), "mix": numbers(2, 2, seed=1)})
def gather():
    """Rows looked up, one of them twice and one never; the ids are a tap."""
    ids = np.array([[0, 2], [2, 3]], "int32")

    def recorded(p):
        rows = ops.take(p["table"], ids, axis=0)
        return ops.sum(tanh(rows @ p["mix"]) ** 2), {"rows": rows}

    def twin(p):
        rows = p["table"][ids]
        return np.sum(np.tanh(rows @ p["mix"]) ** 2), {"rows": rows}

    return recorded, twin


@_function({"kernel": numbers(2, 2, 1, 2), "bias": numbers(2, seed=1)})
def convolution():
    image = numbers(2, 4, 4, 1, seed=2)

    def recorded(p):
        z = ops.conv(like(image, p["bias"]), p["kernel"], padding="valid")
        return ops.sum(tanh(z + p["bias"]) ** 2), {"z": z}

    def twin(p):
        z = sum(
            image[:, i : i + 3, j : j + 3] @ p["kernel"][i, j]
            for i in range(2)
            for j in range(2)
        )
        return np.sum(np.tanh(z + p["bias"]) ** 2), {"z": z}

    return recorded, twin


@_function({"x": numbers(1, 4, 4, 1)})
def max_pooling():
    def recorded(p):
        z = ops.max_pool(p["x"], 2, 2)
        return ops.sum(z**3) * ops.sum(z), {"z": z}

    def twin(p):
        z = p["x"].reshape(1, 2, 2, 2, 2, 1).max(axis=(2, 4))
        return np.sum(z**3) * np.sum(z), {"z": z}

    return recorded, twin


@_function({"x": numbers(2, 5), "gain": numbers(5, seed=1)})
def moments():
    """What layer normalization does."""

    def recorded(p):
        mean, variance = ops.moments(p["x"], axes=[1], keepdims=True)
        z = (p["x"] - mean) / ops.sqrt(variance + 0.1) * p["gain"]
        return ops.sum(z**3), {"z": z}

    def twin(p):
        x = p["x"]
        mean, variance = x.mean(1, keepdims=True), x.var(1, keepdims=True)
        z = (x - mean) / np.sqrt(variance + 0.1) * p["gain"]
        return np.sum(z**3), {"z": z}

    return recorded, twin


@_function({"kernel": numbers(2, 2), "start": numbers(2, seed=1)})
def loop():
    x = numbers(3, 2, seed=2)

    def recorded(p):
        def step(h, x):
            h = tanh((h[None] @ p["kernel"])[0] + x)
            return h, h

        last, all_of_them = ops.scan(step, p["start"], like(x, p["start"]))
        return ops.sum(all_of_them**3), {"last": last}

    def twin(p):
        h, total = p["start"], 0.0
        for row in x:
            h = np.tanh(h @ p["kernel"] + row)
            total += np.sum(h**3)
        return total, {"last": h}

    return recorded, twin


@_function({"query": numbers(1, 2, 1, 2), "key": numbers(1, 3, 1, 2, seed=1)})
def attention():
    value = numbers(1, 3, 1, 2, seed=2)

    def recorded(p):
        z = ops.dot_product_attention(p["query"], p["key"], like(value, p["key"]))
        return ops.sum(z**3), {"z": z}

    def twin(p):
        scores = np.einsum("nqhd,nkhd->nhqk", p["query"], p["key"]) / np.sqrt(2)
        weights = np.exp(scores)
        weights /= weights.sum(-1, keepdims=True)
        z = np.einsum("nhqk,nkhd->nqhd", weights, value)
        return np.sum(z**3), {"z": z}

    return recorded, twin


@_function({"logits": numbers(3, 4)})
def cross_entropy():
    labels = np.array([0, 3, 1], "int32")

    def recorded(p):
        losses = ops.sparse_categorical_crossentropy(
            labels, p["logits"], from_logits=True
        )
        return ops.mean(losses), {"losses": losses}

    def twin(p):
        z = p["logits"]
        losses = np.log(np.exp(z).sum(1)) - z[np.arange(3), labels]
        return np.mean(losses), {"losses": losses}

    return recorded, twin


@_function({"x": numbers(3, 2), "mix": numbers(2, 2, seed=1)})
def message_passing():
    """What nodes of a graph receive along its edges is curved twice."""
    sources = np.array([0, 1, 2, 0], "int32")
    targets = np.array([1, 2, 1, 0], "int32")

    def recorded(p):
        sent = ops.take(p["x"] @ p["mix"], sources, axis=0)
        received = ops.tanh(ops.segment_sum(sent, targets, num_segments=3))
        sizes = ops.segment_sum(ops.take(received**2, targets, axis=0), sources, 3)
        return ops.sum(ops.sqrt(sizes + 1.0)), {"received": received}

    def twin(p):
        received, sizes = np.zeros((3, 2)), np.zeros((3, 2))
        np.add.at(received, targets, (p["x"] @ p["mix"])[sources])
        received = np.tanh(received)
        np.add.at(sizes, sources, received[targets] ** 2)
        return np.sum(np.sqrt(sizes + 1.0)), {"received": received}

    return recorded, twin
