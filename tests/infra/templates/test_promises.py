"""Every rendered template keeps every promise; every mutant is caught by the promise named for it."""

from __future__ import annotations

import pytest

from infra.templates.variants import ALL
from tests.infra.templates import serving_promises
from tests.infra.templates.loading import rendered
from tests.infra.templates.mutants import MUTANTS, Mutant
from tests.infra.templates.promises import PROMISES, broken

assert serving_promises.DIMENSIONS  # its promises are registered by the import


@pytest.mark.parametrize("variant", [variant.name for variant in ALL])
def test_a_rendered_template_keeps_every_promise(variant: str) -> None:
    assert broken(rendered(variant)) == {}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_mutant_is_caught_by_the_promise_named_for_it(mutant: Mutant) -> None:
    template = rendered(mutant.variant)
    mutant.change(template)
    assert template != rendered(mutant.variant), "the mutation changed nothing"
    assert mutant.killed_by in broken(template), f"nobody saw: {mutant.name}"


def test_every_promise_has_a_mutant_that_only_it_must_see() -> None:
    assert PROMISES.keys() == {mutant.killed_by for mutant in MUTANTS}
    assert len(MUTANTS) >= 60
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
