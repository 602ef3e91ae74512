"""Which probes share a tag: by going through a run."""

import pytest

from keras_curvature.tensorboard import groups
from keras_curvature.tensorboard.groups import Group


def grouped(count):
    """The groups of a run, as a writer begins them, and the numbers of their probes."""
    held, now = {}, {}
    for number in range(count):
        begun = Group.beginning(number, step=10 * number)
        group = now.get(begun.stride, begun)
        if len(held.get(group, ())) == groups.PROBES:
            group = begun
        now[begun.stride] = group
        held.setdefault(group, []).append(number)
    return held


def test_a_group_knows_its_probes_by_its_name():
    held = grouped(5000)
    assert sorted(n for numbers in held.values() for n in numbers) == list(range(5000))
    for group, numbers in held.items():
        read = Group.of(f"curvature_layers/{group.name}")
        assert read == group
        assert [read.number_of(place) for place in range(len(numbers))] == numbers


@pytest.mark.parametrize("every", [1, 2, 4, 16, 64])
def test_every_so_many_probes_lie_in_few_groups(every):
    held = grouped(5000)
    some = {group for group in held if group.has_some(every)}
    found = [n for group in some for n in held[group] if n % every == 0]
    assert sorted(found) == list(range(0, 5000, every))
    # Beyond the first ones nothing else is read.
    read = sum(len(held[group]) for group in some)
    assert read < len(found) + groups.PROBES


@pytest.mark.parametrize("count", [1, 50, 51, 480, 700, 2000, 2001, 9000, 31_000])
def test_about_as_many_probes_are_shown_as_are_enough(count):
    every = groups.stride_for(grouped(count), 500)
    assert every == 1 or count / every > 245
    assert count / every <= 520
