"""A rank's way into the sealed package: signature first, then the key, then what the front is to know.

Owns: the order of opening, which words a refusal gets, what the model room is handed.
Must not know: the package's format, torch, HTTP.
Invariant: nothing of the package is parsed before its signature holds, nothing is published before its key
fits; there is no other way to a model from here. Once loading is over no cipher and no key is left.

    rank 0   verify -> (wait for the key) -> unlock -> publish small files -> load -> close
    others   wait until rank 0 has published     -> verify -> unlock       -> load -> close
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from container.ranks.assembly import Report, StartFailed
from container.ranks.config import EngineConfig
from container.ranks.heartbeat import LoadPhase, StartFault
from container.ranks.place import Place
from model_package import licence, opener, providers, public_keys
from model_package.hpke import HpkeError
from model_package.keeping import KeptSource
from model_package.layout import Kind
from model_package.licence import Licensing
from model_package.manifest import Manifest
from model_package.opener import Contents, Package, SealedTensor, Trust
from model_package.outcome import Outcome, PackageError
from model_package.recipients import Owner
from model_package.refusal import KeyRefused, Refusal
from model_package.signature import Root, Roots
from sagemaker_entry.model_files import NAMES
from sagemaker_entry.sealed import board, waiting
from sagemaker_entry.sealed.holding import INVOCATION
from sagemaker_entry.sealed.plan import Plan
from sagemaker_entry.settings import variable

BOARD_POLL_S: Final = 0.02
MAX_THREADS: Final = 8  # that decrypt; memory is the limit from about there on
TOLD_EVERY_S: Final = 2.0
MIB: Final = 1024 * 1024
Moved = Callable[[int, float], None]  # plain bytes, seconds
# What is wrong is the key and not the package.
ABOUT_KEYS: Final = frozenset({Outcome.KEY_WRONG, Outcome.RECIPIENT_MISSING, Outcome.RECIPIENT_WRONG})
PLAIN: Final = (
    "the model is not sealed, and this endpoint serves sealed packages alone; hint: seal it with "
    f"`strongroom package build`, or set `{variable('allow_plaintext')}=on`"
)


@dataclass(frozen=True, slots=True)
class Descriptors:
    """What PID 1 handed on."""

    board: int
    unlock: int
    key: int | None = None


class Opened:
    """Implements container.model.opened.Opener over a package's contents."""

    refuses: type[Exception] = PackageError

    def __init__(self, contents: Contents, moved: Moved) -> None:
        self._contents = contents
        self._moved = moved

    def file(self, name: str) -> bytes | None:
        return self._contents.file(name)

    def tensor_files(self) -> tuple[str, ...]:
        return self._contents.names(Kind.TENSORS)

    def tensors(self, name: str) -> Iterator[Tensor]:
        return (Tensor(each, self._moved) for each in self._contents.tensors(name))


@dataclass(frozen=True, slots=True)
class Tensor:
    """A sealed tensor whose reading is counted."""

    sealed: SealedTensor
    _moved: Moved

    @property
    def name(self) -> str:
        return self.sealed.name

    @property
    def dtype(self) -> str:
        return self.sealed.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sealed.shape

    @property
    def data_bytes(self) -> int:
        return self.sealed.data_bytes

    def read_into(self, memory: memoryview) -> None:
        began_s = time.monotonic()
        self.sealed.read_into(memory)
        self._moved(self.data_bytes, time.monotonic() - began_s)


class Meter:
    """How much was opened and how fast, told to the operator as it goes; counts and no names."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._bytes = 0
        self._busy_s = 0.0
        self._told_s = time.monotonic()

    def moved(self, opened_bytes: int, took_s: float) -> None:
        """Note that so many plain bytes came out in so long."""
        self._bytes += opened_bytes
        self._busy_s += took_s
        now_s = time.monotonic()
        if now_s - self._told_s >= TOLD_EVERY_S:
            self._told_s = now_s
            self._tell(f"engine opening the package: {self._text()}")

    def end(self) -> None:
        """Say what it came to."""
        self._tell(f"engine opened the package: {self._text()}")

    def _text(self) -> str:
        rate = self._bytes / 1e9 / max(self._busy_s, 1e-6)
        return f"{self._bytes / MIB:.0f} MiB in {self._busy_s:.2f} s, {rate:.2f} GB/s"


@contextmanager
def opening(
    plan: Plan,
    fds: Descriptors,
    tell: Callable[[str], None],
    config: EngineConfig,
    report: Report,
    place: Place,
) -> Iterator[Opened]:
    """Yield the opened package to load from, and drop its keys; raises StartFailed."""
    report(LoadPhase.OPENING)
    while place.rank > 0 and not board.published(fds.board):
        time.sleep(BOARD_POLL_S)  # rank 0 verifies, and waits for the key where one has to come
        report(LoadPhase.OPENING)
    meter = Meter(tell)
    with ExitStack() as held:
        contents = _refusing(config, lambda: _contents(held, plan, fds, config, report, place))
        yield Opened(contents, meter.moved)
    if place.rank == 0:
        meter.end()


def _contents(
    held: ExitStack, plan: Plan, fds: Descriptors, config: EngineConfig, report: Report, place: Place
) -> Contents:
    """Return the unlocked package, to be closed by `held`; published if this is the first engine's rank 0."""
    restarted = board.published(fds.board)
    package = held.enter_context(opener.open_package(Path(config.model_dir), trust(plan)))
    if plan.prove_whole and not restarted:
        package.prove_whole(lambda _: report(LoadPhase.OPENING))
    asked = _provider(plan, fds, restarted=restarted)
    data_key = _data_key(plan, fds, package, asked, report)
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    contents = held.enter_context(package.unlock(data_key, threads))
    if place.rank == 0:
        _publish(fds.board, package.manifest, contents, _licence(asked))
    return contents


def trust(plan: Plan) -> Trust:
    """Return what the reader knows from outside the package; raises KeyRefused."""
    roots = tuple(
        Root(public_keys.parse(text, public_keys.Kind.SIGNING).raw, not_after_s)
        for text, not_after_s in plan.roots
    )
    owner = Owner(plan.owner)
    by_owner = Roots(vendor=roots) if owner is Owner.VENDOR else Roots(customer=roots)
    return Trust(owner, by_owner, plan.started_s, plan.min_epoch)


def _provider(plan: Plan, fds: Descriptors, *, restarted: bool) -> providers.Provider | None:
    """Return who has the key, None for a key that comes in a call. Raises KeyRefused."""
    kept = None if fds.key is None else KeptSource(fds.key)
    if plan.key == INVOCATION:
        return providers.Given(kept) if restarted and kept is not None else None
    licensing = None
    if plan.owner == Owner.VENDOR:
        state = None if plan.state_dir is None else Path(plan.state_dir)
        licensing = Licensing(trust(plan).roots.vendor, lambda: plan.started_s, state, started=restarted)
    return providers.provider(plan.key, providers.Means({}, licensing=licensing, kept=kept))


def _data_key(
    plan: Plan, fds: Descriptors, package: Package, asked: providers.Provider | None, report: Report
) -> bytearray:
    if asked is not None:
        return asked.data_key(package.manifest)
    if fds.key is None:
        raise KeyRefused(Refusal.SOURCE_WITHOUT_CALLS)
    return waiting.wait(
        package.manifest, plan.image_version, fds.unlock, fds.key, lambda: report(LoadPhase.LOCKED)
    )


def _licence(asked: providers.Provider | None) -> board.Licence | None:
    """Return the end of the licence that was admitted."""
    if not isinstance(asked, providers.Licensed):
        return None
    verdict = licence.admit(asked.path, dataclasses.replace(asked.licensing, started=True))
    return board.Licence(verdict.licence.terms.not_after_s)


def _publish(fd: int, manifest: Manifest, contents: Contents, term: board.Licence | None) -> None:
    """Tell the front, once. Raises StartFailed where another package lies there than was served before."""
    before = board.read(fd)
    if before is not None:
        if before.content_sha256 != manifest.content_sha256:
            raise StartFailed(
                StartFault.PACKAGE_REFUSED,
                "the package was exchanged while it was served; hint: start the container anew",
            )
        return
    files = {name: content for name in NAMES if (content := contents.file(name)) is not None}
    board.publish(fd, board.Published(content_sha256=manifest.content_sha256, licence=term, files=files))


def _refusing(config: EngineConfig, call: Callable[[], Contents]) -> Contents:
    """Return what `call` does; a refusal becomes StartFailed, raised from here: a traceback holds frames."""
    try:
        return call()
    except PackageError as error:
        fault = StartFault.KEY_REFUSED if error.outcome in ABOUT_KEYS else StartFault.PACKAGE_REFUSED
        text = f"{error.message}; hint: {error.hint}"
        if error.outcome in (Outcome.MANIFEST_MISSING, Outcome.SIGNATURE_MISSING):
            text = PLAIN if Path(config.model_dir, "config.json").exists() else text
    except (KeyRefused, HpkeError) as refused:
        fault, text = StartFault.KEY_REFUSED, f"{refused.message}; hint: {refused.hint}"
    raise StartFailed(fault, text)
