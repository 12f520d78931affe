"""`strongroom package`, as its owner types it: built, looked at, proved, wrapped anew, compared, opened."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from infra import packages
from infra.report import CommandError, ExitCode
from model_package import secret
from tests.infra.test_keys import ROOT, Shell
from tests.model_package import making

NOT_SHOWN = "model.embed.weight"


class Desk:
    """A vendor and a customer with keys made by the command line, and a model to seal."""

    def __init__(self, folder: Path, shell: Shell) -> None:
        self.folder, self.shell = folder, shell
        self.model = making.model(folder / "plain")
        self.public = {
            name: self.make(kind, name)
            for name, kind in {
                "vendor": "signing",
                "customer": "signing",
                "installation": "installation",
                "second": "installation",
                "data": "data",
                "customer-data": "data",
            }.items()
        }

    def make(self, kind: str, name: str) -> str:
        done = self.shell("key", "make", "--kind", kind, "--out", self.folder / name, "--json")
        return str(done.result.get("public"))

    def build(self, out: str, *options: object, owner: str = "vendor", key: str = "data") -> Any:
        return self.shell(
            "package", "seal", self.model, "--out", self.folder / out, "--name", "tiny",
            "--version", "1.0", "--key", f"file:{self.folder / key}", "--signing-key", self.folder / owner,
            "--owner", owner, "--recipient", self.public["installation"], *options, "--json",
        )  # fmt: skip

    def __call__(self, verb: str, *arguments: object, root: str = "vendor") -> Any:
        return self.shell("package", verb, *arguments, "--root", self.public[root], "--json")


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capfd)


@pytest.fixture
def desk(tmp_path: Path, shell: Shell) -> Desk:
    made = Desk(tmp_path, shell)
    done = made.build("sealed", "--epoch", 3)
    assert done.code == 0, done.stdout
    return made


def test_a_built_package_is_described_proved_and_opened_bit_for_bit(desk: Desk) -> None:
    sealed, back = desk.folder / "sealed", desk.folder / "back"
    shown = desk("inspect", sealed).result
    assert (shown["model"], shown["owner"], shown["epoch"], shown["base"]) == ("tiny 1.0", "vendor", 3, None)
    assert {each["name"] for each in shown["files"]} == set(making.plain(desk.model))
    assert len(shown["recipients"]) == 1 and "tensors" not in shown
    inside = desk("inspect", sealed, "--key", f"recipient:file:{desk.folder / 'installation'}")
    assert inside.result["tensors"] == {"model.safetensors": {"BF16": 1, "F16": 1, "F32": 2, "U8": 1}}
    assert NOT_SHOWN not in inside.stdout + inside.stderr
    assert desk("verify", sealed).result["gb_per_s"] > 0
    before = desk.shell.hardened
    opened = desk("unseal", sealed, "--key", f"file:{desk.folder / 'data'}", "--out", back).result
    assert desk.shell.hardened == before + 1
    assert making.plain(back) == making.plain(desk.model)
    assert opened["plain_bytes"] == sum(map(len, making.plain(desk.model).values()))


def test_an_archive_unpacks_to_the_package(desk: Desk) -> None:
    out = desk.folder / "new" / "model.tar.gz"
    done = desk("archive", desk.folder / "sealed", "--out", out)
    assert done.result["archive_bytes"] == out.stat().st_size
    with tarfile.open(out) as packed:
        packed.extractall(desk.folder / "unpacked", filter="data")
    assert making.plain(desk.folder / "unpacked") == making.plain(desk.folder / "sealed")
    assert desk("archive", desk.folder / "sealed", "--out", out).result["kind"] == "seal_refused"


def test_one_wrong_bit_is_found_without_a_key(desk: Desk) -> None:
    sealed = desk.folder / "sealed"
    largest = max(sealed.glob("*.sealed"), key=lambda path: path.stat().st_size)
    raw = bytearray(largest.read_bytes())
    raw[-30] ^= 4
    largest.write_bytes(raw)
    done = desk("verify", sealed)
    assert (done.code, done.result["kind"]) == (ExitCode.VERIFICATION_FAILED, "chunk_wrong")
    assert done.result["message"] == "corrupted or tampered with"


def test_another_root_another_key_and_another_recipient_are_each_refused_in_their_words(desk: Desk) -> None:
    sealed, out = desk.folder / "sealed", desk.folder / "out"
    assert desk("inspect", sealed, root="customer").result["kind"] == "signer_unknown"
    for key, kind in (
        (f"file:{desk.folder / 'customer-data'}", "key_wrong"),
        (f"recipient:file:{desk.folder / 'second'}", "recipient_missing"),
        (f"file:{desk.folder / 'nothing'}", "key_missing"),
    ):
        done = desk("unseal", sealed, "--key", key, "--out", out)
        assert done.code != 0 and done.result["kind"] == kind
        assert not out.exists()


def test_wrapping_for_another_installation_shuts_out_the_first(desk: Desk) -> None:
    sealed, new = desk.folder / "sealed", desk.folder / "new"
    key = f"file:{desk.folder / 'data'}"
    done = desk(
        "rewrap", sealed, "--key", key, "--signing-key", desk.folder / "vendor", "--out", new,
        "--recipient", desk.public["second"], "--epoch", 4,
    )  # fmt: skip
    assert done.code == 0 and done.result["epoch"] == 4
    first, second = (f"recipient:file:{desk.folder / name}" for name in ("installation", "second"))
    assert desk("inspect", new, "--key", second).code == 0
    assert desk("inspect", new, "--key", first).result["kind"] == "recipient_missing"
    found = desk("diff", sealed, new, "--key", key, "--key", key).result
    assert found["fields"] == ["epoch"] and found["recipients"] and found["same_content"]


def test_a_difference_is_shown_by_file_and_number(desk: Desk) -> None:
    (desk.model / "config.json").write_text("{}")
    assert desk.build("changed").code == 0
    first, second, key = desk.folder / "sealed", desk.folder / "changed", f"file:{desk.folder / 'data'}"
    assert desk("diff", first, second).result["files"] is None
    found = desk("diff", first, second, "--key", key, "--key", key).result
    assert [each["name"] for each in found["files"]] == ["config.json"]
    assert not found["same_content"]
    assert desk("diff", first, second, "--key", key).code == ExitCode.USAGE


def test_an_adapter_is_bound_to_its_base_and_to_its_owner(desk: Desk) -> None:
    base = ("--base", desk.folder / "sealed", "--base-root", desk.public["vendor"])
    done = desk.build("adapter", *base, owner="customer", key="customer-data")
    assert done.code == 0 and done.result["base"] is not None
    adapter, customer = desk.folder / "adapter", ("--owner", "customer")
    assert desk("verify", adapter, *base, *customer, root="customer").code == 0
    assert desk("verify", adapter, *customer, root="customer").result["kind"] == "base_wrong"
    assert desk("verify", adapter, *base, *customer, root="vendor").result["kind"] == "signer_unknown"
    key = ("--key", f"file:{desk.folder / 'data'}", "--out", desk.folder / "out")
    done = desk("unseal", adapter, *base, *customer, *key, root="customer")
    assert done.result["kind"] == "key_wrong"


def test_what_cannot_be_sealed_is_refused_and_nothing_is_written_over(desk: Desk) -> None:
    again = desk.build("sealed")
    assert (again.code, again.result["kind"]) == (ExitCode.USAGE, "seal_refused")
    assert again.result["message"] == "the destination holds a package already"
    (desk.folder / "file").write_text("")
    blocked = desk.build("file/below")
    assert (blocked.code, blocked.result["kind"]) == (ExitCode.ENVIRONMENT_MISSING, "system_refused")
    (desk.model / "model.safetensors").write_bytes(b"\x80\x02}q")
    refused = desk.build("other")
    assert refused.result["kind"] == "seal_refused" and "not safetensors" in refused.result["message"]


def test_people_get_lines_and_a_bar_on_a_terminal_only(desk: Desk) -> None:
    done = desk.shell("package", "inspect", desk.folder / "sealed", "--root", desk.public["vendor"])
    assert "model: tiny 1.0" in done.stdout and "config.json" in done.stdout
    primary, secondary = pty.openpty()
    with os.fdopen(secondary, "w") as terminal:
        program = "from infra.meter import Meter; m = Meter('sealing'); m.show(1, 4); m.show(4, 4)"
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, stderr=terminal, check=True, timeout=60)
    shown = os.read(primary, 10_000).decode()
    os.close(primary)
    assert "sealing  25%" in shown and "sealing 100%" in shown and "GB/s" in shown
    assert "sealing" not in desk.build("quiet").stderr  # which is no terminal


def test_no_key_is_left_in_the_arguments_results_and_errors(desk: Desk) -> None:
    private = (desk.folder / "data").read_text().strip()
    done = desk(
        "unseal", desk.folder / "sealed", "--key", f"file:{desk.folder / 'data'}", "--out", desk.folder / "o"
    )
    assert private not in done.stdout + done.stderr + json.dumps(done.result)


def test_a_process_that_cannot_be_hardened_reads_no_key(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise secret.HardeningError

    monkeypatch.setattr(secret, "harden_process", refuse)
    trusted = packages.Trusted("vendor", (desk.public["vendor"],))
    with pytest.raises(CommandError) as caught:
        packages.inspect(desk.folder / "sealed", trusted, f"file:{desk.folder / 'data'}")
    assert caught.value.kind == "not_hardened"


def test_a_key_wrapped_for_a_hybrid_recipient_opens_with_its_seed_alone(desk: Desk) -> None:
    public = desk.make("hybrid", "hybrid")
    assert public.startswith("mlkem768x25519:")
    assert desk.shell("key", "show", public, "--json").result["kind"] == "hybrid"
    assert desk.build("kept", "--recipient", public).code == 0
    shown = desk("inspect", desk.folder / "kept", "--key", f"recipient:file:{desk.folder / 'hybrid'}")
    assert shown.code == 0, shown.stdout
    assert {each["scheme"] for each in shown.result["recipients"]} == {"x25519", "mlkem768x25519"}
    beside = desk("inspect", desk.folder / "kept", "--key", f"recipient:file:{desk.folder / 'installation'}")
    assert beside.code == 0
    other = desk("inspect", desk.folder / "kept", "--key", f"recipient:file:{desk.folder / 'second'}")
    assert other.result["kind"] == "recipient_missing"
    short = desk.build("short", "--recipient", public[:-2])
    assert short.result["kind"] == "public_key_malformed"
