"""An exception as JSON types, so that a parent without torch can judge it."""

from __future__ import annotations

import re
import sys
import traceback
from typing import Any

MAX_MESSAGE = 8_192
MAX_TRACEBACK = 32_768
MAX_CHAIN = 16

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 2**10, "MB": 2**20, "GB": 2**30}
_REQUESTED = re.compile(r"[Tt]ried to allocate (\d+(?:\.\d+)?) (bytes|[KMGT]iB|[KMG]B)\b")


def requested_bytes(message: str) -> int | None:
    """What the allocation that failed asked for, by torch's own words; None where the message does not say."""
    found = _REQUESTED.search(message)
    return round(float(found[1]) * _UNITS[found[2]]) if found else None


def describe_exception(error: BaseException) -> dict[str, Any]:
    """The record of an exception: JSON types only, bounded in size.

    Returns:
        type, bases, message, traceback, requested_bytes (or None), chain (the exceptions it came from, nearest
        first, each with type, bases, message and link: "cause" where it was named by `raise … from`, else
        "context") and device (see `_device_state`; empty where CUDA was not started).
    """
    own = _describe_one(error)
    return {
        **own,
        "traceback": _traceback(error),
        "requested_bytes": requested_bytes(own["message"]),
        "chain": _chain(error),
        "device": _device_state(),
    }


def _describe_one(error: BaseException) -> dict[str, Any]:
    try:
        message = str(error)
    except Exception as failure:
        message = f"<the exception's text could not be had: {type(failure).__name__}>"
    bases = [qualified_name(cls) for cls in type(error).__mro__]
    return {"type": bases[0], "bases": bases, "message": _utf8(message[:MAX_MESSAGE])}


def qualified_name(cls: type) -> str:
    """`torch.OutOfMemoryError`; builtins without their module."""
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def _traceback(error: BaseException) -> str:
    try:
        return _utf8("".join(traceback.format_exception(error))[-MAX_TRACEBACK:])
    except Exception:
        return ""


def _utf8(text: str) -> str:
    # Lone surrogates (from undecodable file names) are legal in str and in nothing else.
    return text.encode("utf-8", "replace").decode()


def _chain(error: BaseException) -> list[dict[str, Any]]:
    chain: list[dict[str, Any]] = []
    seen = {id(error)}
    # A context further up says nothing about the cause of what is below it: once "context", always "context".
    link = "cause"
    current: BaseException | None = error
    while current is not None and len(chain) < MAX_CHAIN:
        if current.__cause__ is not None:
            current = current.__cause__
        elif current.__context__ is not None and not current.__suppress_context__:
            current, link = current.__context__, "context"
        else:
            break
        if id(current) in seen:
            break
        seen.add(id(current))
        chain.append({**_describe_one(current), "link": link})
    return chain


def _device_state() -> dict[str, int]:
    """num_ooms (of the allocator in this process) and free_bytes (of the card), where CUDA is up.

    A poisoned context answers neither; nothing is then known, which is no error.
    """
    torch: Any = sys.modules.get("torch")
    state: dict[str, int] = {}
    try:
        if torch is None or not torch.cuda.is_initialized():
            return state
        # The statistics are kept on the host; asking for the free bytes goes to the driver and may fail.
        state["num_ooms"] = sum(
            int(torch.cuda.memory_stats(device).get("num_ooms", 0)) for device in range(torch.cuda.device_count())
        )
        state["free_bytes"] = int(torch.cuda.mem_get_info()[0])
    except Exception:
        pass
    return state
