"""Is a runner's result an answer to the plan it was given?

Owns: matching result rows to sequences, and the rules they must meet.
Must not know: policy, what follows from a result. Standard library only.
Invariant: nothing of a result is used before all of it has been found to fit its plan.
"""

from __future__ import annotations

from collections.abc import Iterable

from container.engine.planning import Step
from container.engine.sequence import Sequence, State
from container.engine.step import ROW_PROMPT_LOGPROBS, ROW_SAMPLES, RowResult, StepResult


class BrokenResult(Exception):
    """A runner returned something that is no answer to its plan; handled as a failed step."""


def match(step: Step, result: StepResult, vocabulary: int) -> dict[Sequence, RowResult]:
    """Return each asking row's result by its sequence, but for those that ended while the step was under way.

    Raises BrokenResult when the two do not fit.
    """
    asking = ROW_SAMPLES | ROW_PROMPT_LOGPROBS
    asked = [row for row, flags in enumerate(step.plan.flags) if flags & asking]
    if result.number != step.plan.number or [row.row for row in result.rows] != asked:
        raise BrokenResult("the result has other rows than the plan asked for")
    outcome: dict[Sequence, RowResult] = {}
    for row in result.rows:
        sequence, count = step.rows[row.row]
        if (row.ended or row.grammar_failed) and sequence.sampling.grammar is None:
            raise BrokenResult("a row tells of a grammar that its sequence does not have")
        if not row.failed:
            _check_row(
                row, sequence, (step.plan.starts[row.row], count), step.plan.flags[row.row], vocabulary
            )
            _check_accepted(row, step.drafts.get(sequence, ()))
        if sequence.state is not State.FINISHED:
            outcome[sequence] = row
    return outcome


def _check_row(
    row: RowResult, sequence: Sequence, tokens: tuple[int, int], flags: int, vocabulary: int
) -> None:
    """Check one row of `tokens` (first position, count)."""
    start, count = tokens
    if (row.sampled is not None) != bool(flags & ROW_SAMPLES):
        raise BrokenResult("a row sampled that should not, or did not sample")
    if row.sampled is not None and not 0 <= row.sampled.token < vocabulary:
        raise BrokenResult("a sampled token is outside the vocabulary")
    wanted = 0
    if flags & ROW_PROMPT_LOGPROBS:
        wanted = min(start + count, sequence.prompt_tokens - 1) - start
    if len(row.prompt_logprobs) != wanted:
        raise BrokenResult(f"a row has {len(row.prompt_logprobs)} prompt logprobs instead of {wanted}")


def _check_accepted(row: RowResult, drafts: Iterable[int]) -> None:
    guessed = tuple(drafts)[: len(row.accepted)]
    if tuple(token.token for token in row.accepted) != guessed:
        raise BrokenResult("a row accepted what was no draft of it")
