"""How many samples fit at once: what a probe will need, and what there is.

What a loss computes on its way (its *activations*) is added up from a trace of two
samples and of one. A gradient keeps most of that, a product with the Hessian more, and
samples of the diagonal the most; see benchmarks/memory_prediction.py. Besides there are
vectors of the size of the parameters. It is a rule of thumb on the safe side: where the
memory runs out all the same, `Evaluation` halves the batches and goes on.
"""

import dataclasses

from keras_curvature import backend
from keras_curvature.data import ProbeData
from keras_curvature.evaluation import Evaluation

#: Times the activations that a probe takes at most: on a wide convolutional network 3.8
#: to 6.2 for four samples of the diagonal with a control variate, 0.8 to 2.9 for a
#: product, by backend.
ACTIVATIONS = 6.0

#: Vectors of the size of the parameters: gradients, directions, and what is kept.
VECTORS = 32

#: Share of the free memory that may be planned with.
SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Need:
    """The memory that a probe will need, in bytes.

    Attributes:
        fixed: whatever the size of a batch.
        per_sample: for each sample of a batch.
        free: what is free where the model lives; `None` if unknown.
    """

    fixed: int
    per_sample: int
    free: int | None

    @classmethod
    def of(cls, evaluation: Evaluation) -> "Need":
        """Predicts it from traces of the loss."""
        state, loss = evaluation.state(), evaluation.loss
        counts = []
        for size in (1, 2):
            batch = evaluation.data.in_parts(size).first()
            with backend.on(evaluation.data.place), backend.twice_differentiable():
                counts.append(backend.computed_bytes(loss, state, batch))
        layout = loss.layout
        return cls(
            VECTORS * layout.size * layout.dtype.itemsize,
            int(ACTIVATIONS * max(counts[1] - counts[0], 0)),
            backend.free_memory(evaluation.data.place),
        )

    def fitting(self) -> int | None:
        """How many samples fit at once, one at least; `None` for any number."""
        if self.free is None or not self.per_sample:
            return None
        return max(1, int((SHARE * self.free - self.fixed) / self.per_sample))

    def told(self, data: ProbeData) -> str:
        """In words, for the batches of some data."""
        size = min(data.largest, data.at_once or data.largest)
        whole = _amount(self.fixed + size * self.per_sample)
        free = "" if self.free is None else f" of {_amount(self.free)} that are free"
        return f"about {whole}{free}, for {size:,} samples at once"


def _amount(size: int) -> str:
    return f"{size / 2**30:.2g} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
