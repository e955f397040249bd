"""Waits for ranks: sends them the signals that it gets, and ends what does not end."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

from dr2dist.errors import UserError
from dr2dist.launching.launcher import Launcher
from dr2dist.status import APART, GOES_ON, STOP_SIGNALS, Status, handled, say

PERIOD = 0.1
"""Seconds between two looks."""
PATIENCE = 16.0
"""Seconds that ranks have, once one has ended, to find it out and to say so: the word of a loss
reaches all within 11 (see heartbeat.py). With the half minute that the first takes to find a silent
one, all have ended well within a minute."""
FIRST_WAIT, LONGEST_WAIT = 5.0, 300.0
"""Seconds before the first restart, and at most before one."""
STEADY = 60.0
"""Seconds after which a start has not failed as such."""
MARGIN = 10.0
"""Seconds beyond `train.grace` after which a rank that was asked to stop is ended."""
CUT = f"stopped before a checkpoint could be written; {GOES_ON}"


class Signals:
    """The signals to stop that this process gets while it is entered, with their times.

    Until ranks are started there is nothing to wait for: a signal then ends the process.
    """

    def __init__(self) -> None:
        self.caught: list[tuple[float, int]] = []
        self.started = False

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._note) for number in handled()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.caught.append((time.monotonic(), number))
        if not self.started:
            say("dr2dist: stopped before anything was started")
            raise SystemExit(Status.STOPPED)

    @property
    def asked(self) -> float | None:
        """When the first came."""
        return self.caught[0][0] if self.caught else None

    @property
    def at_once(self) -> bool:
        """Whether a second one has come."""
        return any(when - self.caught[0][0] > APART for when, _ in self.caught)


def supervise(
    launcher: Launcher,
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    signals: Signals,
    grace: float,
    cut: str = CUT,
) -> int:
    """Starts ranks and waits until all have ended; the exit status of the whole.

    A signal to stop is sent on to all of them, and they have `grace` seconds; a second one ends
    them at once. When a rank has failed the others have PATIENCE seconds. cut: what to say when
    none of them could end in order.
    """
    signals.started = True
    try:
        launcher.start(command, environments)
        names = [each.get("RANK", str(number)) for number, each in enumerate(environments)]
        statuses = _wait(launcher, names, signals, grace)
    finally:
        launcher.kill()
    status = combined(statuses, signals.asked is not None)
    if status == Status.STOPPED and Status.STOPPED not in statuses:
        say(f"dr2dist: {cut}")
    return status


def with_restarts(start: Callable[[], int], most: int, signals: Signals) -> int:
    """Starts a run, and again, at most so many times, whenever a rank is lost; its exit status.

    Before each start ranks wait, FIRST_WAIT seconds, and twice as long where the start before has
    not lasted for STEADY: what has ended one may need a while to come back. So may a host that
    does not answer when the run is started again: what the first start has not refused counts as
    lost then. A signal ends the waiting. Raises UserError for what the first start finds.
    """
    again, wait = 0, 0.0
    while True:
        begin = time.monotonic()
        status = _once_more(start, signals) if again else start()
        lost = (Status.LOST, Status.USER_ERROR) if again else (Status.LOST,)
        if status not in lost or signals.caught or again == most:
            return status
        again += 1
        lasted = time.monotonic() - begin > STEADY
        wait = FIRST_WAIT if lasted or not wait else min(LONGEST_WAIT, 2 * wait)
        say(f"dr2dist: start {again} of at most {most} more, in {wait:g} s")
        end = time.monotonic() + wait
        while time.monotonic() < end and not signals.caught:
            time.sleep(PERIOD)
        if signals.caught:
            return _stopped()


def _once_more(start: Callable[[], int], signals: Signals) -> int:
    try:
        return start()
    except UserError as error:
        if signals.caught:
            return _stopped()
        say(f"dr2dist: {error}")
        return Status.LOST


def _stopped() -> Status:
    say("dr2dist: stopped before it was started again; the same command goes on")
    return Status.STOPPED


def _wait(
    launcher: Launcher, names: Sequence[str], signals: Signals, grace: float
) -> list[int | None]:
    """The statuses of all, once they have ended. names: how messages call them, in their order."""
    failed: float | None = None
    sent = False
    while True:
        now, statuses = time.monotonic(), launcher.statuses()
        if failed is None and any(statuses):
            failed = now
            _name_killed(names, statuses, signals)
        if None not in statuses:
            return statuses
        if signals.caught and not sent:
            launcher.send(signals.caught[0][1])
            sent = True
        # One that a signal has ended, before it could answer, can do no step with the others.
        patience = PATIENCE if _killed(statuses) or signals.asked is None else grace + MARGIN
        late = signals.asked is not None and now - signals.asked > grace + MARGIN
        if signals.at_once or late or (failed is not None and now - failed > patience):
            launcher.kill()
        time.sleep(PERIOD)


def combined(statuses: list[int | None], asked: bool) -> int:
    """One exit status for all ranks. asked: whether the command was asked to stop."""
    for known in (Status.USER_ERROR, Status.UNPROVEN, Status.STOPPED):
        if known in statuses:
            return known
    if not any(statuses):
        return Status.DONE
    # A signal may reach a rank before it can answer.
    if asked or any(status in [-number for number in STOP_SIGNALS] for status in statuses):
        return Status.STOPPED
    if Status.LOST in statuses or _killed(statuses):
        return Status.LOST
    return next(status for status in statuses if status)


def _name_killed(names: Sequence[str], statuses: Sequence[int | None], signals: Signals) -> None:
    """Ranks that a signal has ended, not one that asks to stop, cannot say so themselves; nor has
    one whose status none of dr2dist's is, as of a library that ends its process."""
    if signals.caught:  # that explains it
        return
    for rank, status in zip(names, statuses, strict=True):
        number = 0 if status is None else -status
        if number > 0 and number not in STOP_SIGNALS:
            more = ", as where memory is full" if number == signal.SIGKILL else ""
            say(f"dr2dist: rank {rank} was ended by a signal: {signal.strsignal(number)}{more}")
        elif number < 0 and status not in list(Status):
            say(f"dr2dist: rank {rank} ended with status {status}")


def _killed(statuses: list[int | None]) -> bool:
    """Whether a signal has ended one."""
    return any(status is not None and status < 0 for status in statuses)
