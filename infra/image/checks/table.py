"""The table of checks: number, title, function.

Owns: registration, the running of all of them.
Must not know: what a check looks at.
Invariant: a number belongs to one check; a check that raises has failed, it never passes by accident.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Subject = TypeVar("Subject")
Findings = list[str]


@dataclass(frozen=True, slots=True)
class Result:
    """One check's outcome; `findings` is None when it was not run."""

    number: int
    title: str
    findings: tuple[str, ...] | None

    @property
    def passed(self) -> bool:
        return self.findings == ()


class Table(Generic[Subject]):
    """Checks over one kind of subject."""

    def __init__(self) -> None:
        self.checks: dict[int, tuple[str, Callable[[Subject], Findings]]] = {}

    def check(
        self, number: int, title: str
    ) -> Callable[[Callable[[Subject], Findings]], Callable[[Subject], Findings]]:
        """Register the decorated function under a number."""

        def register(function: Callable[[Subject], Findings]) -> Callable[[Subject], Findings]:
            assert number not in self.checks, f"check {number} is there already"
            self.checks[number] = (title, function)
            return function

        return register

    def run(self, subject: Subject) -> list[Result]:
        """Return every check's outcome over `subject`."""
        return [
            Result(number, title, _findings(function, subject))
            for number, (title, function) in sorted(self.checks.items())
        ]


def _findings(function: Callable[[Subject], Findings], subject: Subject) -> tuple[str, ...]:
    try:
        return tuple(function(subject))
    except Exception as error:  # noqa: BLE001  what cannot be checked has not passed
        return (f"the check itself failed: {type(error).__name__}",)
