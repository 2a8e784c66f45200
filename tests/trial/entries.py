"""Functions that the tests run in child processes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def echo(request, report):
    report("forward", live_bytes=7)
    return {"echo": request}


def show_process(request, report):
    return {
        "session": os.getsid(0) == os.getpid(),
        "stdin": sys.stdin.read(),
        "environment": os.environ.get("TRIAL_TEST"),
        "modules": len(sys.modules),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


def raise_error(request, report):
    report("backward", live_bytes=3)
    namespace: dict = {}
    exec(request["code"], namespace)
    return {}


def exit_now(request, report):
    sys.stderr.write(request.get("stderr", ""))
    sys.stderr.flush()
    if request.get("python"):
        sys.exit(request["code"])
    os._exit(request["code"])


def return_it(request, report):
    return {"huge": {"text": "x" * (20 * 2**20)}, "bytes": {"b": b"x"}, "list": [1]}[request["what"]]


def leave_torn_result(request, report):
    Path(request["folder"], "result.json").write_text('{"result": {"peak": 12')
    Path(request["folder"], ".result.json.77.tmp").write_text('{"result": {}}')
    os._exit(0)


def multiply(request, report):
    """Parallel operations in the child: they hang where the parent has run one before the fork."""
    import torch

    before = os.getppid()
    a = torch.randn(700, 700)
    loss = (torch.nn.Parameter(a) @ a).sum()
    loss.backward()
    return {"finite": bool(torch.isfinite(loss)), "threads": torch.get_num_threads(), "parent": before}


def run_inner_sandbox(request, report):
    from autofit.trial.sandbox import Job, Sandbox

    with Sandbox(preload=("json",)) as sandbox:
        job = Job(entry="tests.trial.entries:echo", request={}, folder=Path(request["folder"]), deadline_seconds=20)
        return {"inner": json.dumps(sandbox.run(job).result)}


def use_bitsandbytes(request, report):
    import bitsandbytes
    import torch

    data = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    packed, state = bitsandbytes.functional.quantize_4bit(data)
    back = bitsandbytes.functional.dequantize_4bit(packed, state)
    return {"finite": bool(torch.isfinite(back).all()), "capability": torch.cuda.get_device_capability()}


def allocate(request, report):
    import torch

    report("forward")
    torch.empty(int(request["gigabytes"] * 2**30), dtype=torch.uint8, device="cuda")
    if request.get("die"):
        os.kill(os.getpid(), 9)
    return {}


def multiply_on_a_full_card(request, report):
    """The card is filled outside of torch's allocator, so that the library finds no room."""
    import ctypes

    import torch

    a = torch.ones(64, 64, device="cuda")
    driver = ctypes.CDLL("libcuda.so.1")
    size = torch.cuda.mem_get_info()[0]
    while size >= 2**20:
        if driver.cuMemAlloc_v2(ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(size)) != 0:
            size //= 2
    report("forward", free_bytes=torch.cuda.mem_get_info()[0])
    return {"sum": float((a @ a).sum())}


def device_assert(request, report):
    import torch

    index = torch.tensor([9], device="cuda")
    return {"value": float(torch.zeros(3, device="cuda")[index].cpu())}


def bitsandbytes_exit(request, report):
    """A paged state that is larger than any memory: the library prints and calls exit(1)."""
    import bitsandbytes
    import torch

    torch.zeros(1, device="cuda")
    bitsandbytes.functional.get_paged(2**50, dtype=torch.uint8)
    return {}
