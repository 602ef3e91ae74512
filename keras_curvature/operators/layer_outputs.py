"""Curvature at the layers' outputs, carried back to the variables.

For a layer that is linear in its variables W, `z_n = J_n W` for sample n, the diagonal
of the Hessian block of W needs only the curvature at the layer's outputs:

    diag(H_WW) = Σ_n diag(J_nᵀ M_n J_n),     M_n = ∂²L/∂z_n ∂z_nᵀ

because `∂²z/∂W² = 0` and samples do not interact. One Hessian-vector product with
respect to a zero shift of all outputs, along independent random signs `v`, gives
`u = M v` for all samples and layers at once, and

    E[Σ_n (J_nᵀ v_n) ⊙ (J_nᵀ u_n)] = diag(H_WW).

The noise between samples and between the inputs of a unit, which makes Hutchinson's
estimate useless at affordable cost, is gone. This is Curvature Propagation (Martens,
Sutskever, Swersky, ICML 2012, arXiv 1206.6464) as an ordinary Hessian-vector product.
"""

import math
import warnings

from keras import ops

from keras_curvature import backend
from keras_curvature.operators import gauss_newton
from keras_curvature.operators.recording import Recording, rules_for
from keras_curvature.operators.rule_check import TOLERANCE, jacobian_errors
from keras_curvature.probe import Probe

#: Relative size of the leak between samples beyond which they count as interacting.
LEAK = 1e-4


class LayerOutputHessian:
    """The Hessian over the joint space of layer outputs and remaining variables.

    Variables of layers with a rule (see `keras_curvature.layer_rules`) are reached
    through the outputs. All others, and penalties that act on variables directly,
    join the same product as ordinary parameter directions, so that an estimate is
    complete and unbiased for every model.

    A variable is taken through the outputs only if that is right for it, which is
    read off the graph while tracing: if it also acts on the loss in a way that no
    rule knows, together with the layer's outputs (a tied matrix), or if one of its
    uses feeds another (a layer applied to its own output), it becomes a parameter
    direction.

    Args:
        operator: a `HessianOperator` of a model; its data and options are used.

    Raises:
        ValueError: for the Hessian of a plain function.

    Attributes:
        coverage: dictionary from the path of each variable to `"layer outputs"` or
            `"parameters"`; complete once a product has been traced. A path that
            occurs again is followed by a number.
        notes: what was found out about the graph while it was traced, for those who
            compute with it.
    """

    def __init__(self, operator):
        if not isinstance(operator.probe, Probe):
            raise ValueError(
                "Layer outputs need a Keras model. Received: the Hessian of a plain "
                f"function, {operator!r}. Use an exact method or Hutchinson's."
            )
        self.operator = operator
        self.coverage = {}
        self.notes = {}
        self._rules = None
        self._interact = None

    @property
    def samples_interact(self):
        """Whether a sample's outputs feel the directions of other samples.

        Products along directions that vanish for half of the samples: if the samples
        are independent, so do the products there. Layers such as BatchNormalization
        in training mode make them non-zero; the per-sample formula does not hold for
        them. Found out once, by two products, on the first data with two samples,
        together with rules that do not describe their layers, which are dropped with
        a warning.
        """
        if self._interact is None:
            leak, samples, errors = self.operator.mean_over_batches(
                self._check, ("layer outputs", "check"), backend.array([0, 0], "int32")
            )
            self._drop_rules([bool(error > TOLERANCE) for error in errors])
            # Independent samples leak an exact zero, but for sums over the batch that
            # cancel; real interaction is orders above.
            interact = bool(leak > LEAK)
            if float(samples) < 2:
                return interact
            self._interact = interact
        return self._interact

    @property
    def num_outputs(self):
        """Number of the model's scalar outputs per sample, if it is fixed."""
        self.samples_interact  # noqa: B018  # Notes it.
        return self.notes["outputs"]

    @property
    def rules(self):
        """The layers that are reached through their outputs, with their rules."""
        if self._rules is None:
            probe = self.operator.probe
            self._candidates = rules_for(probe.model, probe.variables)
            self._rules = dict(self._candidates)
        return self._rules

    # While tracing

    def record(self, batch, outputs=False):
        """A `Recording` of the loss on a batch; while tracing only."""
        recording = Recording(self.operator.probe, batch, self.rules, outputs)
        self._rules = recording.rules
        self.coverage = {
            name: "layer outputs" if id(v) in recording.paths else "parameters"
            for name, v in zip(recording.names, recording.variables, strict=True)
        }
        return recording

    def _drop_rules(self, wrong):
        layers = [x for x, bad in zip(self._candidates, wrong, strict=True) if bad]
        layers = [layer for layer in layers if layer in self._rules]
        for layer in layers:
            del self._rules[layer]
        if layers:
            warnings.warn(
                "The output of these layers does not depend on their variables as "
                "their layer rules say; they are taken as ordinary parameters: "
                f"{', '.join(layer.path for layer in layers)}. For layers of Keras, "
                "this is an error in Keras: look whether a bias along another axis "
                "than the last one has as many entries as the last axis.",
                stacklevel=3,
            )

    def _check(self, batch, seed):
        """The leak between samples, their number, and the errors of the rules."""
        leak, rows = self._leak(batch, seed)
        errors = jacobian_errors(self.operator.probe, batch, self._candidates, seed)
        return leak, rows, errors

    def _leak(self, batch, seed):
        """How much leaks into other samples, and the number of samples."""
        recording = self.record(batch, outputs=True)
        try:
            self.notes["outputs"] = sum(gauss_newton.output_sizes(recording))
        except ValueError:
            self.notes["outputs"] = math.inf  # They have no fixed size.
        first = len(recording.variables)
        signs = recording.signs(seed)
        probed = [k for k in range(first, len(signs)) if signs[k] is not None]
        leaks, rows = [ops.zeros((), "float64")], 1
        if probed:
            rows = ops.shape(signs[probed[0]])[0]
        for number in range(2):
            v, masks = [None] * len(signs), {}
            half = half_of(rows, seed, number)
            for k in probed:
                shape = (-1,) + (1,) * (len(signs[k].shape) - 1)
                masks[k] = ops.cast(ops.reshape(half, shape), signs[k].dtype.name)
                # Half of it common to all samples: what couples them through a mean
                # grows weaker with their number along independent directions only.
                v[k] = masks[k] * (signs[k] + signs[k][:1])
            u = recording.tapes.product(v, wanted=probed)
            sums = {
                k: [
                    ops.cast(ops.sum(part), "float64")
                    for part in (ops.square(u[k]), ops.square(u[k]) * (1 - masks[k]))
                ]
                for k in probed
            }
            total = sum(whole for whole, _ in sums.values())
            for whole, leaked in sums.values():
                # Each layer by itself, but for those of no account.
                scale = ops.maximum(whole, 1e-12 * total)
                leaks.append(leaked / ops.maximum(scale, 1e-300))
        return ops.sqrt(ops.max(ops.stack(leaks))), ops.cast(rows, "float64")


def half_of(count, seed, number):
    """Ones for half of so many entries and zeros for the others, as integers.

    Masks number 0 and 1 together tell any two of four samples apart, and almost all
    pairs of more: the order of the samples, which may have a meaning (pairs in
    neighbouring places, or in the two halves of the batch), is shuffled.
    """
    order = backend.random_normal((count,), backend.fold_seed(seed, 1))
    position = ops.argsort(ops.argsort(order))
    return position // 2**number % 2
