"""Eigenvalues, density, norm and trace of real models, against the dense Hessian."""

import functools

import cases
import keras
import numpy as np
import pytest
from probed_cases import probed

import keras_curvature as kc
from keras_curvature import estimators

pytestmark = pytest.mark.usefixtures("module_float64")


@pytest.mark.parametrize("name", cases.CASES)
def test_every_model(name):
    """Four looks with a third of the products that H has columns, or 12.

    Few random directions have long tails: of 240 figures one or two are off by more
    than four errors.
    """
    op, h = probed(name).op, probed(name).dense
    h = (h + h.T) / 2
    values = np.linalg.eigvalsh(h)
    scale = abs(values).max()
    subspace = estimators.DominantSubspace()
    for _ in range(4):
        figures = subspace.update(op, max(12, len(h) // 3), block_sizes=op.sizes)
        for estimate, exact in (
            (figures.frobenius_norm, np.linalg.norm(h)),
            (figures.trace, np.trace(h)),
        ):
            error = abs(estimate.value - exact)
            assert error <= 6 * estimate.standard_error + 1e-9 * scale
            assert sum(b.value for b in figures.trace.blocks) == pytest.approx(
                figures.trace.value, rel=1e-9, abs=1e-9 * scale
            )
    assert abs(figures.frobenius_norm.value / np.linalg.norm(h) - 1) < 0.02
    top = kc.hessian_eigenvalues(op, k=3, tolerance=1e-6)
    expected = values[np.argsort(-abs(values))][:3]
    np.testing.assert_allclose(
        np.sort(abs(top.value)), np.sort(abs(expected)), rtol=1e-5, atol=1e-8 * scale
    )
    density = kc.hessian_spectral_density(op, num_steps=4, num_vectors=16)
    assert np.trapezoid(density.density, density.grid) == pytest.approx(1, rel=1e-6)
    for order, exact in ((1, np.trace(h)), (2, np.linalg.norm(h) ** 2)):
        moment = density.moment(order)
        error = abs(moment.value - exact / len(h))
        assert error <= 4 * moment.standard_error + 1e-9 * scale**order


def test_a_training_in_which_the_subspace_turns():
    """Probe by probe, against H formed in full: errors that hold, and that are small.

    The two dominant directions of the first probe are lost by the last one.
    """
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((120, 4))
    y = (x @ rng.standard_normal((4, 3))).argmax(axis=1)
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(12, "tanh"), keras.layers.Dense(3)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.02), loss=loss)
    op = kc.HessianOperator(model, x, y)
    subspaces = [estimators.DominantSubspace() for _ in range(6)]
    errors, inside, dominant = [], [], []
    for _ in range(8):
        h = op.to_dense()
        dominant.append(np.linalg.eigh((h + h.T) / 2)[1][:, -2:])
        for seed, subspace in enumerate(subspaces):
            norm = subspace.update(op, 12, seed=seed).frobenius_norm
            errors.append(norm.value / np.linalg.norm(h) - 1)
            inside.append(
                abs(norm.value - np.linalg.norm(h)) <= 2 * norm.standard_error
            )
        model.fit(x, y, batch_size=12, epochs=1, verbose=0)
    cosine = np.linalg.svd(dominant[0].T @ dominant[-1])[1].min()
    assert cosine < 0.5
    errors = np.reshape(errors, (8, 6))[2:]
    assert np.sqrt(np.mean(errors**2)) < 0.02
    assert np.mean(inside) > 0.85


class Batches(keras.utils.PyDataset):
    """Eight samples, three at a time."""

    def __init__(self, x, y):
        super().__init__()
        self._x, self._y = x, y

    @property
    def num_batches(self):
        return 3

    def __getitem__(self, i):
        return self._x[3 * i : 3 * i + 3], self._y[3 * i : 3 * i + 3]


FIGURES = {
    "diagonal": lambda *a, **b: kc.hessian_diagonal(*a, **b).value[0],
    "trace": lambda *a, **b: kc.hessian_trace(*a, method="deflated", **b).value,
    "norm": lambda *a, **b: (
        kc.hessian_frobenius_norm(*a, method="deflated", num_matvecs=12, **b).value
    ),
    "eigenvalues": lambda *a, **b: kc.hessian_eigenvalues(*a, k=2, **b).value,
    "density": lambda *a, **b: (
        kc.hessian_spectral_density(*a, num_steps=4, num_vectors=2, **b).density
    ),
    "summary": lambda *a, **b: kc.curvature_summary(*a, print_fn=False, **b)[-1][
        "hessian_frobenius_norm"
    ],
}


@functools.cache
def operators(kind):
    """The samples at once, or in batches; all figures share what is compiled."""
    model, x, y, *_ = cases.mlp_relu()
    if kind == "arrays":
        return kc.HessianOperator(model, x, y)
    data = Batches(x, y)
    if kind == "dataset":
        tf = pytest.importorskip("tensorflow")
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(3)
    return kc.HessianOperator(model, data)


@pytest.mark.parametrize("kind", ["dataset", "py_dataset"])
@pytest.mark.parametrize("figure", FIGURES)
def test_whole_data_sets(figure, kind, capsys):
    """The same figures as from arrays, and a bar that tells the time left."""
    expected = FIGURES[figure](operators("arrays"), verbose=False)
    capsys.readouterr()
    found = FIGURES[figure](operators(kind), verbose=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    assert capsys.readouterr().out
