"""What a probe measures: from an operator to the figures of a record."""

import numpy as np

from keras_curvature import record as records
from keras_curvature.analysis import diagonal_moments, has_layers
from keras_curvature.callbacks.hand_over import hand_over
from keras_curvature.callbacks.sharpness import Sharpness
from keras_curvature.estimators import DominantSubspace, spectral_density
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
        density_freq: every how many probes the spectral density is taken; 0 never.
        histograms: whether entries of the diagonal are counted.
        per_variable: whether they are counted by variable, besides layers.
    """

    def __init__(
        self,
        seed,
        num_matvecs,
        diagonal,
        diagonal_samples,
        preconditioned,
        density_freq,
        histograms,
        per_variable,
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
        self._probes = 0

    def renew(self):
        """Forgets what was learnt about the cost of the diagonal: another operator."""
        self._method = self._diagonal

    def take(self, model, operator, num_matvecs):
        """The figures for a record; the optimizer is handed the diagonal.

        Args:
            model: the Keras model that trains.
            operator: the `HessianOperator` on the probe data.
            num_matvecs: products for trace, norm and eigenvalue this time.
        """
        self._probes += 1
        spent, diagonal, subspace = 0, None, None
        if self._diagonal is not None:
            diagonal = self._estimate_diagonal(operator)
            spent += diagonal.num_matvecs
            hand_over(model, operator, diagonal.diagonal.value)
        if self._num_matvecs:
            subspace = self._subspace.update(
                operator, num_matvecs, self._seed, operator.sizes
            )
            spent += subspace.num_matvecs
        figures = records.scalar_figures(diagonal, subspace)
        if self._sharpness is not None:
            seen, products = self._sharpness.look(model, operator)
            figures.update(seen)
            spent += products
        if self._density_freq and (self._probes - 1) % self._density_freq == 0:
            density = spectral_density(operator, seed=self._seed, **DENSITY)
            figures["spectral_density"] = _plain(density)
            spent += density.num_matvecs
        variables = records.variable_figures(operator, diagonal, subspace, self._edges)
        figures["variables"] = variables
        figures["layers"] = records.layer_figures(variables)
        if not self._per_variable:
            for variable in variables:
                variable.pop("histogram", None)
        figures["num_matvecs"] = spent
        return figures

    def _estimate_diagonal(self, operator):
        sampled = self._method in ("layerwise", "hutchinson")
        moments = diagonal_moments(
            operator,
            self._method,
            self._diagonal_samples if sampled else None,
            seed=self._seed_of_probe(),
            samples=self._diagonal_samples,
        )
        if self._method == "auto" and moments.trace.standard_error != 0:
            # Found too dear once, which need not be found out again. What is cheap
            # depends on the weights, and is looked at anew.
            self._method = "layerwise" if has_layers(operator) else "hutchinson"
        return moments

    def _seed_of_probe(self):
        """A seed of its own for each probe, so that noise averages out over probes."""
        sequence = np.random.SeedSequence([self._seed, self._probes])
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
