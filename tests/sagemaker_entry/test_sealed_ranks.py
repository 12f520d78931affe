"""The whole endpoint over a sealed package on two ranks: the plain answers, and to each rank its own part."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_package import layout
from sagemaker_entry.supervisor import EXIT_KEY, EXIT_PACKAGE
from tests.model_package import making
from tests.ranks.test_followers import followers_of
from tests.sagemaker_entry import sealed_model
from tests.sagemaker_entry.sealed_model import Made, RealServer, copies, refused

pytestmark = pytest.mark.timeout(600)  # each of three processes imports torch, on cores that others hold
TWO = {"STRONGROOM_TENSOR_PARALLEL": "2", "STRONGROOM_THREADS": "2"}
READ = re.compile(  # file, offset and length; os.preadv is preadv2 without flags where the kernel has it
    r"preadv2?\(\d+<[^>]*/([0-9a-f]{32}\.sealed)>, \[.*\], 1, (\d+)(?:, 0)?\) += (\d+)"
)
PARTS = {scheme: f"parts/tp2-{scheme}/model-rank-{{}}-of-2.safetensors" for scheme in ("none", "int8-block")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return sealed_model.make(tmp_path_factory.mktemp("sealed"), [(2, scheme) for scheme in PARTS])


class Ranks(RealServer):
    """An endpoint on two ranks."""

    def __init__(self, directory: Path, **environment: str) -> None:
        super().__init__(directory, **TWO | environment)

    def ranks(self) -> list[int]:
        rank_0 = [e["child_pid"] for e in self.events("child_started") if e["child"] == "engine"][-1]
        return [rank_0, *followers_of(rank_0)]


def sealed(made: Made, directory: Path, scheme: str, **changes: str) -> Ranks:
    told = {"STRONGROOM_QUANTIZE": scheme, "STRONGROOM_DTYPE": "float32"}
    return Ranks(directory, **made.environment | told | changes)


def plain(made: Made, directory: Path, scheme: str, **changes: str) -> list[bytes]:
    """Return what an endpoint says that serves the plain files."""
    told = {"STRONGROOM_MODEL": str(made.plain), "STRONGROOM_SERVED_NAME": "tiny"}
    told |= {"STRONGROOM_QUANTIZE": scheme, "STRONGROOM_DTYPE": "float32"}
    with RealServer(directory, **told | changes) as server:
        return server.answers()


@pytest.fixture(scope="module")
def expected(made: Made, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """What one rank says that computes in full precision: two differ in the order of their sums alone."""
    answers = plain(made, tmp_path_factory.mktemp("plain"), "none")
    assert len(set(answers)) == len(answers), "answers that are all the same show nothing"
    return answers


def test_two_ranks_answer_as_one_keep_no_key_and_read_their_own_part_alone(
    made: Made, expected: list[bytes], tmp_path: Path
) -> None:
    calls = tmp_path / "calls"
    server = sealed(made, tmp_path / "server", "none")
    if shutil.which("strace"):
        server.launcher, server._arguments = "tests.sagemaker_entry.traced", [str(calls), "reads"]
    with server:
        assert server.answers() == expected
        assert server.metric("strongroom_package_sealed") == 1
        assert "engine opened the package" in server.log
        ranks, processes = server.ranks(), server.processes()
        assert len(ranks) == 2 and set(ranks) < set(processes)
        assert sum(copies(pid, [b"STRONGROOM_SERVED_NAME"]) for pid in processes) > 0, "the scan sees nothing"
        assert [copies(pid, made.secrets) for pid in processes] == [0] * len(processes)
    assert server.process.returncode == 0, server.log
    if calls.exists():
        check_reads(made, calls.read_text(), ranks)


def check_reads(made: Made, trace: str, ranks: list[int]) -> None:
    """Hold what each rank read against its own part: all of that, and nothing of other tensors."""
    names = {entry.stored_name: entry for entry in made.manifest.files}
    starts = {stored: data_start(made.package / stored) for stored in names}
    read: dict[int, dict[str, int]] = {pid: {} for pid in ranks}
    born: dict[int, int] = {}  # thread or process -> who made it
    for thread, call in calls_of(trace):
        if found := re.fullmatch(r"(?:clone3?|v?fork)\(.*= (\d+)", call):
            born[int(found[1])] = thread
        elif ".sealed>" in call:
            found = READ.fullmatch(call)
            assert found, f"read in a way that this test does not know: {call}"
            while thread not in read:
                thread = born[thread]  # up to the rank that it is a thread of
            stored, offset, count = found[1], int(found[2]), int(found[3])
            if names[stored].kind is layout.Kind.TENSORS and offset >= starts[stored]:
                of_rank = read[thread]
                of_rank[stored] = of_rank.get(stored, 0) + count
    for rank, pid in enumerate(ranks):
        (own,) = (entry for entry in made.manifest.files if entry.name == PARTS["none"].format(rank))
        assert read[pid] == {own.stored_name: own.size - starts[own.stored_name]}


def calls_of(trace: str) -> Iterator[tuple[int, str]]:
    """Yield thread and call of each line of strace, those that others interrupted in one piece."""
    begun: dict[str, str] = {}
    for line in trace.splitlines():
        thread, _, call = line.partition(" ")
        call = call.strip()
        if call.endswith(" <unfinished ...>"):
            begun[thread] = call.removesuffix(" <unfinished ...>")
        elif found := re.match(r"<\.\.\. \w+ resumed>", call):
            yield int(thread), begun.pop(thread) + call[found.end() :]
        else:
            yield int(thread), call


def data_start(path: Path) -> int:
    """Return where the first tensor's chunks lie, behind header, index and table of contents."""
    content = path.read_bytes()
    header = layout.parse_header(content[: layout.HEADER_BYTES], len(content))
    toc = layout.toc_segment(header)
    return toc.offset + toc.plain_bytes + layout.TAG_BYTES * toc.chunks


def test_two_quantized_ranks_answer_as_two_plain_ones(made: Made, tmp_path: Path) -> None:
    with sealed(made, tmp_path / "sealed", "int8-block") as server:
        answers = server.answers()
    assert answers == plain(made, tmp_path / "plain", "int8-block", **TWO)


def test_ranks_that_connect_to_each_other_answer_the_same(
    made: Made, expected: list[bytes], tmp_path: Path
) -> None:
    server = sealed(made, tmp_path, "none")
    server.launcher = "tests.sagemaker_entry.sealed_gloo"
    with server:
        assert len(server.ranks()) == 2
        assert server.answers() == expected


def test_another_key_is_refused_in_one_line(made: Made, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(bytes(making.key("other")))
    key.chmod(0o400)
    said = refused(sealed(made, tmp_path / "server", "none", STRONGROOM_KEY=f"file:{key}"), EXIT_KEY)
    assert "key_refused: the key is not this package's" in said


@pytest.mark.parametrize("name", [PARTS["none"].format(0), PARTS["none"].format(1)])
@pytest.mark.parametrize("launcher", ["sagemaker_entry", "tests.sagemaker_entry.sealed_gloo"])
def test_a_turned_bit_in_one_ranks_part_is_refused_in_one_line(
    made: Made, tmp_path: Path, name: str, launcher: str
) -> None:
    package = made.flipped(tmp_path / "package", name)
    server = sealed(made, tmp_path / "server", "none", STRONGROOM_MODEL=package)
    server.launcher = launcher
    assert "package_refused: " in (said := refused(server, EXIT_PACKAGE))
    assert "corrupted or tampered with" in said
    assert ("rank 1: " in said) == ("rank-1-of-2" in name)


def test_a_turned_bit_in_what_both_ranks_read_is_refused_in_one_line(made: Made, tmp_path: Path) -> None:
    package = made.flipped(tmp_path / "package", "parts/tp2-none/manifest.json")
    said = refused(sealed(made, tmp_path / "server", "none", STRONGROOM_MODEL=package), EXIT_PACKAGE)
    assert "corrupted or tampered with" in said


def test_a_turned_bit_in_a_scheme_that_is_not_served_is_not_read(
    made: Made, expected: list[bytes], tmp_path: Path
) -> None:
    package = made.flipped(tmp_path / "package", PARTS["int8-block"].format(1))
    with sealed(made, tmp_path / "server", "none", STRONGROOM_MODEL=package) as server:
        assert server.answers() == expected
