"""Facts and servers for the tests of listings: the example vendor, a results file, a server that answers.

Owns: what they look like. Must not know: what is checked of them.
Invariant: every call makes fresh values; a server ends with its context.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec

from infra.marketplace import figures, folder, notebook, request, samples, vendor

EXAMPLE = Path(vendor.__file__).parent / "vendor.example.toml"
BENCH = Path(__file__).resolve().parents[2] / "bench" / "results"
SPEED = BENCH / "serve-smollm2-135m-instruct" / "result.json"
QUALITY = BENCH / "quality-smollm2-135m" / "quality.json"
MODEL = request.Model("example", "1.0", "0" * 32, "1" * 64, 1000)
CHAT = {
    "choices": [{"message": {"content": "Paris"}}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1},
}
PARTS = b"".join(b'data: {"choices": [{"delta": {"content": "%b"}}]}\n\n' % part for part in (b"Pa", b"ris"))
METERED = '{"Dimension": "inference.count", "ConsumedUnits": 1}'


def words(**changes: Any) -> vendor.Vendor:
    """Return the example vendor with dotted paths changed: `product__title="x"`."""
    read, _ = vendor.read(EXAMPLE)
    loaded = msgspec.to_builtins(read)
    for path, value in changes.items():
        *steps, last = path.split("__")
        held = loaded
        for step in steps:
            held = held[int(step)] if isinstance(held, list) else held[step]
        held[last] = value
    return msgspec.convert(loaded, vendor.Vendor)


def toml(tmp_path: Path, *changes: tuple[str, str]) -> Path:
    """Return a copy of the example file with texts replaced."""
    text = EXAMPLE.read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    made = tmp_path / "vendor.toml"
    made.write_text(text, encoding="utf-8")
    return made


class Server:
    """Answers as a container does; `lines`: whether it knows JSON lines."""

    def __init__(self, *, lines: bool, locked: bool, metering: str, ping: int, stream_end: bytes) -> None:
        server = self
        self.calls: list[tuple[str, str]] = []

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                """Stay silent."""

            def do_GET(self) -> None:
                self._answer(ping, b"", {samples.LOCKDOWN: "on" if locked else "off"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                kind = self.headers["Content-Type"]
                server.calls.append((self.path, kind))
                if kind != "application/json" and not lines:
                    self._answer(415, b"{}", {})
                elif body.get("stream"):
                    self._answer(200, PARTS + stream_end, {})
                else:
                    text = json.dumps({**CHAT, "asked": body["messages"][0]["content"]}).encode()
                    self._answer(200, text, {samples.METERING: metering} if metering else {})

            def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"

    @contextlib.contextmanager
    def running(self) -> Iterator[Server]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()


def server(
    lines: bool = True,
    locked: bool = True,
    metering: str = "",
    ping: int = 200,
    stream_end: bytes = b"data: [DONE]\n\n",
) -> contextlib.AbstractContextManager[Server]:
    """Return a context with a running server."""
    made = Server(lines=lines, locked=locked, metering=metering, ping=ping, stream_end=stream_end)
    return made.running()


def facts(given: vendor.Vendor | None = None, **options: Any) -> tuple[folder.Facts, dict[str, bytes]]:
    """Return a listing's facts, recorded from a server with `options`, and the recorded files."""
    chosen = given or words()
    with server(**options) as running:
        recording, files = samples.record(running.address, chosen.samples)
    speeds = figures.read_speed([str(SPEED)], chosen.workloads)
    quality = figures.read_quality(QUALITY, "int8-block")
    cells = notebook.cells(chosen, recording.batch_type)
    printed = ["printed\n" for cell in cells if cell.kind == "code"]
    files[notebook.NAME] = notebook.text(notebook.document(cells, printed)).encode()
    executed = hashlib.sha256(files[notebook.NAME]).hexdigest()
    return folder.Facts(folder.FORMAT, chosen, "", MODEL, speeds, quality, recording, executed), files
