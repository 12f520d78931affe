"""The parts between settings and an opened package: what is demanded, what is kept, what is told."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import msgspec
import pytest

from container.ranks.assembly import StartFailed
from container.ranks.config import EngineConfig
from container.ranks.door import make_door
from container.ranks.heartbeat import LoadPhase, StartFault
from container.ranks.place import ALONE, Place
from model_package import keeping, unlock
from model_package.layout import Kind
from model_package.opener import Trust
from model_package.recipients import Owner
from model_package.refusal import KeyRefused, Refusal
from sagemaker_entry import settings
from sagemaker_entry.sealed import board, holding, opening, plan, waiting, wire
from sagemaker_entry.settings import SettingsError
from tests.model_package import making
from tests.sagemaker_entry.sealed_model import root

PACKAGE = {"STRONGROOM_KEY": "file:/run/secrets/key", "STRONGROOM_VENDOR_ROOTS": root("vendor")}
SOON_S = 5.0


def planned(**environment: str) -> plan.Plan | None:
    chosen, _ = settings.read(environment)
    return plan.plan(chosen, making.NOW_S, "1.2.3")


def told(**changes: object) -> plan.Plan:
    made = planned(**PACKAGE)
    assert made is not None
    return msgspec.structs.replace(made, **changes)


# Settings


def test_a_start_is_sealed_unless_the_operator_says_otherwise() -> None:
    with pytest.raises(SettingsError, match="`STRONGROOM_KEY` is not set") as caught:
        planned()
    assert "STRONGROOM_ALLOW_PLAINTEXT=on" in caught.value.hint
    assert planned(STRONGROOM_ALLOW_PLAINTEXT="on") is None


@pytest.mark.parametrize("both", [False, True])
def test_one_partys_roots_are_demanded_and_no_more(both: bool) -> None:
    given = {"STRONGROOM_KEY": "fd:7"}
    if both:
        given |= {"STRONGROOM_VENDOR_ROOTS": root("vendor"), "STRONGROOM_CUSTOMER_ROOTS": root("customer")}
    with pytest.raises(SettingsError, match="who may have signed"):
        planned(**given)


@pytest.mark.parametrize("name", ["KEY", "VENDOR_ROOTS", "CUSTOMER_ROOTS", "STATE_DIR"])
def test_leave_for_plain_files_contradicts_a_package(name: str) -> None:
    values = {"KEY": "fd:7", "STATE_DIR": "/state"}
    given = {f"STRONGROOM_{name}": values.get(name, root("vendor")), "STRONGROOM_ALLOW_PLAINTEXT": "on"}
    with pytest.raises(SettingsError, match=f"contradicts `STRONGROOM_{name}`"):
        settings.read(given)


@pytest.mark.parametrize("text", ["ed25519:00", "x25519:" + "0" * 64, "ed25519:" + "A" * 64, "", "a,b"])
def test_roots_have_one_form(text: str) -> None:
    given = {"STRONGROOM_VENDOR_ROOTS": text or ","}
    with pytest.raises(SettingsError, match="malformed"):
        settings.read(given)


def test_a_plan_says_what_the_reader_knows_from_outside() -> None:
    made = planned(
        STRONGROOM_KEY="fd:7",
        STRONGROOM_CUSTOMER_ROOTS=f"{root('customer')}@{making.NOW_S},{root('vendor')}",
        STRONGROOM_MIN_EPOCH="4",
        STRONGROOM_VERIFY="full",
    )
    assert made is not None and made.prove_whole and made.min_epoch == 4
    assert plan.decode(plan.encode(made)) == made
    trust: Trust = opening.trust(made)
    assert trust.owner is Owner.CUSTOMER and trust.roots.vendor == () and trust.min_epoch == 4
    assert trust.roots.customer == (making.root("customer", making.NOW_S), making.root("vendor"))
    assert trust.now_s == making.NOW_S


# The board


def published(**changes: object) -> board.Published:
    files = {"tokenizer.json": b"{}", "config.json": bytes(70_000)}
    return msgspec.structs.replace(
        board.Published(content_sha256="ab", licence=board.Licence(7), files=files), **changes
    )


def test_a_board_is_read_once_it_is_whole_and_never_changes() -> None:
    fd = board.create()
    try:
        assert board.read(fd) is None and not board.published(fd)
        os.write(fd, b"an engine that died while it wrote")
        assert board.read(fd) is None
        board.publish(fd, published())
        assert board.read(fd) == published()
        with pytest.raises(OSError, match="not permitted"):
            board.publish(fd, published(content_sha256="cd"))
        with pytest.raises(OSError, match="not permitted"):
            os.pwrite(fd, b"x", 0)
        assert board.read(fd) == published()
        assert "config" not in repr(published())
    finally:
        os.close(fd)


def test_a_board_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "MAX_BYTES", 1000)
    fd = board.create()
    with pytest.raises(ValueError, match="exceed 1000 bytes"):
        board.publish(fd, published())
    assert not board.published(fd)
    os.close(fd)


# What PID 1 holds


def held(key: str) -> holding.Held:
    return holding.hold(told(key=key), {})


def close(these: holding.Held) -> None:
    for fd in {*these.engine.values(), *these.front.values()}:
        os.close(fd)


@pytest.mark.parametrize("wrapped", ["", "recipient:", "licence:/a/licence,"])
def test_a_key_that_its_source_gives_once_is_kept_and_gone_from_its_source(
    wrapped: str, tmp_path: Path
) -> None:
    path = tmp_path / "key"
    path.write_bytes(bytes(making.key("data")))
    path.chmod(0o600)
    these = held(f"{wrapped}file:{path}?unlink")
    try:
        assert not path.exists()
        assert keeping.fetch(these.engine["--key-fd"]) == making.key("data")
        assert "--key-fd" not in these.front, "the front gets no key"
        assert these.front["--board-fd"] != these.engine["--board-fd"]
        mode = fcntl.fcntl(these.front["--board-fd"], fcntl.F_GETFL) & os.O_ACCMODE
        assert mode == os.O_RDONLY
    finally:
        close(these)


@pytest.mark.parametrize("key", ["file:/run/key", "channel:weights", "kms:arn", "attest:", "nonsense:x"])
def test_a_source_that_can_be_read_again_or_never_is_left_to_the_engine(key: str) -> None:
    these = held(key)
    assert "--key-fd" not in these.engine
    close(these)


def test_for_a_key_that_comes_in_a_call_a_page_is_reserved() -> None:
    these = held("invocation:")
    with pytest.raises(KeyRefused) as caught:
        keeping.fetch(these.engine["--key-fd"])
    assert caught.value.refusal is Refusal.KEY_MISSING
    close(these)


# Opening


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    making.seal(making.model(folder / "plain"), folder / "sealed")
    key = folder / "key"
    key.write_bytes(bytes(making.key("data")))
    key.chmod(0o400)
    return folder


def opened(
    folder: Path, fd: int, place: Place = ALONE, package: str = "sealed", **changes: object
) -> tuple[list[str], list[LoadPhase], dict[str, int]]:
    """Open the package as a rank does; return what was told, reported, and each tensors file's tensors."""
    lines: list[str] = []
    phases: list[LoadPhase] = []
    made = told(**{"key": f"file:{folder / 'key'}", **changes})
    config = EngineConfig(model_dir=str(folder / package))
    fds = opening.Descriptors(fd, -1)
    with opening.opening(made, fds, lines.append, config, phases.append, place) as opener:
        names = opener.tensor_files()
        found = {}
        for name in names:
            tensors = list(opener.tensors(name))
            for tensor in tensors:
                tensor.read_into(memoryview(bytearray(tensor.data_bytes)))
            found[name] = len(tensors)
        assert opener.file("config.json") and opener.file("absent") is None
    assert opener.tensor_files() == (), "its keys are still there"
    with pytest.raises(ValueError, match="the package is closed"):
        tensors[0].read_into(memoryview(bytearray(tensors[0].data_bytes)))
    return lines, phases, found


def test_an_opened_package_is_told_of_published_once_and_closed(sealed: Path) -> None:
    fd = board.create()
    lines, phases, found = opened(sealed, fd)
    assert found == {"model.safetensors": 5} and phases[0] is LoadPhase.OPENING
    assert len(lines) == 1 and "GB/s" in lines[0]
    first = board.read(fd)
    assert first is not None and first.licence is None
    assert set(first.files) == {"config.json", "tokenizer.json", "chat_template.jinja"}
    assert first.files["config.json"] == (sealed / "plain" / "config.json").read_bytes()
    opened(sealed, fd)  # an engine that is started again
    making.seal(making.model(sealed / "plain2", 2), sealed / "other", seed=3)
    with pytest.raises(StartFailed, match="exchanged while it was served"):
        opened(sealed, fd, package="other")
    os.close(fd)


def test_another_rank_waits_until_rank_0_has_published(sealed: Path) -> None:
    fd = board.create()
    done = threading.Event()

    def follow() -> None:
        opened(sealed, fd, Place(1, 2))
        done.set()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    assert not done.wait(0.3)
    opened(sealed, fd)
    assert done.wait(SOON_S)
    thread.join()
    os.close(fd)


@pytest.mark.parametrize(
    ("changes", "fault", "said"),
    [
        ({"min_epoch": 9}, StartFault.PACKAGE_REFUSED, "replaced by a newer one"),
        ({"owner": "customer"}, StartFault.PACKAGE_REFUSED, "belongs to the other party"),
        ({"roots": ((root("other"), None),)}, StartFault.PACKAGE_REFUSED, "not trusted"),
        ({"roots": ((root("vendor"), 5),)}, StartFault.PACKAGE_REFUSED, "no longer accepted"),
        ({"started_s": 5}, StartFault.PACKAGE_REFUSED, "clock is behind"),
        ({"key": "file:/absent/key"}, StartFault.KEY_REFUSED, "not where the key source says"),
        ({"key": "attest:"}, StartFault.KEY_REFUSED, "not part of this version"),
        ({"key": "env:KEY"}, StartFault.KEY_REFUSED, "for development"),
        ({"key": "kms:arn:aws:kms:eu-west-1:123456789012:key/a"}, StartFault.KEY_REFUSED, "no key service"),
        ({"key": "invocation:"}, StartFault.KEY_REFUSED, "answers no calls"),
        ({"key": "licence:/absent,file:/absent"}, StartFault.KEY_REFUSED, "no licence file"),
        ({"roots": (("ed25519:" + "0" * 64, None),)}, StartFault.KEY_REFUSED, "public key"),
    ],
)
def test_each_refusal_is_one_line_with_a_hint(
    sealed: Path, changes: dict[str, object], fault: StartFault, said: str
) -> None:
    fd = board.create()
    with pytest.raises(StartFailed) as caught:
        opened(sealed, fd, **changes)
    assert caught.value.fault is fault and said in str(caught.value)
    assert "; hint: " in str(caught.value) and "\n" not in str(caught.value)
    assert not board.published(fd)
    os.close(fd)


def test_tensors_come_from_tensors_files_alone(sealed: Path) -> None:
    with making.opened(sealed / "sealed") as contents:
        opener = opening.Opened(contents, lambda opened_bytes, took_s: None)
        assert opener.tensor_files() == contents.names(Kind.TENSORS)
        assert opener.file("model.safetensors") is None


# Unlocking by invocation


class Locked:
    """A locked engine, waiting in a thread."""

    def __init__(self, sealed: Path) -> None:
        self.front, engine = make_door()
        self.page = keeping.reserve()
        with making.open_package(sealed / "sealed", making.trust()) as package:
            self.manifest = package.manifest
        self.beats = 0
        self.key = bytearray()

        def wait() -> None:
            self.key = waiting.wait(self.manifest, "1.2.3", engine, self.page.descriptor, self.beat)

        self.thread = threading.Thread(target=wait, daemon=True)
        self.thread.start()

    def beat(self) -> None:
        self.beats += 1

    def ask(self, verb: wire.Verb, document: bytes = b"") -> tuple[wire.Status, bytes]:
        return wire.call(self.front, verb, document, SOON_S)

    def message(self, key: str = "data") -> bytes:
        status, description = self.ask(wire.Verb.DESCRIBE)
        assert status is wire.Status.DONE
        return unlock.seal(description, self.manifest, making.key(key), frozenset({"1.2.3"}))


def test_the_right_key_is_taken_once_and_kept(sealed: Path) -> None:
    locked = Locked(sealed)
    assert locked.ask(wire.Verb.UNLOCK, locked.message("other")) == (wire.Status.REFUSED, b"key-wrong")
    assert locked.ask(wire.Verb.UNLOCK, b"{}") == (wire.Status.REFUSED, b"unlock-malformed")
    assert locked.ask(wire.Verb.UNLOCK, b"x" * 10_000) == (wire.Status.REFUSED, b"unlock-malformed")
    assert locked.thread.is_alive() and not locked.key
    with pytest.raises(KeyRefused):
        keeping.fetch(locked.page.descriptor)
    message = locked.message()
    assert locked.ask(wire.Verb.UNLOCK, message) == (wire.Status.DONE, b"")
    locked.thread.join(SOON_S)
    assert locked.key == making.key("data") == keeping.fetch(locked.page.descriptor)
    with pytest.raises(TimeoutError):
        wire.call(locked.front, wire.Verb.UNLOCK, message, 0.3)  # nobody waits any more


def test_a_message_for_another_package_is_refused_and_may_be_sent_again_rightly(
    sealed: Path, tmp_path: Path
) -> None:
    locked = Locked(sealed)
    message = msgspec.json.decode(locked.message())
    message["package"]["package_id"] = "0" * 32
    assert locked.ask(wire.Verb.UNLOCK, msgspec.json.encode(message))[1] == b"unlock-for-another-package"
    assert locked.ask(wire.Verb.UNLOCK, locked.message())[0] is wire.Status.DONE
    locked.thread.join(SOON_S)


def test_a_caller_who_says_nothing_or_leaves_does_not_stop_the_waiting(
    sealed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.1)
    monkeypatch.setattr(waiting, "BEAT_S", 0.05)
    locked = Locked(sealed)
    silent = wire.knock(locked.front)
    gone = wire.knock(locked.front)
    gone.close()
    assert locked.ask(wire.Verb.UNLOCK, locked.message())[0] is wire.Status.DONE
    locked.thread.join(SOON_S)
    assert locked.key and locked.beats > 1
    silent.close()
