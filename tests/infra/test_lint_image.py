"""The linters' verdict over the Dockerfile: what counts as a failure, and that faults are really planted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.infra.linting import dockerfile

SEEN = {"DS002": {"DS001", "DS002"}, "DS004": {"DS001", "DS004"}}


def test_only_what_has_a_reason_may_be_found() -> None:
    assert dockerfile.judge("trivy", {"DS001"}, SEEN) == []
    (wrong,) = dockerfile.judge("trivy", {"DS001", "DS005"}, SEEN)
    assert wrong == "trivy: DS005 is broken and has no reason"


def test_a_reason_that_nothing_needs_any_more_is_a_failure() -> None:
    assert dockerfile.judge("trivy", set(), SEEN) == ["trivy: DS001 has a reason and is not broken"]


def test_a_linter_that_does_not_see_what_is_planted_is_a_failure() -> None:
    (wrong,) = dockerfile.judge("trivy", {"DS001"}, SEEN | {"DS004": {"DS001"}})
    assert wrong == "trivy: does not see DS004 where it is planted"


@pytest.mark.parametrize("name", dockerfile.LINTERS)
def test_every_linter_has_faults_planted_in_a_copy_of_the_real_file(name: str, tmp_path: Path) -> None:
    assert dockerfile.PLANTED[name].keys().isdisjoint(dockerfile.ANSWERED[name])
    for rule, line in dockerfile.PLANTED[name].items():
        copy = dockerfile.faulty(tmp_path / rule, line).read_text().splitlines()
        assert [one for one in copy if one not in dockerfile.DOCKERFILE.read_text().splitlines()] == [line]
        assert copy.index(line) + 1 == next(i for i, one in enumerate(copy) if one.startswith("ENTRYPOINT"))
