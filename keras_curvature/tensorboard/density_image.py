"""An image of the density of all eigenvalues, drawn with NumPy alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_curvature.tensorboard.bitmap_font import ADVANCE, HEIGHT, INK, write

# TensorBoard shows thumbnails of about this width.
_WIDTH, _DOWN = 284, 160
_LEFT, _TOP, _RIGHT, _BOTTOM = 40, 22, 14, 38
_LINE = np.array([0, 114, 178], "uint8")
_BAND = np.array([190, 216, 234], "uint8")
_GRID = np.array([232, 232, 232], "uint8")


def density_image(density: Mapping[str, Any]) -> np.ndarray:
    """Draws a density on a logarithmic scale over the eigenvalues, with its errors.

    Most eigenvalues of a network are near zero; the interesting ones are few. So the
    scale reaches from the peak down to a tenth of what a single eigenvalue looks like.

    Args:
        density: A record's `"spectral_density"`: `"grid"`, `"density"`,
            `"standard_error"` (or None), `"sigma"` and `"size"`.

    Returns:
        A uint8 array of shape `(height, width, 3)`. The band is two standard errors
        to each side.
    """
    grid = np.asarray(density["grid"], "float64")
    value = np.asarray(density["density"], "float64")
    error = density.get("standard_error")
    error = np.zeros_like(value) if error is None else np.asarray(error, "float64")
    one = 1 / (density["size"] * density["sigma"] * np.sqrt(2 * np.pi))
    high = np.ceil(np.log10(max(value.max(), one)))
    low = min(np.floor(np.log10(0.1 * one)), high - 1)

    canvas = np.full((_TOP + _DOWN + _BOTTOM, _LEFT + _WIDTH + _RIGHT, 3), 255, "uint8")
    plot = canvas[_TOP : _TOP + _DOWN, _LEFT : _LEFT + _WIDTH]
    _decades(canvas, plot, low, high)
    _eigenvalues(canvas, plot, grid)

    at = np.linspace(grid[0], grid[-1], _WIDTH)

    def row(values: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            place = (np.log10(np.interp(at, grid, values)) - low) / (high - low)
        return np.round((1 - np.clip(place, 0, 1)) * (_DOWN - 1)).astype(int)

    line = row(value)
    upper, lower = row(value + 2 * error), row(np.maximum(value - 2 * error, 0))
    rows = np.arange(_DOWN)[:, None]
    plot[(rows >= upper) & (rows <= lower) & (upper < lower)] = _BAND
    # From one column's height to the next one's, two pixels thick.
    before = np.concatenate([line[:1], line[:-1]])
    first, last = np.minimum(before, line), np.maximum(before, line) + 1
    shown = (rows >= first) & (rows <= last) & (first < _DOWN - 1)
    shown[:, 1:] |= shown[:, :-1]
    plot[shown] = _LINE
    write(canvas, "density of eigenvalues (+/- 2 standard errors)", 6, _LEFT)
    write(canvas, "eigenvalue", _TOP + _DOWN + 24, _LEFT + _WIDTH // 2 - 5 * ADVANCE)
    return canvas


def _decades(canvas: np.ndarray, plot: np.ndarray, low: float, high: float) -> None:
    """Lines and labels at powers of ten, eight of them at most."""
    every = int(np.ceil((high - low) / 8))
    for power in range(int(low), int(high) + 1, every):
        y = round((high - power) / (high - low) * (_DOWN - 1))
        plot[y] = _GRID
        label = f"1e{power}"
        x = _LEFT - ADVANCE * (len(label) + 1)
        write(canvas, label, _TOP + y - HEIGHT // 2, x)


def _eigenvalues(canvas: np.ndarray, plot: np.ndarray, grid: np.ndarray) -> None:
    """Marks and labels at round eigenvalues, zero in the colour of the text."""
    rough = (grid[-1] - grid[0]) / 5
    power = 10 ** np.floor(np.log10(rough))
    unit = next(u * power for u in (1, 2, 5, 10) if u * power >= rough)
    for i in range(int(np.ceil(grid[0] / unit)), int(grid[-1] // unit) + 1):
        place = (i * unit - grid[0]) / (grid[-1] - grid[0])
        x = round(place * (_WIDTH - 1))
        plot[:, x] = _GRID if i else INK
        label = f"{i * unit:.4g}"
        x += _LEFT - ADVANCE * len(label) // 2
        write(
            canvas, label, _TOP + _DOWN + 10, min(x, canvas.shape[1] - 6 * len(label))
        )
