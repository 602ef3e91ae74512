"""Which samples stand beside the Gauss–Newton part, and that they are worth it."""

import types

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_curvature as kc
from keras_curvature.diagonal import diagonal_moments
from keras_curvature.estimators import to_host
from keras_curvature.split_diagonal import WHOLE, SplitMoments

SIZES = (40, 20)


def parts_of(cancelled, seed=0):
    """`SplitMoments` of known matrices `G` and `R`, and `G + R`.

    A part of G is taken away by R; beside that R has entries a tenth the size of G's.
    """
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((sum(SIZES), 30))
    other = rng.standard_normal((sum(SIZES), sum(SIZES)))
    g = a @ a.T
    r = 0.5 * (other + other.T) - cancelled * g

    def of_g(key, start, width, axes):
        squares = (a @ np.sign(rng.standard_normal((30, 20 * width)))) ** 2
        return ops.cast(squares.reshape(len(a), 20, width).mean(axis=1).T, "float32")

    def of_r(key, start, width, axes):
        v = np.sign(rng.standard_normal((sum(SIZES), width)))
        return ops.cast((v * (r @ v)).T, "float32")

    of_r.once = of_r
    parts = types.SimpleNamespace(
        possible=True,
        alike=True,
        num_outputs=float("inf"),
        gauss_newton=of_g,
        rest={"parameters": of_r},
    )
    evaluation = types.SimpleNamespace(
        once=lambda make: parts,
        meanwhile=lambda owner: {},
        loss=types.SimpleNamespace(layout=types.SimpleNamespace(sizes=SIZES)),
    )
    return SplitMoments(evaluation), (g + r).astype("float32")


@pytest.mark.parametrize("seed", range(4))
def test_the_whole_is_sampled_where_the_parts_cancel(seed):
    split, whole = parts_of(0.9, seed)
    assert split.kinds(whole, shrink=True) == (WHOLE,)
    split, whole = parts_of(0.0, seed)
    assert split.kinds(whole, shrink=True) == ("parameters",)


def test_what_is_tried_is_drawn_once_and_not_kept():
    split, whole = parts_of(0.5)
    drawn, seen = [], {}
    of_r = split.parts.rest.pop("parameters")
    split.parts.rest["layers"] = of_r
    of_r.once = lambda *args, **more: drawn.append(args) or of_r(*args, **more)
    split._evaluation.meanwhile = lambda owner: seen
    assert split.curved(whole)
    before = len(drawn)
    assert before and seen
    split.kinds(whole, shrink=True)
    assert len(drawn) == before and not seen


def test_the_choice_stays():
    split, whole = parts_of(0.9)
    for seed in range(6):
        split.moments(whole, 8, None, seed, shrink=True)
        assert split.kinds(whole, shrink=True) == (WHOLE,)


def test_the_choice_is_made_anew_when_the_noise_is_another():
    """As in a network that was sure of what is wrong, and learns."""
    split, whole = parts_of(0.9)
    split.moments(whole, 8, None, 0, shrink=True)
    other, learned = parts_of(0.0)
    split.parts = other.parts
    assert split.kinds(learned, shrink=True) == (WHOLE,)
    for seed in range(2):
        split.moments(learned, 8, None, seed, shrink=True)
    assert split.kinds(learned, shrink=True) == ("parameters",)


def test_unbiased_samples_are_those_of_the_parts():
    split, whole = parts_of(0.9)
    assert split.kinds(whole, shrink=False) == ("parameters",)


@pytest.mark.parametrize("cancelled", [0.0, 0.9])
@pytest.mark.parametrize("budget", [4, 16])
def test_the_budget_is_kept_and_the_error_covers_the_truth(cancelled, budget):
    split, whole = parts_of(cancelled)
    within = []
    for seed in range(8):
        found = split.moments(whole, budget, None, seed, shrink=True)
        assert found.num_matvecs == budget
        distance = to_host(found.diagonal.value) - np.diag(whole)
        within.append(np.abs(distance) <= 2 * to_host(found.diagonal.standard_error))
    assert np.mean(within) >= 0.92


@pytest.fixture(scope="module")
def operators():
    """A network that is sure of itself: of the right answers, and of wrong ones."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 12, 3)).astype("float32")
    model = keras.Sequential(
        [
            layers.Input((12, 3)),
            layers.Dense(6, "tanh"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(6, "tanh"),
            layers.Dense(4),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss=loss)
    model.set_weights([rng.standard_normal(v.shape) for v in model.weights])
    answers = np.argsort(to_host(model(x)), axis=1)
    right, wrong = answers[:, -1], answers[:, 0]
    return [kc.HessianOperator(model, x, y.astype("int32")) for y in (right, wrong)]


@pytest.mark.parametrize("kind", ["chosen", WHOLE])
@pytest.mark.parametrize("number", [0, 1])
def test_it_is_never_worse_than_random_signs(operators, number, kind, monkeypatch):
    operator, products = operators[number], 8
    split = operator.evaluation.once(SplitMoments)
    if kind == WHOLE:
        monkeypatch.setattr(split, "kinds", lambda *_, **__: (WHOLE,))
    dense = operator.to_dense().astype("float64")
    squares = []
    for seed in range(12):
        found = diagonal_moments(operator, "shrunk", products, seed=seed).diagonal
        value = to_host(found.value)
        squares.append(np.sum((value - np.diag(dense)) ** 2))
        place = "with it" if kind == WHOLE else "the rest sampled along"
        assert all(place in way for way in found.ways.values())
    of_signs = (np.sum(dense**2) - np.sum(np.diag(dense) ** 2)) / products
    assert np.sqrt(np.mean(squares) / of_signs) <= 1.05
