"""The charts of TensorBoard's Custom Scalars tab."""

import re

from tensorboard.plugins.custom_scalar import layout_pb2

from keras_curvature.tensorboard import tags

_BAND_TITLES = {
    "hessian_trace": "Trace, ± 2 standard errors",
    "hessian_frobenius_norm": "Frobenius norm, ± 2 standard errors",
    "hessian_max_eigenvalue": "Largest eigenvalue, ± bound",
}
_LAYER_TITLES = {
    "frobenius_share": "Share of the squared Frobenius norm, by layer",
    "diagonal_mean_abs": "Mean absolute diagonal, by layer",
    "diagonal_max": "Largest diagonal entry, by layer",
    "negative_share": "Share of negative diagonal entries, by layer",
}
_GRADIENT_TITLES = {
    "gradient_norm": "Norm of the gradient, by layer",
    "update_ratio": "Change of the weights in a step over their norm, by layer",
}


def layout() -> layout_pb2.Layout:
    """Global figures with error bands, stability, the top layers, the gradient."""
    # With a preconditioner, as Adam has one, the second chart is the one that tells.
    stability = [
        _lines(title, *(re.escape(tag) + "$" for tag in pair))
        for title, *pair in (
            (
                "Largest eigenvalue against 2 / learning rate",
                tags.MAX_EIGENVALUE.tag,
                tags.TWO_OVER_LEARNING_RATE.tag,
            ),
            (
                "Preconditioned eigenvalue against the stability threshold",
                tags.PRECONDITIONED.tag,
                tags.STABILITY_THRESHOLD.tag,
            ),
        )
    ]
    stability.insert(
        0,
        _lines(
            "Curvature that the optimizer sees over its stability threshold",
            re.escape(tags.STABILITY_RATIO.tag) + "$",
        ),
    )
    return layout_pb2.Layout(
        category=[
            layout_pb2.Category(
                title="Curvature",
                # TensorBoard shows margin charts from the last to the first.
                chart=[_margin(band) for band in reversed(tags.BANDS)],
            ),
            layout_pb2.Category(title="Edge of stability", chart=stability),
            layout_pb2.Category(
                title="Curvature by layer", chart=_by_layer(_LAYER_TITLES)
            ),
            layout_pb2.Category(title="Gradient", chart=_by_layer(_GRADIENT_TITLES)),
        ]
    )


def _by_layer(titles: dict[str, str]) -> list[layout_pb2.Chart]:
    by_key = {figure.key: figure for figure in tags.LAYER_FIGURES}
    return [
        _lines(title, re.escape(by_key[key].tag) + "/.*")
        for key, title in titles.items()
    ]


def _margin(band: tags.Band) -> layout_pb2.Chart:
    series = layout_pb2.MarginChartContent.Series(
        value=band.value, lower=band.lower, upper=band.upper
    )
    return layout_pb2.Chart(
        title=_BAND_TITLES[band.key],
        margin=layout_pb2.MarginChartContent(series=[series]),
    )


def _lines(title: str, *patterns: str) -> layout_pb2.Chart:
    return layout_pb2.Chart(
        title=title, multiline=layout_pb2.MultilineChartContent(tag=list(patterns))
    )
