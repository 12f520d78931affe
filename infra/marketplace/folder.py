"""A listing's folder: written once from facts, looked at again as often as wanted.

Owns: which files there are, the check. Must not know: how facts were got, how a page reads.
Invariant: `listing.json` holds all facts and every other file follows from them; a folder with a file more, a
file less or a byte changed does not pass.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from infra import validation
from infra.marketplace import notebook, request, rules, samples, texts
from infra.marketplace.figures import Quality, Speed
from infra.marketplace.vendor import Vendor
from infra.report import CommandError, ExitCode, Result

FORMAT: Final = 1
FACTS: Final = "listing.json"
ARNS: Final = "arn_map.json"
REQUESTS: Final = "requests"
FILE_BYTES: Final = 16 * 1024 * 1024


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that a listing is made of."""

    format: int
    vendor: Vendor
    terms: str
    model: request.Model
    speeds: tuple[Speed, ...]
    quality: Quality | None
    recording: samples.Recording
    notebook_sha256: str  # as it was executed


def derived(facts: Facts) -> dict[str, bytes]:
    """Return the files that follow from the facts, by their name in the folder."""
    made = {
        request_name(region): _json(held)
        for region, held in request.requests(facts.vendor, facts.model, facts.recording.batch_type).items()
    }
    made[ARNS] = _json(request.arn_map(facts.vendor))
    made[FACTS] = _json(msgspec.to_builtins(facts))
    return made | {name: text.encode() for name, text in texts.pages(facts).items()}


def request_name(region: str) -> str:
    """Return where the request for a region lies."""
    return f"{REQUESTS}/{region}.json"


def write(out: Path, facts: Facts, recorded: Mapping[str, bytes]) -> Result:
    """Write a new folder and check it; raises CommandError where `out` exists."""
    refused = [
        f"{one['where']}: {one['detail']}" for one in _facts_findings(facts) if one["state"] == "refused"
    ]
    if refused:
        hint = (
            f"{len(refused) - 1} more: correct the vendor file"
            if len(refused) > 1
            else "correct the vendor file"
        )
        raise CommandError(ExitCode.VERIFICATION_FAILED, "listing_refused", refused[0], hint)
    try:
        out.mkdir(parents=True)
        for name, data in {**derived(facts), **recorded}.items():
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_bytes(data)
    except FileExistsError as error:
        hint = "name a new folder; a listing is built whole"
        raise CommandError(ExitCode.USAGE, "bad_argument", f"`{out.name}` exists", hint) from error
    except OSError as error:
        message = f"`{out.name}` cannot be written"
        raise CommandError(
            ExitCode.ENVIRONMENT_MISSING, "system_refused", message, "check space and modes"
        ) from error
    return check(out)


def check(folder: Path) -> Result:
    """Return all findings about a folder; nothing outside it is asked. Raises CommandError for no listing."""
    files = _files(folder)
    try:
        facts = msgspec.json.decode(files.pop(FACTS, b""), type=Facts)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        message = f"`{FACTS}` is no listing: {str(error)[:1].lower()}{str(error)[1:]}"
        raise CommandError(ExitCode.VERIFICATION_FAILED, "no_listing", message, "build it again") from error
    findings = [*_folder_findings(facts, files), *_facts_findings(facts)]
    return {
        "ok": not any(one["state"] == "refused" for one in findings),
        "folder": str(folder),
        "product": facts.vendor.product.package_name,
        "regions": [source.region for source in facts.vendor.regions],
        "files": len(files) + 1,
        "findings": findings,
    }


def _folder_findings(facts: Facts, files: dict[str, bytes]) -> Iterator[dict[str, str]]:
    """Yield what differs between the files and what the facts give."""
    if facts.format != FORMAT:
        yield _finding("refused", FACTS, f"`format` is {facts.format}; this version reads {FORMAT}")
    given = derived(facts)
    del given[FACTS]
    for name in sorted(set(files) - set(given) - {*samples.FILES, notebook.NAME}):
        yield _finding("refused", name, "the file is not a part of a listing")
    for name in sorted(set(given) - set(files)):
        yield _finding("refused", name, "the file is missing")
    for name in sorted(set(given) & set(files)):
        if files[name] == given[name]:
            continue
        if name.startswith(f"{REQUESTS}/"):
            yield from _request_findings(name, files[name], given[name])
        else:
            yield _finding("refused", name, f"the file differs from what `{FACTS}` gives")
    for fault in _notebook_faults(facts, files.get(notebook.NAME)):
        yield _finding("refused", notebook.NAME, fault)
    for fault in samples.faults(
        facts.recording, {name: data for name, data in files.items() if name in samples.FILES}
    ):
        yield _finding("refused", samples.FOLDER, fault)


def _notebook_faults(facts: Facts, data: bytes | None) -> Iterator[str]:
    if data is None:
        yield "the file is missing"
        return
    if hashlib.sha256(data).hexdigest() != facts.notebook_sha256:
        yield f"`{notebook.NAME}` is not what was executed"
    yield from notebook.faults(data, notebook.cells(facts.vendor, facts.recording.batch_type))


def _request_findings(name: str, data: bytes, given: bytes) -> Iterator[dict[str, str]]:
    """Yield each field of a changed request, and what AWS would refuse of it."""
    try:
        held: Any = json.loads(data)
    except ValueError:
        held = None
    if not isinstance(held, dict):
        yield _finding("refused", name, "the request is no JSON object")
        return
    for path in differences(json.loads(given), held):
        yield _finding("refused", name, f"`{path}` differs from what `{FACTS}` gives")
    region = name.removeprefix(f"{REQUESTS}/").removesuffix(".json")
    yield from _refusals(name, held, region)


def _facts_findings(facts: Facts) -> Iterator[dict[str, str]]:
    """Yield what AWS or Marketplace would refuse of the facts themselves."""
    made = request.requests(facts.vendor, facts.model, facts.recording.batch_type)
    for region, held in made.items():
        yield from _refusals(request_name(region), held, region)
    for fault in rules.vendor_faults(facts.vendor, facts.recording.metered, facts.recording.locked):
        yield _finding("refused", FACTS, fault)
    for caution in rules.cautions(facts.vendor, {one.origin.instance_type for one in facts.speeds}):
        yield _finding("warn", FACTS, caution)


def _refusals(name: str, held: dict[str, Any], region: str) -> Iterator[dict[str, str]]:
    found = validation.faults("sagemaker", "CreateModelPackage", held)
    for fault in found:
        yield _finding("refused", name, fault)
    if any("Invalid type" in fault for fault in found):
        return  # the rules read fields whose types are right
    for fault in rules.region_faults(held, region):
        yield _finding("refused", name, fault)


def differences(expected: Any, found: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted path of each value that differs between two JSON documents."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name in sorted(set(expected) | set(found)):
            inner = f"{path}.{name}".lstrip(".")
            if name in expected and name in found:
                yield from differences(expected[name], found[name], inner)
            else:
                yield inner
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for index, (one, other) in enumerate(zip(expected, found, strict=True)):
            yield from differences(one, other, f"{path}.{index}")
    elif expected != found or type(expected) is not type(found):
        yield path


def show(result: Result) -> None:
    """Print a line a finding."""
    state = "passes" if result["ok"] else "does not pass"
    print(
        f"{result['product']} in {', '.join(result['regions'])}: {result['files']} files, the folder {state}"
    )
    for one in result["findings"]:
        print(f"{'FAIL' if one['state'] == 'refused' else 'WARN'}  {one['where']}: {one['detail']}")


def _files(folder: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    if not (folder / FACTS).is_file():
        hint = "build one with `strongroom listing build`"
        raise CommandError(ExitCode.USAGE, "no_listing", f"`{folder.name}` holds no `{FACTS}`", hint)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or (path.is_file() and path.stat().st_size > FILE_BYTES):
            raise CommandError(ExitCode.VERIFICATION_FAILED, "no_listing", f"`{name}` is a link or too large")
        if path.is_file():
            found[name] = path.read_bytes()
    return found


def _finding(state: str, where: str, detail: str) -> dict[str, str]:
    return {"state": state, "where": where, "detail": detail}


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
