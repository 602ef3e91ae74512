"""Which probes share a tag of the page, so that a few of them can be read alone.

TensorBoard hands out a tag as a whole, and a long run of a deep model is much: a screen
has no room for more than some hundred of its probes. So every second probe lies in tags
of its own, every second of the others in further ones, and so on. Whoever needs every
fourth probe leaves three quarters of a run unread.

| group | probes in it |
|---|---|
| `<step>` | the first ten of a run; named after the first one |
| `every_1/<number>/<step>` | of the others, ten that have odd numbers, counted from 0 |
| `every_2/<number>/<step>` | ten whose numbers are multiples of 2, and not of 4 |
| … | |
| `every_64/<number>/<step>` | ten whose numbers are multiples of 64 |
"""

import dataclasses
from collections.abc import Iterable

PROBES = 10
"""In a group. TensorBoard's slow loader keeps no more of a tag, its fast one 100."""

_WIDEST = 64
_PREFIX = "every_"


@dataclasses.dataclass(frozen=True)
class Group:
    """Probes that share their tags.

    Attributes:
        number: The number of probes before the first one, as far as the name tells it.
        stride: All their numbers are multiples of it. `None` for the first ones of a
            run, which lie together.
        name: The part of the tags behind the first slash.
    """

    number: int
    stride: int | None
    name: str

    @classmethod
    def beginning(cls, number: int, step: int) -> "Group":
        """The group that begins with a probe.

        Args:
            number: The number of probes before it.
            step: Its step.
        """
        stride = stride_of(number)
        if stride is None:
            return cls(0, None, str(step))
        return cls(number, stride, f"{_PREFIX}{stride}/{number}/{step}")

    @classmethod
    def of(cls, tag: str) -> "Group":
        """The group that a tag belongs to."""
        name = tag.partition("/")[2]
        stride, *rest = name.removeprefix(_PREFIX).split("/")
        return cls(int(rest[0]), int(stride), name) if rest else cls(0, None, name)

    def number_of(self, place: int) -> int:
        """The number of a probe by its place in the group."""
        if self.stride is None:
            return self.number + place
        apart = self.stride if self.stride == _WIDEST else 2 * self.stride
        return self.number + apart * place

    def has_some(self, every: int) -> bool:
        """Whether probes with numbers that are multiples of `every` lie in it."""
        return self.stride is None or self.stride >= min(every, _WIDEST)


def stride_of(number: int) -> int | None:
    """The stride of the group in which a probe of this number lies."""
    return min(number & -number, _WIDEST) if number >= PROBES else None


def stride_for(groups: Iterable[Group], most: int) -> int:
    """At which stride there are about so many probes of a run, or less.

    Args:
        groups: All groups of the run.
        most: How many probes are enough. Groups don't tell how many there are in them,
            so that it may be twenty more.
    """
    last, stride = max((group.number for group in groups), default=0), 1
    while last > most * stride and stride < _WIDEST:
        stride *= 2
    return stride
