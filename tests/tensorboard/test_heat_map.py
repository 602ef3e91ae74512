"""The image of layers over steps."""

import numpy as np
import pytest

from keras_curvature.tensorboard import heat_map
from keras_curvature.tensorboard.bitmap_font import text_mask
from keras_curvature.tensorboard.heat_map import HeatMap


def drawn(columns):
    chart = HeatMap()
    for step, values in columns:
        chart.add(step, values)
    return chart.render()


def colours_of_map(pixels):
    """The colour in the middle of the map's first row, from left to right."""
    row = pixels[4 + 6]
    inside = [tuple(p) for p in row if tuple(p) not in {(255, 255, 255), (60, 64, 67)}]
    return list(dict.fromkeys(inside))


def test_larger_curvature_is_lighter_on_a_logarithmic_scale():
    pixels = drawn([(i, {"dense": 10.0**-i}) for i in range(5)])
    colours = colours_of_map(pixels)
    assert len(colours) == 5
    lightness = [sum(map(int, c)) for c in colours]
    assert lightness == sorted(lightness, reverse=True)
    assert colours[0] == (253, 231, 37)
    assert colours[-1] == (68, 1, 84)


def test_missing_and_non_finite_values_are_grey():
    pixels = drawn([(0, {"a": 1.0}), (1, {"b": 1.0}), (2, {"a": np.nan, "b": np.inf})])
    assert tuple(heat_map._MISSING) in colours_of_map(pixels)


def test_zero_and_constant_figures_are_drawn():
    assert drawn([(0, {"a": 0.0})]).shape[2] == 3
    assert drawn([(0, {"a": 3.0}), (1, {"a": 3.0})]).dtype == np.uint8


def test_image_and_memory_stop_growing():
    chart = HeatMap()
    for step in range(3000):
        chart.add(step, {f"layer_{i}": 1.0 + i for i in range(300)})
    assert len(chart._columns) <= heat_map.MAX_COLUMNS
    # The columns kept are evenly spaced, the first probe among them.
    steps = np.array([step for step, _ in chart._columns])
    assert steps[0] == 0
    assert np.unique(np.diff(steps)).size == 1
    height, width, _ = chart.render().shape
    assert height < 1600 and width < 1600


def test_a_repeated_step_replaces_its_column():
    chart = HeatMap()
    for value in (1.0, 2.0):
        chart.add(7, {"a": value})
    assert chart._columns == [(7, {"a": 2.0})]


def test_letters_are_told_apart_and_unknown_ones_are_boxes():
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./+:()"
    shapes = {text_mask(letter).tobytes() for letter in letters}
    assert len(shapes) == len(letters)
    np.testing.assert_array_equal(text_mask("λ"), text_mask("中"))


@pytest.mark.parametrize("name", ["", "x" * 200, "größe/名前"])
def test_any_layer_name_can_be_drawn(name):
    assert drawn([(0, {name: 1.0})]).shape[2] == 3
