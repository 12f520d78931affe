"""What the front's tests share: a running server with a fake engine, raw HTTP, a byte-level tokenizer.

Everything listens on loopback, port 0, and ends with the context.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _byte_characters() -> list[str]:
    """Return the printable stand-ins of the 256 bytes, as in GPT-2's byte-level BPE."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) if byte in kept else chr(256 + others.index(byte)) for byte in range(256)]


def write_model(directory: Path, template: str = TEMPLATE, controls: Sequence[str] = ()) -> Path:
    """Write the text files of a model whose token ids are the bytes of the text; return `directory`.

    `controls` are more control tokens, from id 258 on; like all of them they leave no text.
    """
    directory.mkdir(parents=True, exist_ok=True)
    special = [
        {"id": 256, "content": "<|im_start|>", "special": True},
        {"id": 257, "content": "<|im_end|>", "special": True},
    ]
    special += [{"id": 258 + i, "content": text, "special": True} for i, text in enumerate(controls)]
    for token in special:
        token |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    document = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": {c: i for i, c in enumerate(_byte_characters())}
            | {t["content"]: t["id"] for t in special},
            "merges": [],
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(document))
    config = {"eos_token": "<|im_end|>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 257}))
    return directory


def wait_until(condition: Callable[[], Any], limit_s: float = 5.0, what: str = "the condition") -> float:
    """Return the seconds until `condition` held; fails after `limit_s`."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit_s, f"{what} did not hold within {limit_s} s"
        time.sleep(0.01)
    return time.monotonic() - began


class Server:
    """Supervisor, front and fake engine as child processes."""

    launcher = "tests.sagemaker_entry.launch"

    def __init__(
        self,
        directory: Path,
        *,
        load_s: float = 0.0,
        step_s: float = 10.0,
        fault: str = "NONE",
        grammar: str = "yes",
        nofile: int = 0,
        front: str = "real",
        template: str = TEMPLATE,
        controls: Sequence[str] = (),
        unix: Path | None = None,
        **environment: str,
    ) -> None:
        self.directory = directory
        self.status_path = directory / "status.json"
        self.log_path = directory / "log.jsonl"
        steering = {
            "status": self.status_path,
            "load-s": load_s,
            "step-s": step_s,
            "fault": fault,
            "grammar": grammar,
            "nofile": nofile,
            "front": front,
        }
        self._arguments = [part for name, value in steering.items() for part in (f"--{name}", str(value))]
        self._environment = {
            "STRONGROOM_MODEL": str(write_model(directory / "model", template, controls)),
            "STRONGROOM_LOG_LEVEL": "debug",
            "STRONGROOM_ALLOW_PLAINTEXT": "on",
        } | environment
        here = {"STRONGROOM_HOST": "127.0.0.1", "STRONGROOM_PORT": "0"}
        self._environment |= here if unix is None else {"STRONGROOM_LISTEN": f"unix:{unix}"}
        self.unix = unix  # where it listens instead of a port
        self.port = 0

    def start(self) -> Server:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("STRONGROOM_", "SAGEMAKER_"))}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.launcher, *self._arguments],
                cwd=ROOT,
                env=inherited | self._environment,
                stdout=log,
                stderr=log,
            )
        wait_until(lambda: self.events("listening"), 15, "the listener")
        self.port = self.events("listening")[0].get("port", 0)
        return self

    def __enter__(self) -> Server:
        self.start()
        self.wait_ready()
        return self

    def wait_ready(self, limit_s: float = 30.0) -> None:
        wait_until(lambda: self.ping() == 200, limit_s, "a healthy /ping")

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(29)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()

    # Looking inside

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        found = []
        for line in self.log.splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if event.get("event") == name:
                found.append(event)
        return found

    @property
    def engine(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.status_path.read_text())
        return status

    def metric(self, name: str) -> float:
        text = self.request("GET", "/metrics")[2].decode()
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))

    # HTTP

    def ping(self) -> int:
        try:
            return self.request("GET", "/ping")[0]
        except OSError:
            return 0

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Send one request on a connection of its own; `body` is JSON unless it is bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=40)
        try:
            sent = dict(headers or {})
            connection.sock = self.connect()
            if body is not None and not isinstance(body, bytes):
                body = json.dumps(body).encode()
                sent.setdefault("Content-Type", "application/json")
            connection.request(method, path, body, sent)
            reply = connection.getresponse()
            return reply.status, reply.headers, reply.read()
        finally:
            connection.close()

    def invoke(self, body: Any, path: str = "/invocations", **headers: str) -> tuple[int, Any]:
        status, _, reply = self.request("POST", path, body, headers)
        return status, json.loads(reply)

    def connect(self) -> socket.socket:
        if self.unix is None:
            return socket.create_connection(("127.0.0.1", self.port), timeout=40)
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.settimeout(40)
        try:
            client.connect(str(self.unix))
        except OSError:
            client.close()
            raise
        return client

    def raw(self, data: bytes, limit_s: float = 3.0) -> bytes:
        """Send bytes as they are; return all that comes back until the server closes or `limit_s` is over."""
        with self.connect() as client:
            client.settimeout(limit_s)
            with contextlib.suppress(OSError):  # the server may answer and close while we still send
                client.sendall(data)
            return read_all(client)


def read_all(client: socket.socket) -> bytes:
    """Return what arrives until the end, a reset or the socket's timeout."""
    received = b""
    try:
        while data := client.recv(65536):
            received += data
    except OSError:
        return received
    return received


def post(path: str, body: bytes, *headers: str, close: bool = True) -> bytes:
    """Return a POST as bytes, with a Content-Length unless `headers` frame it themselves."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", *headers]
    if not any(h.lower().startswith(("content-length", "transfer-encoding")) for h in headers):
        lines.append(f"Content-Length: {len(body)}")
    if not any(h.lower().startswith("content-type") for h in headers):
        lines.append("Content-Type: application/json")
    if close:
        lines.append("Connection: close")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def status_of(reply: bytes) -> int:
    """Return the status of the first reply in `reply`, 0 for none."""
    return int(reply.split(b" ", 2)[1]) if reply.startswith(b"HTTP/1.1 ") else 0
