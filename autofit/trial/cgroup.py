"""Whether the kernel's memory killer struck: a host's out-of-memory is not the device's."""

from __future__ import annotations

import re
from pathlib import Path

_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def oom_kills(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> dict[str, int]:
    """Processes killed for want of host memory, by the counter's file: of this process's cgroup (v2 and v1).

    Where no cgroup counts, the whole machine's count stands in. Empty where neither is to be had.
    """
    counts = {str(path): count for path in _event_files(proc, cgroups) if (count := _read(path)) is not None}
    if not counts and (count := _read(proc / "vmstat")) is not None:
        counts["vmstat"] = count
    return counts


def grew(before: dict[str, int], after: dict[str, int]) -> bool:
    """Whether any counter that was there before has grown."""
    return any(after.get(name, 0) > count for name, count in before.items())


def _read(path: Path) -> int | None:
    try:
        found = _COUNT.search(path.read_text())
    except OSError:
        return None
    return int(found[1]) if found else None


def _event_files(proc: Path, cgroups: Path) -> list[Path]:
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    paths: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # In a container the path may be the host's while the mount shows only our part of it: try both.
        if not controllers:
            roots, name = [cgroups, cgroups / "unified"], "memory.events"
        elif "memory" in controllers.split(","):
            roots, name = [cgroups / "memory"], "memory.oom_control"
        else:
            continue
        for root in roots:
            own = root / path.lstrip("/") / name
            paths.append(own if own.exists() else root / name)
    return paths
