"""Every tag in the event files, named once.

TensorBoard groups charts by the part of a tag before the first slash and sorts the
groups by name. So `hessian/` comes first and is read alone; a group is one figure for
all layers, and a deep model has no more groups than a small one; what only margin charts
need comes last, but for variables, which are there on request.

| tag | key of the record | what it is |
|---|---|---|
| `hessian/trace` | `hessian_trace` | sum of the eigenvalues |
| `hessian/frobenius_norm` | `hessian_frobenius_norm` | root of the sum of squares |
| `hessian/max_eigenvalue` | `hessian_max_eigenvalue` | curvature of the stiffest direction |
| `hessian/stability_ratio` | `stability_ratio` | largest curvature that the optimizer sees over its stability threshold; unstable above 1 |
| `hessian/critical_sharpness` | `critical_sharpness` | sharpness that a step of the optimizer meets, on request |
| `stability/preconditioned_max_eigenvalue` | `hessian_preconditioned_max_eigenvalue` | the largest eigenvalue as the optimizer sees it |
| `stability/threshold` | `stability_threshold` | curvature above which the optimizer is unstable |
| `stability/two_over_learning_rate` | `two_over_learning_rate` | the same for plain gradient descent, and only there |
| `probe/loss`, `probe/learning_rate` | `loss`, `learning_rate` | loss on the probe data; learning rate |
| `probe/gradient_norm`, `probe/gradient_noise_scale`, `probe/update_ratio` | `gradient_norm`, `gradient_noise_scale`, `update_ratio` | the gradient on the probe data, and how far the weights move |
| `probe/seconds`, `probe/num_matvecs`, `probe/overhead` | `seconds`, `num_matvecs`, `overhead` | what the probe cost |
| `uncertainty/<figure>_lower`, `_upper` | the first three | value ∓ 2 standard errors; value ∓ bound for the eigenvalue; the value itself where no error is known |
| `layer_diagonal_mean/<layer>` | `diagonal_mean` | mean of the diagonal |
| `layer_diagonal_mean_abs/<layer>` | `diagonal_mean_abs` | mean of its absolute values |
| `layer_diagonal_max/<layer>` | `diagonal_max` | its maximum |
| `layer_negative_share/<layer>` | `negative_share` | share of negative entries, 0 to 1 |
| `layer_trace/<layer>` | `trace` | sum of the diagonal |
| `layer_frobenius_share/<layer>` | `frobenius_share` | share of the squared Frobenius norm in the layer's rows, 0 to 1 |
| `layer_gradient_norm/<layer>` | `gradient_norm` | norm of the layer's part of the gradient |
| `layer_update_ratio/<layer>` | `update_ratio` | how far the layer's weights move in a step, as a share of them |
| `variable_<as above>/<path>` | the same, per variable | on request |
| `hessian_diagonal_signed_log10/<layer>`, `variable_diagonal_signed_log10/<path>` | `histogram` | histogram of the diagonal, on a signed logarithmic axis |
| `loss_gradient_signed_log10/<layer>` | `gradient_histogram` | the same of the gradient |
| `optimizer/<key>` | `optimizer` | whatever the optimizer tells about itself |
| `mode` | `mode` | text: how the layers ran |

Only the layers that curve the loss most have tags of their own, and `_whole_model` has
a histogram. The page "Curvature" has all layers: it reads tensors of its own, in which
all figures of a probe lie together, so that no figure is sampled at other steps than
another.

| tag of the page | what it is |
|---|---|
| `curvature_figures/<group>` | all figures of a probe but the layers', a vector; their keys are in the tag's metadata |
| `curvature_layers/<group>` | the layers' figures, a matrix of layers by keys |
| `curvature_density/<group>` | `spectral_density`, three rows: eigenvalue, density, standard error |
| `curvature_layer_table` | names and sizes of the layers, in their order in the model |

TensorBoard keeps ten tensors of a tag, or a hundred, and drops others at random. So none
of these tags holds more than ten probes, see `groups.py`. A figure that is missing from the record, or None, has no tag, and is NaN in the page's tensors.
"""  # noqa: E501

import dataclasses

PLUGIN_NAME = "curvature"
"""Our page's name to TensorBoard, and the owner of its tensors."""

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
        return f"uncertainty/{self._name}_lower"

    @property
    def upper(self) -> str:
        """The tag of the upper end."""
        return f"uncertainty/{self._name}_upper"


TRACE = Figure(
    "hessian_trace",
    "hessian/trace",
    "Trace of the Hessian of the training loss on the probe data: the sum of its "
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
    "Largest eigenvalue of the Hessian: the curvature of the stiffest direction. Plain "
    "gradient descent is unstable along it while it exceeds 2 / learning rate.",
)
STABILITY_RATIO = Figure(
    "stability_ratio",
    "hessian/stability_ratio",
    "Largest curvature that the optimizer sees, divided by its stability threshold: "
    "above 1 its steps overshoot along that direction. Only where both are known and "
    "the eigenvalue has converged.",
)
PRECONDITIONED = Figure(
    "hessian_preconditioned_max_eigenvalue",
    "stability/preconditioned_max_eigenvalue",
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
    "stability/threshold",
    "The optimizer is unstable along directions whose (preconditioned) curvature is "
    "above this; with its momentum taken into account.",
)
TWO_OVER_LEARNING_RATE = Figure(
    "two_over_learning_rate",
    "stability/two_over_learning_rate",
    "2 / learning rate: plain gradient descent is unstable along directions whose "
    "curvature is above this line.",
)
HESSIAN_FIGURES = (
    TRACE,
    FROBENIUS_NORM,
    MAX_EIGENVALUE,
    STABILITY_RATIO,
    PRECONDITIONED,
    CRITICAL_SHARPNESS,
    STABILITY_THRESHOLD,
    TWO_OVER_LEARNING_RATE,
)
BANDS = (
    Band("hessian_trace", "hessian_trace_standard_error", 2.0),
    Band("hessian_frobenius_norm", "hessian_frobenius_norm_standard_error", 2.0),
    # A bound, not a standard deviation: once is enough.
    Band("hessian_max_eigenvalue", "hessian_max_eigenvalue_error", 1.0),
)

PROBE_FIGURES = (
    Figure("loss", "probe/loss", "Training loss on the probe data."),
    Figure("learning_rate", "probe/learning_rate", "The optimizer's learning rate."),
    Figure(
        "gradient_norm",
        "probe/gradient_norm",
        "Norm of the gradient of the training loss on the probe data.",
    ),
    Figure(
        "gradient_noise_scale",
        "probe/gradient_noise_scale",
        "Simple noise scale, in samples: the variance of a sample's gradient over the "
        "squared norm of the mean gradient (McCandlish et al. 2018, arXiv 1812.06162). "
        "Batches much smaller than this are mostly noise; much larger ones gain "
        "little.",
    ),
    Figure(
        "update_ratio",
        "probe/update_ratio",
        "Norm of the weights' net change since the last probe, divided by the number "
        "of steps in between and by the norm of the weights.",
    ),
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
GLOBAL_FIGURES = HESSIAN_FIGURES + PROBE_FIGURES
ERROR_KEYS = (
    "hessian_trace_standard_error",
    "hessian_frobenius_norm_standard_error",
    "hessian_max_eigenvalue_error",
    "hessian_preconditioned_max_eigenvalue_error",
    "critical_sharpness_error",
)
"""Errors of the figures: on the page as such, elsewhere in the bands."""


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
            "gradient_norm",
            f"{kind}_gradient_norm",
            f"Norm of the {kind}'s part of the gradient on the probe data.",
        ),
        Figure(
            "update_ratio",
            f"{kind}_update_ratio",
            f"Norm of the net change of the {kind}'s weights since the last probe, "
            "divided by the number of steps and by the norm of these weights.",
        ),
    )


LAYER_FIGURES = _figures_by("layer")
VARIABLE_FIGURES = _figures_by("variable")
LAYER_KEYS = (
    *(figure.key for figure in LAYER_FIGURES),
    "diagonal_min",
    "diagonal_mean_standard_error",
    "trace_standard_error",
    "block_share",
    "block_share_standard_error",
)
"""A layer's figures on the page."""

WHOLE_MODEL = "_whole_model"
LAYER_HISTOGRAM = "hessian_diagonal_signed_log10"
VARIABLE_HISTOGRAM = "variable_diagonal_signed_log10"
GRADIENT_HISTOGRAM = "loss_gradient_signed_log10"

PAGE_FIGURES = "curvature_figures"
PAGE_LAYERS = "curvature_layers"
PAGE_DENSITY = "curvature_density"
LAYER_TABLE = "curvature_layer_table"

MODE = "mode"
MODE_DESCRIPTION = (
    "How the layers of the model ran while the curvature was measured: in training, "
    "BatchNormalization takes the statistics of the batch."
)
OPTIMIZER = "optimizer"
_OF_OPTIMIZER = {
    "curvature_age": "Steps since the optimizer took in curvature.",
    "step_size": "Root mean square of the last step, weight decay apart.",
    "clipped_share": (
        "Share of entries whose averaged gradient exceeds its usual size, and is cut."
    ),
    "newton_share": (
        "Share of entries in which curvature weighs more than the trust radius."
    ),
    "negative_share": "Share of entries with negative curvature.",
}


def optimizer_description(key: str) -> str:
    """What TensorBoard shows beside a figure that an optimizer tells of itself."""
    return _OF_OPTIMIZER.get(key, f"What the optimizer tells of its steps: {key}.")
