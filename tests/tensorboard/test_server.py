"""A real TensorBoard on real event files, asked over HTTP, under both loaders."""

import numpy as np
from records import LAYERS, SERVED_STEPS, synthetic_record

from keras_curvature.tensorboard import tags

RUN = "a/curvature"


def test_scalars_have_the_tags_and_values_that_were_written(server):
    found = server.get("plugin/scalars/tags")[RUN]
    expected = {figure.tag for figure in tags.GLOBAL_FIGURES}
    expected |= {f.of(layer) for f in tags.LAYER_FIGURES for layer in LAYERS}
    expected |= {band.lower for band in tags.BANDS}
    expected |= {band.upper for band in tags.BANDS}
    expected |= {"optimizer/clipped_share"}
    assert set(found) == expected
    assert "sum of its eigenvalues" in found["hessian/trace"]["description"]

    for key, tag in (("hessian_trace", "hessian/trace"), ("loss", "probe/loss")):
        points = server.get("plugin/scalars/scalars", run=RUN, tag=tag)
        assert [step for _, step, _ in points] == list(SERVED_STEPS)
        written = [synthetic_record(step)[key] for step in SERVED_STEPS]
        # float32 in the file.
        np.testing.assert_allclose([p[2] for p in points], written, rtol=1e-6)


def test_custom_scalars_show_error_bands(server):
    categories = server.get("plugin/custom_scalars/layout")["category"]
    assert [c["title"] for c in categories] == [
        "Curvature",
        "Edge of stability",
        "Curvature by layer",
        "Gradient",
    ]
    charts = {chart["title"]: chart for c in categories for chart in c["chart"]}
    margin = charts["Trace, ± 2 standard errors"]["margin"]["series"][0]
    written = set(server.get("plugin/scalars/tags")[RUN])
    assert set(margin.values()) <= written
    for chart in charts.values():
        for pattern in chart.get("multiline", {}).get("tag", ()):
            answer = server.get("plugin/custom_scalars/scalars", run=RUN, tag=pattern)
            assert answer["regex_valid"]
            assert answer["tag_to_events"], pattern
    stability = charts["Largest eigenvalue against 2 / learning rate"]["multiline"]
    lines = [
        list(
            server.get("plugin/custom_scalars/scalars", run=RUN, tag=pattern)[
                "tag_to_events"
            ]
        )
        for pattern in stability["tag"]
    ]
    assert lines == [["hessian/max_eigenvalue"], ["stability/two_over_learning_rate"]]
    seen = charts["Preconditioned eigenvalue against the stability threshold"]
    assert seen["multiline"]["tag"] == [
        r"stability/preconditioned_max_eigenvalue$",
        r"stability/threshold$",
    ]


def test_histograms_and_distributions_have_the_counts(server):
    assert set(server.get("plugin/histograms/tags")[RUN]) == {
        f"{group}/{layer}"
        for group in (tags.LAYER_HISTOGRAM, tags.GRADIENT_HISTOGRAM)
        for layer in (*LAYERS, tags.WHOLE_MODEL)
    }
    points = server.get(
        "plugin/histograms/histograms", run=RUN, tag=f"{tags.LAYER_HISTOGRAM}/logits"
    )
    assert [step for _, step, _ in points] == list(SERVED_STEPS)
    layer = synthetic_record(0)["layers"][-1]
    bins = np.array(points[0][2])
    assert bins[:, 2].sum() == layer["size"]
    # The axis counts decades, and the bins are half a decade wide.
    np.testing.assert_allclose(bins[:, 1] - bins[:, 0], 0.5, rtol=1e-9)
    compressed = server.get(
        "plugin/distributions/distributions",
        run=RUN,
        tag=f"{tags.LAYER_HISTOGRAM}/logits",
    )
    assert len(compressed) == len(SERVED_STEPS)
