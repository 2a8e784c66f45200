"""glibc's allocator, told to keep what is freed: a CPU step asks for the same large blocks again and again."""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """From now on freed blocks stay with this process instead of going back to the kernel and being zeroed anew.

    Measured on two cores with the embedded model at 16 × 1,600 tokens: 6,200 against 4,400 tokens/s. Does nothing
    where the C library is not glibc.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
