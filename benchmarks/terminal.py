"""A picture of a command in a terminal, with the seconds at which each line came.

    python benchmarks/terminal.py docs/quickstart.svg -- ./launch/quickstart.sh

Runs the commands, which are one each after a `--`, with a terminal of 100 columns, and ends with
the status of the first that fails. Of a line that is written over, such as a bar, the last state is
kept. Needs rich, which the extra `docs` has.
"""

from __future__ import annotations

import argparse
import io
import os
import pty
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = 100
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-ln-z]")
"""Movements of the cursor; colours, which end with m, stay."""


def lines_of(command: list[str]) -> tuple[list[tuple[float, str]], int]:
    """(seconds since the start, line) of all that a command writes, and its status."""
    ours, theirs = pty.openpty()
    size = {"COLUMNS": str(COLUMNS), "LINES": "50", "TERM": "xterm-256color"}
    start = time.monotonic()
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, **size}
    )
    os.close(theirs)
    found, rest = [], ""
    while True:
        try:
            data = os.read(ours, 4096)
        except OSError:  # all ends of the terminal are closed
            break
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
        *whole, rest = (rest + data.decode(errors="replace")).replace("\r\n", "\n").split("\n")
        now = time.monotonic() - start
        found += [(now, line) for line in whole]
    if rest:
        found.append((time.monotonic() - start, rest))
    return [(at, last_state(line)) for at, line in found], process.wait()


def last_state(line: str) -> str:
    """What is seen of a line that was written over."""
    states = [state for state in CONTROL.sub("", line).split("\r") if state.strip()]
    return states[-1] if states else ""


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path, help="SVG to write")
    arguments = sys.argv[1:]
    first = arguments.index("--") if "--" in arguments else len(arguments)
    given = parser.parse_args(arguments[:first])
    commands: list[list[str]] = []
    for word in arguments[first:]:
        if word == "--":
            commands.append([])
        else:
            commands[-1].append(word)
    if not commands or not all(commands):
        parser.error("found no command, allowed is PICTURE -- COMMAND")
    console = Console(record=True, width=COLUMNS + 8, file=io.StringIO())
    status = 0
    for command in commands:
        console.print(Text(f"{'':6}$ {shlex.join(command)}", style="bold"))
        found, status = lines_of(command)
        for at, line in found:
            console.print(Text.assemble((f"{at:5.0f} ", "dim"), Text.from_ansi(line)))
        if status:
            break
    picture = console.export_svg(title=Path(commands[0][0]).name)
    # A picture must not fetch fonts: readers' own fixed-width one does.
    given.picture.write_text(re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
