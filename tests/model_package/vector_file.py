"""One test vector: what a reader is given, the files of a package, the one outcome. A text head, then bytes.

Owns: the file's form. Must not know: how vectors are made or read.
Invariant: `parse(dump(vector))` is the vector.

    outcome: chunk-wrong                     comment: one sentence
    owner: vendor                            now: 1790086400
    min-epoch: 0                             base: none, or package_id and content_sha256
    root: vendor HEX, and the second after which it is no longer accepted or none
    data-key: HEX, or recipient-key: HEX (an X25519 private key), or neither
    content: NAME SHA256                     of every file when the outcome is `opened`
    link: NAME TARGET, folder: NAME          what lies in a file's place
    file: NAME BYTES                         whose content follows the empty line, in this order
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

NOW_S = 1_790_086_400


@dataclass
class Vector:
    """See the file's docstring."""

    outcome: str
    comment: str
    files: dict[str, bytes] = field(repr=False)
    owner: str = "vendor"
    now_s: int = NOW_S
    min_epoch: int = 0
    base: tuple[str, str] | None = None
    roots: list[tuple[str, str, int | None]] = field(default_factory=list)
    data_key: bytes | None = field(default=None, repr=False)
    recipient_key: bytes | None = field(default=None, repr=False)
    content: dict[str, str] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)

    def lay_out(self, directory: Path) -> Path:
        """Write the package's files into the new `directory` and return it."""
        directory.mkdir(parents=True)
        for name, content in self.files.items():
            (directory / name).write_bytes(content)
        for name, target in self.links.items():
            (directory / name).symlink_to(target)
        for name in self.folders:
            (directory / name).mkdir()
        return directory


def dump(vector: Vector) -> bytes:
    """Return the bytes of the vector's file."""
    base = " ".join(vector.base) if vector.base else "none"
    lines = [
        f"outcome: {vector.outcome}",
        f"comment: {vector.comment}",
        f"owner: {vector.owner}",
        f"now: {vector.now_s}",
        f"min-epoch: {vector.min_epoch}",
        f"base: {base}",
    ]
    for owner, public, not_after_s in vector.roots:
        lines.append(f"root: {owner} {public} {'none' if not_after_s is None else not_after_s}")
    if vector.data_key is not None:
        lines.append(f"data-key: {vector.data_key.hex()}")
    if vector.recipient_key is not None:
        lines.append(f"recipient-key: {vector.recipient_key.hex()}")
    lines += [f"content: {name} {digest}" for name, digest in vector.content.items()]
    lines += [f"link: {name} {target}" for name, target in vector.links.items()]
    lines += [f"folder: {name}" for name in vector.folders]
    lines += [f"file: {name} {len(content)}" for name, content in vector.files.items()]
    return "\n".join(lines).encode() + b"\n\n" + b"".join(vector.files.values())


def parse(raw: bytes) -> Vector:
    """Return the vector in `raw`."""
    head, _, body = raw.partition(b"\n\n")
    vector = Vector("", "", {})
    for line in head.decode().splitlines():
        field_name, _, value = line.partition(": ")
        words = value.split(" ")
        if field_name == "outcome":
            vector.outcome = value
        elif field_name == "comment":
            vector.comment = value
        elif field_name == "owner":
            vector.owner = value
        elif field_name == "now":
            vector.now_s = int(value)
        elif field_name == "min-epoch":
            vector.min_epoch = int(value)
        elif field_name == "base":
            vector.base = None if value == "none" else (words[0], words[1])
        elif field_name == "root":
            vector.roots.append((words[0], words[1], None if words[2] == "none" else int(words[2])))
        elif field_name == "data-key":
            vector.data_key = bytes.fromhex(value)
        elif field_name == "recipient-key":
            vector.recipient_key = bytes.fromhex(value)
        elif field_name == "content":
            vector.content[words[0]] = words[1]
        elif field_name == "link":
            vector.links[words[0]] = words[1]
        elif field_name == "folder":
            vector.folders.append(value)
        else:
            assert field_name == "file", field_name
            length = int(words[1])
            vector.files[words[0]], body = body[:length], body[length:]
    assert not body
    return vector
