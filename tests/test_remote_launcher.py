"""Ranks on hosts as the command sees them: what it prints, and how it is stopped."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import pytest

from dr2dist.errors import UserError
from dr2dist.launching import remote
from dr2dist.launching.hosts import Host
from dr2dist.launching.remote import RemoteLauncher
from tests.pool import wait_for


class Unread(io.StringIO):
    """A stream whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_ranks_go_on_when_nobody_reads_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "speaks.py").write_text("import sys\nprint('a')\nprint('b', file=sys.stderr)\n")
    launcher = RemoteLauncher([Host("localhost", 1)], "speaks", 1.0)
    try:
        launcher.greet(30, {"PYTHONPATH": str(tmp_path)})
        monkeypatch.setattr(sys, "stdout", Unread())
        monkeypatch.setattr(sys, "stderr", Unread())
        launcher.start([], [{}])
        wait_for(lambda: launcher.statuses() != [None], "the rank's end")
        assert launcher.statuses() == [0]
    finally:
        launcher.close()


def test_hosts_that_hang_are_not_waited_for_by_who_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "SSH", [sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(remote, "ALIVE", 5.0)
    launcher = RemoteLauncher([Host(f"far{n}", 1) for n in range(8)], "speaks", 1.0)
    begin = time.monotonic()
    with pytest.raises(UserError, match="stopped"):
        launcher.greet(600, {}, stopping=lambda: time.monotonic() > begin + 0.2)
    launcher.close()
    assert time.monotonic() - begin < 20  # one by one they would take 40
