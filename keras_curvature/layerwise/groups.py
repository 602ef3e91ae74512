"""Sets that belong together because they overlap."""

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def connected(sets: Iterable[set[T]]) -> list[set[T]]:
    """Unions of the sets that overlap, directly or through others.

    Args:
        sets: any sets.

    Returns:
        Sets without common elements, in the order of their first parts.
    """
    merged: list[set[T]] = []
    for one in sets:
        mine = [m for m in merged if m & one]
        union = set(one).union(*mine)
        if mine:
            merged[merged.index(mine[0])] = union
            merged = [m for m in merged if not any(m is other for other in mine)]
        else:
            merged.append(union)
    return merged
