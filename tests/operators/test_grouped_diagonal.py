"""Samples of the diagonal, group by group."""

import cases
import numpy as np
import pytest

import keras_curvature as kc
from keras_curvature.operators import GroupedDiagonal


@pytest.fixture(scope="module")
def operator(module_float64):
    case = cases.CASES["transformer"]()
    return kc.HessianOperator(case.model, case.x, case.y, case.sample_weight)


def samples(operator, groups, count=240):
    sampler = GroupedDiagonal(operator.layer_outputs, groups)
    parts = [sampler.diagonal_samples(0, i, 4).numpy() for i in range(0, count, 4)]
    return np.concatenate(parts, axis=1)


def test_samples_are_unbiased(operator):
    drawn = samples(operator, "layer")
    truth = np.diag(operator.to_dense())
    error = drawn.std(axis=1, ddof=1) / np.sqrt(drawn.shape[1])
    # 240 samples of about a hundred entries: 4.5 is passed once in a thousand runs.
    assert np.all(np.abs(drawn.mean(axis=1) - truth) <= 4.5 * error + 1e-12)


def test_a_group_per_layer_has_less_noise_than_a_joint_product(operator):
    truth = np.diag(operator.to_dense())[:, None]
    joint = np.concatenate(
        [operator.layer_outputs.diagonal_samples(0, i, 4) for i in range(0, 240, 4)],
        axis=1,
    )
    grouped = samples(operator, "layer")
    assert np.square(grouped - truth).sum() < np.square(joint - truth).sum()


def test_one_group_of_all_layers_is_the_joint_product(operator):
    layers = {v.path.rpartition("/")[0] for v in operator.variables}
    grouped = samples(operator, [sorted(layers)], count=4)
    joint = operator.layer_outputs.diagonal_samples(0, 0, 4).numpy()
    np.testing.assert_allclose(grouped, joint, rtol=1e-9, atol=1e-12)


def test_hessian_diagonal_takes_groups(operator):
    estimate = kc.hessian_diagonal(
        operator, method="layerwise", groups="layer", num_matvecs=4
    )
    mean = samples(operator, "layer", count=4).mean(axis=1)
    np.testing.assert_allclose(operator.flatten(estimate.value), mean, rtol=1e-6)
    assert estimate.num_matvecs == 4


@pytest.mark.parametrize("groups", ["layers", [["no such layer"]], ["dense"]])
def test_unknown_groups_are_refused(operator, groups):
    with pytest.raises(ValueError, match="Received: groups="):
        GroupedDiagonal(operator.layer_outputs, groups)
