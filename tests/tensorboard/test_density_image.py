"""The image of the spectral density."""

import numpy as np
import pytest

from keras_curvature.tensorboard import density_image as module
from keras_curvature.tensorboard.density_image import density_image


def density(places, size=100, sigma=0.05, low=-1.0, high=5.0, error=0.0):
    """Gaussians of equal weight around some eigenvalues."""
    grid = np.linspace(low, high, 256)
    peaks = np.exp(-0.5 * ((grid[:, None] - np.array(places)) / sigma) ** 2)
    value = peaks.mean(1) / (sigma * np.sqrt(2 * np.pi))
    return {
        "grid": grid.tolist(),
        "density": value.tolist(),
        "standard_error": (error * value).tolist() if error else None,
        "sigma": sigma,
        "size": size,
    }


def columns_of(pixels, colour):
    """The eigenvalues from -1 to 5 at which a colour occurs."""
    plot = pixels[:, module._LEFT : module._LEFT + module._WIDTH]
    found = np.flatnonzero((plot == colour).all(-1).any(0))
    return -1 + 6 * found / (module._WIDTH - 1)


def test_peaks_stand_at_their_eigenvalues():
    at = columns_of(density_image(density([0.0, 3.0])), module._LINE)
    for place in (0.0, 3.0):
        assert np.abs(at - place).min() < 0.02
    # Nothing where no eigenvalue is.
    assert not ((at > 0.5) & (at < 2.5)).any()


def test_band_is_there_with_an_error_only():
    with_error = density_image(density([1.0], error=0.4))
    assert columns_of(with_error, module._BAND).size
    assert not columns_of(density_image(density([1.0])), module._BAND).size


@pytest.mark.parametrize("size", [1, 10**9])
def test_any_size_can_be_drawn(size):
    pixels = density_image(density([0.0], size=size))
    assert pixels.dtype == np.uint8
    assert columns_of(pixels, module._LINE).size


def test_a_narrow_spectrum_far_from_zero():
    flat = density([1e6], sigma=1.0, low=1e6 - 6, high=1e6 + 6)
    assert (density_image(flat) == module._LINE).all(-1).any()
