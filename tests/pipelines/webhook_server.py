"""A real webhook on the loopback interface, in a thread, that answers as a test wants."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = "T0K3N-that-nobody-may-see"


@dataclass(slots=True)
class WebhookServer:
    """A running server.

    Attributes:
        port: of the loopback interface.
        heard: the messages that were taken.
        answers: status codes of the next answers; 200 when there are none left.
        delay: seconds before an answer.
        attempts: requests so far.
    """

    port: int
    heard: list[dict[str, Any]] = field(default_factory=lambda: list[dict[str, Any]]())
    answers: list[int] = field(default_factory=lambda: list[int]())
    delay: float = 0.0
    attempts: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hooks/{SECRET}"

    @property
    def events(self) -> list[str]:
        return [message["event"] for message in self.heard]


@contextlib.contextmanager
def webhook_server() -> Iterator[WebhookServer]:
    """Start a server, and stop it in the end."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            running.attempts += 1
            body = self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(running.delay)
            code = running.answers.pop(0) if running.answers else 200
            if code == 200:
                assert self.headers["Content-Type"] == "application/json"
                running.heard.append(json.loads(body))
            with contextlib.suppress(OSError):  # whoever asked may have gone
                self.send_response(code)
                self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running = WebhookServer(port=server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield running
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
