"""A case in a process of its own, asked for one measurement at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
import threading
from dataclasses import asdict
from types import TracebackType
from typing import Any

from dr2dist.bench import worker
from dr2dist.bench.cases import Spec
from dr2dist.errors import UserError


class CaseError(Exception):
    """A case's process ended: with what it last wrote."""


class Process:
    """Starts on entry; ends, with all its memory, on exit.

    It is forked from one that has imported what all cases need, and done nothing else: libraries
    take longer to import than a small model to measure. exact_memory: memory is measured, with an
    allocator that keeps nothing; slower.
    """

    def __init__(self, spec: Spec, exact_memory: bool) -> None:
        self.spec, self.exact_memory = spec, exact_memory

    def __enter__(self) -> Process:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([worker.__name__])
        self._errors = tempfile.NamedTemporaryFile(  # which the process opens by its name
            mode="r", encoding="utf-8", errors="replace"
        )
        self._ours, theirs = context.Pipe()
        given = (theirs, asdict(self.spec), self.exact_memory, self._errors.name)
        self._process = context.Process(target=worker.serve, args=given, daemon=True)
        self._process.start()
        theirs.close()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self._ours.close()
        self._errors.close()

    def ask(self, measure: str, seconds: float | None = None, **values: Any) -> dict[str, Any]:
        """One of the worker's measurements.

        seconds: after which the process is ended, None for never. Raises UserError for a case
        that cannot be built, CaseError if the process ended.
        """
        limit = threading.Timer(seconds or 0, self._process.kill)
        if seconds is not None:
            limit.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended, and may have said why
                self._ours.send({"measure": measure, **values})
            answer: dict[str, Any] = self._ours.recv()
        except (EOFError, OSError):
            self._process.join()
            last = self._errors.read().strip().rpartition("\n")[2]
            code = self._process.exitcode
            raise CaseError(f"{self.spec.case} ended with {code}: {last or 'no message'}") from None
        finally:
            limit.cancel()
        if "error" in answer:
            raise UserError(answer["error"])
        return answer


def ask_once(spec: Spec, measure: str, **values: Any) -> dict[str, Any]:
    """One measurement of memory in a fresh process."""
    with Process(spec, exact_memory=True) as process:
        return process.ask(measure, **values)
