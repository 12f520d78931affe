"""`strongroom package build`: its stages in order, what an interruption leaves, and what is refused."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from infra.report import ExitCode
from model_package import beside
from model_package.opener import open_package
from model_package.outcome import Outcome, PackageError
from tests.infra.test_keys import ROOT, Shell
from tests.model_package import making

KILLS = 20
NO_PARTS = ("--tensor-parallel", "1", "--quantize", "none")
REPORT = {
    "architecture": "TinyForCausalLM",
    "parameters": 2_000_000,
    "text": "a text",
    "positions": 96,
    "reference": "the unquantized weights computed in float32",
    "rows": [
        {
            "variant": "none",
            "quality": {"perplexity": 10.0, "kl_mean": 0.0, "kl_p99": 0.0, "top1_agreement": 1.0},
            "weight_bytes": 4 << 20,
            "refused": None,
        },
        {
            "variant": "int8-block",
            "quality": {"perplexity": 10.5, "kl_mean": 0.004, "kl_p99": 0.02, "top1_agreement": 0.97},
            "weight_bytes": 1 << 20,
            "refused": None,
        },
        {"variant": "fp8", "quality": None, "weight_bytes": None, "refused": "no such hardware"},
    ],
}
# Stands for the interpreter that runs the stages: each leaves files as the real one does, and a logged line.
STAND_IN = """#!/bin/sh
for given in "$@"; do case $given in
  --out=*) out=${{given#--out=}};;
  --tensor-parallel=*) ranks=${{given#*=}};;
  --quantize=*) scheme=${{given#*=}};;
esac; done
echo "$2" >> {log}
said={{}}
case $2 in
  container.model.convert) cp -r {model} "$out"; cp {report} "$out/notes.bin";;
  container.model.parts)
    mkdir -p "$out/tp$ranks-$scheme"
    cp {model}/model.safetensors "$out/tp$ranks-$scheme/model-rank-0-of-$ranks.safetensors"
    echo {{}} > "$out/tp$ranks-$scheme/manifest.json";;
  container.model.belonging) said='{{"weights_sha256": "0f"}}';;
  container.model.quality)
    mkdir -p "$out"
    cp {report} "$out/quality.json"
    echo table > "$out/quality.md"
    echo plot > "$out/quality.svg";;
esac
{then}
echo "$said"
"""
# Runs the command line, and kills itself and its children just before the Nth thing that reaches the disk.
CHILD = """
import os, signal, subprocess, sys
from infra import cli
from model_package import secret, storage

left, sys.executable = int(sys.argv[1]), sys.argv[2]

def counting(real):
    def call(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call

secret.harden_process = lambda: None
for name in ("pwrite", "fsync", "rename", "replace", "rmdir", "unlink", "mkdir"):
    setattr(os, name, counting(getattr(os, name)))
subprocess.run = counting(subprocess.run)
sys.argv = ["strongroom", *sys.argv[3:]]
try:
    cli.main()
finally:
    print(10**6 - left, file=sys.stderr)
"""


class Vendor:
    """Keys, a source and a stand-in for the stages; `options` are those of every build here."""

    def __init__(self, folder: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.shell, self.log = folder, shell, folder / "log"
        self.model = making.model(folder / "checkpoint")
        self.gguf = folder / "tiny.gguf"
        self.gguf.write_bytes(b"GGUF")
        (folder / "LICENSE").write_text("Do as you like.\n")
        (folder / "report.json").write_text(json.dumps(REPORT))
        self.root = self._made("signing", "vendor")
        self._made("data", "data")
        self.program = folder / "python"
        self.stands_in()
        monkeypatch.setattr(sys, "executable", str(self.program))
        self.options = [
            "--name", "tiny", "--version", "1.0", "--key", f"file:{folder / 'data'}",
            "--signing-key", str(folder / "vendor"), "--licence", "Apache-2.0", "--base-model", "maker/tiny",
            "--tensor-parallel", "1,2", "--quantize", "none,int8-block", "--json",
        ]  # fmt: skip

    def _made(self, kind: str, name: str) -> str:
        done = self.shell("key", "make", "--kind", kind, "--out", self.folder / name, "--json")
        return str(done.result.get("public"))

    def stands_in(self, then: str = "") -> None:
        given = {"log": self.log, "model": self.model, "report": self.folder / "report.json"}
        quoted = {name: shlex.quote(str(path)) for name, path in given.items()}
        self.program.write_text(STAND_IN.format(**quoted, then=then))
        self.program.chmod(0o755)

    def build(self, out: str, *options: object, source: Path | None = None) -> Any:
        return self.shell(
            "package", "build", source or self.gguf, "--out", self.folder / out, *self.options, *options
        )

    def stages(self) -> list[str]:
        """Return what was run since the last look."""
        lines = self.log.read_text().split() if self.log.exists() else []
        self.log.write_text("")
        return [line.removeprefix("container.model.") for line in lines]

    def unsealed(self, out: str) -> dict[str, bytes]:
        root = making.Root(bytes.fromhex(self.root.removeprefix("ed25519:")))
        trust = making.Trust(making.Owner.VENDOR, making.Roots(vendor=(root,)), 2**40)
        key = bytearray.fromhex((self.folder / "data").read_text())
        with open_package(self.folder / out, trust) as package, package.unlock(key) as contents:
            return making.read_all(contents)

    def outcome(self, out: str) -> Outcome:
        try:
            self.unsealed(out)
        except PackageError as error:
            return error.outcome
        return Outcome.OPENED


@pytest.fixture
def vendor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Vendor:
    return Vendor(tmp_path, Shell(monkeypatch, capfd), monkeypatch)


def test_a_gguf_becomes_a_package_with_parts_report_card_and_licence(vendor: Vendor) -> None:
    done = vendor.build("package", "--archive", vendor.folder / "model.tar.gz")
    assert done.code == 0, done.stdout
    assert vendor.stages() == ["convert", "parts", "parts", "parts", "belonging", "quality"]
    sealed = vendor.unsealed("package")
    checkpoint = making.plain(vendor.model)
    assert {name: sealed[name] for name in checkpoint} == checkpoint
    added = {name for name in sealed if name not in checkpoint}
    folders = {f"parts/{name}" for name in ("tp1-int8-block", "tp2-none", "tp2-int8-block")}
    assert {name for name in added if "/" not in name} == {*beside.TEXTS}  # `notes.bin`: a pickle's suffix
    assert {name.rpartition("/")[0] for name in added} == {"", "parts", *folders}
    assert sealed["parts/weights.sha256"] == b"0f"
    clear = {path.name for path in (vendor.folder / "package").iterdir() if path.suffix != ".sealed"}
    assert clear == {*beside.NAMES, "manifest.json", "manifest.sig"} - {"model.oms.sig"}
    for name in beside.TEXTS:
        assert (vendor.folder / "package" / name).read_bytes() == sealed[name]
    assert sealed["LICENSE"] == b"Do as you like.\n" and b"not in this package" not in sealed["README.md"]
    assert not list(vendor.folder.glob("*.unfinished"))
    with tarfile.open(vendor.folder / "model.tar.gz") as packed:
        packed.extractall(vendor.folder / "laid out", filter="data")
    assert vendor.unsealed("laid out") == sealed
    assert (vendor.folder / "laid out" / "README.md").is_file()


def test_unquantized_weights_are_left_out_where_asked_for_and_the_card_says_so(vendor: Vendor) -> None:
    assert vendor.build("package", "--without-weights").code == 0
    sealed = vendor.unsealed("package")
    assert "model.safetensors" not in sealed and "config.json" in sealed
    assert "parts/tp2-none/model-rank-0-of-2.safetensors" in sealed
    assert b"The unquantized weights are not in this package" in sealed["README.md"]


def test_parts_that_are_not_of_these_weights_are_never_sealed(vendor: Vendor) -> None:
    vendor.stands_in('[ "$2" = container.model.belonging ] && exit 2')
    refused = vendor.build("package")
    assert (refused.code, refused.result["kind"]) == (ExitCode.USAGE, "belonging_refused")
    assert vendor.outcome("package") is Outcome.MANIFEST_MISSING
    vendor.stages()
    vendor.stands_in()
    assert vendor.build("package").code == 0
    assert vendor.stages() == ["belonging", "quality"]  # asked anew, whatever was kept


def test_the_bill_of_materials_and_the_second_signature_are_proved_and_shown(vendor: Vendor) -> None:
    made = vendor.shell("key", "make", "--kind", "oms", "--out", vendor.folder / "oms", "--json")
    (vendor.folder / "oms.pem").write_text(made.result["public"])
    assert vendor.build("package", "--oms-key", vendor.folder / "oms").code == 0
    package, root = vendor.folder / "package", ("--root", vendor.root, "--json")
    shown = vendor.shell("package", "inspect", package, *root).result
    assert (shown["licence"], shown["base_model"]) == ("Apache-2.0", "maker/tiny")
    assert shown["architecture"] == "TinyForCausalLM"
    assert {"variant": "int8-block", "metric": "perplexity", "value": "10.5"} in shown["metrics"]
    pem = ("--oms-root", vendor.folder / "oms.pem")
    proved = vendor.shell("package", "verify", package, *root, *pem).result
    assert proved["bill_of_materials"] and proved["model_signing"]
    again = ("--signing-key", vendor.folder / "vendor", "--key", f"file:{vendor.folder / 'data'}")
    wrapped = vendor.shell("package", "rewrap", package, *again, "--out", vendor.folder / "new", *root)
    assert wrapped.code == 0
    moved = vendor.shell("package", "verify", vendor.folder / "new", *root, *pem)  # signed without that key
    assert (moved.code, moved.result["kind"]) == (ExitCode.VERIFICATION_FAILED, "documents_refused")
    assert vendor.shell("package", "verify", vendor.folder / "new", *root).result["bill_of_materials"]
    (package / "README.md").write_text("| better than it is |")
    for verb in ("inspect", "verify"):
        refused = vendor.shell("package", verb, package, *root)
        assert (refused.code, refused.result["kind"]) == (ExitCode.VERIFICATION_FAILED, "documents_refused")
    assert vendor.outcome("package") is Outcome.OPENED


def test_a_directory_is_sealed_from_where_it_lies_without_its_own_card(vendor: Vendor) -> None:
    (vendor.model / "README.md").write_text("another card")
    (vendor.model / "LICENSE").write_text("the model's own")
    (vendor.model / "weights.bin").write_bytes(b"\x80\x02}q")
    assert vendor.build("package", source=vendor.model).code == 0
    assert vendor.stages()[0] == "parts"
    sealed = vendor.unsealed("package")
    assert sealed["LICENSE"] == b"the model's own" and b"another card" not in sealed["README.md"]
    assert "weights.bin" not in sealed


def test_the_card_is_one_the_hub_reads_and_its_figures_are_the_reports(vendor: Vendor) -> None:
    assert vendor.build("package").code == 0
    card = huggingface_hub.ModelCard((vendor.folder / "package" / "README.md").read_text())
    assert card.data.license == "apache-2.0" and card.data.base_model == "maker/tiny"
    assert card.data.pipeline_tag == "text-generation" and card.data.library_name == "strongroom"
    assert "| `int8-block` | 1 | 10.500 | 0.00400 | 97.0% |" in card.text
    assert "| `fp8` | not measured: no such hardware |" in card.text
    assert "2 M parameters" in card.text and "`tp2-int8-block`" in card.text
    own = vendor.build("own", "--licence", "LicenseRef-Tiny-1.0")
    assert own.code == 0
    header = huggingface_hub.ModelCard((vendor.folder / "own" / "README.md").read_text()).data
    assert (header.license, header["license_name"], header["license_link"]) == (
        "other",
        "tiny-1.0",
        "LICENSE",
    )


def killed(vendor: Vendor, steps: int, out: str) -> subprocess.CompletedProcess[str]:
    arguments = ["package", "build", str(vendor.gguf), "--out", str(vendor.folder / out), *vendor.options]
    archive = ["--archive", str(vendor.folder / f"{out}.tar.gz")]
    return subprocess.run(
        [PYTHON, "-c", CHILD, str(steps), str(vendor.program), *arguments, *archive],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


PYTHON = sys.executable


@pytest.mark.timeout(1200)  # 41 processes, on a machine that may be busy
def test_a_kill_at_any_of_20_points_leaves_nothing_that_opens_and_a_second_run_ends_it(
    vendor: Vendor,
) -> None:
    """SIGKILL before a stage, a write, a flush, a rename or a removal, from the first to the last."""
    done = killed(vendor, 10**6, "whole")
    assert done.returncode == 0, done.stderr
    steps, whole = int(done.stderr.split()[-1]), vendor.unsealed("whole")
    assert steps > KILLS
    before, after = 0, 0
    for number in range(KILLS):
        out = f"killed {number}"
        ended = killed(vendor, round(number * (steps - 1) / (KILLS - 1)), out)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        finished = (vendor.folder / out / "manifest.json").exists()
        before, after = before + (not finished), after + finished
        assert vendor.outcome(out) is (Outcome.OPENED if finished else Outcome.MANIFEST_MISSING)
        again = vendor.build(out, "--archive", vendor.folder / f"{out}.tar.gz")
        assert again.code == 0, again.stdout
        assert vendor.unsealed(out) == whole
        assert (vendor.folder / f"{out}.tar.gz").is_file()
        assert not list(vendor.folder.glob(f"{out}*.unfinished")) and not list(
            vendor.folder.glob("*.partial")
        )
        assert set(os.listdir(vendor.folder / out)).isdisjoint({"sealing.json"})
    assert before >= KILLS // 2 and after >= 1


def test_a_second_run_keeps_what_is_whole_and_makes_again_what_is_not(vendor: Vendor) -> None:
    vendor.stands_in('[ "$2" = container.model.quality ] && exit 1')
    assert vendor.build("package").code == ExitCode.CHECK_FAILED
    assert vendor.outcome("package") is Outcome.MANIFEST_MISSING
    assert vendor.stages() == ["convert", "parts", "parts", "parts", "belonging", "quality"]
    (part,) = (vendor.folder / "package.unfinished" / "parts-2-none").rglob("*.safetensors")
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    vendor.stands_in()
    assert vendor.build("package").code == 0
    assert vendor.stages() == ["parts", "belonging", "quality"]


def test_a_source_that_changed_is_converted_and_divided_anew(vendor: Vendor) -> None:
    vendor.stands_in('[ "$2" = container.model.quality ] && exit 1')
    vendor.build("package")
    vendor.stages()
    vendor.gguf.write_bytes(b"GGUF changed")
    vendor.stands_in()
    assert vendor.build("package").code == 0
    assert vendor.stages() == ["convert", "parts", "parts", "parts", "belonging", "quality"]


def test_plain_files_lie_where_nobody_else_enters(vendor: Vendor) -> None:
    vendor.stands_in("exit 2")
    refused = vendor.build("package")
    assert (refused.code, refused.result["kind"]) == (ExitCode.USAGE, "convert_refused")
    assert (vendor.folder / "package.unfinished").stat().st_mode & 0o777 == 0o700


def test_what_a_killed_build_started_keeps_a_second_one_out_until_it_ends(vendor: Vendor) -> None:
    vendor.stands_in('[ "$2" = container.model.quality ] && exec sleep 600')
    program = [PYTHON, "-c", CHILD, str(10**6), str(vendor.program), "package", "build", str(vendor.gguf)]
    given = ["--out", str(vendor.folder / "package"), *vendor.options]
    with subprocess.Popen([*program, *given], cwd=ROOT, start_new_session=True) as first:
        while not vendor.log.exists() or "quality" not in vendor.log.read_text():
            assert first.poll() is None
            time.sleep(0.05)
        first.kill()  # and not its child
        first.wait()
        refused = vendor.build("package")
        assert (refused.code, refused.result["kind"]) == (ExitCode.USAGE, "build_running")
        os.killpg(first.pid, signal.SIGKILL)
    vendor.stands_in()
    deadline = time.monotonic() + 60
    while (done := vendor.build("package")).code and time.monotonic() < deadline:
        time.sleep(0.05)  # until the kernel has let go of the child's descriptors
    assert done.code == 0, done.stdout


def test_a_seed_is_refused_outside_test_mode_and_makes_the_same_bytes_within(
    vendor: Vendor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded = ("--nonce-seed", "07")
    refused = vendor.build("a", *seeded)
    assert (refused.code, refused.result["kind"]) == (ExitCode.USAGE, "seed_refused")
    monkeypatch.setenv("STRONGROOM_TEST_MODE", "1")
    assert vendor.build("a", *seeded).code == vendor.build("b", *seeded).code == 0
    made = [{path.name: path.read_bytes() for path in (vendor.folder / out).iterdir()} for out in "ab"]
    assert made[0] == made[1]
    assert vendor.build("c", "--nonce-seed", "08").code == 0
    other = {path.name for path in (vendor.folder / "c").glob("*.sealed")}
    assert other.isdisjoint(made[0])
    assert vendor.build("a", *seeded).result["message"] == "the destination holds a package already"
    (vendor.folder / "d").mkdir()
    (vendor.folder / "d" / "sealing.json").write_text("{}")
    assert vendor.build("d", *seeded).result["kind"] == "seed_refused"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--quantize", "int9"), "`--quantize int9` is not a scheme"),
        (("--tensor-parallel", "0"), "`--tensor-parallel` is numbers from 1 to 64, divided by commas"),
        (("--tensor-parallel", "2,2"), "a number of ranks or a scheme is named twice"),
        (("--licence", "Do what you want"), "`--licence` is not an SPDX identifier"),
        (("--base-model", "a: b"), "`--base-model` is not a model's name"),
        (("--licence-text", "nowhere"), "there is no licence text"),
        (("--without-weights", *NO_PARTS), "`--without-weights` would leave nothing to serve"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_made(
    options: tuple[str, ...], said: str, vendor: Vendor
) -> None:
    done = vendor.build("package", *options)
    assert (done.code, done.result["message"]) == (ExitCode.USAGE, said)
    assert vendor.stages() == [] and not (vendor.folder / "package").exists()


def test_a_finished_package_is_never_built_over(vendor: Vendor) -> None:
    assert vendor.build("package").code == 0
    before = vendor.unsealed("package")
    again = vendor.build("package")
    assert again.result["message"] == "the destination holds a package already"
    assert vendor.unsealed("package") == before
    (vendor.folder / "model.tar.gz").write_text("")
    taken = vendor.build("other", "--archive", vendor.folder / "model.tar.gz")
    assert taken.result["message"] == "the archive exists already"
