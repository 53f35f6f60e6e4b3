"""A server of files over HTTP on this machine, which fails where a test wants it to."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Web(ThreadingHTTPServer):
    """Serves `files` by their paths.

    Attributes:
        url: of its root.
        files: path -> content.
        etags, types: path -> what is said of a file's version (its length where nothing is) and type.
        faults: path -> what happens to the next requests (GET) for a file, one after the other: a status, 400 to
            599; "stall", no answer; another number, of bytes after which the connection is cut; "damage", a byte in
            the middle is another; "less" and "more", its length is said to be other than it is; or "" for nothing.
        damaged: paths whose bytes are damaged each time.
        away: connections are closed without an answer. served: when it is set, that happens after as many answers.
        pace: seconds between two pieces of a body, 0 for all at once; pieces are of a 20th of it.
        length: how the end of a file is told: "length", "chunked", or "close" (by the end of the connection).
        ranges: whether a part of a file can be asked for. head: whether HEAD is answered.
        token: what requests have to bring as Authorization, if it is set.
        requests: method, target and the range asked for, of each.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.types: dict[str, str] = {}
        self.faults: dict[str, list[int | str]] = {}
        self.length, self.ranges, self.head = "length", True, True
        self.token = ""
        self.damaged: set[str] = set()
        self.away, self.pace = False, 0.0
        self.served: int | None = None
        self.requests: list[tuple[str, str, str]] = []
        self.closing = threading.Event()

    def find(self, target: str) -> bytes | None:
        """The body of the answer to a request; None if there is nothing."""
        return self.files.get(target.partition("?")[0])

    def handle_error(self, *arguments: Any) -> None:
        """Clients that went away are not told of."""


class _Handler(BaseHTTPRequestHandler):
    server: Web
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        web, path = self.server, self.path.partition("?")[0]
        asked = self.headers.get("Range", "")
        web.requests.append((self.command, self.path, asked))
        if web.served is not None:
            web.served -= 1
            web.away = web.away or web.served < 0
        if web.away:
            self.close_connection = True
            return
        if web.token not in ("", self.headers.get("Authorization")):
            self._status(401)
            return
        if not body and not web.head:
            self._status(405)
            return
        faults = web.faults.get(path, [])
        fault = faults.pop(0) if faults and body else None
        if fault == "stall":
            web.closing.wait()
            return
        content = web.find(self.path)
        if isinstance(fault, int) and 400 <= fault < 600:
            self._status(fault)
        elif content is None:
            self._status(404)
        else:
            self._file(path, content, asked, body, fault)

    def _status(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file(self, path: str, content: bytes, asked: str, body: bool, fault: int | str | None) -> None:
        web, cut = self.server, fault if isinstance(fault, int) else None
        if fault == "damage" or path in web.damaged:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked and web.ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", web.etags.get(path, f'"{len(content)}"'))
        self.send_header("Content-Type", web.types.get(path, "application/octet-stream"))
        part = content[start:]
        if web.length == "length":
            self.send_header("Content-Length", str(len(part) + {"less": -10, "more": 10}.get(str(fault), 0)))
        elif web.length == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        if not body:
            return
        sent = part[:cut]
        size = -(-len(sent) // 20) if web.pace else len(sent)
        for piece in (sent[first : first + size] for first in range(0, len(sent), max(1, size))):
            web.closing.wait(web.pace)
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if web.length == "chunked" else piece)
        if cut is None and web.length == "chunked":
            self.wfile.write(b"0\r\n\r\n")
        if cut is not None or fault in ("less", "more") or web.length == "close":
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def web_server() -> Iterator[Web]:
    """Serve while the block runs."""
    web = Web()
    threading.Thread(target=web.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield web
    finally:
        web.closing.set()
        web.shutdown()
        web.server_close()
