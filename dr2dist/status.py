"""How processes end: the exit statuses of the command and of ranks, and what asks them to stop."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Any, NoReturn, TextIO

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""What a person, a service manager, a terminal that closes, and a scheduler send."""
APART = 1.0
"""Seconds within which further signals count as the same one: a process group gets it at once, and
what is sent on by a launcher again."""

GOES_ON = "the same command goes on from the last checkpoint, or starts anew without one"
"""What messages say of a run that was broken off."""


class Status(IntEnum):
    """An exit status."""

    DONE = 0
    USER_ERROR = 2
    """A setting, a file or a call that cannot work."""
    UNPROVEN = 3
    """A step that could not be proven, and was not applied."""
    LOST = 4
    """A rank was lost; of a command: and there is no checkpoint to go on from."""
    STOPPED = 75
    """Able to go on (EX_TEMPFAIL of sysexits.h): asked to stop; of a command: or a rank was lost,
    and there is a checkpoint."""


def handled() -> tuple[signal.Signals, ...]:
    """The signals that this process answers: not SIGHUP under nohup, which has it ignored."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(each for each in STOP_SIGNALS if not (ignored and each == signal.SIGHUP))


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """What is started within it gets signals to stop once it calls `take_signals`, and not while
    Python starts, which would end it with a traceback, or in silence."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def take_signals() -> None:
    """See `held_back`. Those that have come meanwhile come now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def lives(process: int) -> bool:
    """Whether a process of this host is there, whosever it is."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's, and there
    return True


def say(line: str, stream: TextIO | None = None) -> None:
    """Writes a line to stderr, or another stream, if somebody is there to read it: who stops since
    the terminal was closed has none."""
    with contextlib.suppress(OSError):
        stream = stream or sys.stderr
        stream.write(f"{line}\n")
        stream.flush()


def open_streams() -> None:
    """Opens what this process was started without (`>&-`), to nobody: a file that is opened later
    would take its place, and get what is printed. What this process starts has them too. Names may
    have letters that the streams' encoding lacks."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nobody = os.open(os.devnull, os.O_RDWR)
            if nobody != number:
                os.dup2(nobody, number)
                os.close(nobody)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def end_after(main: Callable[[], None]) -> NoReturn:
    """Runs a process's main function, with streams that are open, and ends the process at once,
    with its status: Python would take seconds to take torch apart."""
    open_streams()
    status: Any = Status.DONE
    try:
        main()
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(int(status))
