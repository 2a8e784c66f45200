"""A process with a sandbox, for the tests to kill: controller.py ENTRY REQUEST_JSON FOLDER START_METHOD."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from autofit.trial.portable import PortableRunner
from autofit.trial.sandbox import Job, Sandbox

if __name__ == "__main__":
    entry, request, folder, method = sys.argv[1:]
    with Sandbox(preload=("json",), start_method="fork" if method == "fork" else "spawn") as sandbox:
        if method == "portable":
            sandbox._runner = PortableRunner()
        sandbox.start()
        print(getattr(sandbox._runner, "pid", os.getpid()), flush=True)
        job = Job(entry=entry, request=json.loads(request), folder=Path(folder), deadline_seconds=60, grace_seconds=5)
        try:
            sandbox.run(job)
        except KeyboardInterrupt:
            print(json.dumps({"interrupted": sandbox.last_outcome.interrupted}), flush=True)  # type: ignore[union-attr]
            sys.exit(130)
