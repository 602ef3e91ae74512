"""The functions that users call: each picks an operator and an estimator.

All take a model and a batch of data (or a `HessianOperator`) and return an `Estimate`:
a value, its standard error, and the number of matrix-vector products. Further keyword
arguments go to `HessianOperator`: `sample_weight`, `class_weight`, `loss_fn`,
`variables`, `training`, `batch_size`, `hvp`, `jit_compile`.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from keras import ops

from keras_curvature import estimators
from keras_curvature.backend import Tensor
from keras_curvature.estimators import DeflatedMoments, Estimate, Moments
from keras_curvature.layerwise import (
    ExactDiagonal,
    GaussNewtonDiagonal,
    LayerwiseDiagonal,
    Plan,
    find_structure,
)
from keras_curvature.loss import FunctionLoss, TrainingLoss
from keras_curvature.operators import BasisDiagonal, HessianOperator
from keras_curvature.progress import Progress

P = ParamSpec("P")
T = TypeVar("T")

#: `method="auto"` computes a figure exactly if that takes at most this many products.
AFFORDABLE_MATVECS = 64

#: Exact figures that take more products than this must be asked for explicitly.
MAX_MATVECS = 10_000

#: The Gauss–Newton part is computed exactly, and only the rest sampled, if the model
#: has at most this many scalar outputs for each sample that is drawn, and the rest has
#: less than this share of the variance.
CONTROL_PASSES = 4
CONTROL_NOISE = 0.5

#: Keeps the draws of samples at the layers' outputs apart from those of estimators.
_PURPOSE = 4

#: Samples of the diagonal when neither a budget nor a tolerance is given.
LAYERWISE_SAMPLES = 8


def hessian_diagonal(
    model: Any,
    x: Any = None,
    y: Any = None,
    *,
    method: str = "auto",
    num_matvecs: int | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    max_matvecs: int = MAX_MATVECS,
    groups: Any = "joint",
    control_variate: bool | str = "auto",
    verbose: bool | str = "auto",
    **options: Any,
) -> Estimate:
    """The diagonal of the Hessian of the training loss.

    ```python
    estimate = kc.hessian_diagonal(model, x, y)
    for v, h in zip(model.trainable_variables, estimate.value):
        print(v.path, h.mean())
    ```

    | `method` | what it gives | price in products |
    |---|---|---|
    | `"exact"` | the diagonal; per layer the cheapest way | one per unit, or less |
    | `"layerwise"` | samples from signs at the layers' outputs | `num_matvecs` |
    | `"hutchinson"` | samples from signs on the parameters | `num_matvecs` |
    | `"gauss_newton"` | the Gauss–Newton diagonal, exact or sampled | one per output |

    `"layerwise"` is Curvature Propagation (Martens, Sutskever, Swersky 2012) as one
    Hessian-vector product per sample; a single one is often better than a hundred of
    Hutchinson's (Bekas, Kokiopoulou, Saad 2007), which are the fallback for models
    whose samples interact. The Gauss–Newton diagonal leaves the model's own curvature
    out; it is not negative if the loss is convex in the outputs.

    Args:
        model: a compiled Keras model, or a `HessianOperator`.
        x: inputs, or a data set; see `HessianOperator`.
        y: targets.
        method: see the table. `"auto"` is exact where that takes no more products
            than `num_matvecs` allows, or 64 without it; else layerwise.
        num_matvecs: number of samples of the random methods. Defaults to 8 for
            `"layerwise"`, 32 for `"hutchinson"`, and an exact result for
            `"gauss_newton"`.
        tolerance: relative standard error `‖errors‖ / ‖diagonal‖` at which to stop.
        seed: seed of the random signs.
        max_matvecs: an exact diagonal that takes more products is refused.
        groups: which layers of a layerwise sample share a product: `"joint"` for all,
            `"layer"` for a product per layer (less noise, most in transformers and
            residual networks, at a price that grows with depth), or a list of lists
            of layers or their names.
        control_variate: whether a layerwise sample is drawn of `H − G` alone and the
            exact diagonal of the Gauss–Newton part G added, for one backward pass
            per scalar output of the model. `"auto"` does so if those passes are few
            for the number of samples.
        verbose: whether to show progress; `"auto"` does if it takes long.
        **options: further arguments of `HessianOperator`.

    Returns:
        An `Estimate` whose value and standard error are lists of NumPy arrays, one
        for each variable, in units of loss per squared unit of the variable. For the
        operator of a function they have the structure of its parameters.

    Raises:
        ValueError: for an unknown method, inconsistent data, an exact diagonal
            beyond `max_matvecs`, or a control variate that the model does not have.
    """
    operator = operator_for(model, x, y, options)
    with Progress(operator.evaluation, verbose) as progress:
        moments = diagonal_moments(
            operator,
            method,
            num_matvecs,
            tolerance,
            seed,
            max_matvecs,
            progress,
            groups=groups,
            control_variate=control_variate,
        )
    estimate: Any = moments.diagonal
    result: Estimate = dataclasses.replace(
        estimate,
        value=_as_arrays(operator, estimate.value),
        standard_error=_as_arrays(operator, estimate.standard_error),
    )
    return result


def _keeping_still(
    function: Callable[Concatenate[HessianOperator, P], T],
) -> Callable[Concatenate[HessianOperator, P], T]:
    """A function of an operator that keeps still meanwhile."""

    @functools.wraps(function)
    def keeping(operator: HessianOperator, *args: P.args, **kwargs: P.kwargs) -> T:
        with operator.still():
            return function(operator, *args, **kwargs)

    return keeping


@_keeping_still
def diagonal_moments(
    operator: HessianOperator,
    method: str = "auto",
    num_matvecs: int | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    max_matvecs: int = MAX_MATVECS,
    progress: Progress | None = None,
    samples: int = LAYERWISE_SAMPLES,
    groups: Any = "joint",
    control_variate: bool | str = "auto",
) -> Moments:
    """`hessian_diagonal` and the trace that comes with it, for an operator.

    Args:
        operator: a `HessianOperator`.
        method: as for `hessian_diagonal`, like all that follow.
        num_matvecs: the budget.
        tolerance: relative standard error to reach.
        seed: seed of the random signs.
        max_matvecs: limit of the exact method.
        progress: told `progress(done, total)`; says whether to go on.
        samples: samples of `"layerwise"` when there is no budget.
        groups: which layers share a product.
        control_variate: whether the Gauss–Newton part is computed exactly.

    Returns:
        `Moments` whose tensors are flat and stay on the device, without a norm.
    """
    _check_choice(method, ("auto", "exact", "layerwise", "hutchinson", "gauss_newton"))
    by_layers = has_layers(operator)
    if method == "layerwise" and not by_layers:
        warnings.warn(
            "Curvature at the layers' outputs does not give the diagonal here: the "
            "samples of a batch interact (a layer mixes them), or there is no Keras "
            "model to open. Using random signs on the parameters (Hutchinson) instead.",
            stacklevel=3,
        )
    evaluation, plan = operator.evaluation, None
    if by_layers and method in ("auto", "exact"):
        plan = evaluation.once(ExactDiagonal).plan(seed)
    if method == "auto":
        cost = operator.shape[0] if plan is None else plan.num_matvecs
        budget = AFFORDABLE_MATVECS if num_matvecs is None else num_matvecs
        method = "exact" if cost <= budget else "layerwise"
    if method == "layerwise" and not by_layers:
        method = "hutchinson"
    if method == "hutchinson":
        return estimators.hutchinson_moments(
            operator,
            num_matvecs,
            tolerance,
            seed,
            operator.sizes,
            diagonal=True,
            progress=progress,
        )
    if method == "exact":
        return _exact_diagonal(operator, plan, max_matvecs, progress)
    sampled = num_matvecs is not None or tolerance is not None
    if method == "gauss_newton":
        gauss_newton = evaluation.once(GaussNewtonDiagonal)
        if not sampled:
            diagonal, passes = gauss_newton.compute(max_matvecs)
            return estimators.moments_of_diagonal(
                diagonal, passes, operator.sizes, operator.place
            )
        draw = gauss_newton.samples
    else:
        num_matvecs = num_matvecs if sampled else samples
        drawn = estimators.check_budget(num_matvecs, tolerance)
        control = _controlled(operator, plan, control_variate, drawn, seed)
        draw = _layerwise(operator, groups, control).samples
    key = estimators.seed_key(seed, _PURPOSE)
    return estimators.sampled_moments(
        lambda start, width: draw(key, start, width),
        num_matvecs,
        tolerance,
        operator.sizes,
        progress,
        operator.place,
    )


def hessian_trace(
    model: Any,
    x: Any = None,
    y: Any = None,
    *,
    method: str = "auto",
    num_matvecs: int | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    max_matvecs: int = MAX_MATVECS,
    verbose: bool | str = "auto",
    **options: Any,
) -> Estimate:
    """The trace of the Hessian of the training loss: the sum of its eigenvalues.

    | `method` | what it does |
    |---|---|
    | `"exact"` | the sum of the exact diagonal |
    | `"layerwise"` | the sum of the diagonal from signs at the layers' outputs |
    | `"deflated"` | the dominant subspace exactly, the rest from random signs |
    | `"hutchinson"` | random signs alone (Hutchinson 1990) |

    `"layerwise"` has the least noise for most networks. `"deflated"` is Hutch++
    (Meyer, Musco, Musco, Woodruff 2021) for a symmetric operator; it pays because a
    few large eigenvalues make most of the noise.

    Args:
        model: a compiled Keras model, or a `HessianOperator`.
        x: inputs, or a data set; see `HessianOperator`.
        y: targets.
        method: see the table. `"auto"` is exact where that takes no more products
            than `num_matvecs` allows, or 64 without it; else layerwise, or deflated
            where samples interact.
        num_matvecs: budget of products. Defaults to 8 for `"layerwise"` and 32 for
            the other random methods, or to 1024 with a tolerance.
        tolerance: relative standard error at which to stop.
        seed: seed of the random signs.
        max_matvecs: an exact trace that takes more products is refused.
        verbose: whether to show progress; `"auto"` does if it takes long.
        **options: further arguments of `HessianOperator`.

    Returns:
        An `Estimate` of a float, in the units of the Hessian. Its `blocks` are the
        traces of the variables' diagonal blocks, which add up to it.

    Raises:
        ValueError: for an unknown method, inconsistent data, or an exact trace
            beyond `max_matvecs`.
    """
    _check_choice(method, ("auto", "exact", "layerwise", "deflated", "hutchinson"))
    operator = operator_for(model, x, y, options)
    if method == "auto" and not has_layers(operator):
        method = "deflated"
    with Progress(operator.evaluation, verbose) as progress:
        if method == "deflated":
            return _deflated(operator, "trace", num_matvecs, tolerance, seed, progress)
        return diagonal_moments(
            operator, method, num_matvecs, tolerance, seed, max_matvecs, progress
        ).trace


def hessian_frobenius_norm(
    model: Any,
    x: Any = None,
    y: Any = None,
    *,
    method: str = "auto",
    num_matvecs: int | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    max_matvecs: int = MAX_MATVECS,
    verbose: bool | str = "auto",
    **options: Any,
) -> Estimate:
    """The Frobenius norm of the Hessian of the training loss, `sqrt(Σ H_ij²)`.

    | `method` | what it does |
    |---|---|
    | `"exact"` | P products with the basis vectors |
    | `"deflated"` | the dominant subspace exactly, the rest from random signs |
    | `"hutchinson"` | random signs alone |

    The standard error follows from that of the squared norm, which is what can be
    estimated without bias, by the delta method. `"deflated"` is described in
    `keras_curvature.estimators.DominantSubspace`.

    ```python
    norm = kc.hessian_frobenius_norm(model, x, y)
    own = norm.pairs.value.diagonal()           # of each variable's diagonal block
    between = 1 - (own**2).sum() / norm.value**2    # share between the variables
    ```

    Args:
        model: a compiled Keras model, or a `HessianOperator`.
        x: inputs, or a data set; see `HessianOperator`.
        y: targets.
        method: see the table. `"auto"` is exact for no more parameters than
            `num_matvecs`, or 64 without it; else deflated.
        num_matvecs: budget of products. Defaults to 32, or to 1024 with a tolerance.
        tolerance: relative standard error at which to stop.
        seed: seed of the random signs.
        max_matvecs: an exact norm that takes more products is refused.
        verbose: whether to show progress; `"auto"` does if it takes long.
        **options: further arguments of `HessianOperator`.

    Returns:
        An `Estimate` of a float, in the units of the Hessian. Its `blocks` are the
        norms of the variables' rows, whose squares add up to its square. Its `pairs`
        holds an array `(n, n)` for n variables: the norm of the part of H in the rows
        of one and the columns of another (`None` for `"hutchinson"`).

    Raises:
        ValueError: for an unknown method, inconsistent data, or an exact norm beyond
            `max_matvecs`.
    """
    _check_choice(method, ("auto", "exact", "deflated", "hutchinson"))
    operator = operator_for(model, x, y, options)
    if method == "auto":
        budget = AFFORDABLE_MATVECS if num_matvecs is None else num_matvecs
        method = "exact" if operator.shape[0] <= budget else "deflated"
    name, blocks = "frobenius_norm", operator.sizes
    with Progress(operator.evaluation, verbose) as progress:
        if method == "exact":
            _check_affordable(operator.shape[0], max_matvecs, 'method="deflated"')
            return estimators.exact_moments(operator, blocks, progress).frobenius_norm
        if method == "deflated":
            return _deflated(operator, name, num_matvecs, tolerance, seed, progress)
        return estimators.hutchinson_moments(
            operator,
            num_matvecs,
            tolerance,
            seed,
            blocks,
            progress=progress,
            judged=("squared norm",),
        ).frobenius_norm


def hessian_matrix(
    model: Any,
    x: Any = None,
    y: Any = None,
    *,
    max_parameters: int = 10_000,
    **options: Any,
) -> np.ndarray:
    """The Hessian of the training loss as a dense matrix, for small models.

    Args:
        model: a compiled Keras model, or a `HessianOperator`.
        x: inputs, or a data set; see `HessianOperator`.
        y: targets.
        max_parameters: refuses larger models; P parameters take P products and
            hold P² numbers.
        **options: further arguments of `HessianOperator`.

    Returns:
        NumPy array of shape (P, P), rows and columns in the order of
        `model.trainable_variables`, each flattened.

    Raises:
        ValueError: for a model with more than `max_parameters` parameters.
    """
    operator = operator_for(model, x, y, options)
    size = operator.shape[0]
    if size > max_parameters:
        gigabytes = size**2 * operator.dtype.itemsize / 2**30
        raise ValueError(
            f"The dense Hessian of {size:,} parameters takes {size:,} products and "
            f"{gigabytes:.1f} GiB, more than max_parameters={max_parameters:,} "
            "allows. Use products with `HessianOperator`, or raise `max_parameters`."
        )
    return operator.to_dense()


def has_layers(operator: HessianOperator) -> bool:
    """Whether the diagonal can be had from the layers' outputs."""
    return (
        isinstance(operator.evaluation.loss, TrainingLoss)
        and operator.hvp == "tape"
        and not operator.evaluation.once(find_structure).samples_interact
    )


def _layerwise(
    operator: HessianOperator, groups: Any, control_variate: bool
) -> LayerwiseDiagonal:
    """Layerwise samples, made once for each choice: they are compiled."""
    if groups not in ("joint", "layer"):
        return LayerwiseDiagonal(operator.evaluation, groups, control_variate)
    return operator.evaluation.once(_LAYERWISE[groups, control_variate])


_LAYERWISE = {
    (groups, control_variate): functools.partial(
        LayerwiseDiagonal, groups=groups, control_variate=control_variate
    )
    for groups in ("joint", "layer")
    for control_variate in (False, True)
}


def _controlled(
    operator: HessianOperator,
    plan: Plan | None,
    control_variate: bool | str,
    drawn: int,
    seed: int,
) -> bool:
    """Whether samples of the diagonal leave the Gauss–Newton part out."""
    num_outputs = operator.evaluation.once(find_structure).num_outputs
    few = num_outputs <= CONTROL_PASSES * min(drawn, 16)
    if not control_variate or (control_variate == "auto" and not few):
        return False
    plan = plan or operator.evaluation.once(ExactDiagonal).plan(seed)
    if control_variate == "auto":
        return plan.num_outputs < math.inf and plan.noise_without < CONTROL_NOISE
    if plan.num_outputs == math.inf:
        raise ValueError(
            "The Gauss–Newton part cannot be told from the rest of the Hessian: the "
            "outputs have no fixed size, or the loss mixes them with something else. "
            f"Received: control_variate={control_variate!r}; use False."
        )
    return True


def _exact_diagonal(
    operator: HessianOperator,
    plan: Plan | None,
    max_matvecs: int,
    progress: Progress | None,
) -> Moments:
    """From the layers' outputs if there is a plan, else by the parameter basis."""
    _check_affordable(
        operator.shape[0] if plan is None else plan.num_matvecs,
        max_matvecs,
        'method="hutchinson"' if plan is None else 'method="layerwise"',
    )
    evaluation, spent = operator.evaluation, operator.shape[0]
    if plan is not None:
        spent = plan.num_matvecs
        if progress is not None:
            progress.announce(spent)
        diagonal = evaluation.once(ExactDiagonal).compute(plan)
    elif isinstance(evaluation.loss, FunctionLoss) and operator.hvp == "tape":
        go_on: Callable[[int, int], bool] = progress or (lambda done, total: True)
        diagonal = evaluation.once(BasisDiagonal).compute(go_on)
    else:
        return estimators.exact_moments(operator, operator.sizes, progress)
    return estimators.moments_of_diagonal(
        diagonal, spent, operator.sizes, operator.place
    )


def _deflated(
    operator: HessianOperator,
    name: str,
    num_matvecs: int | None,
    tolerance: float | None,
    seed: int,
    progress: Progress,
) -> Estimate:
    """A figure from a dominant subspace, refined until it is precise enough."""
    budget = estimators.check_budget(num_matvecs, tolerance)
    first = budget if tolerance is None else min(24, budget)
    for figures, spent in subspace_looks(operator, first, budget, seed, progress):
        estimate: Estimate = getattr(figures, name)
        estimate = dataclasses.replace(estimate, num_matvecs=spent)
        error = estimate.relative_standard_error
        if tolerance is not None and error is not None and error <= tolerance:
            break
    return estimate


def subspace_looks(
    operator: HessianOperator,
    first: int,
    budget: int,
    seed: int,
    progress: Progress,
) -> Iterator[tuple[DeflatedMoments, int]]:
    """Looks at an operator, each from the subspace that the last one found.

    Each takes twice the products of the last.

    Args:
        operator: a `HessianOperator`.
        first: products of the first look.
        budget: products of all of them.
        seed: seed of the random signs.
        progress: when it says stop there are no further looks.

    Yields:
        `DeflatedMoments`, and the products spent so far.
    """
    subspace, spent, width = estimators.DominantSubspace(), 0, first
    while not spent or (width >= 2 and not progress.stopped):
        told = functools.partial(_told, progress, spent, budget)
        try:
            figures = subspace.update(
                operator, width, seed, operator.sizes, progress=told
            )
        except KeyboardInterrupt:
            if not (spent and progress.stopped):
                raise
            return
        spent += figures.num_matvecs
        yield figures, spent
        if figures.num_matvecs < width:
            return  # Stopped, or exact.
        width = min(2 * width, budget - spent)


def _told(progress: Progress, before: int, budget: int, done: int, _: Any) -> bool:
    """Tells of products after others."""
    return progress(before + done, budget)


def _check_affordable(cost: int, max_matvecs: int, alternative: str) -> None:
    if cost > max_matvecs:
        raise ValueError(
            f"The exact figure takes {cost:,} matrix-vector products, more than "
            f"max_matvecs={max_matvecs:,}. Use {alternative} for an estimate with an "
            "error bar, or raise `max_matvecs`."
        )


def _check_choice(method: str, choices: tuple[str, ...]) -> None:
    if method not in choices:
        raise ValueError(
            f"`method` must be one of {', '.join(map(repr, choices))}. Received: "
            f"method={method!r}."
        )


def operator_for(
    model: Any, x: Any, y: Any, options: dict[str, Any]
) -> HessianOperator:
    """The operator to work on: the one given, or a new one."""
    if isinstance(model, HessianOperator):
        if x is not None or y is not None or options:
            raise ValueError(
                "A HessianOperator brings its data and options along. Received: "
                f"x and y of types {type(x).__name__} and {type(y).__name__}, "
                f"options {sorted(options)}. Leave them out, or pass a model."
            )
        return model
    return HessianOperator(model, x, y, **options)


def _as_arrays(operator: HessianOperator, flat: Tensor | None) -> Any:
    """A flat tensor as NumPy arrays, in the structure of the parameters."""
    if flat is None:
        return None
    return operator.structured(ops.convert_to_numpy(flat))
