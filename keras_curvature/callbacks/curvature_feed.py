"""`CurvatureFeed`: the monitor with the settings that suit an optimizer."""

import keras
import numpy as np
from keras import ops, tree

from keras_curvature.callbacks.arguments import check, is_count
from keras_curvature.callbacks.curvature_monitor import CurvatureMonitor


class CurvatureFeed(CurvatureMonitor):
    """Feeds an optimizer with fresh curvature from the training data.

    A `CurvatureMonitor` that measures what `DiagonalNewton` needs and nothing else:
    one random sample of the Hessian's diagonal, each time on another batch of the
    training data. A sample costs about two gradients of its batch, and the optimizer
    averages them.

    ```python
    model.compile(optimizer=kc.DiagonalNewton(), loss="mse")
    model.fit(x, y, callbacks=[kc.CurvatureFeed((x, y))])
    ```

    Args:
        train_data: what `fit` trains on: `(x, y)` or `(x, y, sample_weight)` of arrays
            or nested structures, of which each probe takes random rows; or a data
            set, of which each probe takes the next batch.
        update_freq: number of training batches between probes. Defaults to `100`.
        batch_size: number of samples in a probe; only for arrays. Defaults to `32`.
        diagonal: method for the diagonal, as in `hessian_diagonal`.
            Defaults to `"layerwise"`.
        diagonal_samples: samples of the diagonal per probe. Defaults to `1`.
        seed: seed of the random rows and directions.
        **arguments: further arguments of `CurvatureMonitor`.

    Raises:
        ValueError: as for `CurvatureMonitor`.
    """

    def __init__(
        self,
        train_data,
        update_freq: int | str = 100,
        batch_size: int = 32,
        *,
        diagonal: str = "layerwise",
        diagonal_samples: int = 1,
        seed: int = 0,
        **arguments,
    ):
        if isinstance(train_data, (tuple, list)):
            train_data = _RandomRows(train_data, batch_size, seed)
        settings = {"num_matvecs": 0, "preconditioned": False, "histograms": False}
        super().__init__(
            train_data,
            update_freq,
            seed=seed,
            diagonal=diagonal,
            diagonal_samples=diagonal_samples,
            fresh_batches=True,
            **(settings | arguments),
        )


class _RandomRows(keras.utils.PyDataset):
    """Random rows of arrays, without end; batch i is a function of the seed and i."""

    def __init__(self, data, size, seed):
        super().__init__()
        check(
            is_count(size, 1), "must be a positive number of samples", batch_size=size
        )
        self._arrays = tree.map_structure(ops.convert_to_numpy, tuple(data))
        counts = {len(a) for a in tree.flatten(self._arrays)}
        if len(counts) != 1 or 0 in counts:
            raise ValueError(
                "All arrays in `train_data` must have the same number of samples, and "
                f"at least one. Received: {sorted(counts)} samples."
            )
        (self._count,) = counts
        self._size, self._seed = min(size, self._count), seed

    @property
    def num_batches(self):
        """None: it never ends."""

    def __getitem__(self, index):
        rng = np.random.default_rng([self._seed, index])
        rows = rng.choice(self._count, self._size, replace=False)
        return tree.map_structure(lambda a: a[rows], self._arrays)
