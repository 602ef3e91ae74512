"""Trains one model many times: traced once, reset for every run.

All methods see the same initial weights, batches and schedule for a seed. Steps run in
blocks within one graph; a method that uses curvature is given a diagonal between two
blocks, which is timed on its own.
"""

import time

import keras
import numpy as np
import tensorflow as tf
from keras import ops

import keras_curvature as kc
from keras_curvature.callbacks.hand_over import hand_over, wanted_axes
from keras_curvature.diagonal import diagonal_moments

#: Share of the budget in which the learning rate rises; then it falls to zero.
WARM_UP = 0.05

#: Steps in a block.
BLOCK = 20

#: How often in a run the held-out loss is measured.
EVALUATIONS = 30


def schedule(steps):
    """The learning rate over its peak: a linear rise, then a linear fall."""
    rise = max(1, round(WARM_UP * steps))
    step = np.arange(steps)
    return np.minimum((step + 1) / rise, (steps - step) / (steps - rise))


class Trainer:
    """A task and a method, traced once for each value of the method's parameter.

    Args:
        task: a `Task`.
        method: a `Method`.
    """

    def __init__(self, task, method):
        self.task, self.method = task, method
        self._data = [ops.convert_to_tensor(a) for a in task.data()]
        self._weights = {}
        self.model = self._new(0)
        self.optimizer = method.build()
        self.model.compile(self.optimizer, task.loss)
        self.optimizer.build(self.model.trainable_variables)
        self._start = [v.numpy() for v in self.optimizer.variables]
        self._operator = None
        self._blocks = {}
        self._evaluate = tf.function(self._mean_loss)
        self.seconds_to_compile = 0.0

    def run(self, seed, rate, value=None):
        """One training.

        Args:
            seed: of weights and batches.
            rate: the schedule's peak.
            value: of the method's parameter; `None` for the optimizer's own.

        Returns:
            Dictionary of plain numbers and lists: `steps` at each evaluation with the
            losses `train` (mean since the last one) and `held_out`, and the final
            loss on training data.
        """
        task = self.task
        block = self._compiled(value)
        self._reset(seed)
        rng = np.random.default_rng(seed)
        size = len(self._data[0])
        batches = rng.integers(0, size, (task.steps, task.batch)).astype("int32")
        rates = (rate * schedule(task.steps)).astype("float32")
        between = max(1, task.steps // EVALUATIONS // BLOCK) * BLOCK
        result = {"steps": [], "train": [], "held_out": []}
        losses = []
        for start in range(0, task.steps, BLOCK):
            rows = slice(start, start + BLOCK)
            if start % self.method.refresh == 0:
                self._deliver(batches[start], seed * 100_003 + start)
            losses.append(float(block(batches[rows], rates[rows])))
            done = min(start + BLOCK, task.steps)
            if done % between == 0 or done == task.steps:
                result["steps"].append(done)
                result["train"].append(float(np.mean(losses)))
                result["held_out"].append(float(self._evaluate(*self._data[2:])))
                losses = []
                if not np.isfinite(result["train"][-1]):
                    break
        result["final_train"] = float(self._evaluate(*self._part_of_training()))
        return result

    def costs(self, value=None, blocks=20):
        """Milliseconds of processor time per step, and per delivery of curvature.

        Processor time, because it hardly depends on what else the machine does.

        Args:
            value: of the method's parameter.
            blocks: number of blocks of steps, each after a delivery; medians are
                returned.
        """
        block = self._compiled(value)
        self._reset(0)
        rows = np.arange(BLOCK * self.task.batch) % len(self._data[0])
        rows = rows.reshape(BLOCK, -1).astype("int32")
        rates = np.zeros(BLOCK, "float32")
        times = []
        for number in range(blocks):
            begin = time.process_time()
            self._deliver(rows[0], number)
            delivered = time.process_time()
            float(block(rows, rates))
            times.append((time.process_time() - delivered, delivered - begin))
        step, delivery = 1e3 * np.median(times, axis=0)
        return {"step": step / BLOCK, "delivery": delivery}

    def _new(self, seed):
        keras.utils.set_random_seed(seed)
        model = self.task.build()
        self._weights[seed] = model.get_weights()
        return model

    def _reset(self, seed):
        if seed not in self._weights:
            self._new(seed)
        self.model.set_weights(self._weights[seed])
        for variable, value in zip(self.optimizer.variables, self._start, strict=True):
            variable.assign(value)

    def _compiled(self, value):
        """The block of steps for a value of the parameter, traced and run once."""
        if value is not None:
            setattr(self.optimizer, self.method.parameter, value)
        if value in self._blocks:
            return self._blocks[value]
        start = time.perf_counter()
        block = self._blocks[value] = tf.function(self._train_block)
        rows = np.zeros((BLOCK, self.task.batch), "int32")
        self._deliver(rows[0], 0)
        block(rows, np.zeros(BLOCK, "float32"))
        rest = self.task.steps % BLOCK
        if rest:
            block(rows[:rest], np.zeros(rest, "float32"))
        self._evaluate(*self._data[2:])
        self._evaluate(*self._part_of_training())
        self.seconds_to_compile += time.perf_counter() - start
        return block

    def _part_of_training(self):
        return [d[:2000] for d in self._data[:2]]

    def _deliver(self, rows, seed):
        """A sample of the diagonal on a batch of the training data."""
        method = self.method.curvature
        if method is None:
            return
        rows = rows[: self.method.rows]
        batch = [tf.gather(d, rows) for d in self._data[:2]]
        if self._operator is None:
            self._operator = kc.HessianOperator(self.model, *batch)
        else:
            self._operator.set_data(*batch)
        moments = diagonal_moments(
            self._operator,
            method,
            self.method.products,
            seed=seed % 2**31,
            axes=wanted_axes(self.model, self._operator),
        )
        hand_over(self.model, self._operator, moments.diagonal.value)

    def _train_block(self, batches, rates):
        total = tf.zeros(())
        for i in tf.range(len(rates)):
            self.optimizer.learning_rate.assign(rates[i])
            x, y = (tf.gather(d, batches[i]) for d in self._data[:2])
            variables = self.model.trainable_variables
            with tf.GradientTape() as tape:
                loss = self.task.loss(y, self.model(x, training=True))
            gradients = tape.gradient(loss, [v.value for v in variables])
            # Sums the rows of a word that occurs twice, as every rule needs it.
            self.optimizer.apply([tf.convert_to_tensor(g) for g in gradients])
            total += loss
        return total / tf.cast(len(rates), "float32")

    def _mean_loss(self, x, y):
        return self.task.loss(y, self.model(x, training=False))
