"""Which grammar a request runs under: its own, its fallback where that one is at fault, or none at all."""

from __future__ import annotations

import pytest

from container.engine.request import Grammar, GrammarKind, SamplingParams
from sagemaker_entry.errors import ApiError, Code
from sagemaker_entry.generation import GenerationRequest, TextPrompt
from sagemaker_entry.service import with_followed_grammar

EXACT = Grammar(GrammarKind.LARK, "exact")
LOOSE = Grammar(GrammarKind.LARK, "loose")


def request(grammar: Grammar | None, fallback: Grammar | None = None) -> GenerationRequest:
    return GenerationRequest(
        (TextPrompt("x"),),
        SamplingParams(grammar=grammar),
        grammar_field="tools",
        grammar_fallback=fallback,
    )


class Check:
    """Refuses the grammars whose text is listed."""

    def __init__(self, *refused: str, code: Code = Code.INVALID_VALUE) -> None:
        self.refused = refused
        self.code = code
        self.asked: list[tuple[str, str]] = []

    def __call__(self, grammar: Grammar, field: str) -> None:
        self.asked.append((grammar.text, field))
        if grammar.text in self.refused:
            raise ApiError(self.code, param=field, rule="followed")


def test_a_request_without_a_grammar_is_not_checked() -> None:
    check = Check()
    plain = request(None, LOOSE)
    assert with_followed_grammar(plain, check) is plain and not check.asked


def test_a_grammar_that_passes_is_followed() -> None:
    check = Check("loose")
    made = request(EXACT, LOOSE)
    assert with_followed_grammar(made, check) is made
    assert check.asked == [("exact", "tools")], "the fallback is not looked at"


def test_a_grammar_at_fault_gives_way_to_its_fallback() -> None:
    check = Check("exact")
    followed = with_followed_grammar(request(EXACT, LOOSE), check)
    assert followed.sampling.grammar == LOOSE
    assert check.asked == [("exact", "tools"), ("loose", "tools")]


@pytest.mark.parametrize(
    ("check", "fallback"),
    [
        (Check("exact"), None),
        (Check("exact", "loose"), LOOSE),
        (Check("exact", code=Code.OVERLOADED), LOOSE),
    ],
)
def test_otherwise_the_request_is_refused(check: Check, fallback: Grammar | None) -> None:
    with pytest.raises(ApiError) as caught:
        with_followed_grammar(request(EXACT, fallback), check)
    assert caught.value.code is check.code
