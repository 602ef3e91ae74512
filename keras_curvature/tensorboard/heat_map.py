"""An image of one figure, layers over steps, drawn with NumPy alone."""

from collections.abc import Mapping

import numpy as np

from keras_curvature.tensorboard.bitmap_font import ADVANCE, HEIGHT, write

MAX_COLUMNS = 320
MAX_ROWS = 96
_ROW = 14
_MIN_MAP_WIDTH = 280
_LABEL_LETTERS = 24
_PAPER = np.array([255, 255, 255], "uint8")
_MISSING = np.array([226, 226, 226], "uint8")
# Nine colours of matplotlib's viridis: even steps in lightness, and told apart with any
# colour vision.
_VIRIDIS = np.array(
    [
        (68, 1, 84),
        (71, 44, 122),
        (59, 81, 139),
        (44, 113, 142),
        (33, 144, 141),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ],
    "float64",
)


class HeatMap:
    """Collects one positive figure per layer and step, and draws the lot.

    Colours are logarithmic. Beyond `MAX_COLUMNS` probes every other column is dropped,
    so that neither the memory nor the image grows with the length of training.
    """

    def __init__(self) -> None:
        self._columns: list[tuple[int, dict[str, float]]] = []
        self._names: dict[str, None] = {}
        self._stride = 1
        self._offered = 0

    def __bool__(self) -> bool:
        return bool(self._columns)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one column.

        Args:
            step: The step of the probe. A column of the same step is replaced.
            values: The figure by layer.
        """
        self._names |= dict.fromkeys(values)
        if self._columns and self._columns[-1][0] == step:
            self._columns.pop()
            self._offered -= 1
        if self._offered % self._stride == 0:
            self._columns.append((step, dict(values)))
        self._offered += 1
        if len(self._columns) > MAX_COLUMNS:
            self._columns = self._columns[::2]
            self._stride *= 2

    def render(self) -> np.ndarray:
        """Draws the map with the layers' names, first and last step and colour scale.

        Returns:
            A uint8 array of shape `(height, width, 3)`.
        """
        names = list(self._names)[:MAX_ROWS]
        table = np.array(
            [
                [column.get(name, np.nan) for _, column in self._columns]
                for name in names
            ]
        )
        low, high = _decades(table)
        cell = max(1, -(-_MIN_MAP_WIDTH // table.shape[1]))
        cells = np.repeat(np.repeat(_colours(table, low, high), cell, 1), _ROW, 0)
        cells[_ROW - 1 :: _ROW] = _PAPER

        labels = [_short(name) for name in names]
        left = ADVANCE * (max(map(len, labels)) + 1)
        top, bottom = 4, 52
        canvas = np.empty(
            (top + len(cells) + bottom, left + cells.shape[1] + 12, 3), "uint8"
        )
        canvas[:] = _PAPER
        canvas[top : top + len(cells), left : left + cells.shape[1]] = cells
        for i, label in enumerate(labels):
            x = left - ADVANCE * (len(label) + 1) + ADVANCE // 2
            write(canvas, label, top + _ROW * i + 2, x)

        y, right = top + len(cells) + 4, left + cells.shape[1]
        write(canvas, f"step {self._columns[0][0]}", y, left)
        if len(self._columns) > 1:
            last = str(self._columns[-1][0])
            write(canvas, last, y, right - ADVANCE * len(last))
        y += 2 * HEIGHT
        bar = np.linspace(low, high, min(240, cells.shape[1]))[None]
        canvas[y : y + 8, left : left + bar.shape[1]] = _colours(10**bar, low, high)
        write(canvas, f"1e{int(low)}", y + 11, left)
        end = f"1e{int(high)}"
        write(canvas, end, y + 11, left + bar.shape[1] - ADVANCE * len(end))
        return canvas


def _decades(table: np.ndarray) -> tuple[float, float]:
    """Whole powers of ten around what is positive and finite, six decades at most."""
    visible = table[np.isfinite(table) & (table > 0)]
    if not visible.size:
        return -1.0, 0.0
    high = float(np.ceil(np.log10(visible.max())))
    low = float(np.floor(np.log10(visible.min())))
    return max(min(low, high - 1), high - 6), high


def _colours(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Colours of positive values; grey where there is none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        place = (np.log10(values) - low) / (high - low)
    missing = ~np.isfinite(values) | (values < 0)
    place = np.where(missing, 0.0, np.clip(place, 0.0, 1.0))
    at = np.linspace(0.0, 1.0, len(_VIRIDIS))
    rgb = np.stack([np.interp(place, at, channel) for channel in _VIRIDIS.T], axis=-1)
    return np.where(missing[..., None], _MISSING, rgb.round()).astype("uint8")


def _short(name: str) -> str:
    """The end of a long name tells more than its beginning."""
    if len(name) <= _LABEL_LETTERS:
        return name
    return ".." + name[-(_LABEL_LETTERS - 2) :]
