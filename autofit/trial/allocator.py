"""How PyTorch's CUDA allocator is set in every child: trial and training must see the same gaps."""

from __future__ import annotations

import os
import sys

_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def allocator_env() -> dict[str, str]:
    """Environment of a child: expandable segments, which leave almost no gap between allocated and reserved.

    Empty where the user has set the allocator, or the platform has no such segments.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _NAMES):
        return {}
    return {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
