"""Where keys lie while they are used and what is left afterwards, looked at from inside child processes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from model_package import hpke, key_files, secret
from tests.model_package.memory_scan import masked
from tests.model_package.parties import CONTENT, NOW_S, fresh_key, issue, terms, vendor

ROOT = Path(__file__).resolve().parents[2]
PREAMBLE = """
import json, sys
from model_package import hpke, secret, signing_keys
from tests.model_package.memory_scan import copies, unmasked
given = json.load(sys.stdin)
"""


def child(program: str, given: dict[str, object]) -> dict[str, dict[str, int]]:
    """Run `program` in its own process, with `given` on its stdin, and return the last line of its stdout."""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + program],
        cwd=ROOT,
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    shown: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return shown


def hpke_secrets(private: bytearray, info: bytes, sealed: bytes) -> dict[str, bytes]:
    """Return every value from which `sealed` opens: RFC 9180, sections 4.1 and 5.1, without the library's."""
    enc = sealed[: hpke.ENC_BYTES]
    kem = b"KEM" + (0x0020).to_bytes(2, "big")
    suite = b"HPKE" + b"".join(number.to_bytes(2, "big") for number in (0x0020, 1, 2))

    def extract(salt: bytes, name: bytes, label: bytes, ikm: bytes) -> bytes:
        mac = HMAC(salt or bytes(32), hashes.SHA256())
        mac.update(b"HPKE-v1" + name + label + ikm)
        return mac.finalize()

    def expand(key: bytes, name: bytes, label: bytes, context: bytes) -> bytes:
        labelled = (32).to_bytes(2, "big") + b"HPKE-v1" + name + label + context
        return HKDFExpand(hashes.SHA256(), 32, labelled).derive(key)

    dh = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(enc))
    eae_prk = extract(b"", kem, b"eae_prk", dh)
    shared = expand(eae_prk, kem, b"shared_secret", enc + hpke.public_of(private))
    context = b"\0" + extract(b"", suite, b"psk_id_hash", b"") + extract(b"", suite, b"info_hash", info)
    scheduled = extract(shared, suite, b"secret", b"")
    key = expand(scheduled, suite, b"key", context)
    return {"dh": dh, "eae_prk": eae_prk, "shared_secret": shared, "secret": scheduled, "key": key}


def test_no_copy_of_any_key_is_left_after_unwrapping() -> None:
    """Not of the data key, not of the private key, not of any value in between from which it follows."""
    private = hpke.make_private()
    data_key = os.urandom(32)
    sealed = hpke.seal(hpke.public_of(private), b"info", data_key)
    secrets = {"private": private, "data_key": data_key, **hpke_secrets(private, b"info", sealed)}
    shown = child(
        """
with secret.wiping(unmasked(given["secrets"]["private"])) as private:
    with secret.wiping(hpke.open_(private, b"info", bytes.fromhex(given["sealed"]))) as key:
        during = copies(given["secrets"])
print(json.dumps({"during": during, "after": copies(given["secrets"])}))
""",
        {"sealed": sealed.hex(), "secrets": {name: masked(value) for name, value in secrets.items()}},
    )
    assert shown["after"] == dict.fromkeys(secrets, 0)
    assert shown["during"]["private"] == shown["during"]["data_key"] == 1  # the search finds what is there


def test_no_copy_of_a_signing_key_is_left_after_signing() -> None:
    private = os.urandom(32)
    shown = child(
        """
with secret.wiping(unmasked(given["private"])) as private:
    signing_keys.sign(private, b"purpose", b"document")
    during = copies({"private": given["private"]})
print(json.dumps({"during": during, "after": copies({"private": given["private"]})}))
""",
        {"private": masked(private)},
    )
    assert (shown["during"], shown["after"]) == ({"private": 1}, {"private": 0})


def test_a_key_held_as_bytes_would_be_found() -> None:
    """The counter-example: what the rule about bytearrays is for."""
    private = os.urandom(32)
    shown = child(
        """
with secret.wiping(unmasked(given["private"])) as private:
    careless = bytes(private)
print(json.dumps({"after": copies({"private": given["private"]})}))
""",
        {"private": masked(private)},
    )
    assert shown["after"]["private"] == 1


def test_a_hardened_process_is_closed_to_its_own_user_and_leaves_no_core() -> None:
    shown = child(
        """
import os, resource
if os.getuid() == 0:
    os.setresuid(65534, 65534, 65534)
secret._LIBC.prctl(secret._PR_SET_DUMPABLE, 1, 0, 0, 0)  # changing the user cleared it
def state():
    own = os.stat(f"/proc/{os.getpid()}/mem").st_uid == os.getuid()
    return {"dumpable": secret.dumpable(), "own": own, "core": resource.getrlimit(resource.RLIMIT_CORE)[1]}
before = state()
secret.harden_process()
print(json.dumps({"before": before, "after": state()}))
""",
        {},
    )
    assert (shown["before"]["dumpable"], shown["before"]["own"]) == (True, True)
    assert shown["after"] == {"dumpable": False, "own": False, "core": 0}


@pytest.mark.parametrize(("when_set", "when_asked"), [(-1, 0), (0, 1)])
def test_hardening_that_the_kernel_refuses_or_ignores_is_an_error(
    monkeypatch: pytest.MonkeyPatch, when_set: int, when_asked: int
) -> None:
    def prctl(option: int, *_: int) -> int:
        return when_set if option == secret._PR_SET_DUMPABLE else when_asked

    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(secret, "_LIBC", type("Libc", (), {"prctl": staticmethod(prctl)}))
    with pytest.raises(secret.HardeningError):
        secret.harden_process()


def test_a_core_limit_that_cannot_be_lowered_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise ValueError

    monkeypatch.setattr(secret, "_LIBC", type("Libc", (), {"prctl": staticmethod(lambda *_: 0)}))
    monkeypatch.setattr(resource, "setrlimit", refused)
    with pytest.raises(secret.HardeningError) as raised:
        secret.harden_process()
    assert raised.value.__context__ is None


def test_a_key_is_wiped_however_its_block_ends() -> None:
    key = bytearray(b"k" * 32)
    with pytest.raises(KeyError), secret.wiping(key):
        raise KeyError
    assert key == bytes(32)
    with secret.wiping(key):
        key[:] = b"l" * 32
    assert key == bytes(32)


@pytest.mark.parametrize("length", [0, 1, 32, 8192])
def test_wiping_keeps_the_length(length: int) -> None:
    key = bytearray(b"k" * length)
    secret.wipe(key)
    assert key == bytes(length)


def test_what_is_taken_over_is_wiped_where_it_lay() -> None:
    content = os.urandom(32)
    expected = bytearray(content)
    assert secret.take_over(content) == expected
    assert content == bytes(32)
    assert secret.take_over(b"") == b"" and secret.take_over(b"x") == b"x" and b"x" != b"\0"


def test_the_pages_of_a_key_are_locked_and_left_out_of_dumps() -> None:
    shown = child(
        """
import ctypes
key = bytearray(32)
held = secret.hold(key)
place = ctypes.addressof(ctypes.c_char.from_buffer(key))
flags, inside = "", False
for line in open("/proc/self/smaps"):
    head = line.split()[0]
    if "-" in head and not head.endswith(":"):
        start, end = (int(edge, 16) for edge in head.split("-"))
        inside = start <= place < end
    elif inside and head == "VmFlags:":
        flags = line.split()[1:]
print(json.dumps({"held": {"locked": held.locked, "undumped": held.undumped}, "flags": flags}))
""",
        {},
    )
    assert shown["held"]["undumped"] and "dd" in shown["flags"]
    assert shown["held"]["locked"] == ("lo" in shown["flags"])


def test_nothing_is_held_for_an_empty_key() -> None:
    assert secret.hold(bytearray()) == secret.Held(locked=False, undumped=False)


def test_no_copy_is_left_by_any_source_nor_by_opening(tmp_path: Path) -> None:
    """From a key file, a recipient's key and a licence to an open package; as bytes and as hex."""
    seller, installation, data_key = vendor(), hpke.make_private(), fresh_key()
    manifest = seller.seal(tmp_path / "package", data_key)
    keys = {manifest.package_id: data_key}
    issue(tmp_path / "licence", seller, terms(manifest.package_id), keys, hpke.public_of(installation))
    for name, key in {"data": data_key, "recipient": seller.recipient, "installation": installation}.items():
        key_files.write_new(tmp_path / name, key)
    shown = child(
        """
from pathlib import Path
from model_package import opener, providers
from model_package.licence import Licensing
from model_package.recipients import Owner
from model_package.signature import Root, Roots
folder, now_s = Path(given["folder"]), given["now_s"]
root = Root(bytes.fromhex(given["root"]))
means = providers.Means({}, licensing=Licensing((root,), lambda: now_s, folder))
trust = opener.Trust(Owner.VENDOR, Roots((root,)), now_s)
opened = {}
for uri in given["uris"]:
    with opener.open_package(folder / "package", trust) as package:
        key = providers.provider(uri, means).data_key(package.manifest)
        during = copies(given["secrets"])
        with package.unlock(key) as contents:
            opened[uri] = len(contents.file("config.json"))
print(json.dumps({"during": during, "after": copies(given["secrets"]), "opened": opened}))
""",
        {
            "folder": str(tmp_path),
            "now_s": NOW_S,
            "root": seller.root.public_key.hex(),
            "uris": [
                f"file:{tmp_path}/data",
                f"recipient:file:{tmp_path}/recipient",
                f"licence:{tmp_path}/licence,file:{tmp_path}/installation",
            ],
            "secrets": {
                "data_key": masked(data_key),
                "data_key_hex": masked(data_key.hex().encode()),
                "recipient": masked(seller.recipient),
                "installation": masked(installation),
                "installation_hex": masked(installation.hex().encode()),
            },
        },
    )
    assert set(shown["opened"].values()) == {len(CONTENT)} and len(shown["opened"]) == 3
    assert shown["during"]["data_key"] == 1
    assert set(shown["after"].values()) == {0}
