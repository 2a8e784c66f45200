"""The environment of every child: trial and training must see the same card through the same allocator."""

from __future__ import annotations

import os
import sys

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def child_environment(step: str = "autofit") -> dict[str, str]:
    """One card, the first visible one; and, on Linux, expandable segments for our own step.

    Those leave almost no gap between allocated and reserved memory. The user's own setting of the allocator stays. A
    stock trainer's step runs as it comes: with the allocator's default.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    # NVML counts cards by their place on the bus; CUDA would begin with the fastest.
    environment = {"CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    if step == "autofit" and sys.platform == "linux" and not any(name in os.environ for name in _ALLOCATOR):
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return environment
