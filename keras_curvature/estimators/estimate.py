"""`Estimate`: a figure, how far it may be off, and what it cost."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from keras import ops, tree


@dataclasses.dataclass(frozen=True, eq=False)
class Estimate:
    """A figure with its standard error and its price.

    Attributes:
        value: a float, a tensor of shape `(P,)`, or a nested structure of arrays.
        standard_error: standard deviation of `value` over the random directions,
            estimated from their spread; in the form of `value`. Zero for an exact
            figure, `None` when a single sample leaves nothing to compare.
        num_matvecs: number of products with the operator that were spent.
        blocks: shares of consecutive groups of coordinates, as `Estimate`s in the
            order of `block_sizes`; empty when none were asked for.
        pairs: for a norm with blocks, an `Estimate` of an array `(blocks, blocks)`:
            the norm of each part of the matrix, rows of one block and columns of
            another; the diagonal blocks' on its diagonal. `None` where unknown.
        ways: for a diagonal, from the name of each variable to the way it was had, in
            words; empty for other figures.
    """

    value: Any
    standard_error: Any
    num_matvecs: int
    blocks: tuple["Estimate", ...] = ()
    pairs: "Estimate | None" = None
    ways: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def relative_standard_error(self) -> float | None:
        """`‖standard_error‖ / ‖value‖` (Euclidean norms), or `None` if unknown.

        Zero for an exact figure, whatever its value; infinite for an uncertain
        figure of zero.
        """
        if self.standard_error is None:
            return None
        return ratio(_norm(self.standard_error), _norm(self.value))

    @property
    def relative_standard_errors(self) -> list[float] | None:
        """`relative_standard_error` of each array of the value, in their order."""
        if self.standard_error is None:
            return None
        errors, values = tree.flatten(self.standard_error), tree.flatten(self.value)
        return [ratio(_norm(e), _norm(v)) for e, v in zip(errors, values, strict=True)]

    def __repr__(self) -> str:
        plural = "" if self.num_matvecs == 1 else "s"
        price = f"{self.num_matvecs} matvec{plural}"
        if isinstance(self.value, (int, float)):
            return self._scalar(price)
        parts = tree.flatten(self.value)
        size = sum(math.prod(p.shape) for p in parts)
        if not size:
            return f"no entries ({price})"
        mean = sum(float(ops.sum(p)) for p in parts) / size
        parts = [p for p in parts if math.prod(p.shape)]
        low = min(float(ops.min(p)) for p in parts)
        high = max(float(ops.max(p)) for p in parts)
        error = self.relative_standard_error
        if error is None:
            quality = "no standard error from one sample"
        elif error == 0:
            quality = "exact"
        else:
            quality = f"relative standard error {error:.2g}"
        return (
            f"{size} entries in [{low:.4g}, {high:.4g}], mean {mean:.4g} "
            f"({quality}, {price})"
        )

    def _scalar(self, price: str) -> str:
        if self.standard_error is None:
            return f"{self.value:.6g} (no standard error from one sample, {price})"
        if self.standard_error == 0:
            return f"{self.value:.6g} (exact, {price})"
        error = self.standard_error
        if not (math.isfinite(error) and math.isfinite(self.value)):
            return f"{self.value:.4g} ± {error:.2g} ({price})"
        # As many digits of the value as two digits of its error allow.
        exponent = math.floor(math.log10(error))
        if self.value and not -5 < math.log10(abs(self.value)) < 7:
            digits = math.floor(math.log10(abs(self.value))) - exponent + 1
            return f"{self.value:.{max(digits, 0)}e} ± {error:.1e} ({price})"
        decimals = min(max(1 - exponent, 0), 9)
        return f"{self.value:.{decimals}f} ± {error:.{decimals}f} ({price})"


def ratio(error: float, value: float) -> float:
    """`error / value` of two norms, where no error at all is zero of anything."""
    if error == 0:
        return 0.0
    return error / value if value else math.inf


def _norm(value: Any) -> float:
    if isinstance(value, (int, float)):
        return abs(float(value))
    # Not `ops.norm`: PyTorch's is off by up to 2 % after 10^7 entries in float32.
    return math.sqrt(sum(float(ops.sum(ops.square(p))) for p in tree.flatten(value)))
