"""What is in the event files, and what a real TensorBoard makes of it."""

import io
import os

import keras
import numpy as np
import pytest
from event_files import event_files, events, read, scalars
from PIL import Image
from records import LAYERS, MODE, synthetic_record

from keras_curvature.tensorboard import signed_log, summaries, tags
from keras_curvature.tensorboard.heat_map import HeatMap
from keras_curvature.tensorboard.writer import CurvatureWriter

GLOBAL = {
    "custom_scalars__config__",
    "hessian/trace",
    "hessian/frobenius_norm",
    "hessian/max_eigenvalue",
    "hessian/preconditioned_max_eigenvalue",
    "hessian/stability_threshold",
    "hessian/two_over_learning_rate",
    "uncertainty/trace",
    "uncertainty/frobenius_norm",
    "uncertainty/max_eigenvalue",
    "uncertainty/preconditioned_max_eigenvalue",
    "uncertainty_band/trace_lower",
    "uncertainty_band/trace_upper",
    "uncertainty_band/frobenius_norm_lower",
    "uncertainty_band/frobenius_norm_upper",
    "uncertainty_band/max_eigenvalue_lower",
    "uncertainty_band/max_eigenvalue_upper",
    "probe/loss",
    "probe/learning_rate",
    "probe/seconds",
    "probe/num_matvecs",
    "probe/overhead",
    "optimizer/clipped_share",
    "diagonal_heat_map",
    "curvature_layers",
    "mode",
}
FIGURES = (
    "diagonal_mean",
    "diagonal_mean_abs",
    "diagonal_max",
    "diagonal_min",
    "negative_share",
    "trace",
    "frobenius_share",
)
ERRORS = ("diagonal_mean", "trace")


def tags_by(kind, histogram, names):
    found = {f"{kind}_{figure}/{name}" for figure in FIGURES for name in names}
    found |= {f"uncertainty_of_{kind}/{f}/{name}" for f in ERRORS for name in names}
    return found | {f"{histogram}/{name}" for name in names}


PATHS = [f"{layer}/{name}" for layer in LAYERS for name in ("kernel", "bias")]
BY_LAYER = tags_by("layer", "diagonal", LAYERS)
BY_VARIABLE = tags_by("variable", "diagonal_of_variable", PATHS)


def write(log_dir, *records, **options):
    with CurvatureWriter(log_dir, **options) as writer:
        for record in records:
            writer.write(record)


@pytest.mark.parametrize("per_variable", [False, True])
def test_the_whole_set_of_tags(tmp_path, per_variable):
    write(tmp_path, synthetic_record(10), per_variable=per_variable)
    expected = GLOBAL | BY_LAYER | (BY_VARIABLE if per_variable else set())
    assert set(read(tmp_path)) == expected
    # The groups of the Scalars tab: what is uncertain comes after what is known.
    groups = {tag.split("/")[0] for tag in expected if "/" in tag}
    groups = sorted(group for group in groups if not group.startswith("diagonal"))
    assert groups[0] == "hessian"
    assert groups[-1].startswith("variable" if per_variable else "uncertainty")
    assert len(groups) == (21 if per_variable else 13)


def test_tags_are_documented():
    for figure in tags.GLOBAL_FIGURES:
        assert f"`{figure.key}`" in tags.__doc__
    for figure in tags.LAYER_FIGURES:
        assert f"`{figure.key}`" in tags.__doc__
        assert f"`{figure.of('<layer>')}`" in tags.__doc__
    for figure in tags.GLOBAL_FIGURES + tags.LAYER_FIGURES + tags.VARIABLE_FIGURES:
        assert figure.description.endswith(".")


@pytest.mark.parametrize("missing", [None, "absent"])
def test_what_is_missing_has_no_tag(tmp_path, missing):
    record = synthetic_record(3)
    for key in (
        "learning_rate",
        "two_over_learning_rate",
        "hessian_trace_standard_error",
        "hessian_max_eigenvalue",
        "hessian_max_eigenvalue_error",
    ):
        record[key] = None
    for layer in record["layers"]:
        layer["diagonal_mean_standard_error"] = None
        layer["histogram"] = None
        layer["frobenius_share"] = None
    record["optimizer"] = {}
    if missing == "absent":
        record["layers"] = [_present(layer) for layer in record["layers"]]
        record = _present(record)
    write(tmp_path, record)
    gone = {
        "hessian/max_eigenvalue",
        "hessian/two_over_learning_rate",
        "uncertainty/trace",
        "uncertainty/max_eigenvalue",
        "uncertainty_band/max_eigenvalue_lower",
        "uncertainty_band/max_eigenvalue_upper",
        "probe/learning_rate",
        "optimizer/clipped_share",
    }
    gone |= {f"uncertainty_of_layer/diagonal_mean/{layer}" for layer in LAYERS}
    gone |= {f"layer_frobenius_share/{layer}" for layer in LAYERS}
    gone |= {f"diagonal/{layer}" for layer in LAYERS}
    assert set(read(tmp_path)) == (GLOBAL | BY_LAYER) - gone


def _present(mapping):
    return {key: value for key, value in mapping.items() if value is not None}


def test_a_record_of_nothing_but_a_step(tmp_path):
    write(tmp_path, {"step": 5})
    assert set(read(tmp_path)) == {"custom_scalars__config__", "curvature_layers"}


def test_a_record_without_a_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Received: record with keys .*'loss'"):
        write(tmp_path, {"loss": 1.0})


def test_values_read_back(tmp_path):
    records = [synthetic_record(step) for step in (0, 100, 250)]
    write(tmp_path, *records)
    found = read(tmp_path)
    # float32 in the file.
    close = {"rtol": 1e-6}
    for record in records:
        step = record["step"]

        def at(tag, step=step):
            return found[tag][step]

        for figure in tags.GLOBAL_FIGURES:
            np.testing.assert_allclose(at(figure.tag), record[figure.key], **close)
        for layer in record["layers"]:
            for figure in tags.LAYER_FIGURES:
                np.testing.assert_allclose(
                    at(figure.of(layer["name"])), layer[figure.key], **close
                )
        np.testing.assert_allclose(
            at("hessian/two_over_learning_rate"),
            record["two_over_learning_rate"],
            **close,
        )
        value, error = record["hessian_trace"], record["hessian_trace_standard_error"]
        np.testing.assert_allclose(
            at("uncertainty_band/trace_lower"), value - 2 * error, **close
        )
        np.testing.assert_allclose(
            at("uncertainty_band/trace_upper"), value + 2 * error, **close
        )
        bound = record["hessian_max_eigenvalue_error"]
        np.testing.assert_allclose(
            at("uncertainty_band/max_eigenvalue_upper"),
            record["hessian_max_eigenvalue"] + bound,
            **close,
        )
    assert set(found["hessian/trace"]) == {0, 100, 250}


def test_an_exact_figure_has_an_error_of_zero(tmp_path):
    write(
        tmp_path,
        {"step": 1, "hessian_trace": 3.0, "hessian_trace_standard_error": 0.0},
    )
    assert scalars(tmp_path, "uncertainty/trace") == {1: 0.0}
    assert scalars(tmp_path, "uncertainty_band/trace_lower") == {1: 3.0}


def test_a_margin_chart_has_a_margin_where_no_error_is_known(tmp_path):
    record = {"hessian_trace": 3.0, "hessian_trace_standard_error": None}
    write(tmp_path, {"step": 1, **record})
    for end in ("lower", "upper"):
        assert scalars(tmp_path, f"uncertainty_band/trace_{end}") == {1: 3.0}
    assert "uncertainty/trace" not in read(tmp_path)


def with_histogram(step, edges, counts):
    histogram = {"edges": edges, "counts": counts}
    return {"step": step, "layers": [{"name": "dense", "histogram": histogram}]}


def test_histogram_holds_the_counts_on_the_logarithmic_axis(tmp_path):
    edges = np.array([-1.0, -1e-2, 1e-2, 1.0, 100.0])
    write(tmp_path, with_histogram(4, edges, [0, 7, 2, 0]))
    table = read(tmp_path)["diagonal/dense"][4]
    # The empty bins at both ends are left out.
    places = signed_log.to_axis(edges)
    np.testing.assert_allclose(
        table, [[places[1], places[2], 7], [places[2], places[3], 2]]
    )
    assert table.dtype == np.float64


def test_an_empty_histogram_keeps_its_bins(tmp_path):
    write(tmp_path, with_histogram(0, [0.0, 1.0, 2.0], [0, 0]))
    assert read(tmp_path)["diagonal/dense"][0].shape == (2, 3)


@pytest.mark.parametrize(
    "edges, counts, message",
    [
        ([0, 1], [1, 2], "one more edge than counts.*Received: edges of shape"),
        ([0], [], "one more edge"),
        ([0, 1, 1], [1, 2], "must increase. Received: edges="),
    ],
)
def test_malformed_histograms_are_refused(tmp_path, edges, counts, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, with_histogram(0, edges, counts))


def test_next_to_the_callback_of_keras(tmp_path):
    pytest.importorskip("tensorflow", reason="Keras' callback writes with TensorFlow")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")

    class Probing(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.writer = CurvatureWriter(tmp_path)

        def on_train_batch_end(self, batch, logs=None):
            step = int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))
            self.writer.write({"step": step, "hessian_trace": float(step)})

        def on_train_end(self, logs=None):
            self.writer.close()

    # update_freq="epoch" turns recording off during the batches.
    board = keras.callbacks.TensorBoard(
        tmp_path, update_freq="epoch", write_graph=False
    )
    x = np.zeros((8, 2))
    for _ in range(2):
        model.fit(
            x, x[:, :1], 4, callbacks=[board, Probing()], verbose=0, shuffle=False
        )
    assert sorted(os.listdir(tmp_path)) == ["curvature", "train"]
    trace = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    assert scalars(tmp_path, "hessian/trace") == trace


def test_descriptions_are_written_once(tmp_path):
    write(tmp_path, *(synthetic_record(step) for step in range(3)))
    described = []
    for event in events(*event_files(tmp_path)):
        for value in event.summary.value:
            if value.tag == "hessian/trace" and value.metadata.summary_description:
                described.append(event.step)
    assert described == [0]


def test_layers_are_listed_in_the_order_of_the_model(tmp_path):
    record = synthetic_record(1)
    write(tmp_path, record, synthetic_record(2))
    listed = read(tmp_path)["curvature_layers"]
    # Written again only if it changes.
    assert list(listed) == [1]
    assert [name.decode() for name, _ in listed[1]] == list(LAYERS)
    assert [int(size) for _, size in listed[1]] == [p["size"] for p in record["layers"]]


def test_how_the_layers_ran_is_told_when_it_changes(tmp_path):
    first = synthetic_record(1)
    write(tmp_path, first, synthetic_record(2), {"step": 3, "mode": "inference"})
    told = read(tmp_path)["mode"]
    assert {step: text.item() for step, text in told.items()} == {
        1: MODE.encode(),
        3: b"inference",
    }


def test_images_grow_with_the_logarithm_of_the_probes_and_end_with_the_last(tmp_path):
    steps = range(0, 2000, 10)
    with CurvatureWriter(tmp_path) as writer:
        for step in steps:
            layers = [{"name": "dense", "diagonal_mean_abs": 1.0 + step}]
            writer.write({"step": step, "layers": layers})
    drawn = sorted(read(tmp_path)["diagonal_heat_map"])
    assert drawn[:3] == [0, 10, 20]
    assert drawn[-1] == steps[-1]
    # 1 + log(200) / log(1.1) is 57; the first ones come one by one.
    assert len(drawn) < 57
    width, height, png = read(tmp_path)["diagonal_heat_map"][drawn[-1]]
    assert Image.open(io.BytesIO(png)).size == (int(width), int(height))


def test_images_hold_every_pixel():
    heat_map = HeatMap()
    for step in range(50):
        heat_map.add(step, {name: 1.0 + step * i for i, name in enumerate(LAYERS)})
    for pixels in (
        heat_map.render(),
        np.random.default_rng(0).integers(0, 256, (7, 13, 3), "uint8"),
    ):
        width, height, png = summaries.image("t", pixels).tensor.string_val
        assert (int(height), int(width), 3) == pixels.shape
        # Reads the checksums too.
        Image.open(io.BytesIO(png)).verify()
        for decoded in decodings(png):
            np.testing.assert_array_equal(decoded, pixels)


def decodings(png):
    """The pixels as our own encoder's library reads them, and as another one does."""
    yield np.asarray(Image.open(io.BytesIO(png)))
    try:
        import tensorflow as tf
    except ImportError:
        return
    yield tf.io.decode_png(png).numpy()
