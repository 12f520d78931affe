"""A tiny model that really runs, plain and sealed, and endpoints over either.

Owns: its making, the keys of the tests, what an endpoint over the package is told.
Must not know: what a test does to the package.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from container.model import parts
from model_package import key_files, sealer, signing_keys
from model_package.layout import SMALL_CHUNK_LOG2
from model_package.manifest import Manifest, Model
from model_package.recipients import Owner
from tests.model_package import making
from tests.model_package.forge import derive
from tests.ranks.test_process import alive
from tests.sagemaker_entry.harness import Server, wait_until, write_model

VOCABULARY = 258
SMALL = {
    "STRONGROOM_WORKERS": "1",
    "STRONGROOM_KV_MIB": "8",
    "STRONGROOM_MAX_SEQUENCE_TOKENS": "128",
    "STRONGROOM_THREADS": "1",
    "STRONGROOM_QUANTIZE": "int8-block",
}
REFUSED_S = 120.0  # processes that import torch on cores that others hold
PROMPTS = ("hello", "the sea", "a b c d e f g")


class RealServer(Server):
    """The product's own entry, with the real engine."""

    launcher = "sagemaker_entry"

    def __init__(self, directory: Path, **environment: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        super().__init__(directory, **SMALL | environment)
        self._arguments = ["serve"]

    def __enter__(self) -> RealServer:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def wait_ready(self, limit_s: float = 100.0) -> None:
        super().wait_ready(limit_s)

    def answers(self) -> list[bytes]:
        """Return what it says to a few prompts, without what differs from call to call."""
        said = []
        for prompt in PROMPTS:
            body = {"inputs": prompt, "parameters": {"max_new_tokens": 12, "do_sample": False}}
            status, reply = self.invoke(body)
            assert status == 200, reply
            said.append(repr(reply).encode())
        return said

    def processes(self) -> list[int]:
        """Return the supervisor and everything below it."""
        found, pending = [], [self.process.pid]
        while pending:
            pid = pending.pop()
            with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
                for task in Path(f"/proc/{pid}/task").iterdir():
                    pending += map(int, (task / "children").read_text().split())
                found.append(pid)
        return found


def copies(pid: int, secrets: Sequence[bytes]) -> int:
    """Return how often any of `secrets` lies in the writable memory of a process, for root."""
    found = 0
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            place, mode, *_ = line.split()
            if "w" not in mode:
                continue
            start, end = (int(edge, 16) for edge in place.split("-"))
            try:
                memory.seek(start)
                content = memory.read(end - start)
            except OSError:  # pages that the kernel does not give out
                continue
            found += sum(content.count(secret) for secret in secrets)
    return found


def refused(server: RealServer, code: int) -> str:
    """Return the one line in which a start was refused; every process it had is gone."""
    server.start()
    seen = set()
    began = time.monotonic()
    while server.process.poll() is None:
        assert time.monotonic() - began < REFUSED_S, "it hangs"
        seen.update(server.processes())
        time.sleep(0.02)
    assert server.process.returncode == code, server.log
    wait_until(lambda: not any(map(alive, seen)), 10, "the end of every process")
    lines = [line for line in server.log.splitlines() if "cannot start" in line and not line.startswith("{")]
    assert len(lines) == 1, server.log
    assert "; hint: " in lines[0] and "Traceback" not in server.log
    assert len(server.events("child_died")) <= 2, "it was tried again"
    assert "layers." not in server.log and "weight" not in lines[0]
    return lines[0]


@dataclass
class Made:
    """A plain directory, its package, and where the key lies."""

    folder: Path
    plain: Path
    package: Path
    key_path: Path
    manifest: Manifest
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def secrets(self) -> list[bytes]:
        """Return the data key, its halves, and every file's key."""
        data_key = bytes(making.key("data"))
        about = b"file\0" + bytes.fromhex(self.manifest.package_id)
        files = [path.read_bytes()[8:24] for path in self.package.glob("*.sealed")]
        return [data_key, data_key[:16], data_key[16:], *(derive(data_key, each, about) for each in files)]

    def flipped(self, folder: Path, name: str) -> str:
        """Return a copy of the package with one bit turned in the middle of the file that was `name`."""
        shutil.copytree(self.package, folder)
        stored = next(entry.stored_name for entry in self.manifest.files if entry.name == name)
        content = bytearray((folder / stored).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / stored).write_bytes(content)
        return str(folder)

    def server(self, directory: Path, **changes: str) -> RealServer:
        """Return an endpoint over the package."""
        return RealServer(directory, **self.environment | changes)


def plain_model(directory: Path) -> Path:
    """Write a small random model with its ready decoder."""
    write_model(directory)
    torch.manual_seed(17)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(directory)
    made = parts.make(directory, 1, "int8-block")
    assert made.folder.name == "ready-int8-block"
    return directory


def seal(plain: Path, package: Path, owner: Owner = Owner.VENDOR, epoch: int = 5) -> Manifest:
    """Seal `plain` as `owner` would, in small chunks, now."""
    told = sealer.Sealing(
        owner, Model("tiny", "1.0"), int(time.time()), epoch=epoch, log2_chunk=SMALL_CHUNK_LOG2
    )
    wrap = sealer.to_public_keys(())
    return sealer.seal(
        sealer.files_of(plain), package, told, making.key("data"), wrap, making.key(owner.value)
    )


def make(folder: Path, divided: Sequence[tuple[int, str]] = ()) -> Made:
    """Return the model, plain and sealed, below `folder`, with parts for `divided`: ranks and scheme."""
    plain = plain_model(folder / "plain")
    for ranks, scheme in divided:
        parts.make(plain, ranks, scheme)
    manifest = seal(plain, folder / "package")
    key_path = folder / "key"
    key_files.write_new(key_path, making.key("data"))
    environment = {
        "STRONGROOM_MODEL": str(folder / "package"),
        "STRONGROOM_SERVED_NAME": "tiny",
        "STRONGROOM_ALLOW_PLAINTEXT": "off",
        "STRONGROOM_KEY": f"file:{key_path}",
        "STRONGROOM_VENDOR_ROOTS": root("vendor"),
    }
    return Made(folder, plain, folder / "package", key_path, manifest, environment)


def root(name: str) -> str:
    """Return the public key of the test key `name`, as a setting takes it."""
    return f"ed25519:{signing_keys.public_of(making.key(name)).hex()}"
