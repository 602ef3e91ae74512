"""What a probe measures: from an operator to the figures of a record."""

import numpy as np

from keras_curvature import record as records
from keras_curvature.callbacks.hand_over import hand_over, wanted_axes
from keras_curvature.callbacks.sharpness import Sharpness, critical_figures
from keras_curvature.critical import CriticalSearch
from keras_curvature.diagonal import (
    AFFORDABLE_MATVECS,
    SAMPLED,
    diagonal_moments,
    keeps,
    sampled_method,
    with_subspace,
)
from keras_curvature.estimators import DominantSubspace, spectral_density
from keras_curvature.gradients import Gradients
from keras_curvature.tensorboard import signed_log

#: Lanczos steps and start vectors of a density, and the points it is given at.
DENSITY = {"num_steps": 32, "num_vectors": 2, "num_points": 256}


class Measurement:
    """Measures probe after probe, and keeps what makes the next one cheaper.

    Args:
        seed: seed of the random directions.
        num_matvecs: products for trace, norm and eigenvalue; 0 leaves them out.
        diagonal: method for the diagonal; `None` leaves it out.
        diagonal_samples: samples of the diagonal, where it is not exact.
        preconditioned: whether to follow the eigenvalue that the optimizer sees.
        gradients: whether the gradient and the change of the weights are looked at.
        density_freq: every how many probes the spectral density is taken; 0 never.
        histograms: whether entries of the diagonal are counted.
        per_variable: whether they are counted by variable, besides layers.
        critical: whether the critical sharpness is measured.
    """

    def __init__(
        self,
        seed,
        num_matvecs,
        diagonal,
        diagonal_samples,
        preconditioned,
        gradients,
        density_freq,
        histograms,
        per_variable,
        critical=False,
    ):
        self._seed = seed
        self._num_matvecs = num_matvecs
        self._diagonal = self._method = diagonal
        self._diagonal_samples = diagonal_samples
        self._density_freq = int(density_freq)
        self._edges = signed_log.bin_edges() if histograms else None
        self._per_variable = per_variable
        self._subspace = DominantSubspace()
        self._sharpness = Sharpness(seed) if preconditioned and num_matvecs else None
        self._critical = CriticalSearch() if critical else None
        self._looks_at_gradients = gradients
        self._gradients = None
        self._probes = 0

    @property
    def delivers(self):
        """Whether the optimizer is handed the diagonal."""
        return self._diagonal is not None

    def renew(self):
        """Forgets what was learnt of the operator: there is another one."""
        self._method = self._diagonal
        self._gradients = None

    def take(self, model, operator, num_matvecs, step):
        """The figures for a record; the optimizer is handed the diagonal.

        Args:
            model: the Keras model that trains.
            operator: the `HessianOperator` on the probe data.
            num_matvecs: products for trace, norm and eigenvalue this time.
            step: the step of training, which decides the random directions of the
                diagonal.
        """
        spent, diagonal, subspace, axes = 0, None, None, None
        if self._diagonal is not None:
            axes = wanted_axes(model, operator)
            diagonal = self._estimate_diagonal(operator, step, axes)
            spent += diagonal.num_matvecs
        if self._num_matvecs:
            # A subspace tells of the entries, where any method will do.
            both = self._diagonal == "auto" and axes is None
            both = both and keeps(operator, num_matvecs)
            subspace = self._subspace.update(
                operator, num_matvecs, self._seed, operator.sizes, diagonal=both
            )
            spent += subspace.num_matvecs
            if both:
                diagonal = with_subspace(operator, diagonal, subspace)
        if diagonal is not None:
            hand_over(model, operator, diagonal.diagonal.value)
        figures = records.scalar_figures(diagonal, subspace)
        if self._sharpness is not None:
            seen, products = self._sharpness.look(model, operator)
            figures.update(seen)
            spent += products
        if self._critical is not None:
            figures.update(critical_figures(self._critical, model, operator))
        if self._density_freq and self._probes % self._density_freq == 0:
            density = spectral_density(operator, seed=self._seed, **DENSITY)
            figures["spectral_density"] = _plain(density)
            spent += density.num_matvecs
        variables = records.variable_figures(operator, diagonal, subspace, self._edges)
        if self._looks_at_gradients:
            if self._gradients is None:
                self._gradients = Gradients(operator)
            look = self._gradients.look(step)
            figures.update(records.add_gradient(variables, operator, look, self._edges))
        figures["variables"] = variables
        figures["layers"] = records.layer_figures(variables)
        if not self._per_variable:
            for variable in variables:
                variable.pop("histogram", None)
                variable.pop("gradient_histogram", None)
        figures["num_matvecs"] = spent
        self._probes += 1
        return figures

    def cost(self):
        """What a probe takes, in words."""
        parts = []
        if self._num_matvecs:
            parts.append(f"{self._num_matvecs} products with the Hessian")
        if self._diagonal in ("exact", "gauss_newton"):
            parts.append(f"the diagonal by the method {self._diagonal!r}")
        elif self._diagonal is not None:
            samples = f"{self._diagonal_samples} samples of the diagonal"
            if self._diagonal == "auto":
                samples += f" (exact where {AFFORDABLE_MATVECS} products are enough)"
            parts.append(samples)
        if self._density_freq:
            products = DENSITY["num_steps"] * DENSITY["num_vectors"]
            parts.append(f"{products} products for the density")
        price = [f"{', '.join(parts)}: each about two gradients of the probe data"]
        if self._critical is not None:
            price = price * bool(parts) + ["a gradient and five to six losses"]
        return "; and ".join(price)

    def _estimate_diagonal(self, operator, step, axes):
        sampled = self._method in SAMPLED
        moments = diagonal_moments(
            operator,
            self._method,
            self._diagonal_samples if sampled else None,
            seed=self._seed_at(step),
            samples=self._diagonal_samples,
            axes=axes,
        )
        if (
            axes is None
            and self._method == "auto"
            and moments.trace.standard_error != 0
        ):
            # Found too dear once, which need not be found out again. What is cheap
            # depends on the weights, and is looked at anew.
            self._method = sampled_method(operator)
        return moments

    def _seed_at(self, step):
        """A seed of its own for each step, so that noise averages out over probes.

        No count of probes, which would start anew when training is resumed.
        """
        sequence = np.random.SeedSequence([self._seed, step])
        return int(sequence.generate_state(1)[0] >> 1)


def _plain(density):
    """A `SpectralDensity` as plain numbers."""
    error = density.standard_error
    return {
        "grid": density.grid.tolist(),
        "density": density.density.tolist(),
        "standard_error": None if error is None else error.tolist(),
        "sigma": density.sigma,
        "size": density.size,
    }
