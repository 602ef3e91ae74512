"""Every tag in the event files, named once.

TensorBoard groups charts by the part of a tag before the first slash, so a group is one
figure for all layers: the layers of a figure are compared on one page, and a deep model
has no more groups than a small one. Groups are sorted by name, which is why those that
say how certain the others are begin with a late letter.

| tag | key of the record | what it is |
|---|---|---|
| `hessian/trace` | `hessian_trace` | sum of the eigenvalues |
| `hessian/frobenius_norm` | `hessian_frobenius_norm` | root of the sum of squares |
| `hessian/max_eigenvalue` | `hessian_max_eigenvalue` | curvature of the stiffest direction |
| `hessian/two_over_learning_rate` | `two_over_learning_rate` | where gradient descent turns unstable; only for plain gradient descent |
| `hessian/preconditioned_max_eigenvalue` | `hessian_preconditioned_max_eigenvalue` | the same as the optimizer sees it |
| `hessian/critical_sharpness` | `critical_sharpness` | sharpness that a step of the optimizer meets, on request |
| `hessian/stability_threshold` | `stability_threshold` | curvature above which the optimizer is unstable |
| `uncertainty/<figure>` | `hessian_trace_standard_error`, `hessian_frobenius_norm_standard_error`, `hessian_max_eigenvalue_error`, `hessian_preconditioned_max_eigenvalue_error`, `critical_sharpness_error` | standard error; for eigenvalues the bound that the residual gives, for the critical sharpness half the interval |
| `uncertainty_band/<figure>_lower`, `_upper` | the first three | value ∓ 2 standard errors; value ∓ bound for the eigenvalue; the value itself where no error is known |
| `probe/loss`, `probe/learning_rate`, `probe/seconds`, `probe/num_matvecs`, `probe/overhead` | `loss`, `learning_rate`, `seconds`, `num_matvecs`, `overhead` | loss on the probe batch; what the probe cost |
| `layer_diagonal_mean/<layer>` | `diagonal_mean` | mean of the diagonal |
| `layer_diagonal_mean_abs/<layer>` | `diagonal_mean_abs` | mean of its absolute values |
| `layer_diagonal_max/<layer>`, `layer_diagonal_min/<layer>` | `diagonal_max`, `diagonal_min` | its extremes |
| `layer_negative_share/<layer>` | `negative_share` | share of negative entries, 0 to 1 |
| `layer_trace/<layer>` | `trace` | sum of the diagonal |
| `layer_frobenius_share/<layer>` | `frobenius_share` | share of the squared Frobenius norm in the layer's rows, 0 to 1 |
| `uncertainty_of_layer/diagonal_mean/<layer>`, `uncertainty_of_layer/trace/<layer>` | `diagonal_mean_standard_error`, `trace_standard_error` | standard errors |
| `variable_<as above>/<path>`, `uncertainty_of_variable/<as above>/<path>` | the same, per variable | on request |
| `diagonal/<layer>`, `diagonal_of_variable/<path>` | `histogram` | histogram of the diagonal, on a signed logarithmic axis |
| `diagonal_heat_map` | `diagonal_mean_abs` | image, layers over steps |
| `spectral_density` | `spectral_density` | image of the density of all eigenvalues, on request |
| `optimizer/<key>` | `optimizer` | whatever the optimizer tells about itself |
| `curvature_layers` | `layers` | names and sizes of the layers, in their order in the model |
| `mode` | `mode` | text: how the layers ran |

A figure that is missing from the record, or None, has no tag.
"""  # noqa: E501

import dataclasses

PLUGIN_NAME = "curvature"
"""Our page's name to TensorBoard, and the owner of `LAYER_TABLE`."""

SUBDIRECTORY = "curvature"
"""The run's directory below `log_dir`, next to Keras' `train` and `validation`."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """One scalar of the record and the tag it is written under.

    Attributes:
        key: The record's key.
        tag: The whole tag of a global figure; the group of a figure that exists once
            for each layer, to which a slash and the layer's name are added.
        description: What TensorBoard shows behind the chart's information mark.
    """

    key: str
    tag: str
    description: str

    def of(self, name: str) -> str:
        """The tag of this figure for one layer or variable."""
        return f"{self.tag}/{name}"


@dataclasses.dataclass(frozen=True)
class Band:
    """A figure with an error, and the tags of the interval drawn around it.

    Attributes:
        key: The record's key of the value.
        error_key: The record's key of its error.
        factor: How many errors the interval extends to each side.
    """

    key: str
    error_key: str
    factor: float

    @property
    def _name(self) -> str:
        return self.key.removeprefix("hessian_")

    @property
    def value(self) -> str:
        """The tag of the value."""
        return f"hessian/{self._name}"

    @property
    def lower(self) -> str:
        """The tag of the lower end."""
        return f"uncertainty_band/{self._name}_lower"

    @property
    def upper(self) -> str:
        """The tag of the upper end."""
        return f"uncertainty_band/{self._name}_upper"


TRACE = Figure(
    "hessian_trace",
    "hessian/trace",
    "Trace of the Hessian of the training loss on the probe batch: the sum of its "
    "eigenvalues.",
)
FROBENIUS_NORM = Figure(
    "hessian_frobenius_norm",
    "hessian/frobenius_norm",
    "Frobenius norm of the Hessian: the root of the sum of its squared eigenvalues.",
)
MAX_EIGENVALUE = Figure(
    "hessian_max_eigenvalue",
    "hessian/max_eigenvalue",
    "Largest eigenvalue of the Hessian. Gradient descent is unstable along its "
    "eigenvector while it exceeds 2 / learning rate.",
)
TWO_OVER_LEARNING_RATE = Figure(
    "two_over_learning_rate",
    "hessian/two_over_learning_rate",
    "2 / learning rate: gradient descent is unstable along directions whose curvature "
    "is above this line.",
)
PRECONDITIONED = Figure(
    "hessian_preconditioned_max_eigenvalue",
    "hessian/preconditioned_max_eigenvalue",
    "Largest eigenvalue of the Hessian as the optimizer sees it: with its diagonal "
    "preconditioner on both sides.",
)
CRITICAL_SHARPNESS = Figure(
    "critical_sharpness",
    "hessian/critical_sharpness",
    "2 / rate, for the smallest rate at which a step along the (preconditioned) "
    "gradient raises the loss.",
)
STABILITY_THRESHOLD = Figure(
    "stability_threshold",
    "hessian/stability_threshold",
    "The optimizer is unstable along directions whose (preconditioned) curvature is "
    "above this; with its momentum taken into account.",
)
HESSIAN_FIGURES = (
    TRACE,
    FROBENIUS_NORM,
    MAX_EIGENVALUE,
    TWO_OVER_LEARNING_RATE,
    PRECONDITIONED,
    CRITICAL_SHARPNESS,
    STABILITY_THRESHOLD,
)
HESSIAN_ERRORS = (
    Figure(
        "hessian_trace_standard_error",
        "uncertainty/trace",
        "Standard error of the trace; 0 if it is exact.",
    ),
    Figure(
        "hessian_frobenius_norm_standard_error",
        "uncertainty/frobenius_norm",
        "Standard error of the Frobenius norm; 0 if it is exact.",
    ),
    Figure(
        "hessian_max_eigenvalue_error",
        "uncertainty/max_eigenvalue",
        "An eigenvalue of the Hessian is no farther from the estimate than this (norm "
        "of the residual).",
    ),
    Figure(
        "hessian_preconditioned_max_eigenvalue_error",
        "uncertainty/preconditioned_max_eigenvalue",
        "The same for the Hessian as the optimizer sees it. Its eigenvalue is left out "
        "while this is not below it.",
    ),
    Figure(
        "critical_sharpness_error",
        "uncertainty/critical_sharpness",
        "Half of the interval in which the critical sharpness was found.",
    ),
)
BANDS = (
    Band("hessian_trace", "hessian_trace_standard_error", 2.0),
    Band("hessian_frobenius_norm", "hessian_frobenius_norm_standard_error", 2.0),
    # A bound, not a standard deviation: once is enough.
    Band("hessian_max_eigenvalue", "hessian_max_eigenvalue_error", 1.0),
)

PROBE_FIGURES = (
    Figure("loss", "probe/loss", "Training loss on the probe batch."),
    Figure("learning_rate", "probe/learning_rate", "The optimizer's learning rate."),
    Figure("seconds", "probe/seconds", "Time that the probe took, in seconds."),
    Figure(
        "num_matvecs",
        "probe/num_matvecs",
        "Hessian-vector products that the probe spent.",
    ),
    Figure(
        "overhead",
        "probe/overhead",
        "Share of the time that probes have taken so far, compilation apart.",
    ),
)
GLOBAL_FIGURES = HESSIAN_FIGURES + HESSIAN_ERRORS + PROBE_FIGURES


def _figures_by(kind: str) -> tuple[Figure, ...]:
    """The figures that exist once for each layer, or once for each variable."""
    of = f"of the {kind}'s part of the Hessian's diagonal"
    return (
        Figure("diagonal_mean", f"{kind}_diagonal_mean", f"Mean {of}."),
        Figure(
            "diagonal_mean_abs",
            f"{kind}_diagonal_mean_abs",
            f"Mean absolute value {of}.",
        ),
        Figure("diagonal_max", f"{kind}_diagonal_max", f"Maximum {of}."),
        Figure("diagonal_min", f"{kind}_diagonal_min", f"Minimum {of}."),
        Figure(
            "negative_share",
            f"{kind}_negative_share",
            f"Share of negative entries {of}.",
        ),
        Figure("trace", f"{kind}_trace", f"Sum {of}."),
        Figure(
            "frobenius_share",
            f"{kind}_frobenius_share",
            f"Share of the squared Frobenius norm that lies in the {kind}'s rows.",
        ),
        Figure(
            "diagonal_mean_standard_error",
            f"uncertainty_of_{kind}/diagonal_mean",
            f"Standard error of the mean {of}.",
        ),
        Figure(
            "trace_standard_error",
            f"uncertainty_of_{kind}/trace",
            f"Standard error of the sum {of}.",
        ),
    )


LAYER_FIGURES = _figures_by("layer")
VARIABLE_FIGURES = _figures_by("variable")

LAYER_HISTOGRAM = "diagonal"
VARIABLE_HISTOGRAM = "diagonal_of_variable"
HEAT_MAP = "diagonal_heat_map"
SPECTRAL_DENSITY = "spectral_density"
LAYER_TABLE = "curvature_layers"
MODE = "mode"
MODE_DESCRIPTION = (
    "How the layers of the model ran while the curvature was measured: in training, "
    "BatchNormalization takes the statistics of the batch."
)
OPTIMIZER = "optimizer"
