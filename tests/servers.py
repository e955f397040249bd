"""Servers on the loopback: one of HTTP that fails as asked, and one of S3."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Faults:
    """What becomes of the next requests for contents: so many are answered 503, broken off, sent
    short under a false length. latency: seconds before each. sent: bytes by path."""

    busy: int = 0
    cut: int = 0
    lie: int = 0
    latency: float = 0.0
    ranges: bool = True
    sent: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, name: str) -> bool:
        with self.lock:
            left = getattr(self, name)
            setattr(self, name, max(0, left - 1))
            return bool(left)


@dataclass
class Server:
    url: str
    faults: Faults
    stop: Any


def serve(folder: Path, port: int = 0) -> Server:
    """Until its `stop`, which ends connections that are open too."""
    faults = Faults()
    open_: set[socket.socket] = set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            open_.add(self.connection)

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(False)

        def do_GET(self) -> None:
            self._answer(True)

        def _answer(self, contents: bool) -> None:
            time.sleep(faults.latency)
            if contents and faults.take("busy"):
                return self._send(503, b"", {})
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                return self._send(404, b"", {})
            data, headers, status = path.read_bytes(), {}, 200
            wanted = self.headers.get("Range") if faults.ranges else None
            if wanted:
                first, last = wanted.removeprefix("bytes=").split("-")
                part = data[int(first) : int(last or len(data)) + 1]
                headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
                data, status = part, 206
            faults.sent[path.name] += len(data) if contents else 0
            return self._send(status, data, headers, contents)

        def _send(self, status: int, data: bytes, more: dict[str, str], body: bool = True) -> None:
            self.send_response(status)
            length = len(data)
            if body and status < 300 and faults.take("lie"):
                data = data[: length // 2]
                length = len(data)
            self.send_header("Content-Length", str(length))
            if faults.ranges:
                self.send_header("Accept-Ranges", "bytes")
            for name, value in more.items():
                self.send_header(name, value)
            self.end_headers()
            if not body:
                return
            if status < 300 and faults.take("cut"):
                self.wfile.write(data[: length // 2])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        for connection in list(open_):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    return Server(f"http://127.0.0.1:{server.server_port}", faults, stop)


S3_BUCKET = "shards"


@contextmanager
def s3(folder: Path) -> Iterator[dict[str, str]]:
    """A server that has a folder's files in a bucket; the environment that leads there."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        client = boto3.client(
            "s3",
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=S3_BUCKET)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                key = path.relative_to(folder).as_posix()
                client.put_object(Bucket=S3_BUCKET, Key=key, Body=path.read_bytes())
        yield environment
    finally:
        server.stop()


def main() -> None:
    """Serves a folder until it is killed: python -m tests.servers FOLDER PORT."""
    import sys

    serve(Path(sys.argv[1]), int(sys.argv[2]))
    os.write(1, b"ready\n")
    threading.Event().wait()


if __name__ == "__main__":
    main()
