"""A case in a process of its own, asked for one measurement at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from types import TracebackType
from typing import Any

from dr2dist.bench.cases import Spec
from dr2dist.errors import UserError

# glibc then returns what is freed at once, so that resident memory is what is in use.
RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class CaseError(Exception):
    """A case's process ended: with what it last wrote."""


class Process:
    """Starts on entry; ends, with all its memory, on exit.

    exact_memory: memory is measured, with an allocator that keeps nothing; slower.
    """

    def __init__(self, spec: Spec, exact_memory: bool) -> None:
        self.spec = spec
        self._environment = {**os.environ, **(RETURN_AT_ONCE if exact_memory else {})}

    def __enter__(self) -> Process:
        self._errors = tempfile.TemporaryFile(mode="w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dr2dist.bench.worker"],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._send(asdict(self.spec))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            stream.close()

    def ask(self, measure: str, seconds: float | None = None, **values: Any) -> dict[str, Any]:
        """One of the worker's measurements.

        seconds: after which the process is ended, None for never. Raises UserError for a case
        that cannot be built, CaseError if the process ended.
        """
        self._send({"measure": measure, **values})
        assert self._process.stdout is not None
        limit = threading.Timer(seconds or 0, self._process.kill)
        if seconds is not None:
            limit.start()
        line = self._process.stdout.readline()
        limit.cancel()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().strip().rpartition("\n")[2]
            raise CaseError(f"{self.spec.case} ended with {status}: {last or 'no message'}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def _send(self, value: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; what it said is read by `ask`


def ask_once(spec: Spec, measure: str, **values: Any) -> dict[str, Any]:
    """One measurement of memory in a fresh process."""
    with Process(spec, exact_memory=True) as process:
        return process.ask(measure, **values)
