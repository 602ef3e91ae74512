"""`CurvatureMonitor`: probes the curvature while `fit` runs."""

import os
import sys
import time
from collections.abc import Sequence

import keras

from keras_curvature import backend, keras_internals
from keras_curvature import record as records
from keras_curvature.callbacks.arguments import (
    check,
    check_arguments,
    is_count,
    unpacked,
)
from keras_curvature.callbacks.batches import NextBatches, RandomRows
from keras_curvature.callbacks.failures import Failures, about_data, reason
from keras_curvature.callbacks.hand_over import (
    batches_per_step,
    last_delivery,
    learning_rate,
    optimizer_figures,
    steps_taken,
    takes_curvature,
)
from keras_curvature.callbacks.measurement import Measurement
from keras_curvature.callbacks.pace import Pace
from keras_curvature.callbacks.sharpness import stability_ratio
from keras_curvature.callbacks.training_loss import RecentLosses
from keras_curvature.operators import HessianOperator
from keras_curvature.preconditioning import number
from keras_curvature.stability import limit_of_gradient_descent, optimizer_of
from keras_curvature.tensorboard.writer import CurvatureWriter

#: What `update_freq="auto"` stands for: batches between probes, at least, and the share
#: of the time that probes may take.
AUTO_FREQ, AUTO_OVERHEAD = 100, 0.1


class CurvatureMonitor(keras.callbacks.Callback):
    """Watches the Hessian of the training loss while `fit` runs.

    Before the first step and every hundred batches or so it computes the Hessian's
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
    each probe; nothing has to be wired. A failing probe never stops training. Loops of
    your own call `probe`.

    Where to probe, and along which random directions the diagonal is sampled, depends
    on the step and the seed alone. So several `fit`s are as one, and a training that is
    resumed (`BackupAndRestore`, a saved model) goes on with the probes that it would
    have had. What was recorded beyond the step that training was taken back to goes.

    Each entry of `history` is a flat dictionary:

    | key | meaning |
    |---|---|
    | `step`, `epoch` | `optimizer.iterations` (or batches so far, where no optimizer counts) and epoch at the probe |
    | `loss` | training loss on the probe data |
    | `mode` | how the layers ran: as in `"training without noise"`, `"inference"` or `"training"`, and how many samples BatchNormalization took its statistics of |
    | `learning_rate` | of the optimizer at that step |
    | `two_over_learning_rate` | the eigenvalue above which plain gradient descent is unstable, `None` for other optimizers |
    | `hessian_trace`, `hessian_frobenius_norm` | the figures |
    | `hessian_max_eigenvalue` | largest eigenvalue |
    | `…_standard_error` | their standard errors, `None` if unknown |
    | `hessian_max_eigenvalue_error` | norm of the eigenvalue's residual |
    | `hessian_preconditioned_max_eigenvalue` | largest eigenvalue that the optimizer sees; `None` until its bound, `…_error`, is below it |
    | `critical_sharpness` | if asked for: the sharpness that a step of the optimizer meets, see `critical_sharpness`; `…_error` is its bound, `…_direction` says along what |
    | `stability_threshold` | the curvature above which the optimizer is unstable; missing, with a warning, where the probe's loss is far from that of training |
    | `stability_ratio` | the largest eigenvalue that the optimizer sees over its threshold; missing until the eigenvalue has converged |
    | `gradient_norm` | norm of the gradient on the probe data |
    | `gradient_noise_scale` | trace of the gradients' covariance over the squared mean gradient, in samples, from the gradients of parts of the probe data (McCandlish et al. 2018, arXiv 1812.06162); `None` where the probe's size has no divisor up to 8, the loss is no mean over samples (BatchNormalization), or the gradient drowns in noise |
    | `update_ratio` | norm of the weights' net change since the last probe, divided by the steps in between and by the weights' norm |
    | `seconds`, `num_matvecs` | what the probe cost |
    | `overhead` | share of the time that probes have taken so far, compilation apart |
    | `variables`, `layers` | lists of dictionaries: statistics of the diagonal, traces, shares of the squared norm, gradient, weights and their change |
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
        update_freq: number of training batches between probes, which is kept exactly,
            or `"epoch"`. Defaults to `"auto"`: every 100 batches, and at fewer of their
            multiples where probes would take more than a tenth of the time
            (`max_overhead=0.1`). With an optimizer that takes curvature it is every
            100 batches, so that training does not depend on the clock.
        log_dir: event files are written to `<log_dir>/curvature`, or to `curvature_2`
            and so on where another training is in it already. Two monitors need a
            directory each. Defaults to `None`, which writes none.
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
            Takes 4 products, up to 12 where they have not found it yet.
        sharpness: `"critical"` for the critical sharpness at every probe, along the
            gradient divided by what the optimizer divides it by, where that is known.
            Takes a gradient and five or six values of the loss, and no second
            derivative: with `num_matvecs=0, diagonal=None` for models where those are
            out of reach. Defaults to `None`.
        gradients: whether gradient, noise scale and change of the weights are looked
            at, which takes two gradients and the memory of two parameter vectors.
        spectral_density: whether the density of all eigenvalues is estimated at every
            probe, or at every n-th for a number n; the page in TensorBoard shows it.
            Takes 64 products (32 Lanczos steps from each of 2 random vectors), and
            for small models the memory of 32 times the parameters. Defaults to
            `False`.
        max_overhead: share of the wall-clock time that probes may take, such as
            0.05. Then `update_freq` is the least number of batches between probes;
            they are spaced, and get fewer products, as the clock demands. The time
            to compile the first probe is not counted. Defaults to `None`: no limit,
            except for `update_freq="auto"`.
        fresh_batches: whether each probe takes the next batch of a data set instead
            of all of it; the data set may be endless. Defaults to `False`.
        histograms: whether histograms of the diagonal are written.
        per_variable: whether event files hold figures by variable besides layers.
        top_layers: how many layers get charts of their own in TensorBoard's own tabs:
            those with most of the squared norm at the first probe. `None` for all. The
            page "Curvature" has all of them.
        also_log: further keys of the record that are added to the logs of each epoch,
            as in `("gradient_norm", "stability_ratio")`.
        on_error: `"warn"` to go on after a failed probe, or `"raise"`.
        verbose: `1` prints a line per probe, `0` nothing. Defaults to `"auto"`: one
            line before the first probe, which takes long to compile, unless `fit`
            itself is silent.
        **options: further arguments of `HessianOperator`: `class_weight`, `loss_fn`,
            `variables`, `training`, `batch_size`, `hvp`, `jit_compile`.

    Raises:
        ValueError: for arguments that make no sense; at the start of training for
            probe data that does not fit the model.
    """  # noqa: E501

    def __init__(
        self,
        probe_data,
        update_freq: int | str = "auto",
        log_dir: str | os.PathLike | None = None,
        seed: int = 0,
        *,
        num_matvecs: int = 12,
        diagonal: str | None = "auto",
        diagonal_samples: int = 4,
        preconditioned: bool = True,
        sharpness: str | None = None,
        gradients: bool = True,
        spectral_density: bool | int = False,
        max_overhead: float | None = None,
        fresh_batches: bool = False,
        histograms: bool = True,
        per_variable: bool = False,
        top_layers: int | None = 8,
        also_log: Sequence[str] = (),
        on_error: str = "warn",
        verbose: bool | str = "auto",
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
            sharpness=sharpness,
            top_layers=top_layers,
            also_log=also_log,
            max_overhead=max_overhead,
            on_error=on_error,
            verbose=verbose,
            options=options,
        )
        self.update_freq = update_freq
        self.log_dir = log_dir
        self.seed = int(seed)
        self.history: list = []
        self.verbose = verbose if verbose == "auto" else bool(verbose)
        self._probe_data = unpacked(probe_data)
        self._num_matvecs = num_matvecs
        self._sharpness = sharpness
        self._measurement = Measurement(
            self.seed,
            num_matvecs,
            diagonal,
            diagonal_samples,
            preconditioned,
            gradients,
            spectral_density,
            histograms,
            per_variable,
            sharpness is not None,
        )
        if not (num_matvecs or diagonal is not None or spectral_density):
            # Nothing is differentiated twice, and nothing has to be said about that.
            options = {"hvp": "finite_difference", **options}
        # The number of batches between probes, `None` for whole epochs.
        named: dict = {"auto": AUTO_FREQ, "epoch": None}
        self._every: int | None = named.get(update_freq, update_freq)
        self._max_overhead = max_overhead
        self._pace = Pace(max_overhead, self._every or 1, num_matvecs)
        self._batches_of: NextBatches | RandomRows | None = None
        if fresh_batches:
            self._batches_of = NextBatches(*self._probe_data)
        self._data_of = None  # The step whose batch the operator has.
        self._failures = Failures(on_error)
        self._recent = RecentLosses()
        self._options = options
        self._also_log = tuple(also_log)
        self._writer = None
        if log_dir:
            self._writer = CurvatureWriter(log_dir, per_variable, top_layers)
        self._operator = None
        self._operator_of = None
        self._renewed = False  # The operator, since the last training began.
        self._announced = False
        self._starting = False
        self._run = 0  # Where the records of the present training begin.
        self._batches = 0  # Of training so far,
        self._batch = 0  # and of the epoch.
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
        self._prepare()
        self._starting = True
        self._pace.start()

    def on_epoch_begin(self, epoch, logs=None):
        """Probes before the first step."""
        self._epoch = epoch
        # Not when training begins: callbacks may load weights then (BackupAndRestore).
        if self._starting:
            self._starting = False
            with self._failures.survived(lambda: "The first curvature probe"):
                self._start()

    def on_train_batch_end(self, batch, logs=None):
        """Probes when a multiple of `update_freq` batches was reached or passed."""
        # One call per execution: with steps_per_execution=4 the batches are 3, 7, … and
        # may end beyond the last of an epoch.
        done = min(batch + 1, self._params("steps") or batch + 1)
        # They begin anew with each epoch; in a loop of one's own perhaps not.
        new = done - self._batch if done > self._batch else done
        self._batch = done
        seen, self._batches = self._batches, self._batches + new
        self._pace.trained(new)
        self._recent.add(self.model, done, logs)
        if self._passed(seen):
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

    def probe(self, step: int | None = None) -> dict | None:
        """Looks at the curvature now, for training loops of one's own.

        Writes the same records and event files as probes of `fit`, and hands the
        diagonal to an optimizer that takes it.

        ```python
        monitor.set_model(model)
        for step, (x, y) in enumerate(batches):
            if step % 100 == 0:
                monitor.probe(step)
            ...                                # a step of training
        monitor.on_train_end()                 # closes the event file
        ```

        A step before that of the last record tells that training was taken back: the
        records from there on go, as they do when `fit` is resumed.

        Args:
            step: the number of steps taken so far. Defaults to the optimizer's
                count; needed where that stands still, or there is no optimizer.

        Returns:
            The record, also the last one in `history`; `None` if the probe failed,
            of which a warning tells.

        Raises:
            ValueError: for a step that is no count, a model that was not set, or
                probe data that does not fit it.
        """
        check(
            step is None or is_count(step, 0),
            "must be the number of steps taken so far",
            step=step,
        )
        if self.model is None:
            raise ValueError(
                "A monitor needs a model to probe. In a loop of your own call "
                "`monitor.set_model(model)` first, or make a "
                "`keras.callbacks.CallbackList([monitor], model=model)`. "
                "Received: no model."
            )
        if self._prepare():
            self._pace.start()
        step = self._step() if step is None else int(step)
        run = self.history[self._run :]
        last = run[-1]["step"] if run else -1
        if self._renewed or step < last:
            self._go_on(step if step == 0 else step - 1, anew=step == 0)
        self._pace.trained(max(step - max(last, 0), 0))
        return self._attempt(step)

    def _figures(self):
        norm = (
            "hessian_frobenius_norm",
            "hessian_max_eigenvalue",
            "hessian_max_eigenvalue_error",
        )
        trace = self._measurement.delivers or self._num_matvecs
        return (
            *(("hessian_trace",) if trace else ()),
            *(norm if self._num_matvecs else ()),
            *(("critical_sharpness",) if self._sharpness else ()),
            *self._also_log,
        )

    def _start(self):
        """Finds the place in training, and probes if that was not done there before."""
        taken, each = steps_taken(self.model), batches_per_step(self.model)
        # An optimizer that never counts a step (a model with several) tells nothing.
        if self._renewed or (taken and taken != self._batches // each):
            self._batches = taken * each
        step = self._step()
        last = self._go_on(step, anew=self._renewed)
        if self._measurement.delivers:
            # An optimizer is saved with what it took in, a monitor is not.
            delivered = last_delivery(self.model)
            last = last if delivered is None else delivered
        if last is None or (last != step and self._passed(last * each)):
            self._probe()

    def _passed(self, batches):
        """Whether a multiple of `update_freq` lies behind that many, up to now."""
        every = self._every
        return every is not None and batches // every != self._batches // every

    def _go_on(self, step, anew):
        """Makes the records go on from a step; returns the step of the last one.

        Args:
            step: records beyond it are of a training that was taken back, and go.
            anew: whether it may be another training than that of the records.
        """
        self._renewed = False
        if anew and step == 0:
            self._run = len(self.history)
        while len(self.history) > self._run and self.history[-1]["step"] > step:
            self.history.pop()
        last = self.history[-1]["step"] if len(self.history) > self._run else None
        if self._writer is not None:
            with self._failures.survived(lambda: f"Going on with {self.log_dir}"):
                before = self._writer.directory
                written = self._writer.begin(step, anew)
                if self._writer.directory != before:
                    self._say(f"writing to {self._writer.directory}: {before} is taken")
                last = written if last is None else last
        return last

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
        self._operator, self._operator_of = None, None
        self._renewed = True
        try:
            data = self._data_at(self._step())
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
        self._recent = RecentLosses()
        self._announced = False
        # Building may have created the variables.
        self._operator_of = (*of[:2], *model.trainable_variables)
        keras_internals.build_optimizer(model)
        if self.update_freq == "auto" and self._max_overhead is None:
            # What training depends on must not depend on the clock.
            needed = self._measurement.delivers and takes_curvature(model)
            # Several processes must probe at the same steps.
            needed = needed or self._options.get("across_processes")
            self._pace.share = None if needed else AUTO_OVERHEAD
        return True

    def _data_at(self, step):
        """The probe data of a step."""
        if self._batches_of is None:
            return self._probe_data
        self._data_of = step
        return self._batches_of.at(step)

    def _probe(self):
        if self._operator is not None and self._pace.due():
            self._attempt(self._step())

    def _attempt(self, step):
        """Looks, keeps the record and tells of it; returns it, or `None`."""
        if self._operator is None:
            return None
        traces = backend.num_traces()
        record = None
        try:
            with self._failures.survived(lambda: f"The curvature probe at step {step}"):
                record = self._look(step)
                self.history.append(record)
            if record is not None:
                self._tell(record)
        finally:
            self._pace.probed(compiled=backend.num_traces() != traces)
        if self._pace.advice is not None:
            self._failures.tell(self._pace.advice, "advice")
        return record

    def _tell(self, record):
        if not records.is_finite(record):
            self._failures.tell(
                f"The curvature at step {record['step']} is not finite. Has training "
                "diverged, or does the loss overflow?",
                "not finite",
            )
        if self.verbose is True:
            self._print(records.one_line(record))
        if self._writer is not None:
            with self._failures.survived(
                lambda: f"Writing the figures of step {record['step']} for TensorBoard"
            ):
                self._writer.write(record)

    def _say(self, text):
        """Prints a line where training prints lines too, or if asked for."""
        if self.verbose is True or (self.verbose and self._params("verbose") != 0):
            self._print(f"curvature: {text}")

    def _print(self, line):
        if self._params("verbose") in (1, "auto"):
            # Over Keras' progress bar, which is drawn again below.
            clear = "\r\x1b[2K" if sys.stdout.isatty() else "\r"
            line = clear + line.ljust(0 if sys.stdout.isatty() else 110)
        print(line, flush=True)

    def _look(self, step):
        start = time.perf_counter()
        # Read first: in mid-epoch on JAX the variables are empty until Keras is asked
        # for the model, which is when it brings their values from the training step.
        model, operator = self.model, self._operator
        if not self._announced:
            self._announced = True
            self._say(
                f"preparing the first probe ({operator.shape[0]:,} parameters). A "
                f"probe takes {self._measurement.cost()}{self._memory()}"
            )
        if self._batches_of is not None and self._data_of != step:
            operator.set_data(*self._data_at(step))
        record = {
            "step": step,
            "epoch": self._epoch,
            "loss": number(operator.loss()).item(),
            "mode": operator.mode,
            "learning_rate": learning_rate(model),
            "two_over_learning_rate": limit_of_gradient_descent(optimizer_of(model)),
        }
        record.update(
            self._measurement.take(model, operator, self._pace.num_matvecs, step)
        )
        apart = self._recent.mismatch(record["loss"])
        if apart is not None:
            # What would be said about stability would be about another loss.
            record.pop("stability_threshold", None)
            self._failures.tell(apart, "another loss")
        ratio = stability_ratio(record)
        if ratio is not None:
            record["stability_ratio"] = ratio
        record["optimizer"] = optimizer_figures(model)
        record["seconds"] = time.perf_counter() - start
        record["overhead"] = self._pace.overhead
        return record

    def _memory(self):
        """What a probe will need, in words, where that was asked for."""
        need, data = self._operator.need, self._operator.evaluation.data
        return "" if need is None else f"; memory: {need.told(data)}"

    def _step(self):
        """The optimizer's count of its steps; ours, where it has none."""
        model = self.model
        return steps_taken(model) or self._batches // batches_per_step(model)

    def _params(self, name):
        """A parameter of `fit`; `None` in other loops."""
        return (self.params or {}).get(name)
