"""`strongroom key` and `strongroom licence`, from a vendor's first key to a licence that a host checks."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infra import keys, keys_cli, licences, licences_cli
from infra.cli import main
from infra.report import CommandError, ExitCode
from model_package import hpke, key_files, licence_form, secret, signing_keys, sources
from model_package.manifest import Manifest, Model
from model_package.recipients import Owner
from model_package.refusal import Refusal
from model_package.sealer import Sealing, seal, to_public_keys

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Done:
    """How a command ended and what it wrote."""

    code: int
    stdout: str
    stderr: str

    @property
    def result(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.stdout)
        assert loaded["ok"] is (self.code == 0)
        found: dict[str, Any] = loaded["result" if self.code == 0 else "error"]
        return found


class Shell:
    """Runs the command line in this process, which must stay dumpable for other tests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capfd = capfd
        self.hardened = 0
        monkeypatch.setattr(secret, "harden_process", self._harden)

    def _harden(self) -> None:
        self.hardened += 1

    def __call__(self, *arguments: object) -> Done:
        code: object = 0
        self._monkeypatch.setattr(sys, "argv", ["strongroom", *map(str, arguments)])
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        captured = self._capfd.readouterr()
        assert isinstance(code, int)
        return Done(code, captured.out, captured.err)


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capfd)


class Trade:
    """A vendor with a sealed package and a customer's host, all made with the command line."""

    def __init__(self, folder: Path, shell: Shell) -> None:
        self.folder, self.shell = folder, shell
        self.root = self._made("signing", "vendor-signing")
        self.recipient = self._made("installation", "vendor-recipient")
        self.installation = self._made("installation", "host")
        self.manifest = self.seal("package")
        self.licence = folder / "licence"

    def _made(self, kind: str, name: str) -> str:
        done = self.shell("key", "make", "--kind", kind, "--out", self.folder / name, "--json")
        assert done.code == 0, done.stdout
        public: str = done.result["public"]
        return public

    def seal(self, name: str, owner: Owner = Owner.VENDOR) -> Manifest:
        plain = self.folder / "plain"
        plain.write_text("{}")
        data_key = bytearray(range(32))
        return seal(
            {"config.json": plain},
            self.folder / name,
            Sealing(owner, Model("tiny", "1"), created_s=int(time.time()), epoch=3),
            data_key,
            to_public_keys([bytes.fromhex(self.recipient.partition(":")[2])]),
            key_files.read_file(self.folder / "vendor-signing"),
        )

    def order(self, **changed: object) -> list[object]:
        asked: dict[str, object] = {
            "package": self.folder / "package",
            "key": f"recipient:file:{self.folder}/vendor-recipient",
            "signing-key": self.folder / "vendor-signing",
            "installation": self.installation,
            "customer": "Example Ltd",
            "id": "42",
            "not-after": day(30),
            "out": self.licence,
            **changed,
        }
        return [word for name, value in asked.items() for word in (f"--{name}", value)]

    def make(self, **changed: object) -> Done:
        return self.shell("licence", "make", *self.order(**changed), "--json")

    def check(self, *options: object, licence: Path | None = None) -> Done:
        path = licence or self.licence
        return self.shell("licence", "check", path, "--root", self.root, *options, "--json")


@pytest.fixture
def trade(tmp_path: Path, shell: Shell) -> Trade:
    return Trade(tmp_path, shell)


def day(later: int) -> str:
    return (datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=later)).strftime("%Y-%m-%d")


@pytest.mark.parametrize("kind", ["installation", "signing", "data"])
def test_a_made_key_is_private_named_and_never_shown(shell: Shell, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "key"
    done = shell("key", "make", "--kind", kind, "--out", path)
    assert done.code == 0 and shell.hardened == 1
    assert path.stat().st_mode & 0o7777 == 0o600
    private = key_files.read_file(path)
    assert any(private) and private.hex() not in done.stdout + done.stderr
    assert str(path) in done.stderr
    assert done.stdout.count("\n") == (0 if kind == "data" else 1)


@pytest.mark.parametrize(("kind", "prefix"), [("installation", "x25519:"), ("signing", "ed25519:")])
def test_the_public_half_is_the_same_made_read_and_shown(
    shell: Shell, tmp_path: Path, kind: str, prefix: str
) -> None:
    made = shell("key", "make", "--kind", kind, "--out", tmp_path / "key", "--json").result
    read = shell("key", "public", "--kind", kind, "--key", tmp_path / "key", "--json").result
    shown = shell("key", "show", made["public"], "--json").result
    assert made["public"].startswith(prefix)
    assert {**made, "file": None} == {**read, "file": None} == {**shown, "file": None}
    plain = shell("key", "public", "--kind", kind, "--key", tmp_path / "key")
    assert plain.stdout == made["public"] + "\n" and made["id"] in plain.stderr
    private = key_files.read_file(tmp_path / "key")
    public = hpke.public_of(private) if kind == "installation" else signing_keys.public_of(private)
    assert made["public"] == prefix + public.hex()


def test_a_key_is_divided_into_two_shares_or_none(shell: Shell, tmp_path: Path) -> None:
    whole, image, artifact = (tmp_path / name for name in ("whole", "image", "artifact"))
    shell("key", "make", "--kind", "data", "--out", whole)
    order = ("key", "split", "--key", whole, "--image-share", image, "--artifact-share", artifact)
    artifact.write_text("precious")
    assert shell(*order, "--json").result["kind"] == "key_file_exists"
    assert not image.exists()  # half a split would look like a whole one
    artifact.unlink()
    done = shell(*order)
    assert (done.code, done.stdout) == (0, "") and "obfuscation" in done.stderr
    key = key_files.read_file(whole)
    assert sources.source(f"image:{image},{artifact}", {}).read() == key
    assert key not in (key_files.read_file(image), key_files.read_file(artifact))
    assert key.hex() not in done.stderr


def test_a_key_file_is_never_overwritten(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("precious")
    done = shell("key", "make", "--kind", "data", "--out", path, "--json")
    assert (done.code, done.result["kind"]) == (ExitCode.USAGE, "key_file_exists")
    assert path.read_text() == "precious"


def test_an_open_key_file_is_refused_with_its_next_move(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "key"
    shell("key", "make", "--kind", "signing", "--out", path)
    path.chmod(0o644)
    done = shell("key", "public", "--kind", "signing", "--key", path)
    assert (done.code, done.stdout) == (ExitCode.ENVIRONMENT_MISSING, "")
    assert "error: the key file is open" in done.stderr and "hint: `chmod 0400`" in done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x25519:",
        "x25519:" + "AB" * 32,
        "rsa:" + "ab" * 32,
        "ab" * 32,
        "ed25519:" + "00" * 32,
        "x25519:" + "ab" * 33,
    ],
)
def test_what_is_no_public_key_is_refused(shell: Shell, text: str) -> None:
    done = shell("key", "show", text, "--json")
    assert (done.code, done.result["kind"]) == (ExitCode.USAGE, "public_key_malformed")


def test_a_licence_goes_from_the_vendor_to_the_host(trade: Trade) -> None:
    made = trade.make(feature="adapters")
    assert made.code == 0, made.stdout
    assert trade.licence.stat().st_mode & 0o7777 == 0o644
    assert made.result["package_ids"] == [trade.manifest.package_id]
    assert bytes(range(32)).hex() not in trade.licence.read_text() + made.stdout
    shown = trade.shell("licence", "show", trade.licence, "--root", trade.root, "--json").result
    assert shown == made.result
    assert shown["not_after"] == day(30) + "T23:59:59Z" and shown["features"] == ["adapters"]
    checked = trade.check("--package", trade.folder / "package", "--key", f"file:{trade.folder}/host")
    assert checked.code == 0, checked.stdout
    assert (checked.result["days_left"], checked.result["in_grace"]) == (31, False)
    assert checked.result["opens"]


def test_people_read_the_terms_line_by_line(trade: Trade) -> None:
    trade.make()
    lines = trade.shell("licence", "check", trade.licence, "--root", trade.root).stdout.splitlines()
    assert "customer: Example Ltd" in lines and "days left: 31, then 7 of grace" in lines
    assert "features: none" in lines and f"packages: {trade.manifest.package_id}" in lines
    opened = trade.shell(
        *("licence", "check", trade.licence, "--root", trade.root, "--package", trade.folder / "package"),
        *("--key", f"file:{trade.folder}/host"),
    )
    assert "unwraps for this installation" in opened.stdout


def test_a_licence_is_never_overwritten(trade: Trade) -> None:
    trade.licence.write_text("precious")
    assert trade.make().result["kind"] == "key_file_exists"
    assert trade.licence.read_text() == "precious"


def test_an_edited_licence_is_refused(trade: Trade) -> None:
    trade.make()
    trade.licence.write_bytes(trade.licence.read_bytes().replace(b"Example", b"Exbmple"))
    done = trade.check()
    assert (done.code, done.result["kind"]) == (ExitCode.VERIFICATION_FAILED, "licence_changed")


def test_an_expired_licence_is_refused_and_grace_is_told(trade: Trade) -> None:
    past = {"not-before": day(-60)}
    assert trade.make(**{**past, "not-after": day(-5)}).code == 0
    in_grace = trade.check().result
    assert (in_grace["days_left"], in_grace["in_grace"]) == (0, True)
    assert in_grace["grace_days_left"] in (2, 3)
    trade.licence.unlink()
    assert trade.make(**{**past, "not-after": day(-9)}).code == 0
    done = trade.check()
    assert (done.code, done.result["kind"]) == (ExitCode.VERIFICATION_FAILED, "licence_expired")


def test_a_licence_for_another_installation_or_package_is_refused(trade: Trade) -> None:
    trade.make()
    package = ("--package", trade.folder / "package")
    done = trade.check(*package, "--key", f"file:{trade.folder}/vendor-recipient")
    assert done.result["kind"] == "licence_for_another_installation"
    trade.seal("other")
    done = trade.check("--package", trade.folder / "other", "--key", f"file:{trade.folder}/host")
    assert done.result["kind"] == "licence_for_another_package"


def test_a_clock_behind_the_last_start_is_seen_and_checking_records_nothing(trade: Trade) -> None:
    trade.make()
    state = trade.folder / "state"
    state.mkdir()
    assert trade.check("--state", state).code == 0 and not list(state.iterdir())
    (state / "last-start").write_text(f"strongroom clock 1 {int(time.time()) + 7200}\n")
    assert trade.check("--state", state).result["kind"] == "clock_turned_back"


def test_a_foreign_root_is_refused(trade: Trade) -> None:
    trade.make()
    other = signing_keys.public_of(signing_keys.make_private()).hex()
    done = trade.shell("licence", "show", trade.licence, "--root", f"ed25519:{other}", "--json")
    assert done.result["kind"] == "licence_signer_unknown"
    done = trade.shell("licence", "show", trade.licence, "--root", trade.installation, "--json")
    assert done.result["kind"] == "public_key_malformed"


def test_a_licence_is_made_with_the_packages_own_key_only(trade: Trade) -> None:
    trade.shell("key", "make", "--kind", "data", "--out", trade.folder / "data")
    assert trade.make(key=f"file:{trade.folder}/data").result["kind"] == "key_wrong"
    assert trade.make(key=f"recipient:file:{trade.folder}/host").result["kind"] == "recipient_missing"
    assert trade.make(key="vault:x").result["kind"] == "source_unknown"
    assert trade.make(installation=trade.root).result["kind"] == "public_key_malformed"
    assert trade.make(installation="x25519:" + "00" * 32).result["kind"] == "key_refused"
    assert not trade.licence.exists()


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"not-after": "tomorrow"}, "bad_argument"),
        ({"not-after": "2030-1-5"}, "bad_argument"),
        ({"not-after": "1960-01-01"}, "bad_argument"),
        ({"not-after": "2001-01-01"}, "licence_malformed"),
        ({"customer": ""}, "licence_malformed"),
        ({"id": "a b"}, "licence_malformed"),
        ({"feature": "Upper"}, "licence_malformed"),
        ({"package": "/nonexistent"}, "manifest_missing"),
    ],
)
def test_an_order_that_cannot_be_licensed_writes_nothing(
    trade: Trade, changed: dict[str, object], kind: str
) -> None:
    done = trade.make(**changed)
    assert (done.code != 0, done.result["kind"]) == (True, kind)
    assert not trade.licence.exists()


def test_data_keys_are_wiped_when_making_fails(trade: Trade, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bytearray] = []

    def fail(_terms: object, data_keys: dict[str, bytearray], _holders: object) -> None:
        held.extend(data_keys.values())
        raise CommandError(ExitCode.USAGE, "stop", "stopped")

    monkeypatch.setattr("model_package.licence.make", fail)
    assert trade.make().result["kind"] == "stop"
    assert len(held) == 1 and not any(held[0])


def test_checking_a_package_needs_its_key_source_too(trade: Trade) -> None:
    trade.make()
    assert trade.check("--package", trade.folder / "package").result["kind"] == "bad_argument"
    assert trade.check("--key", "file:/k").result["kind"] == "bad_argument"


def test_every_verb_has_the_json_option() -> None:
    verbs = [
        command.callback for app in (keys_cli.app, licences_cli.app) for command in app.registered_commands
    ]
    assert len(verbs) == 8
    for verb in verbs:
        assert verb is not None and "as_json" in verb.__annotations__


def test_every_refusal_has_an_exit_code_of_its_group() -> None:
    codes = {refusal: keys._code(refusal) for refusal in Refusal}
    assert codes[Refusal.SOURCE_UNKNOWN] is codes[Refusal.KEY_FILE_EXISTS] is ExitCode.USAGE
    assert codes[Refusal.KEY_MISSING] is codes[Refusal.CLOCK_STATE_UNWRITABLE] is ExitCode.ENVIRONMENT_MISSING
    assert codes[Refusal.LICENCE_EXPIRED] is codes[Refusal.UNLOCK_REPLAYED] is ExitCode.VERIFICATION_FAILED


def test_a_machine_without_the_package_extra_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_package.hpke", None)
    monkeypatch.delattr("model_package.hpke")
    with pytest.raises(CommandError) as raised:
        keys.describe("x25519:" + "ab" * 32)
    assert (raised.value.kind, raised.value.hint) == ("no_cryptography", "install strongroom[deploy]")


def test_the_whole_way_works_in_hardened_processes(tmp_path: Path) -> None:
    """As real processes, where hardening is not replaced."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "infra", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
        )

    made = run("key", "make", "--kind", "signing", "--out", str(tmp_path / "key"))
    assert made.returncode == 0, made.stderr
    read = run("key", "public", "--kind", "signing", "--key", str(tmp_path / "key"), "--json")
    assert json.loads(read.stdout)["result"]["public"] + "\n" == made.stdout


def test_importing_the_verbs_imports_no_room() -> None:
    code = "import sys, infra.keys_cli, infra.licences_cli, infra.keys, infra.licences; "
    code += "print([n for n in sys.modules if n.startswith(('model_package', 'cryptography', 'botocore'))])"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert shown.stdout.strip() == "[]", shown.stderr


def test_a_licence_of_the_command_line_is_one_of_the_rooms(trade: Trade) -> None:
    trade.make()
    root = licences._roots([trade.root])
    held = licence_form.verify(trade.licence.read_bytes(), root, int(time.time()))
    assert held.terms.customer == "Example Ltd" and len(held.keys) == 1
