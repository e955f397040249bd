"""Files that are not here: read in ranges through fsspec, over interruptions."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from dr2dist.errors import UserError, one_line

log = logging.getLogger(__name__)

Found = TypeVar("Found")

BLOCK = 8 * 2**20
"""Bytes of a range."""
PATIENCE = 60.0
"""Seconds for which a server that answers nothing, or badly, is tried again."""
FIRST_WAIT, LONGEST_WAIT = 0.25, 8.0
"""Seconds before the first further try, and before any."""
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, ImportError)
"""What no further try changes."""
REFUSED = (400, 401, 403, 404, 405, 410)
"""Answers of HTTP that no further try changes."""
S3 = ("s3", "s3a")
CONNECT, READ = 10, 30
"""Seconds for which a connection, and then its next bytes, are waited for."""


def _options(protocol: str) -> dict[str, Any]:
    """What a file system of fsspec is made with."""
    if protocol in ("http", "https"):
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=READ)
        return {"client_kwargs": {"timeout": limits, "trust_env": True}}
    if protocol in S3:
        once = {"total_max_attempts": 1}  # `persistent` tries again, with an end
        waits = {"connect_timeout": CONNECT, "read_timeout": READ}
        return {"config_kwargs": {**waits, "retries": once}}
    return {}


def is_remote(text: str) -> bool:
    """Whether a text is a URL, such as s3://bucket/key."""
    return "://" in text


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system and the path there. Raises UserError for a protocol that it does not
    know, or whose package is not installed."""
    import fsspec

    protocol = url.partition("://")[0] if is_remote(url) else "file"
    try:
        own = fsspec.config.conf.get(protocol, {})  # what its user has said counts
        options = {
            name: {**value, **own.get(name, {})} for name, value in _options(protocol).items()
        }
        system, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{url}: {protocol}:// cannot be read: {one_line(error)}; 'pip install "
            "dr2dist[remote]' brings what http, s3 and gs need"
        ) from None
    if protocol in S3:
        system.retries = 1  # s3fs has no option for it
    return system, path


def size_of(url: str, patience: float = PATIENCE) -> int | None:
    """Bytes of a file; None where its server does not say. Raises UserError."""
    system, path = file_system(url)
    return persistent(url, lambda: system.info(path), patience).get("size")


def read_all(url: str, patience: float = PATIENCE) -> bytes:
    """A small file. Raises UserError."""
    system, path = file_system(url)
    return bytes(persistent(url, lambda: system.cat_file(path), patience))


def listed(url: str, patience: float = PATIENCE) -> list[str]:
    """The files under a folder, or that a glob matches, as URLs in order. Raises UserError."""
    system, path = file_system(url)

    def found() -> list[str]:
        names = system.glob(path) if "*" in path or "?" in path else system.ls(path, detail=False)
        return sorted(system.unstrip_protocol(name) for name in names)

    return persistent(url, found, patience)


def persistent(url: str, attempt: Callable[[], Found], patience: float) -> Found:
    """What an attempt gives, tried again with growing waits for `patience` seconds.

    Raises UserError, in one line, for what no further try changes and at the end.
    """
    wait, end = FIRST_WAIT, time.monotonic() + patience
    while True:
        try:
            return attempt()
        except Exception as raised:  # of any file system's own kind
            error = _cause(raised)
            final = isinstance(error, FINAL) or getattr(error, "status", None) in REFUSED
            if final or "Credentials" in type(error).__name__:
                raise UserError(f"{url}: cannot be read: {_named(error)}") from None
            if time.monotonic() + wait > end:
                raise UserError(
                    f"{url}: cannot be read: {_named(error)}, for {patience:g} s"
                ) from None
            log.info("%s: %s: tried again in %.1f s", url, _named(error), wait)
        time.sleep(wait * random.uniform(0.7, 1.3))
        wait = min(2 * wait, LONGEST_WAIT)


def _cause(error: BaseException) -> BaseException:
    """fsspec says of a server of HTTP that cannot be reached that the file is not found."""
    found = isinstance(error, FileNotFoundError) and error.__cause__
    return _cause(found) if found else error


def _named(error: BaseException) -> str:
    text = one_line(error)
    kind = type(error).__name__
    return f"{kind}: {text}" if text and text not in kind else kind


class RemoteReader:
    """A file from its beginning to its end, by `read(size)`; a range that breaks off is asked for
    again. Each read raises UserError where that does not help."""

    def __init__(self, url: str, patience: float = PATIENCE) -> None:
        self.url, self.patience = url, patience
        self._system, self._path = file_system(url)
        info = persistent(url, lambda: self._system.info(self._path), patience)
        self._place, self._rest, self._whole = 0, b"", b""
        if info.get("size") is None:  # no ranges either
            self._whole = persistent(url, lambda: self._system.cat_file(self._path), patience)
        self.size = int(info.get("size") or len(self._whole))

    def read(self, size: int = -1) -> bytes:
        """At most so many bytes; none at the end."""
        if size < 0:
            parts = iter(lambda: self.read(BLOCK), b"")
            return b"".join(parts)
        if not self._rest and self._place < self.size:
            self._rest = self._range(self._place, min(self._place + BLOCK, self.size))
            self._place += len(self._rest)
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    def _range(self, start: int, stop: int) -> bytes:
        if self._whole:
            return self._whole[start:stop]

        def attempt() -> bytes:
            data: bytes = self._system.cat_file(self._path, start=start, end=stop)
            if len(data) == self.size and stop - start < len(data):  # ranges are not served
                self._whole = data
                return data[start:stop]
            if len(data) != stop - start:
                raise OSError(f"sent {len(data)} of {stop - start} bytes from {start} on")
            return data

        return persistent(self.url, attempt, self.patience)

    def __enter__(self) -> RemoteReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._rest = self._whole = b""
