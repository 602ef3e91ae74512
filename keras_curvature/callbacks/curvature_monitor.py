"""`CurvatureMonitor`: probes the curvature while `fit` runs."""

import os
import sys
import time

import keras

from keras_curvature import backend, keras_internals
from keras_curvature import record as records
from keras_curvature.callbacks.arguments import check_arguments, unpacked
from keras_curvature.callbacks.failures import Failures, about_data, reason
from keras_curvature.callbacks.hand_over import (
    learning_rate,
    number,
    optimizer_figures,
    step,
)
from keras_curvature.callbacks.measurement import Measurement
from keras_curvature.callbacks.pace import Pace
from keras_curvature.data import endless_batches
from keras_curvature.operators import HessianOperator
from keras_curvature.tensorboard.writer import CurvatureWriter


class CurvatureMonitor(keras.callbacks.Callback):
    """Watches the Hessian of the training loss while `fit` runs.

    Before the first step and every `update_freq` batches it computes the Hessian's
    trace, Frobenius norm, largest eigenvalue and diagonal on the probe data, without
    disturbing training in any way: a run with the monitor is bit for bit the run
    without it.

    ```python
    monitor = kc.CurvatureMonitor((x_probe, y_probe), log_dir="logs/run1")
    history = model.fit(x, y, callbacks=[monitor])
    monitor.history[-1]["hessian_trace"]
    history.history["hessian_trace"]           # last probe of each epoch
    ```

    An optimizer that takes curvature (`DiagonalNewton`) is handed the diagonal at
    each probe; nothing has to be wired. A failing probe never stops training.

    Each entry of `history` is a flat dictionary:

    | key | meaning |
    |---|---|
    | `step`, `epoch` | `optimizer.iterations` and epoch at the probe |
    | `loss` | training loss on the probe data |
    | `mode` | how the layers ran: as in `"training without noise"`, `"inference"` or `"training"`, and how many samples BatchNormalization took its statistics of |
    | `learning_rate` | of the optimizer at that step |
    | `hessian_trace`, `hessian_frobenius_norm` | the figures |
    | `hessian_max_eigenvalue` | largest eigenvalue |
    | `…_standard_error` | their standard errors, `None` if unknown |
    | `hessian_max_eigenvalue_error` | norm of the eigenvalue's residual |
    | `hessian_preconditioned_max_eigenvalue` | largest eigenvalue that the optimizer sees |
    | `stability_threshold` | the curvature above which the optimizer is unstable |
    | `seconds`, `num_matvecs` | what the probe cost |
    | `overhead` | share of the time that probes have taken so far, compilation apart |
    | `variables`, `layers` | lists of dictionaries: statistics of the diagonal, traces and shares of the squared norm |
    | `optimizer` | what the optimizer tells about its steps |
    | `spectral_density` | if asked for: lists `grid`, `density`, `standard_error`; `sigma`, `size` |

    Trace, norm and eigenvalue come from the same products, which are split between
    the dominant subspace kept from the last probe and fresh random signs (see
    `keras_curvature.estimators.DominantSubspace`); they get more precise as training
    goes on.

    Args:
        probe_data: `(x, y)` or `(x, y, sample_weight)` of arrays or nested
            structures, a `tf.data.Dataset` or a `keras.utils.PyDataset`. The loss is
            averaged over all of it at every probe.
        update_freq: number of training batches between probes, or `"epoch"`.
        log_dir: event files are written to `<log_dir>/curvature`. Defaults to `None`,
            which writes none.
        seed: seed of the random directions.
        num_matvecs: matrix-vector products per probe for trace, norm and eigenvalue;
            0 leaves them out.
        diagonal: method for the diagonal, as in `hessian_diagonal`; `None` leaves it
            out. Defaults to `"auto"`: exact where that takes few products, as for
            classifiers of a few classes with piecewise linear layers, else
            layerwise.
        diagonal_samples: samples of the diagonal per probe, where it is not exact.
            One has no standard error.
        preconditioned: whether to follow the largest eigenvalue of the Hessian that
            the optimizer sees, `D^{-1/2} H D^{-1/2}`, where its diagonal
            preconditioner D is known (Adam, AdamW, RMSprop, DiagonalNewton).
            Takes 4 products.
        spectral_density: whether the density of all eigenvalues is estimated at every
            probe, or at every n-th for a number n; TensorBoard shows it as an image.
            Takes 64 products (32 Lanczos steps from each of 2 random vectors) and
            the memory of 64 times the parameters. Defaults to `False`.
        max_overhead: share of the wall-clock time that probes may take, such as
            0.05. Then `update_freq` is the least number of batches between probes;
            they are spaced, and get fewer products, as the clock demands. The time
            to compile the first probe is not counted.
        fresh_batches: whether each probe takes the next batch of a data set instead
            of all of it; the data set may be endless. Defaults to `False`.
        histograms: whether histograms of the diagonal are written.
        per_variable: whether event files hold figures by variable besides layers.
        on_error: `"warn"` to go on after a failed probe, or `"raise"`.
        verbose: 1 prints a line per probe.
        **options: further arguments of `HessianOperator`: `class_weight`, `loss_fn`,
            `variables`, `training`, `batch_size`, `hvp`, `jit_compile`.

    Raises:
        ValueError: for arguments that make no sense; at the start of training for
            probe data that does not fit the model.
    """  # noqa: E501

    def __init__(
        self,
        probe_data,
        update_freq: int | str = 100,
        log_dir: str | os.PathLike | None = None,
        seed: int = 0,
        *,
        num_matvecs: int = 12,
        diagonal: str | None = "auto",
        diagonal_samples: int = 4,
        preconditioned: bool = True,
        spectral_density: bool | int = False,
        max_overhead: float | None = None,
        fresh_batches: bool = False,
        histograms: bool = True,
        per_variable: bool = False,
        on_error: str = "warn",
        verbose: int = 0,
        **options,
    ):
        super().__init__()
        check_arguments(
            update_freq=update_freq,
            log_dir=log_dir,
            seed=seed,
            num_matvecs=num_matvecs,
            diagonal=diagonal,
            diagonal_samples=diagonal_samples,
            spectral_density=spectral_density,
            max_overhead=max_overhead,
            on_error=on_error,
            options=options,
        )
        self.update_freq = update_freq
        self.log_dir = log_dir
        self.seed = int(seed)
        self.history: list = []
        self.verbose = verbose
        self._probe_data = unpacked(probe_data)
        self._num_matvecs = num_matvecs
        self._measurement = Measurement(
            self.seed,
            num_matvecs,
            diagonal,
            diagonal_samples,
            preconditioned,
            spectral_density,
            histograms,
            per_variable,
        )
        least = 1 if update_freq == "epoch" else update_freq
        self._pace = Pace(max_overhead, least, num_matvecs)
        self._batches = None
        if fresh_batches:
            self._batches = endless_batches(*self._probe_data)
        self._failures = Failures(on_error)
        self._options = options
        self._writer = CurvatureWriter(log_dir, per_variable) if log_dir else None
        self._operator = None
        self._operator_of = None
        self._starting = False
        self._used = True
        self._batches_before_epoch = 0
        self._batches_seen = 0
        self._epoch = 0

    def __repr__(self):
        written = f", log_dir={os.fspath(self.log_dir)!r}" if self.log_dir else ""
        last = f", last {records.one_line(self.history[-1])}" if self.history else ""
        return (
            f"<CurvatureMonitor: update_freq={self.update_freq!r}{written}, "
            f"{len(self.history)} probes{last}>"
        )

    # When

    def on_train_begin(self, logs=None):
        """Checks the probe data, and makes the operator and the optimizer ready."""
        self._starting = self._prepare() or not self.history
        self._pace.start()
        if not self._starting:
            # A further `fit` that goes on where the last probe was.
            self._starting = self.history[-1]["step"] != self._step()

    def on_epoch_begin(self, epoch, logs=None):
        """Probes before the first step."""
        self._epoch = epoch
        self._batches_before_epoch = self._batches_seen
        # Not when training begins: callbacks may load weights then (BackupAndRestore).
        if self._starting:
            self._starting = False
            self._probe()

    def on_train_batch_end(self, batch, logs=None):
        """Probes when a multiple of `update_freq` batches was reached or passed."""
        # One call per execution: with steps_per_execution=4 the batches are 3, 7, … and
        # may end beyond the last of an epoch.
        done = min(batch + 1, self.params.get("steps") or batch + 1)
        seen, self._batches_seen = (
            self._batches_seen,
            self._batches_before_epoch + done,
        )
        self._pace.trained(self._batches_seen - seen)
        if self.update_freq != "epoch":
            if seen // self.update_freq != self._batches_seen // self.update_freq:
                self._probe()

    def on_epoch_end(self, epoch, logs=None):
        """Probes if asked for, and adds the last figures to the logs."""
        if self.update_freq == "epoch":
            self._probe()
        if logs is not None:
            last = self.history[-1] if self.history else {}
            for name in self._figures():
                # Never missing, so that columns of epochs stay aligned.
                value = last.get(name)
                logs[name] = float("nan") if value is None else value

    def on_train_end(self, logs=None):
        """Closes the event file; a further `fit` continues the run."""
        if self._writer is not None:
            with self._failures.survived(lambda: "Closing the event file"):
                self._writer.close()

    def _figures(self):
        norm = "hessian_frobenius_norm", "hessian_max_eigenvalue"
        return "hessian_trace", *(norm if self._num_matvecs else ())

    # What

    @property
    def operator(self):
        """The `HessianOperator` on the probe data, `None` before training."""
        return self._operator

    def _prepare(self):
        """Makes the operator if there is none for the model as it is; tells whether.

        Made anew when the model was compiled anew, or layers were frozen or thawed.
        """
        model = self.model
        # Held, not only compared by id, so that no id is given to another object.
        of = (
            model,
            keras_internals.compiled_loss_of(model),
            *model.trainable_variables,
        )
        known = self._operator_of
        if known is not None and list(map(id, known)) == list(map(id, of)):
            return False
        self._operator, self._operator_of, self._used = None, None, False
        try:
            data = self._probe_data if self._batches is None else self._next_batch()
            self._operator = HessianOperator(model, *data, **self._options)
            self._operator.loss()
        except Exception as error:
            if about_data(error):
                raise ValueError(
                    f"CurvatureMonitor cannot probe the model {model.name!r} with its "
                    f"`probe_data`: {reason(error)}"
                ) from error
            # What else fails in the loss fails again in the first probe.
            if self._operator is None:
                with self._failures.survived(lambda: "Looking at the model"):
                    raise
        self._measurement.renew()
        # Building may have created the variables.
        self._operator_of = (*of[:2], *model.trainable_variables)
        keras_internals.build_optimizer(model)
        return True

    def _next_batch(self):
        try:
            return next(self._batches)
        except Exception:
            # A generator that failed gives nothing ever after.
            self._batches = endless_batches(*self._probe_data)
            raise

    def _probe(self):
        if self._operator is None or not self._pace.due():
            return
        traces = backend.num_traces()
        try:
            self._attempt()
        finally:
            self._pace.probed(compiled=backend.num_traces() != traces)

    def _attempt(self):
        with self._failures.survived(
            lambda: f"The curvature probe at step {self._step()}"
        ):
            record = self._look()
            self.history.append(record)
            self._tell(record)

    def _tell(self, record):
        if not records.is_finite(record):
            self._failures.tell(
                f"The curvature at step {record['step']} is not finite. Has training "
                "diverged, or does the loss overflow?",
                "not finite",
            )
        if self.verbose:
            self._print(records.one_line(record))
        if self._writer is not None:
            self._writer.write(record)

    def _print(self, line):
        if self.params.get("verbose") in (1, "auto"):
            # Over Keras' progress bar, which is drawn again below.
            clear = "\r\x1b[2K" if sys.stdout.isatty() else "\r"
            line = clear + line.ljust(0 if sys.stdout.isatty() else 110)
        print(line, flush=True)

    def _look(self):
        start = time.perf_counter()
        # Read first: in mid-epoch on JAX the variables are empty until Keras is asked
        # for the model, which is when it brings their values from the training step.
        model, operator = self.model, self._operator
        if self._batches is not None and self._used:
            operator.set_data(*self._next_batch())
        self._used = True
        record = {
            "step": self._step(),
            "epoch": self._epoch,
            "loss": number(operator.loss()).item(),
            "mode": records.mode_of(operator),
            "learning_rate": learning_rate(model),
        }
        record.update(self._measurement.take(model, operator, self._pace.num_matvecs))
        record["optimizer"] = optimizer_figures(model)
        record["seconds"] = time.perf_counter() - start
        record["overhead"] = self._pace.overhead
        return record

    def _step(self):
        return step(self.model)
