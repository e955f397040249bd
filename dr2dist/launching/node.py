"""On each host of a run: starts ranks there as the command says, and ends them with it.

Speaks with `dr2dist.launching.remote` in lines of JSON, by stdin and stdout; so nothing that a
person has written passes through a shell. Ranks' stdout becomes messages, their stderr is this
process's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from dr2dist.launching.launcher import LocalLauncher, free_port, watched
from dr2dist.launching.supervise import MARGIN, PERIOD
from dr2dist.launching.survey import survey
from dr2dist.status import STOP_SIGNALS, end_after

ALIVE = 5.0
"""Seconds between two words of one to the other, whatever else is said."""
SILENCE = 25.0
"""Seconds without a word from the other after which it counts as gone."""
LEFT = 20.0
"""Seconds that ranks have to end once the link to the command is lost: others are lost to them."""
Message = dict[str, Any]


def main() -> NoReturn:
    """Until all ranks have ended, or the command is gone and they have been ended."""
    end_after(_serve)  # at once: a thread reads stdin, which nobody may close


def _serve() -> None:
    for number in STOP_SIGNALS:
        # The command says what ends, and its own end is seen. Ignored, they would be so in ranks.
        signal.signal(number, lambda number, frame: None)
    Node(sys.stdin.buffer, _own_stdout()).run()


def _own_stdout() -> BinaryIO:
    """Kept for messages: what this process or a library prints goes to stderr."""
    kept = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    return kept


class Node:
    """One conversation with the command. words: lines from it. answers: lines to it."""

    def __init__(self, words: BinaryIO, answers: BinaryIO) -> None:
        self._words, self._answers = words, answers
        self._heard: queue.Queue[Message | None] = queue.Queue()
        self._last = time.monotonic()
        self._launcher = LocalLauncher()
        self._told: list[int | None] | None = None
        self._end: float | None = None
        self._lock = threading.Lock()
        self._grace = 0.0
        self._folder = tempfile.TemporaryDirectory(prefix="dr2dist-")
        threading.Thread(target=self._listen, daemon=True).start()

    def run(self) -> None:
        """See main."""
        spoken = time.monotonic()
        try:
            while not self._over():
                if time.monotonic() - spoken > ALIVE:
                    self._say({"alive": True})
                    spoken = time.monotonic()
                with contextlib.suppress(queue.Empty):
                    self._take(self._heard.get(timeout=PERIOD))
                if self._end is None and time.monotonic() - self._last > SILENCE:
                    self._stop(LEFT)
        finally:
            self._launcher.kill()
            self._launcher.statuses()
            self._folder.cleanup()

    def _listen(self) -> None:
        for line in self._words:
            self._last = time.monotonic()
            self._heard.put(json.loads(line))
        self._heard.put(None)

    def _take(self, message: Message | None) -> None:
        match message:
            case None:
                self._stop(self._grace + MARGIN if self._told else 0.0)
            case {"greet": facts}:
                self._greet(**facts)
            case {"start": ranks}:
                self._start(**ranks)
            case {"send": number}:
                self._launcher.send(number)
            case {"kill": _}:
                self._launcher.kill()

    def _greet(self, folder: str, environment: dict[str, str], paths: list[str]) -> None:
        os.environ.update(environment)
        try:
            os.chdir(folder)
        except OSError as error:
            self._say({"hello": {"error": f"{folder}: {error.strerror}"}})
            return
        self._say({"hello": {"port": free_port(), **survey(paths)}})

    def _start(
        self, module: str, config: str, environments: list[dict[str, str]], grace: float
    ) -> None:
        """config: the whole configuration, as the command has resolved it."""
        path = Path(self._folder.name, "config.yaml")
        path.write_text(config, "utf-8")
        self._grace = grace
        reader, writer = os.pipe()
        threading.Thread(target=self._pass_on, args=(reader,), daemon=True).start()
        line = [sys.executable, "-m", module, "--config", str(path)]
        self._launcher.start(line, watched(environments), stdout=writer)
        os.close(writer)
        self._told = [None] * len(environments)

    def _pass_on(self, reader: int) -> None:
        with os.fdopen(reader, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                self._say({"out": line})

    def _over(self) -> bool:
        """Whether nothing is left to do: tells of ends as they come."""
        if self._end is not None and time.monotonic() > self._end:
            return True
        if self._told is None:
            return False
        found = self._launcher.statuses()
        if found != self._told:
            self._told = found
            self._say({"statuses": found})
        return None not in found

    def _stop(self, seconds: float) -> None:
        """The command is gone: ranks are asked to stop, and have so long."""
        if self._end is None:
            self._launcher.send(signal.SIGTERM)
            self._end = time.monotonic() + seconds

    def _say(self, message: Message) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._answers.write(json.dumps(message).encode() + b"\n")
