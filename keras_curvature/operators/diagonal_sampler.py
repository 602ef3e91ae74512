"""Random samples of a model's diagonal: what all kinds of them have in common."""

from keras import ops

from keras_curvature import backend


class DiagonalSampler:
    """Independent samples of the diagonal, for `estimators.sampled_moments`.

    A kind of sample says in `_prepared` how it is drawn.

    Args:
        layer_outputs: a `LayerOutputHessian`.
    """

    def __init__(self, layer_outputs):
        self._layer_outputs = layer_outputs
        self._operator = layer_outputs.operator

    @property
    def device(self):
        """Name of the device that does the work."""
        return self._operator.device

    @property
    def size(self):
        """P, the number of entries of the diagonal."""
        return self._operator.shape[0]

    def diagonal_samples(self, seed, first, count):
        """Independent samples of the diagonal.

        Args:
            seed: integer seed.
            first: index of the first sample; a sample is a function of
                `(seed, index)` and the model's state alone.
            count: number of samples; they share one forward pass and gradient.

        Returns:
            Tensor `(P, count)`, on the device.
        """
        self._find_out()
        return self._operator.mean_over_batches(
            lambda batch, seed, number: self._samples(batch, seed, number, count),
            (*self._key(), count),
            backend.array([seed, first], "int32"),
            numbered=True,
        )

    def _samples(self, batch, seed, number, count):
        draw = self._prepared(batch)

        def sample(i):
            # Fresh signs for each sample and each batch of the data.
            index = ops.stack([0, i])
            return self._operator.flatten(draw(backend.fold_seed(seed + index, number)))

        samples = backend.loop_over_range(sample, count, self._operator.dtype.name)
        return ops.transpose(samples)

    def _find_out(self):
        """Computes what has to be known before a sample is traced."""
        self._layer_outputs.samples_interact  # noqa: B018  # Leaves rules that hold.

    def _key(self):
        """What the traced computation depends on, besides the number of samples."""
        return (type(self).__name__,)

    def _prepared(self, batch):
        """Records a batch, while tracing.

        Returns:
            A function from a seed to one sample, a list of tensors shaped like the
            variables.
        """
        raise NotImplementedError
