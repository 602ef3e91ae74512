"""How much memory the host has left."""

import os
import pathlib

_GROUP = pathlib.Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes that can be taken without swapping; `None` if the system does not tell."""
    found = [size for size in (_available(), _left_to_the_group()) if size is not None]
    return min(found, default=None)


def _available() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _left_to_the_group() -> int | None:
    """What a container may still take, where one is told its limit."""
    try:
        limit, used = (
            (_GROUP / name).read_text().strip()
            for name in ("memory.max", "memory.current")
        )
        return None if limit == "max" else max(int(limit) - int(used), 0)
    except (OSError, ValueError):
        return None
