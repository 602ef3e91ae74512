"""`CurvatureFeed`: the monitor with the settings that suit an optimizer."""

from keras_curvature.callbacks.batches import RandomRows
from keras_curvature.callbacks.curvature_monitor import CurvatureMonitor


class CurvatureFeed(CurvatureMonitor):
    """Feeds an optimizer with fresh curvature from the training data.

    A `CurvatureMonitor` that measures what `DiagonalNewton` needs and nothing else:
    one random sample of the Hessian's diagonal, each time on another batch of the
    training data. A sample costs about two gradients of its batch, and the optimizer
    averages them. Rows and random directions are functions of the seed and the step: a
    training that was saved and goes on steps as if it had never stopped.

    ```python
    model.compile(optimizer=kc.DiagonalNewton(), loss="mse")
    model.fit(x, y, callbacks=[kc.CurvatureFeed((x, y))])
    ```

    Args:
        train_data: what `fit` trains on: `(x, y)` or `(x, y, sample_weight)` of arrays
            or nested structures, of which each probe takes random rows; or a data
            set, of which each probe takes the next batch (and begins with the first
            when training is resumed).
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
        arrays = isinstance(train_data, (tuple, list))
        settings = {
            "num_matvecs": 0,
            "preconditioned": False,
            "gradients": False,
            "histograms": False,
        }
        super().__init__(
            train_data,
            update_freq,
            seed=seed,
            diagonal=diagonal,
            diagonal_samples=diagonal_samples,
            fresh_batches=not arrays,
            **(settings | arguments),
        )
        if arrays:
            self._batches_of = RandomRows(train_data, batch_size, self.seed)
