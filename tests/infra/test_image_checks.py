"""Every check of a saved image passes on a sound one and fails on one with the single fault it is about."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.image.checks import configuration, files, packages
from infra.image.checks.configuration import SECRET
from infra.image.checks.table import Result
from infra.image.subject import SITE, Image
from tests.infra.tiny_image import LOCK, PACKAGE, File, TinyImage

Fault = Callable[[TinyImage], object]


def results(tiny: TinyImage, path: Path, lock: tuple[object, ...] = LOCK) -> dict[int, Result]:
    with Image(tiny.save(path / "image.tar")) as image:
        found = [*configuration.TABLE.run(image), *files.TABLE.run(image)]
        found += packages.TABLE.run(packages.Installed(image, lock))  # type: ignore[arg-type]
    return {result.number: result for result in found}


def put(path: str, content: bytes = b"x", **fields: object) -> Fault:
    def change(tiny: TinyImage) -> None:
        tiny.files[path] = File(content, **fields)  # type: ignore[arg-type]

    return change


def in_another_layer(path: str, content: bytes = b"x", **fields: object) -> Fault:
    """A layer that adds the file, and one that deletes it again: it ships all the same."""

    def change(tiny: TinyImage) -> None:
        folder, _, name = path.rpartition("/")
        tiny.other_layers += [
            {path: File(content, **fields)},  # type: ignore[arg-type]
            {f"{folder}/.wh.{name}": File()},
        ]

    return change


def config(name: str, value: object) -> Fault:
    return lambda tiny: tiny.config.__setitem__(name, value)


def label(name: str, value: str) -> Fault:
    return lambda tiny: tiny.config["Labels"].__setitem__(name, value)


def late(change: Fault) -> Fault:
    """Change the image after its records were written."""
    return lambda tiny: tiny.finish.append(lambda: change(tiny))


def history(line: str) -> Fault:
    return lambda tiny: tiny.document["history"].append({"created_by": line})


def metadata(text: bytes) -> Fault:
    return put(f"{PACKAGE}/METADATA", text)


TOKEN = b"ghp_" + b"a1B2" * 9
KEY = b"-----BEGIN " + b"PRIVATE KEY-----\nabc"
CA = "etc/ssl/certs/ca-certificates.crt"
LISTED = "usr/share/strongroom/components.json"
LICENCE = b"Name: Flask\nVersion: 3.1.3\nLicense: BSD\n"

FAULTS: list[tuple[int, Fault]] = [
    (1, config("User", "root")),
    (1, config("User", "")),
    (1, config("User", "0:0")),
    (1, config("User", "strongroom")),
    (2, label("org.opencontainers.image.base.digest", "debian:latest")),
    (3, history("ADD https://example.com/a.tar /")),
    (4, config("Healthcheck", None)),
    (5, config("Entrypoint", ["/bin/sh", "-c", "serve"])),
    (5, config("Entrypoint", None)),
    (5, config("Cmd", ["serve"])),
    (6, put("usr/bin/helper", mode=0o4755)),
    (6, put("usr/bin/helper", mode=0o2755)),
    (6, in_another_layer("usr/bin/helper", mode=0o4755)),
    (7, put("usr/bin/ping", attributes={"SCHILY.xattr.security.capability": "x"})),
    (8, put("etc/x", mode=0o666)),
    (8, put("var/x", mode=0o777, folder=True)),
    (9, put("etc/x", uid=4711)),
    (10, in_another_layer("root-key.pem", KEY)),
    (10, put("etc/x", TOKEN)),
    (11, lambda tiny: tiny.config["Env"].append("HF_TOKEN=abc")),
    (11, history("RUN curl -H " + TOKEN.decode())),
    (12, put("var/lib/apt/lists/x")),
    (12, put("opt/strongroom/.git/config")),
    (13, put("usr/bin/curl", mode=0o755)),
    (13, put("usr/bin/gcc-12", mode=0o755)),
    (13, put("opt/strongroom/bin/pip", mode=0o755)),
    (14, put("bin/dash", mode=0o755)),
    (14, put("usr/bin/sh", link="busy", mode=0o777)),
    (15, lambda tiny: setattr(tiny.files["etc/passwd"], "content", b"root::0:0\nstrongroom:x:10001:1\n")),
    (15, lambda tiny: setattr(tiny.files["etc/passwd"], "content", b"root:x:0:0\ngames:x:5:5\n")),
    (15, put("etc/shadow", b"root:$y$abc:1::\n")),
    (16, config("ExposedPorts", {"8080/tcp": {}, "22/tcp": {}})),
    (16, config("ExposedPorts", {})),
    (17, label("org.opencontainers.image.revision", "")),
    (17, label("org.opencontainers.image.created", "2020-01-01T00:00:00Z")),
    (18, put("etc/x", mtime=1_800_000_000)),
    (20, late(put("usr/lib/unlisted.so"))),
    (20, late(lambda tiny: tiny.files.pop("usr/bin/python3.11"))),
    (20, lambda tiny: tiny.components["python"].append("gone-1.0")),
    (20, lambda tiny: tiny.components["python"].clear()),
    (20, late(lambda tiny: tiny.files.pop(LISTED))),
    (21, metadata(b"Name: Flask\nVersion: 3.1.4\nLicense: BSD\n")),
    (21, metadata(LICENCE + b"Requires-Dist: jinja2>=3\n")),
    (22, late(put(f"{SITE}/flask/__init__.py", b"changed"))),
    (22, late(lambda tiny: tiny.files.pop(f"{SITE}/flask/__init__.py"))),
    (22, put(f"{SITE}/nobodys.py")),
    (23, put("usr/lib/python3.11/sitecustomize.py")),
    (23, put(f"{SITE}/start.pth", b"import os; os.system('x')")),
    (24, metadata(b"Name: posthog\nVersion: 3.1.3\nLicense: MIT\n")),
    (24, metadata(b"Name: opentelemetry-exporter-otlp\nVersion: 3.1.3\nLicense: MIT\n")),
    (26, put(CA)),
    (27, config("Entrypoint", ["/opt/strongroom/bin/python", "-m", "sagemaker_entry"])),
    (27, config("Env", ["PATH=/x"])),
    (27, lambda tiny: tiny.config["Env"].append("PYTHONPATH=/tmp")),
    (27, lambda tiny: tiny.config["Env"].append("PYTHONHASHSEED=0")),
    (28, lambda tiny: tiny.files.pop("usr/share/doc/strongroom/LICENSE")),
    (28, lambda tiny: tiny.files.pop("usr/share/doc/python3.11/copyright")),
    (28, metadata(b"Name: Flask\nVersion: 3.1.3\n")),
    (29, metadata(b"Name: gunicorn\nVersion: 22.9\nLicense: MIT\n")),
    (29, metadata(b"Name: torch\nVersion: 2.9.1+cpu\nLicense: BSD\n")),
    (30, put("opt/model.pkl")),
    (30, put("opt/weights.pt")),
]


def test_a_sound_image_passes_every_check(tmp_path: Path) -> None:
    found = results(TinyImage(), tmp_path)
    assert {number: result.findings for number, result in found.items() if not result.passed} == {}
    assert set(found) == {*range(1, 19), *range(20, 31)}


@pytest.mark.parametrize(("number", "fault"), FAULTS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(FAULTS)])
def test_each_check_fails_on_the_fault_it_is_about(number: int, fault: Fault, tmp_path: Path) -> None:
    tiny = TinyImage()
    fault(tiny)
    failed = {n for n, result in results(tiny, tmp_path).items() if not result.passed}
    assert number in failed


def test_every_check_of_a_saved_image_is_shown_to_fail() -> None:
    tables = (configuration.TABLE.checks, files.TABLE.checks, packages.TABLE.checks)
    checks = set(itertools.chain.from_iterable(tables))
    assert {number for number, _ in FAULTS} | {25} == checks  # 25 has a test of its own below


def test_an_image_over_its_budget_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(configuration.BUDGET_BYTES, "cpu", 10)
    assert not results(TinyImage(), tmp_path)[25].passed


def test_a_package_that_the_lock_names_and_the_image_lacks_is_found(tmp_path: Path) -> None:
    from infra.image.wheelhouse import Locked

    more = (*LOCK, Locked("torch", "2.13.0", frozenset({"1" * 64})))
    assert results(TinyImage(), tmp_path, more)[21].findings == ("`torch` is locked and missing",)


def test_what_a_check_stumbles_over_has_not_passed(tmp_path: Path) -> None:
    tiny = TinyImage()
    del tiny.document["created"]
    found = results(tiny, tmp_path)
    assert found[18].findings == ("the check itself failed: KeyError",)


def test_what_a_later_layer_deletes_is_not_in_the_result(tmp_path: Path) -> None:
    tiny = TinyImage()
    in_another_layer("opt/x.pkl")(tiny)
    found = results(tiny, tmp_path)
    assert found[30].passed


def test_a_librarys_marker_is_no_key_and_a_key_is_one_wherever_it_stands() -> None:
    marker = "-----BEGIN OPENSSH " + "PRIVATE KEY-----"
    assert not SECRET.search(f'_SK_START = b"{marker}"\n')
    for text in (f"{marker}\nb3Bl", f'{{"key": "{marker}\\nb3Bl"}}', f"{marker}b3Bl", marker):
        assert SECRET.search(text), text
