"""What training itself says of its loss, to be compared with the probe's."""

import collections

import keras
import numpy as np

#: Batches that training's loss is averaged over, and the least that tell anything.
_MOST, _LEAST = 32, 4

#: Losses differ when they are apart by more standard deviations of the batches than
#: this, and by more than this share of the larger one.
_DEVIATIONS, _SHARE = 4, 0.1


class RecentLosses:
    """The losses of the last batches of training, from the logs of `fit`.

    Keras logs the mean since the epoch began; the loss of a batch is what it adds.
    """

    def __init__(self):
        # Pairs of batches since the epoch began, and the mean until then. Converted
        # when they are asked for: a number that is asked for may stop the device.
        self._means = collections.deque(maxlen=_MOST + 1)

    def add(self, model, done, logs):
        """Takes note of the logs after a step of training.

        Args:
            model: the Keras model that trains.
            done: number of batches since the epoch began.
            logs: the logs, or `None`.
        """
        # What a `train_step` of the model's own logs may be anything.
        if type(model).train_step is keras.Model.train_step and "loss" in (logs or {}):
            self._means.append((done, logs["loss"]))

    def batches(self):
        """The losses of single batches, or means over those of one execution."""
        losses, before = [], (0, 0.0)
        for done, mean in self._means:
            mean = float(mean)
            new = (done, mean)
            if done > before[0]:
                total = done * mean - before[0] * before[1]
                losses.append(total / (done - before[0]))
            else:  # Another epoch.
                losses.append(mean)
            before = new
        # Of the first one only the mean since its epoch began is known.
        return np.array(losses[1:] if len(losses) > _LEAST else [])

    def typical(self):
        """Mean and standard deviation of the last batches; `None` if they are few."""
        losses = self.batches()
        losses = losses[np.isfinite(losses)]
        if len(losses) < _LEAST:
            return None
        return float(losses.mean()), float(losses.std(ddof=1))

    def mismatch(self, loss):
        """What to say if a loss is not that of training; `None` if it may be.

        Args:
            loss: the loss on the probe data.
        """
        typical = self.typical()
        if typical is None or not np.isfinite(loss):
            return None
        mean, deviation = typical
        apart = _DEVIATIONS * deviation + _SHARE * max(abs(mean), abs(loss))
        if abs(loss - mean) <= apart:
            return None
        return (
            f"The loss on the probe data is {loss:.3g}, but {mean:.3g} ± "
            f"{deviation:.2g} in the last batches of training: the figures are of "
            "another loss than the one that training steps on, and no stability "
            "threshold is given. Is the probe data of another kind than the training "
            "data, are there class or sample weights on one side only, does "
            "BatchNormalization run as in inference (`training=False`), or has it "
            "batches of another size (`batch_size=`)?"
        )
