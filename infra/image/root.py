"""The image's file trees, laid out in the build stage: interpreter, packages, our own code.

Owns: copying what contents.py names, the libraries it is linked against, the list of what came from where.
Must not know: Docker, networks. Runs in the build stage as root: standard library only.
Invariant: every file of the result is owned by root, has a fixed mode and time, and is on the list of
components; what is left out of a package is left out of its RECORD too.

    python3 -m infra.image.root VARIANT OUT EPOCH_S     OUT/base, OUT/packages, OUT/code: one layer each
"""

from __future__ import annotations

import fnmatch
import json
import os
import py_compile
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from infra.image import contents

LIBRARIES: Final = (
    "usr/lib/x86_64-linux-gnu" if os.uname().machine == "x86_64" else "usr/lib/aarch64-linux-gnu"
)
LOADERS: Final = {"x86_64": "/lib64/ld-linux-x86-64.so.2", "aarch64": "/lib/ld-linux-aarch64.so.1"}
ELF: Final = b"\x7fELF"
OWN: Final = ("container", "sagemaker_entry", "model_package")


def main(variant: str, out: Path, epoch_s: int) -> None:
    """Lay out the three trees below `out`; prints what was left out, in MB."""
    site = Path(contents.VENV, "lib", "python3.11", "site-packages")
    left_out = contents.PACKAGES_LEFT_OUT | contents.ROOMS_LEFT_OUT
    if variant == "cpu":
        left_out = left_out | contents.CPU_LEFT_OUT
    for pattern, size_bytes in prune(site, left_out).items():
        print(f"left out: {size_bytes / 1e6:7.1f} MB  {pattern}: {left_out[pattern]}")
    commands(Path(contents.VENV, "bin"), site)
    base, packages, code = (out / name for name in ("base", "packages", "code"))
    interpreter(base)
    compile_all(site, site)
    compile_all(base / contents.STDLIB.lstrip("/"), base)
    divide(Path(contents.VENV), packages, code)
    libraries(base, packages, code)
    describe(base, packages, variant)
    accounts(base)
    for tree in (base, packages, code):
        fix(tree, epoch_s)


def prune(site: Path, left_out: Mapping[str, str]) -> dict[str, int]:
    """Delete what `left_out` names from every installed package and its RECORD; return bytes per pattern.

    Raises AssertionError for a pattern that matches nothing: it is stale, or the package has moved.
    """
    sizes = dict.fromkeys(left_out, 0)
    for record in sorted(site.glob("*.dist-info/RECORD")):
        kept = []
        for line in record.read_text(encoding="utf-8").splitlines():
            name = line.rsplit(",", 2)[0].strip('"')
            matched = next((pattern for pattern in left_out if fnmatch.fnmatchcase(name, pattern)), None)
            if matched is None:
                kept.append(line)
            else:
                sizes[matched] += (site / name).stat().st_size
                (site / name).unlink()
        record.write_text("\n".join([*kept, ""]), encoding="utf-8")
    for folder in sorted((path for path in site.rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
    stale = [pattern for pattern, size_bytes in sizes.items() if not size_bytes]
    assert not stale, f"nothing matches {stale}"
    return sizes


def commands(folder: Path, site: Path) -> None:
    """Leave the interpreter and our two verbs in `folder`; nothing of what packages put beside their code."""
    for path in sorted(folder.iterdir()):
        path.unlink()
    for beside in ("include", "share"):
        shutil.rmtree(folder.parent / beside, ignore_errors=True)
    (folder / "python").symlink_to(contents.PYTHON)
    for verb in contents.VERBS:
        command = folder / verb
        command.write_text(contents.COMMAND.format(venv=contents.VENV, verb=verb))
        command.chmod(0o755)
    for record in site.glob("*.dist-info/RECORD"):
        lines = record.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if not line.startswith("../../../")]
        record.write_text("\n".join([*kept, ""]), encoding="utf-8")


def interpreter(base: Path) -> None:
    """Copy Python and its standard library."""
    place(Path(contents.PYTHON), base, contents.PYTHON)
    target = base / contents.STDLIB.lstrip("/")
    ignored = shutil.ignore_patterns(*contents.STDLIB_LEFT_OUT, "config-3.11-*")
    shutil.copytree(contents.STDLIB, target, ignore=ignored, symlinks=False)
    for path in sorted((target / "lib-dynload").iterdir()):
        if path.name.split(".")[0] in contents.EXTENSIONS_LEFT_OUT:
            path.unlink()


def compile_all(tree: Path, root: Path) -> None:
    """Write byte code beside every module; it is never compared with its source, so times do not matter.

    Without it every start compiles for seconds, and cannot keep the result under a read-only root.
    """
    for path in sorted(tree.rglob("*.py")):
        inside = path if root == tree else Path("/", path.relative_to(root))
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        try:
            py_compile.compile(str(path), dfile=str(inside), doraise=True, invalidation_mode=mode, quiet=2)
        except py_compile.PyCompileError:
            print(f"no byte code: {path.name} is not for this Python")


def divide(venv: Path, packages: Path, code: Path) -> None:
    """Copy the environment: what was installed into one tree, what is ours into another."""
    site = Path("lib", "python3.11", "site-packages")
    mine = [site / name for name in OWN]
    mine += [path.relative_to(venv) for path in (venv / site).glob("strongroom-*.dist-info")]
    mine += [Path("bin", verb) for verb in contents.VERBS]
    for path in mine:
        target = code / str(venv).lstrip("/") / path
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (venv / path).is_dir() else shutil.copy2
        copy(venv / path, target)

    def ours(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if Path(folder, name).relative_to(venv) in mine}

    target = packages / str(venv).lstrip("/")
    shutil.copytree(venv, target, ignore=ours, symlinks=True)


def libraries(base: Path, *others: Path) -> None:
    """Copy what any program or library of the trees is linked against and what no tree holds."""
    machine = os.uname().machine
    place(Path(LOADERS[machine]).resolve(), base, str(Path("/", LIBRARIES, Path(LOADERS[machine]).name)))
    for folder in ("lib", "lib64"):
        (base / folder).symlink_to(f"usr/{folder}")
    loader = base / "usr" / LOADERS[machine].lstrip("/")
    if not loader.exists():
        loader.parent.mkdir(parents=True, exist_ok=True)
        loader.symlink_to(Path("/", LIBRARIES, loader.name))
    for name in sorted({name for tree in (base, *others) for name in linked(tree)}):
        place(Path(name).resolve(), base, str(Path("/", LIBRARIES, Path(name).name)))
    place(Path("/usr/lib/locale/C.utf8"), base, "/usr/lib/locale/C.utf8")


def linked(tree: Path) -> Iterator[str]:
    """Yield the system's libraries that the ELF files of `tree` need, as paths of this stage."""
    for path in sorted(tree.rglob("*")):
        if not path.is_file() or path.is_symlink() or not _is_elf(path):
            continue
        # where the loader will find the neighbours: the tree stands elsewhere than it will
        said = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=False)  # noqa: S603, S607
        for line in said.stdout.splitlines():
            name, arrow, found = line.strip().partition(" => ")
            found = found.split(" (")[0]
            assert not arrow or found != "not found" or _is_neighbour(name, tree), f"{path.name} needs {name}"
            if arrow and found.startswith(("/lib/", "/usr/lib/")):
                yield found


def _is_neighbour(name: str, tree: Path) -> bool:
    return any(tree.rglob(name))


def _is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == ELF


def describe(base: Path, packages: Path, variant: str) -> None:
    """Write the list of components and copy Debian's licence texts."""
    listed: dict[str, dict[str, list[str] | str]] = {}
    for path in sorted(path for path in base.rglob("*") if path.is_file() and not path.is_symlink()):
        inside = str(Path("/", path.relative_to(base)))
        if "__pycache__" in inside:
            continue
        name, version = debian_package(inside)
        entry = listed.setdefault(name, {"version": version, "files": []})
        assert isinstance(entry["files"], list)
        entry["files"].append(inside)
    for name in listed:
        text = Path("/usr/share/doc", name, "copyright")
        place(text.resolve(), base, f"/usr/share/doc/{name}/copyright")
    site = packages / contents.VENV.lstrip("/") / "lib/python3.11/site-packages"
    wheels = sorted(path.name.removesuffix(".dist-info") for path in site.glob("*.dist-info"))
    document = {"variant": variant, "debian": listed, "python": wheels}
    target = base / "usr/share/strongroom/components.json"
    target.parent.mkdir(parents=True)
    target.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    place(Path("/build/source/LICENSE"), base, "/usr/share/doc/strongroom/LICENSE")


def debian_package(path: str) -> tuple[str, str]:
    """Return name and version of the package that a file of this stage came with."""
    names = {path, path.removeprefix("/usr"), str(Path(path).resolve())}
    names |= {name.removeprefix("/usr") for name in names}
    for name in sorted(names):
        found = _dpkg("-S", name)
        if found:
            package = found.splitlines()[0].split(": ")[0].split(",")[0]
            return package.split(":")[0], _dpkg("-W", "-f", "${Version}", package, program="dpkg-query")
    raise AssertionError(f"no package has `{path}`")


def _dpkg(*arguments: str, program: str = "dpkg") -> str:
    command = [program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603


def accounts(base: Path) -> None:
    """Write who exists, and make the one place that is writable."""
    etc = base / "etc"
    etc.mkdir()
    for name, text in (
        ("passwd", contents.PASSWD),
        ("group", contents.GROUP),
        ("nsswitch.conf", contents.NSSWITCH),
    ):
        (etc / name).write_text(text)
    # the last two are where a model and the folder of a Unix socket are mounted
    for folder in ("tmp", "proc", "sys", "dev", "opt/ml/model", "run/strongroom"):
        (base / folder).mkdir(parents=True, exist_ok=True)


def place(source: Path, base: Path, target: str) -> None:
    """Copy a file or folder of this stage to `target` in the tree; what is there already stays."""
    path = base / target.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, path)
    elif not path.exists():
        shutil.copyfile(source, path)
        path.chmod(0o755 if os.access(source, os.X_OK) else 0o644)


def fix(tree: Path, epoch_s: int) -> None:
    """Give every entry one owner, one time, and a mode that lets nobody but root write."""
    for path in _bottom_up(tree):
        os.chown(path, 0, 0, follow_symlinks=False)
        if not path.is_symlink():
            runs = path.is_dir() or path.stat().st_mode & 0o111
            path.chmod(0o755 if runs else 0o644)
        os.utime(path, (epoch_s, epoch_s), follow_symlinks=False)
    temporary = tree / "tmp"
    if temporary.is_dir():
        temporary.chmod(0o1777)


def _bottom_up(tree: Path) -> Iterable[Path]:
    return [*sorted(tree.rglob("*"), reverse=True), tree]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
