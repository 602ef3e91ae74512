"""The diagonal of a Hessian: which way it is had, and the trace that comes with it."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from keras_curvature import estimators
from keras_curvature.axes import Axes
from keras_curvature.deflated import deflated
from keras_curvature.estimators import Moments
from keras_curvature.evaluation import Evaluation
from keras_curvature.layerwise import (
    ExactDiagonal,
    GaussNewtonDiagonal,
    LayerwiseDiagonal,
    Plan,
    find_structure,
    least_matvecs,
    looks_curved,
    survey,
)
from keras_curvature.loss import FunctionLoss, TrainingLoss
from keras_curvature.operators import BasisDiagonal, HessianOperator, TurnedOperator
from keras_curvature.progress import Progress
from keras_curvature.split_diagonal import WHOLE, SplitMoments

P = ParamSpec("P")
T = TypeVar("T")

#: How a diagonal may be had.
METHODS = (
    "auto",
    "exact",
    "shrunk",
    "split",
    "layerwise",
    "hutchinson",
    "deflated",
    "gauss_newton",
)

#: Those whose price is a number of samples.
SAMPLED = ("shrunk", "split", "layerwise", "hutchinson", "deflated")

#: `method="auto"` computes a figure exactly if that takes at most this many products.
AFFORDABLE_MATVECS = 64

#: Exact figures that take more products than this must be asked for explicitly.
MAX_MATVECS = 10_000

#: The Gauss–Newton part is computed exactly, and only the rest sampled, if the model
#: has at most this many scalar outputs for each sample that is drawn, and the rest has
#: less than this share of the variance.
CONTROL_PASSES = 4
CONTROL_NOISE = 0.5

#: Products from which a dominant subspace may tell more of a diagonal than samples do,
#: and how many the two are compared with at most.
DEFLATED_FROM, DEFLATED_TRIAL = 16, 64

#: Bound for the elements of the vectors that a subspace keeps for that (0.5 GiB).
KEPT_ELEMENTS = 2**27

#: The two are compared anew when the error is this many times what it was.
_WORSE = 2

#: Keeps the draws of samples at the layers' outputs apart from those of estimators.
_PURPOSE = 4

_NO_LAYERS = (
    "Curvature at the layers' outputs does not give the diagonal here: the samples of "
    "a batch interact (a layer mixes them), or there is no Keras model to open. Using "
    "random signs on the parameters (Hutchinson) instead."
)

#: Samples of the diagonal when neither a budget nor a tolerance is given.
LAYERWISE_SAMPLES = 8


def _keeping_still(
    function: Callable[Concatenate[HessianOperator, P], T],
) -> Callable[Concatenate[HessianOperator, P], T]:
    """A function of an operator that keeps still meanwhile."""

    @functools.wraps(function)
    def keeping(operator: HessianOperator, *args: P.args, **kwargs: P.kwargs) -> T:
        with operator.still():
            return function(operator, *args, **kwargs)

    return keeping


def chosen(
    operator: HessianOperator,
    num_matvecs: int | None = None,
    seed: int = 0,
    usual: bool = True,
    in_axes: bool = False,
) -> tuple[str, Plan | None]:
    """What `method="auto"` stands for, unless a subspace tells more.

    Args:
        operator: a `HessianOperator`.
        num_matvecs: the budget.
        seed: seed of the certificates of the plan.
        usual: whether nothing was asked for that only layerwise samples know.
        in_axes: whether the diagonal is taken in axes of the variables, where no plan
            is known and an exact one takes a product for each entry.

    Returns:
        A method; and the plan of the exact diagonal, where that is known.
    """
    budget = AFFORDABLE_MATVECS if num_matvecs is None else num_matvecs
    cost = operator.shape[0]
    if in_axes:
        return "exact" if cost <= budget else sampled_method(operator, usual), None
    if _opens(operator) and cost > budget:
        # Certificates take long to compile: not for a plan that is dear with all.
        structure = operator.evaluation.once(survey)[0]
        cost = least_matvecs(structure)
        if cost <= budget and usual and looks_curved(structure, budget):
            # Samples that are needed anyway tell most of what is curved.
            cost = least_matvecs(structure, _curved(operator))
    plan = None
    if cost <= budget:
        if has_layers(operator):
            plan = operator.evaluation.once(ExactDiagonal).plan(seed)
        cost = operator.shape[0] if plan is None else plan.num_matvecs
        if cost <= budget:
            return "exact", plan
    return sampled_method(operator, usual), plan


def _curved(operator: HessianOperator) -> set[int]:
    """Variables, by number, that are known to be curved."""
    if not (has_layers(operator) and is_split(operator)):
        return set()
    return operator.evaluation.once(SplitMoments).curved(operator)


def sampled_method(operator: HessianOperator, usual: bool = True) -> str:
    """The method of samples that has the least error.

    Where samples meet in the statistics of a batch, samples at the layers' outputs are
    noisier than random signs in some layers.

    Args:
        operator: a `HessianOperator`.
        usual: whether nothing was asked for that only layerwise samples know.
    """
    if usual and is_split(operator):
        return "shrunk"
    # Known before it is found out whether samples interact, which takes longer.
    meet = _opens(operator) and operator.evaluation.once(survey)[0].statistics
    if usual and meet or not has_layers(operator):
        return "hutchinson"
    return "layerwise"


def method_of_trace(operator: HessianOperator, method: str) -> str:
    """What is better than a method of the diagonal if only the sum is asked for.

    Args:
        operator: a `HessianOperator`.
        method: what was chosen for the diagonal.
    """
    if method == "hutchinson":
        return "deflated"
    if method == "shrunk":
        # Where samples interact a subspace tells as much, and nothing new is compiled.
        return "split" if _split(operator).parts.alike else "deflated"
    return method


def is_split(operator: HessianOperator) -> bool:
    """Whether the Gauss–Newton part of the diagonal can be told from the rest."""
    return _opens(operator) and operator.evaluation.once(SplitMoments).possible


def _split(operator: HessianOperator) -> SplitMoments:
    if not is_split(operator):
        raise ValueError(
            "The Gauss–Newton part of the Hessian cannot be told from the rest: it "
            "needs a Keras model whose loss is convex in outputs of a fixed size, as "
            "squared errors and cross-entropies are, does not mix them with something "
            f"else, and has second derivatives. Received: {operator!r}. Use "
            'method="layerwise" or method="hutchinson".'
        )
    return operator.evaluation.once(SplitMoments)


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
    axes: Sequence[Axes] | None = None,
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
        axes: of each variable, as tensors.

    Returns:
        `Moments` whose tensors are flat and stay on the device, without a norm.
    """
    check_choice(method, METHODS)
    usual = groups == "joint" and control_variate == "auto"
    sampled = num_matvecs is not None or tolerance is not None
    plan, turned = None, None
    if axes is not None:
        axes = list(axes)
        turned = TurnedOperator(operator, operator.evaluation.loss.layout, axes)
    if method == "auto":
        method, plan = chosen(
            operator, num_matvecs, seed, usual, in_axes=turned is not None
        )
        budget = estimators.check_budget(num_matvecs, tolerance) if sampled else samples
        enough = budget >= DEFLATED_FROM
        if enough and usual and method in SAMPLED and keeps(operator, budget):
            return _of_choice(operator, method, budget, tolerance, seed, progress, axes)
    if method == "layerwise" and not has_layers(operator):
        warnings.warn(_NO_LAYERS, stacklevel=3)
        method = "hutchinson"
    if method == "exact" and turned is not None:
        check_affordable(operator.shape[0], max_matvecs, 'method="layerwise"')
        moments = estimators.exact_moments(turned, operator.sizes, progress)
        return _told(moments, operator, _EXACT)
    if method == "exact":
        if plan is None and has_layers(operator):
            plan = operator.evaluation.once(ExactDiagonal).plan(seed)
        moments = _exact_diagonal(operator, plan, max_matvecs, progress)
        return _told(moments, operator, _EXACT, plan.ways if plan else None)
    if method == "hutchinson":
        moments = estimators.hutchinson_moments(
            turned or operator,
            num_matvecs,
            tolerance,
            seed,
            operator.sizes,
            diagonal=True,
            progress=progress,
        )
        return _told(moments, operator, _SAMPLED)
    if method == "deflated":
        found = deflated(
            turned or operator,
            "diagonal",
            num_matvecs,
            tolerance,
            seed,
            operator.sizes,
            progress,
        )
        return _of_subspace(operator, found)
    if method in ("shrunk", "split"):
        split, shrink = _split(operator), method == "shrunk"
        kinds = split.kinds(operator, shrink)
        budget = estimators.check_budget(num_matvecs, tolerance) if sampled else samples
        moments = split.moments(
            operator, budget, tolerance, seed, shrink, progress, axes
        )
        rest = " and ".join(f"sampled along {_PLACES[kind]}" for kind in kinds)
        return _told(moments, operator, f"Gauss-Newton part, and the rest {rest}")
    if method == "gauss_newton":
        told = "Gauss-Newton, sampled"
        if sampled and is_split(operator):
            # In closed form, for any number of classes.
            draw = _split(operator).parts.gauss_newton
        else:
            gauss_newton = operator.evaluation.once(GaussNewtonDiagonal)
            if not sampled:
                diagonal, passes = gauss_newton.compute(max_matvecs, axes)
                moments = estimators.moments_of_diagonal(
                    diagonal, passes, operator.sizes, operator.place
                )
                return _told(moments, operator, "Gauss-Newton, exact")
            draw = gauss_newton.samples
        ways: Mapping[str, str] | None = None
    else:
        num_matvecs = num_matvecs if sampled else samples
        drawn = estimators.check_budget(num_matvecs, tolerance)
        control = turned is None and _controlled(
            operator, plan, control_variate, drawn, seed
        )
        draw, told = _layerwise(operator, groups, control).samples, _SAMPLED
        told = f"Gauss-Newton part exact, the rest {told}" if control else told
        ways = operator.evaluation.once(find_structure).coverage
    key = estimators.seed_key(seed, _PURPOSE)
    moments = estimators.sampled_moments(
        lambda start, width: draw(key, start, width, axes),
        num_matvecs,
        tolerance,
        operator.sizes,
        progress,
        operator.place,
    )
    return _told(moments, operator, told, ways)


def keeps(operator: HessianOperator, num_matvecs: int) -> bool:
    """Whether a diagonal may be had from as many products, all kept in memory."""
    return num_matvecs * operator.shape[0] <= KEPT_ELEMENTS


def with_subspace(
    operator: HessianOperator, diagonal: Moments, subspace: Moments
) -> Moments:
    """Moments of samples, or those that a subspace tells besides other figures.

    Args:
        operator: a `HessianOperator`.
        diagonal: moments of samples.
        subspace: the same from a subspace.

    Returns:
        Those whose diagonal tells the smaller error.
    """
    found = estimators.quieter(diagonal, subspace)
    return diagonal if found is diagonal else _of_subspace(operator, found)


class _Choices:
    """What told the smaller error for how many products, and how large that was."""

    def __init__(self, _: Evaluation):
        self.made: dict[tuple[str, int, bool], tuple[str, float]] = {}


def _of_choice(
    operator: HessianOperator,
    method: str,
    budget: int,
    tolerance: float | None,
    seed: int,
    progress: Progress | None,
    axes: list[Axes] | None,
) -> Moments:
    """By samples or by a subspace, whichever told the smaller error.

    Args:
        operator: a `HessianOperator`.
        method: that of the samples.
        budget: number of products.
        tolerance: relative standard error at which to stop.
        seed: seed of the random directions.
        progress: told of the products.
        axes: of each variable, as tensors.
    """

    def moments(method: str, budget: int, tolerance: float | None) -> Moments:
        return diagonal_moments(
            operator, method, budget, tolerance, seed, progress=progress, axes=axes
        )

    trial = min(budget, DEFLATED_TRIAL)
    made = operator.evaluation.once(_Choices).made
    key = method, trial, axes is not None
    if key not in made:
        best, found = method, moments(method, trial, None)
        if progress is None or not progress.stopped:
            try:
                other = moments("deflated", trial, None)
            except KeyboardInterrupt:
                if progress is None:
                    raise
                return found
            if estimators.quieter(found, other) is other:
                best, found = "deflated", other
        made[key] = best, estimators.error_of_diagonal(found)
        if trial == budget:
            return found
    best, before = made[key]
    found = moments(best, budget, tolerance)
    if tolerance is None and estimators.error_of_diagonal(found) > _WORSE * before:
        del made[key]
    return found


def _of_subspace(operator: HessianOperator, found: Moments) -> Moments:
    return _told(found, operator, f"dominant subspace exact, the rest {_SAMPLED}")


#: In words, with the place of a variable's directions filled in.
_EXACT, _SAMPLED = "exact, by {}", "sampled along {}"

#: What they are called in a plan, as kinds of samples, and for users.
_PLACES = {
    "outputs": "layer outputs",
    "layer outputs": "layer outputs",
    "layers": "layer outputs",
    "parameters": "parameters",
    WHOLE: "parameters, with it",
    "gauss_newton": "model outputs",
}


def _told(
    moments: Moments,
    operator: HessianOperator,
    words: str,
    ways: Mapping[str, str] | None = None,
) -> Moments:
    """Moments whose diagonal says which way each variable went.

    Args:
        moments: the moments.
        operator: the operator.
        words: the way, perhaps with a place to fill in.
        ways: the place of each variable by its name; parameters if not given.
    """
    names = operator.evaluation.loss.layout.names
    ways = ways or dict.fromkeys(names, "parameters")
    diagonal: Any = moments.diagonal
    told = {name: words.format(_PLACES[ways[name]]) for name in names}
    return dataclasses.replace(
        moments, diagonal=dataclasses.replace(diagonal, ways=told)
    )


def has_layers(operator: HessianOperator) -> bool:
    """Whether the diagonal can be had from the layers' outputs."""
    return (
        _opens(operator)
        and not operator.evaluation.once(find_structure).samples_interact
    )


def _opens(operator: HessianOperator) -> bool:
    """Whether there is a model whose layers can be opened."""
    loss = operator.evaluation.loss
    return isinstance(loss, TrainingLoss) and operator.hvp == "tape"


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
    check_affordable(
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


def check_affordable(cost: int, max_matvecs: int, alternative: str) -> None:
    """Refuses an exact figure that takes more products than allowed."""
    if cost > max_matvecs:
        raise ValueError(
            f"The exact figure takes {cost:,} matrix-vector products, more than "
            f"max_matvecs={max_matvecs:,}. Use {alternative} for an estimate with an "
            "error bar, or raise `max_matvecs`."
        )


def check_choice(method: str, choices: tuple[str, ...]) -> None:
    """Refuses a method that is none of the choices."""
    if method not in choices:
        raise ValueError(
            f"`method` must be one of {', '.join(map(repr, choices))}. Received: "
            f"method={method!r}."
        )
