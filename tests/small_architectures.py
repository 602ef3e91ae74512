"""Architectures that are in use, as small as they can be made.

`ARCHITECTURES[name]()` builds a compiled model in Keras' current float type, with data
for it. Those of keras-hub have one block and a vocabulary of eleven words. The cases in
`cases.py` hold what single layers need; here is what models are made of beyond that.
"""

import cases
import keras
import numpy as np
from cases import Case
from keras import layers, ops

ARCHITECTURES = {}

#: Part of these is computed in float32, whatever the float type.
ROUNDED = ("llama", "mistral", "gemma", "mixtral", "ctc", "lora", "int8")


def _architecture(function):
    ARCHITECTURES[function.__name__] = function
    return function


def _classifier(inputs, outputs):
    return cases.functional(inputs, layers.Dense(3)(outputs), cases._cross_entropy())


def differences(op, direction, step):
    """`H v` by differences of the gradient, of fourth order.

    Args:
        op: a `HessianOperator`.
        direction: flat vector v.
        step: length of the steps along it; rounding grows with their inverse, and
            truncation with their fourth power.
    """

    def numpy_of(x):
        return np.asarray(ops.convert_to_numpy(x)).astype("float64")

    at, norm, slopes = (
        [numpy_of(v) for v in op.variables],
        np.linalg.norm(direction),
        {},
    )
    moves = op.split(direction / norm)
    for k in (-2, -1, 1, 2):
        for variable, value, move in zip(op.variables, at, moves, strict=True):
            variable.assign(value + k * step * move)
        slopes[k] = numpy_of(op.value_and_gradient()[1])
    for variable, value in zip(op.variables, at, strict=True):
        variable.assign(value)
    near, far = slopes[1] - slopes[-1], slopes[2] - slopes[-2]
    return (8 * near - far) / (12 * step) * norm


# keras-hub: language

#: One block, narrow.
_BLOCK = {
    "vocabulary_size": 11,
    "num_layers": 1,
    "hidden_dim": 4,
    "intermediate_dim": 6,
}
_HEADS = _BLOCK | {"num_heads": 2, "dropout": 0.0}
_GROUPED_HEADS = _BLOCK | {"num_query_heads": 2, "num_key_value_heads": 1}


def _words(length=4, seed=0):
    return cases._labels((2, length), 11, seed)


def _text(**more):
    """Two texts, the second one shorter."""
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
    return {"token_ids": _words(), "padding_mask": mask} | more


def _predicts_words(kind, **arguments):
    """A causal model; its outputs are compared with the table of its inputs."""
    import keras_hub

    backbone = getattr(keras_hub.models, f"{kind}Backbone")(**arguments)
    logits = backbone.token_embedding(backbone.output, reverse=True)
    model = cases.functional(backbone.input, logits, cases._cross_entropy())
    return Case(model, _text(), _words(seed=1))


@_architecture
def gpt2():
    return _predicts_words("GPT2", **_HEADS, max_sequence_length=5)


@_architecture
def llama():
    """Rotary positions, heads that share keys, gated units, RMS normalization."""
    return _predicts_words("Llama", **_GROUPED_HEADS)


@_architecture
def mistral():
    return _predicts_words("Mistral", **_GROUPED_HEADS, sliding_window=3)


@_architecture
def gemma():
    return _predicts_words("Gemma", **_GROUPED_HEADS, head_dim=2)


@_architecture
def mixtral():
    """Experts in one kernel, two of three for each word."""
    return _predicts_words(
        "Mixtral", **_GROUPED_HEADS, sliding_window=4, num_experts=3, top_k=2
    )


@_architecture
def bert():
    import keras_hub

    backbone = keras_hub.models.BertBackbone(**_HEADS, max_sequence_length=5)
    model = _classifier(backbone.input, backbone.output["pooled_output"])
    segments = np.array([[0, 0, 1, 1], [0, 1, 1, 1]])
    return Case(model, _text(segment_ids=segments), cases._labels(2, 3))


@_architecture
def distilbert():
    import keras_hub

    backbone = keras_hub.models.DistilBertBackbone(**_HEADS, max_sequence_length=5)
    model = _classifier(backbone.input, backbone.output)
    return Case(model, _text(), cases._labels((2, 4), 3))


@_architecture
def t5():
    """Encoder and decoder; relative positions in one table for each of them."""
    import keras_hub

    backbone = keras_hub.models.T5Backbone(**_HEADS)
    model = _classifier(backbone.input, backbone.output["decoder_sequence_output"])
    x = {"encoder_token_ids": _words(), "decoder_token_ids": _words(3, 1)}
    x["encoder_padding_mask"] = _text()["padding_mask"]
    x["decoder_padding_mask"] = np.ones((2, 3))
    return Case(model, x, cases._labels((2, 3), 3))


@_architecture
def whisper():
    """Sound to words: strided convolutions, then encoder and decoder."""
    import keras_hub

    backbone = keras_hub.models.WhisperBackbone(
        **_HEADS,
        num_mels=3,
        max_encoder_sequence_length=6,
        max_decoder_sequence_length=3,
    )
    model = _classifier(backbone.input, backbone.output["decoder_sequence_output"])
    x = {"encoder_features": cases._numbers(2, 6, 3)}
    x |= {"decoder_token_ids": _words(3), "decoder_padding_mask": np.ones((2, 3))}
    return Case(model, x, cases._labels((2, 3), 3))


# keras-hub: pictures


def _sees(backbone, size=8):
    features = backbone.output
    axes = tuple(range(1, len(features.shape) - 1))
    model = _classifier(backbone.input, ops.mean(features, axes))
    return Case(model, cases._numbers(2, size, size, 1), cases._labels(2, 3))


@_architecture
def vit():
    """Positions are an Embedding that is called on a constant."""
    import keras_hub

    return _sees(
        keras_hub.models.ViTBackbone(
            image_shape=(8, 8, 1),
            patch_size=(4, 4),
            num_layers=1,
            num_heads=2,
            hidden_dim=4,
            mlp_dim=6,
            dropout_rate=0.0,
            attention_dropout=0.0,
        )
    )


@_architecture
def sam():
    """Segment Anything's encoder: attention with positions in two tables."""
    import keras_hub

    return _sees(
        keras_hub.models.ViTDetBackbone(
            image_shape=(8, 8, 1),
            patch_size=2,
            hidden_size=4,
            num_layers=1,
            num_heads=2,
            intermediate_dim=6,
            global_attention_layer_indices=[],
            window_size=3,
            num_output_channels=2,
        )
    )


@_architecture
def swin():
    """Attention within windows, whose positions are samples to the layers."""
    import keras_hub

    return _sees(
        keras_hub.models.SwinTransformerBackbone(
            image_shape=(8, 8, 1),
            patch_size=2,
            embed_dim=4,
            depths=[2],
            num_heads=[2],
            window_size=2,
        )
    )


@_architecture
def segformer():
    import keras_hub

    return _sees(
        keras_hub.models.MiTBackbone(
            image_shape=(16, 16, 1),
            num_layers=2,
            layerwise_depths=[1, 1],
            layerwise_num_heads=[1, 2],
            layerwise_sr_ratios=[2, 1],
            layerwise_patch_sizes=[7, 3],
            layerwise_strides=[4, 2],
            hidden_dims=[4, 4],
            max_drop_path_rate=0.1,
        ),
        16,
    )


@_architecture
def resnet():
    """The first filters are 64, so that this is the largest one."""
    import keras_hub

    case = _sees(
        keras_hub.models.ResNetBackbone(
            image_shape=(8, 8, 1),
            input_conv_filters=[64],
            input_conv_kernel_sizes=[3],
            stackwise_num_filters=[64],
            stackwise_num_blocks=[1],
            stackwise_num_strides=[1],
            block_type="basic_block",
        )
    )
    for variable in case.model.trainable_variables:
        if variable.name == "kernel":
            # Sums over so many channels would leave the softmax without curvature.
            variable.assign(0.1 * variable)
    return case


# Pictures without keras-hub


@_architecture
def unet():
    """A step of diffusion: time, a text to attend to, down and up again."""
    image, time = layers.Input((4, 4, 2)), layers.Input((1,))
    text = layers.Input((3, 2))
    clock = ops.concatenate([ops.sin(time), ops.cos(time)], axis=-1)
    h = layers.Activation("silu")(layers.GroupNormalization(2)(image))
    h = layers.Conv2D(4, 3, padding="same")(h)
    h = h + layers.Dense(4)(clock)[:, None, None]
    words = layers.Reshape((16, 4))(h)
    words = words + layers.MultiHeadAttention(2, 2)(
        layers.LayerNormalization()(words), text
    )
    gated = layers.Dense(4)(words)
    words = words + layers.Dense(4)(gated[..., :2] * ops.gelu(gated[..., 2:]))
    h = layers.Reshape((4, 4, 4))(words)
    down = layers.Conv2D(4, 3, strides=2, padding="same", activation="silu")(h)
    up = layers.Concatenate()([layers.UpSampling2D()(down), h])
    model = cases.functional(
        [image, time, text], layers.Conv2D(2, 3, padding="same")(up)
    )
    x = [cases._numbers(2, 4, 4, 2), cases._numbers(2, 1), cases._numbers(2, 3, 2)]
    return Case(model, x, cases._numbers(2, 4, 4, 2, seed=1))


class Queries(layers.Layer):
    """Vectors that are learned, the same for each sample."""

    def build(self, shape):
        self.queries = self.add_weight(shape=(2, 4), name="queries")

    def call(self, x):
        shape = (ops.shape(x)[0], *self.queries.shape)
        return ops.broadcast_to(self.queries[None], shape)


@_architecture
def detr():
    """Objects out of a picture: what is asked for is learned; classes and boxes."""
    image = layers.Input((3, 3, 2))
    seen = layers.Reshape((9, 4))(layers.Conv2D(4, 2, padding="same")(image))
    asked = Queries()(seen)
    asked = layers.LayerNormalization()(
        asked + layers.MultiHeadAttention(1, 2)(asked, asked)
    )
    asked = layers.LayerNormalization()(
        asked + layers.MultiHeadAttention(1, 2)(asked, seen)
    )
    model = cases.functional(
        image,
        {
            "classes": layers.Dense(3, name="classes")(asked),
            "boxes": layers.Dense(4, activation="sigmoid", name="boxes")(asked),
        },
        {"classes": cases._cross_entropy(), "boxes": "huber"},
        loss_weights={"classes": 1.0, "boxes": 5.0},
    )
    y = {"classes": cases._labels((2, 2), 3), "boxes": cases._numbers(2, 2, 4) ** 2}
    return Case(model, cases._numbers(2, 3, 3, 2), y)


# Recurrent


@_architecture
def bidirectional():
    inputs = layers.Input((3, 2))
    h = layers.Bidirectional(layers.LSTM(2, return_sequences=True))(inputs)
    return Case(
        _classifier(inputs, h), cases._numbers(2, 3, 2), cases._labels((2, 3), 3)
    )


@_architecture
def conv_lstm():
    inputs = layers.Input((3, 3, 3, 1))
    h = layers.GlobalAveragePooling2D()(layers.ConvLSTM2D(2, 2)(inputs))
    return Case(
        _classifier(inputs, h), cases._numbers(2, 3, 3, 3, 1), cases._labels(2, 3)
    )


@_architecture
def cells():
    """Two kinds of cells on top of each other, in one loop; steps are masked."""
    inputs = layers.Input((4,), dtype="int32")
    h = layers.Embedding(5, 2, mask_zero=True)(inputs)
    h = layers.RNN([layers.GRUCell(2), layers.LSTMCell(2)])(h)
    x = np.array([[1, 2, 0, 0], [3, 1, 4, 2]])
    return Case(_classifier(inputs, h), x, cases._labels(2, 3))


@_architecture
def ctc():
    """Letters out of sounds, without knowing when."""
    model = cases.sequential(
        layers.Input((4, 2)),
        layers.Dense(3, activation="tanh"),
        layers.Dense(3),
        loss=keras.losses.CTC(),
    )
    return Case(model, cases._numbers(2, 4, 2), np.array([[1, 2], [2, 0]]))


# Graphs and experts


class GraphLayer(layers.Layer):
    """Each node adds up what the nodes in front of it send, along its graph's edges."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.own, self.sent = layers.Dense(units), layers.Dense(units, "tanh")

    def build(self, shapes):
        self.own.build(shapes[0])
        self.sent.build(shapes[0])

    def call(self, inputs):
        nodes, sources, targets = inputs
        sent = self.sent(ops.take_along_axis(nodes, sources[..., None], axis=1))
        to = ops.one_hot(targets, nodes.shape[1], dtype=sent.dtype)
        return ops.tanh(self.own(nodes) + ops.einsum("ben,bed->bnd", to, sent))


@_architecture
def graphs():
    """A batch of graphs of four nodes and five edges."""
    nodes = layers.Input((4, 2))
    edges = [layers.Input((5,), dtype="int32") for _ in range(2)]
    h = GraphLayer(2)([nodes, *edges])
    h = layers.GlobalAveragePooling1D()(GraphLayer(2)([h, *edges]))
    x = [cases._numbers(2, 4, 2)] + [cases._labels((2, 5), 4, seed) for seed in (2, 3)]
    return Case(_classifier([nodes, *edges], h), x, cases._labels(2, 3))


class NodesLayer(layers.Layer):
    """The same for one graph, whose nodes are the samples."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.sent = layers.Dense(units)

    def build(self, shape):
        self.sent.build(shape)

    def call(self, nodes):
        sent = self.sent(ops.take(nodes, np.array([0, 1, 2, 3, 0]), axis=0))
        targets = np.array([0, 1, 1, 2, 3])
        return ops.tanh(ops.segment_sum(sent, targets, num_segments=4))


@_architecture
def graph():
    """One graph: its nodes are the samples, and depend on each other."""
    inputs = layers.Input((2,))
    h = layers.Dense(3, "tanh")(inputs)
    return Case(
        _classifier(inputs, NodesLayer(3)(h)), cases._numbers(4, 2), cases._labels(4, 3)
    )


class Experts(layers.Layer):
    """A few experts for each sample, those that a router ranks highest."""

    def __init__(self, units, count=3, taken=2, **kwargs):
        super().__init__(**kwargs)
        self.taken = taken
        self.router = layers.Dense(count)
        self.experts = [layers.Dense(units, "gelu") for _ in range(count)]

    def build(self, shape):
        for layer in (self.router, *self.experts):
            layer.build(shape)

    def call(self, x):
        logits = self.router(x)
        # As in ST-MoE: large logits of the router are discouraged.
        self.add_loss(0.1 * ops.mean(ops.logsumexp(logits, axis=-1) ** 2))
        highest, which = ops.top_k(logits, self.taken)
        taken = ops.one_hot(which, len(self.experts), dtype=logits.dtype)
        gates = ops.sum(taken * ops.softmax(highest)[..., None], axis=-2)
        every = ops.stack([expert(x) for expert in self.experts], axis=-1)
        return ops.sum(every * gates[..., None, :], axis=-1)


@_architecture
def experts():
    inputs = layers.Input((2,))
    h = Experts(3)(layers.Dense(3, "tanh")(inputs))
    return Case(_classifier(inputs, h), cases._numbers(4, 2), cases._labels(4, 3))


# Adapters and quantized layers


@_architecture
def lora():
    """Adapters in all layers that take them; kernels and tables are frozen."""
    inputs = layers.Input((3,), dtype="int32")
    x = layers.Embedding(5, 4)(inputs)
    x = x + layers.MultiHeadAttention(1, 2)(x, x)
    x = layers.Conv1D(3, 2, padding="same", activation="gelu")(x)
    model = _classifier(inputs, x)
    _adapt(model)
    return Case(model, cases._labels((2, 3), 5), cases._labels((2, 3), 3))


@_architecture
def int8():
    """A quantized layer with adapters in front of one in floats.

    Its inputs are data. A quantized layer behind another one rounds what it gets, and
    training takes the derivative of that for one: no differences would agree.
    """
    model = cases.sequential(
        layers.Input((3,)), layers.Dense(4), layers.Activation("tanh"), layers.Dense(2)
    )
    model.layers[0].quantize("int8")
    _adapt(model.layers[0])
    return Case(model, cases._numbers(4, 3), cases._numbers(4, 2, seed=1))


def _adapt(model):
    """LoRA, with values as after some training: one factor begins at zero."""
    for layer in model._flatten_layers():
        if hasattr(layer, "enable_lora"):
            layer.enable_lora(1)
    adapters = [v for v in model.trainable_variables if "lora" in v.name]
    for i, variable in enumerate(adapters):
        variable.assign(0.5 * cases._numbers(*variable.shape, seed=i))


# Models of models


@_architecture
def nested():
    """A model in a model in a model, the innermost used twice."""
    inner = keras.Sequential(
        [layers.Input((3,)), layers.Dense(3, "tanh"), layers.LayerNormalization()]
    )
    inputs = layers.Input((2,))
    middle = keras.Model(inputs, inner(layers.Dense(3)(inputs)))
    inputs = layers.Input((2,))
    h = middle(inputs) + inner(layers.Dense(3, "tanh")(inputs))
    return Case(_classifier(inputs, h), cases._numbers(3, 2), cases._labels(3, 3))
