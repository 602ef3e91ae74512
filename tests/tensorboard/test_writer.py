"""What is in the event files, and what a real TensorBoard makes of it."""

import json
import os

import keras
import numpy as np
import pytest
from event_files import event_files, events, read, scalars
from records import LAYERS, MODE, synthetic_record
from tensorboard.backend.event_processing import (
    data_ingester,
    plugin_event_accumulator,
)

from keras_curvature.tensorboard import groups, signed_log, tags
from keras_curvature.tensorboard.writer import CurvatureWriter

FIRST = 10
GLOBAL = {
    "custom_scalars__config__",
    "hessian/trace",
    "hessian/frobenius_norm",
    "hessian/max_eigenvalue",
    "hessian/stability_ratio",
    "hessian/critical_sharpness",
    "stability/preconditioned_max_eigenvalue",
    "stability/threshold",
    "stability/two_over_learning_rate",
    "uncertainty/trace_lower",
    "uncertainty/trace_upper",
    "uncertainty/frobenius_norm_lower",
    "uncertainty/frobenius_norm_upper",
    "uncertainty/max_eigenvalue_lower",
    "uncertainty/max_eigenvalue_upper",
    "probe/loss",
    "probe/learning_rate",
    "probe/gradient_norm",
    "probe/gradient_noise_scale",
    "probe/update_ratio",
    "probe/seconds",
    "probe/num_matvecs",
    "probe/overhead",
    "optimizer/clipped_share",
    "hessian_diagonal_signed_log10/_whole_model",
    "loss_gradient_signed_log10/_whole_model",
    f"curvature_figures/{FIRST}",
    f"curvature_layers/{FIRST}",
    "curvature_layer_table",
    "mode",
}
FIGURES = (
    "diagonal_mean",
    "diagonal_mean_abs",
    "diagonal_max",
    "negative_share",
    "trace",
    "frobenius_share",
    "gradient_norm",
    "update_ratio",
)


def tags_by(kind, histograms, names):
    found = {f"{kind}_{figure}/{name}" for figure in FIGURES for name in names}
    return found | {f"{group}/{name}" for group in histograms for name in names}


PATHS = [f"{layer}/{name}" for layer in LAYERS for name in ("kernel", "bias")]
HISTOGRAMS = ["hessian_diagonal_signed_log10", "loss_gradient_signed_log10"]
BY_LAYER = tags_by("layer", HISTOGRAMS, LAYERS)
BY_VARIABLE = tags_by("variable", ["variable_diagonal_signed_log10"], PATHS)


def write(log_dir, *records, **options):
    with CurvatureWriter(log_dir, **options) as writer:
        for record in records:
            writer.write(record)


@pytest.mark.parametrize("per_variable", [False, True])
def test_the_whole_set_of_tags(tmp_path, per_variable):
    write(tmp_path, synthetic_record(FIRST), per_variable=per_variable)
    expected = GLOBAL | BY_LAYER | (BY_VARIABLE if per_variable else set())
    assert set(read(tmp_path)) == expected
    # The groups that TensorBoard's own tabs show, in their order.
    groups = sorted({tag.split("/")[0] for tag in expected if "/" in tag})
    groups = [group for group in groups if not group.startswith("curvature_")]
    assert groups[0] == "hessian"
    assert sorted(tag for tag in expected if tag.startswith("hessian/")) == [
        "hessian/critical_sharpness",
        "hessian/frobenius_norm",
        "hessian/max_eigenvalue",
        "hessian/stability_ratio",
        "hessian/trace",
    ]
    assert groups[-1].startswith("variable" if per_variable else "uncertainty")
    assert len(groups) == (24 if per_variable else 15)


def many_layers(step, number=40):
    """A deep model whose curvature moves from its end to its beginning."""
    first, last = (1.0, 0.0) if step else (0.0, 1.0)
    layers = [
        {
            "name": f"layer{i}",
            "size": 10,
            "trace": 1.0,
            "frobenius_share": first / (i + 1) + last / (number - i),
            "histogram": {"edges": [-1.0, 0.0, 1.0], "counts": [i, 1]},
        }
        for i in range(number)
    ]
    return {"step": step, "hessian_trace": 1.0, "layers": layers}


@pytest.mark.parametrize("top", [0, 3, 8, None])
def test_few_layers_have_tags_of_their_own_and_always_the_same(tmp_path, top):
    write(tmp_path, many_layers(0), many_layers(10), top_layers=top)
    # Another process goes on with the run.
    with CurvatureWriter(tmp_path, top_layers=top) as writer:
        writer.begin(10)
        writer.write(many_layers(20))
    found = read(tmp_path)
    count = 40 if top is None else top
    last = {f"layer{i}" for i in range(40 - count, 40)}
    steps = [0, 10, 20]
    if top == 0:
        assert not any(tag.startswith("layer_") for tag in found)
    for group in ("layer_trace", "hessian_diagonal_signed_log10"):
        of = {
            tag.partition("/")[2]: list(by_step)
            for tag, by_step in found.items()
            if tag.startswith(f"{group}/") and "_whole_model" not in tag
        }
        assert of == dict.fromkeys(last, steps)
    # All of them count in the whole model's histogram, and are on the page.
    whole = found["hessian_diagonal_signed_log10/_whole_model"][0]
    assert whole[:, 2].tolist() == [sum(range(40)), 40]
    for tag, step in (("curvature_layers/0", 10), ("curvature_layers/20", 20)):
        known = np.isfinite(found[tag][step]).any(axis=0)
        assert found[tag][step].shape[0] == 40 and known.sum() == 2


def test_a_tag_of_the_page_holds_as_many_probes_as_tensorboard_keeps(tmp_path):
    steps = [3 * i for i in range(50)]
    records = [{"step": step, "loss": float(step)} for step in steps]
    write(tmp_path, *records[:40])
    # Another process goes on with the run, and with counting its probes.
    with CurvatureWriter(tmp_path) as writer:
        writer.begin(3 * 40)
        for record in records[40:]:
            writer.write(record)
    found = read(tmp_path)
    by_tag = {t: list(v) for t, v in found.items() if "curvature_figures" in t}
    assert by_tag == {
        "curvature_figures/0": steps[:10],
        "curvature_figures/every_1/11/33": steps[11:31:2],
        "curvature_figures/every_1/31/93": steps[31:40:2],
        "curvature_figures/every_2/10/30": steps[10:40:4],
        "curvature_figures/every_4/12/36": steps[12:40:8],
        "curvature_figures/every_8/24/72": [steps[24]],
        "curvature_figures/every_16/16/48": [steps[16]],
        "curvature_figures/every_32/32/96": [steps[32]],
        "curvature_figures/every_1/41/123": steps[41::2],
        "curvature_figures/every_2/42/126": steps[42::4],
        "curvature_figures/every_4/44/132": [steps[44]],
        "curvature_figures/every_8/40/120": [steps[40]],
        "curvature_figures/every_16/48/144": [steps[48]],
    }
    assert sorted(step for held in by_tag.values() for step in held) == steps


def test_tensorboard_keeps_all_probes_of_a_tag():
    kept = data_ingester.DEFAULT_SIZE_GUIDANCE
    assert groups.PROBES <= kept[plugin_event_accumulator.TENSORS]


def test_every_tag_has_a_description(tmp_path):
    record = synthetic_record(FIRST)
    record["optimizer"] = {"clipped_share": 0.1, "anything": 2.0}
    write(tmp_path, record, per_variable=True)
    (first,) = [
        event
        for event in events(*event_files(tmp_path))
        if event.step == FIRST and len(event.summary.value) > 1
    ]
    for value in first.summary.value:
        if not value.tag.startswith("curvature_"):
            assert value.metadata.summary_description.endswith("."), value.tag
        if "signed_log10/" in value.tag:
            assert "signed logarithmic axis" in value.metadata.summary_description


@pytest.mark.parametrize("missing", [None, "absent"])
def test_what_is_missing_has_no_tag(tmp_path, missing):
    record = synthetic_record(FIRST)
    for key in (
        "learning_rate",
        "two_over_learning_rate",
        "hessian_trace_standard_error",
        "hessian_max_eigenvalue",
        "hessian_max_eigenvalue_error",
    ):
        record[key] = None
    for layer in record["layers"]:
        layer["gradient_norm"] = None
        layer["histogram"] = None
        layer["frobenius_share"] = None
    record["optimizer"] = {}
    if missing == "absent":
        record["layers"] = [_present(layer) for layer in record["layers"]]
        record = _present(record)
    write(tmp_path, record)
    gone = {
        "hessian/max_eigenvalue",
        "stability/two_over_learning_rate",
        "uncertainty/max_eigenvalue_lower",
        "uncertainty/max_eigenvalue_upper",
        "probe/learning_rate",
        "optimizer/clipped_share",
        "hessian_diagonal_signed_log10/_whole_model",
    }
    gone |= {f"layer_gradient_norm/{layer}" for layer in LAYERS}
    gone |= {f"layer_frobenius_share/{layer}" for layer in LAYERS}
    gone |= {f"hessian_diagonal_signed_log10/{layer}" for layer in LAYERS}
    assert set(read(tmp_path)) == (GLOBAL | BY_LAYER) - gone


def _present(mapping):
    return {key: value for key, value in mapping.items() if value is not None}


def test_a_record_of_nothing_but_a_step(tmp_path):
    write(tmp_path, {"step": 5})
    assert set(read(tmp_path)) == {"custom_scalars__config__", "curvature_figures/5"}


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
            if record[figure.key] is not None:
                np.testing.assert_allclose(at(figure.tag), record[figure.key], **close)
        for layer in record["layers"]:
            for figure in tags.LAYER_FIGURES:
                np.testing.assert_allclose(
                    at(figure.of(layer["name"])), layer[figure.key], **close
                )
        np.testing.assert_allclose(
            at("stability/two_over_learning_rate"),
            record["two_over_learning_rate"],
            **close,
        )
        value, error = record["hessian_trace"], record["hessian_trace_standard_error"]
        np.testing.assert_allclose(
            at("uncertainty/trace_lower"), value - 2 * error, **close
        )
        np.testing.assert_allclose(
            at("uncertainty/trace_upper"), value + 2 * error, **close
        )
        bound = record["hessian_max_eigenvalue_error"]
        np.testing.assert_allclose(
            at("uncertainty/max_eigenvalue_upper"),
            record["hessian_max_eigenvalue"] + bound,
            **close,
        )
    assert set(found["hessian/trace"]) == {0, 100, 250}


def test_an_exact_figure_has_an_error_of_zero(tmp_path):
    write(
        tmp_path,
        {"step": 1, "hessian_trace": 3.0, "hessian_trace_standard_error": 0.0},
    )
    assert scalars(tmp_path, "uncertainty/trace_lower") == {1: 3.0}


def test_a_margin_chart_has_a_margin_where_no_error_is_known(tmp_path):
    record = {"hessian_trace": 3.0, "hessian_trace_standard_error": None}
    write(tmp_path, {"step": 1, **record})
    for end in ("lower", "upper"):
        assert scalars(tmp_path, f"uncertainty/trace_{end}") == {1: 3.0}


def with_histogram(step, edges, counts):
    histogram = {"edges": edges, "counts": counts}
    return {"step": step, "layers": [{"name": "dense", "histogram": histogram}]}


def test_histogram_holds_the_counts_on_the_logarithmic_axis(tmp_path):
    edges = np.array([-1.0, -1e-2, 1e-2, 1.0, 100.0])
    write(tmp_path, with_histogram(4, edges, [0, 7, 2, 0]))
    table = read(tmp_path)["hessian_diagonal_signed_log10/dense"][4]
    # The empty bins at both ends are left out.
    places = signed_log.to_axis(edges)
    np.testing.assert_allclose(
        table, [[places[1], places[2], 7], [places[2], places[3], 2]]
    )
    assert table.dtype == np.float64


def test_an_empty_histogram_keeps_its_bins(tmp_path):
    write(tmp_path, with_histogram(0, [0.0, 1.0, 2.0], [0, 0]))
    assert read(tmp_path)["hessian_diagonal_signed_log10/dense"][0].shape == (2, 3)


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
    listed = read(tmp_path)["curvature_layer_table"]
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


def test_the_page_gets_every_figure(tmp_path):
    record = synthetic_record(FIRST) | {
        "spectral_density": {
            "grid": [0.0, 1.0, 2.0],
            "density": [0.5, 0.25, 0.1],
            "standard_error": None,
        }
    }
    del record["overhead"]
    write(tmp_path, record, {"step": 20, "loss": 1.0})
    found = read(tmp_path)
    keys = {}
    for event in events(*event_files(tmp_path)):
        for value in event.summary.value:
            if value.tag.startswith("curvature_"):
                content = value.metadata.plugin_data.content
                keys[value.tag, event.step] = json.loads(content)
    tag = f"curvature_figures/{FIRST}"
    named = dict(zip(keys[tag, 10], found[tag][10], strict=True))
    expected = {f.key for f in tags.GLOBAL_FIGURES} | {*tags.ERROR_KEYS}
    assert set(named) == expected | {"optimizer/clipped_share"}
    assert np.isnan(named.pop("overhead"))
    for key, value in named.items():
        given = record["optimizer"][key[10:]] if "/" in key else record[key]
        np.testing.assert_allclose(value, given, rtol=1e-6)
    tag = f"curvature_layers/{FIRST}"
    assert keys[tag, 10] == list(tags.LAYER_KEYS)
    for layer, row in zip(record["layers"], found[tag][10], strict=True):
        given = [layer[key] for key in keys[tag, 10]]
        np.testing.assert_allclose(row, given, rtol=1e-6)
    np.testing.assert_allclose(
        found[f"curvature_density/{FIRST}"][10],
        [[0, 1, 2], [0.5, 0.25, 0.1], [0, 0, 0]],
        rtol=1e-6,
    )


def test_other_figures_of_an_optimizer_go_to_another_tag(tmp_path):
    """TensorBoard knows the metadata of a tag's first tensor only."""
    told = [{}, {"a": 1.0}, {"a": None}, {"a": 1.0, "b": 2.0}]
    write(tmp_path, *({"step": i, "optimizer": one} for i, one in enumerate(told)))
    found = read(tmp_path)
    assert {tag: list(v) for tag, v in found.items() if "curvature_" in tag} == {
        "curvature_figures/0": [0],
        "curvature_figures/1": [1, 2],
        "curvature_figures/3": [3],
    }
