"""The functions that users call: each picks an operator and an estimator.

All take a model and a batch of data (or a `HessianOperator`) and return an `Estimate`:
a value, its standard error, and the number of matrix-vector products. Further keyword
arguments go to `HessianOperator`: `sample_weight`, `class_weight`, `loss_fn`,
`variables`, `training`, `batch_size`, `hvp`, `jit_compile`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_curvature import estimators
from keras_curvature.axes import Axes
from keras_curvature.axes import check as check_axes
from keras_curvature.backend import Tensor, array, on
from keras_curvature.deflated import deflated
from keras_curvature.diagonal import (
    AFFORDABLE_MATVECS,
    MAX_MATVECS,
    check_affordable,
    check_choice,
    chosen,
    diagonal_moments,
    method_of_trace,
)
from keras_curvature.estimators import Estimate
from keras_curvature.operators import HessianOperator
from keras_curvature.progress import Progress


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
    axes: Sequence[Any] | None = None,
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
    | `"shrunk"` | the estimate of least expected error | `num_matvecs` |
    | `"split"` | the same without bias | `num_matvecs` |
    | `"layerwise"` | samples from signs at the layers' outputs | `num_matvecs` |
    | `"hutchinson"` | samples from signs on the parameters | `num_matvecs` |
    | `"deflated"` | a dominant subspace exactly, the rest sampled | `num_matvecs` |
    | `"gauss_newton"` | the Gauss–Newton diagonal, exact or sampled | one per output |

    `"shrunk"` and `"split"` sample the Gauss–Newton part, which is quiet and most of
    the diagonal, by squared gradients, and the rest by random signs. The rest is small
    and noisy: `"shrunk"` believes it as far as its samples agree, see
    `keras_curvature.estimators.shrinkage`, and counts what that leaves out in the
    standard error, which is that of the distance from the truth then. Where the parts
    cancel it takes samples of both together. Both methods need a loss that is convex in
    the model's outputs, such as a squared error or a cross-entropy.

    `"layerwise"` is Curvature Propagation (Martens, Sutskever, Swersky 2012) as one
    Hessian-vector product per sample; a single one is often better than a hundred of
    Hutchinson's (Bekas, Kokiopoulou, Saad 2007). Hutchinson's are the fallback for
    models whose samples interact, as in BatchNormalization, where neither these nor
    shrunk ones are to be had. `"deflated"` knows that part of H exactly which its
    dominant subspace tells, see `keras_curvature.estimators.left_out`: with sixteen
    products or more it is the most precise by far where few eigenvalues dominate, as in
    small networks. The Gauss–Newton diagonal leaves the model's own curvature out; it
    is not negative if the loss is convex in the outputs.

    Args:
        model: a compiled Keras model, or a `HessianOperator`.
        x: inputs, or a data set; see `HessianOperator`.
        y: targets.
        method: see the table. `"auto"` is exact where that takes no more products
            than `num_matvecs` allows, or 64 without it; else shrunk, or layerwise
            where the parts cannot be told from each other. From sixteen products on
            deflated is tried beside it once, and what told the smaller error is kept;
            products of that trial are not counted.
        num_matvecs: number of samples of the random methods; for `"shrunk"` and
            `"split"` half of them go into the rest (seven eighths into both parts
            together where `"shrunk"` samples those), and twice as many backward passes
            as are left into the Gauss–Newton part. Defaults to 8, to 32 for
            `"hutchinson"` and `"deflated"`, and to an exact result for
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
        axes: list with an entry for each variable, whose diagonal is taken in other
            coordinates: `None` for its entries, or a pair of orthogonal matrices A
            and B, of which one may be `None` for ones. The variable is read as a
            matrix W with as many rows as A, and the diagonal is that by `Aᵀ W B`, in
            the variable's shape. `DiagonalNewton().curvature_axes()` is such a list.
            `"exact"` takes a product for each entry then, and `"auto"` only where
            those are few.
        verbose: whether to show progress; `"auto"` does if it takes long.
        **options: further arguments of `HessianOperator`.

    Returns:
        An `Estimate` whose value and standard error are lists of NumPy arrays, one
        for each variable, in units of loss per squared unit of the variable. For the
        operator of a function they have the structure of its parameters. Its `ways`
        tell for each variable how it was had, its `relative_standard_errors` how
        noisy it is.

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
            axes=None if axes is None else _axes_of(operator, axes),
        )
    estimate: Any = moments.diagonal
    result: Estimate = dataclasses.replace(
        estimate,
        value=_as_arrays(operator, estimate.value),
        standard_error=_as_arrays(operator, estimate.standard_error),
    )
    return result


def _axes_of(operator: HessianOperator, axes: Sequence[Any]) -> list[Axes]:
    """Axes as a user gave them, as tensors next to the operator."""
    layout = operator.evaluation.loss.layout
    found: list[Axes] = []
    with on(operator.place):
        for given, dtype in zip(
            check_axes(axes, layout.shapes), layout.dtypes, strict=True
        ):
            if given is None:
                found.append(None)
                continue
            left, right = (None if q is None else array(q, dtype) for q in given)
            found.append((left, right))
    return found


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
    | `"split"` | that of the Gauss–Newton part, and that of the rest |
    | `"layerwise"` | the sum of the diagonal from signs at the layers' outputs |
    | `"deflated"` | the dominant subspace exactly, the rest from random signs |
    | `"hutchinson"` | random signs alone (Hutchinson 1990) |

    `"split"` has the least noise for most networks. `"deflated"` is XTrace (Epperly,
    Tropp, Webber 2024) for a symmetric operator, see
    `keras_curvature.estimators.left_out`; it pays because a few large eigenvalues make
    most of the noise.

    Args:
        model: a compiled Keras model, or a `HessianOperator`.
        x: inputs, or a data set; see `HessianOperator`.
        y: targets.
        method: see the table. `"auto"` is exact where that takes no more products
            than `num_matvecs` allows, or 64 without it; else split where the parts can
            be told from each other, layerwise where they cannot, and deflated where
            samples interact, too.
        num_matvecs: budget of products. Defaults to 8 for the first three and 32 for
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
    choices = "auto", "exact", "split", "layerwise", "deflated", "hutchinson"
    check_choice(method, choices)
    operator = operator_for(model, x, y, options)
    if method == "auto":
        method, _ = chosen(operator, num_matvecs, seed)
        method = method_of_trace(operator, method)
    with Progress(operator.evaluation, verbose) as progress:
        if method == "deflated":
            sizes = operator.sizes
            return deflated(
                operator, "trace", num_matvecs, tolerance, seed, sizes, progress
            ).trace
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
    check_choice(method, ("auto", "exact", "deflated", "hutchinson"))
    operator = operator_for(model, x, y, options)
    if method == "auto":
        budget = AFFORDABLE_MATVECS if num_matvecs is None else num_matvecs
        method = "exact" if operator.shape[0] <= budget else "deflated"
    name, blocks = "frobenius_norm", operator.sizes
    with Progress(operator.evaluation, verbose) as progress:
        if method == "exact":
            check_affordable(operator.shape[0], max_matvecs, 'method="deflated"')
            return estimators.exact_moments(operator, blocks, progress).frobenius_norm
        if method == "deflated":
            return deflated(
                operator, name, num_matvecs, tolerance, seed, blocks, progress
            ).frobenius_norm
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
