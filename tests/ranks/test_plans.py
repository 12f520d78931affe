"""Commands as bytes: what goes in comes out, and nothing else is a command."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from container.engine.request import SamplingParams
from container.engine.step import SlotAssignment, StepPlan, ints
from container.ranks.plans import HEAD, MAGIC, NO_SAMPLING, PARTS, BadCommand, Order, decode, encode

int32 = st.integers(-(2**31), 2**31 - 1)
numbers = st.integers(0, 2**63 - 1)


def arrays(count: int | None = None, multiple: int = 1) -> st.SearchStrategy[array[int]]:
    if count is not None:
        return st.lists(int32, min_size=count, max_size=count).map(ints)
    return st.lists(st.tuples(*(int32,) * multiple), max_size=12).map(lambda rows: ints(sum(rows, ())))


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    rows = draw(st.integers(0, 9))
    assigns = draw(st.lists(st.tuples(int32, int32, int32), max_size=4))
    return StepPlan(
        draw(numbers),
        slots=draw(arrays(rows)),
        starts=draw(arrays(rows)),
        counts=draw(arrays(rows)),
        flags=draw(arrays(rows)),
        tokens=draw(arrays()),
        drafts=draw(st.one_of(arrays(0), arrays(rows))),
        truncates=draw(arrays(multiple=2)),
        releases=draw(arrays()),
        assigns=[SlotAssignment(s, NO_SAMPLING, (), p, c, ints()) for s, p, c in assigns],
        table=draw(arrays(multiple=3)),
        saves=draw(arrays(multiple=3)),
    )


@given(plans())
def test_a_plan_survives_the_way(plan: StepPlan) -> None:
    command = decode(encode(Order.RUN, plan))
    assert command.order is Order.RUN
    assert command.plan == plan


@given(plans(), st.data())
def test_a_plan_cut_short_or_with_more_after_it_is_refused(plan: StepPlan, data: st.DataObject) -> None:
    whole = encode(Order.RUN, plan)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(BadCommand):
        decode(whole[:cut])
    with pytest.raises(BadCommand):
        decode(whole + b"\0" * data.draw(st.integers(1, 9)))


@given(st.binary(max_size=200))
def test_other_bytes_are_no_command(noise: bytes) -> None:
    with pytest.raises(BadCommand):
        decode(noise)


@pytest.mark.parametrize("order", [Order.RESET, Order.CLOSE])
def test_the_other_orders_carry_no_plan(order: Order) -> None:
    assert decode(encode(order)).order is order
    assert decode(encode(order)).plan is None
    with pytest.raises(BadCommand):
        decode(HEAD.pack(MAGIC, order, 1, *(0,) * PARTS))


@pytest.mark.parametrize("place", [1, 2, 3])
def test_rows_that_differ_in_number_are_refused(place: int) -> None:
    lengths = [2] * 4 + [0] * (PARTS - 4)
    lengths[place] = 1
    with pytest.raises(BadCommand):
        decode(HEAD.pack(MAGIC, Order.RUN, 1, *lengths) + b"\0" * 4 * sum(lengths))


@pytest.mark.parametrize(("drafts", "truncates"), [(1, 0), (3, 0), (0, 1), (2, 3)])
def test_drafts_and_truncations_cut_short_are_refused(drafts: int, truncates: int) -> None:
    lengths = [2, 2, 2, 2, 0, drafts, truncates, *(0,) * (PARTS - 7)]
    with pytest.raises(BadCommand, match="drafts"):
        decode(HEAD.pack(MAGIC, Order.RUN, 1, *lengths) + b"\0" * 4 * sum(lengths))


@pytest.mark.parametrize("place", [8, 9, 10])
def test_a_triple_cut_short_is_refused(place: int) -> None:
    lengths = [0] * PARTS
    lengths[place] = 4
    with pytest.raises(BadCommand):
        decode(HEAD.pack(MAGIC, Order.RUN, 1, *lengths) + b"\0" * 16)


def test_an_order_of_another_version_is_refused() -> None:
    for magic, order in ((MAGIC - 1, 1), (MAGIC, 4), (MAGIC, 0)):
        with pytest.raises(BadCommand):
            decode(HEAD.pack(magic, order, 0, *(0,) * PARTS))


def test_what_only_sampling_needs_stays_at_rank_0() -> None:
    sampling = SamplingParams(temperature=0.7, seed=1234567, logit_bias=((1, 2.0),))
    assignment = SlotAssignment(3, sampling, (7, 8), 5, 0, array("i", [77] * 500))
    plan = StepPlan(1, slots=ints([3]), starts=ints([0]), counts=ints([1]), flags=ints([1]), tokens=ints([9]))
    plan.assigns.append(assignment)
    told = decode(encode(Order.RUN, plan)).plan
    assert told is not None
    (received,) = told.assigns
    assert (received.slot, received.prompt_tokens, received.cached_tokens) == (3, 5, 0)
    assert received.sampling == NO_SAMPLING
    assert not received.history and not received.stop_token_ids
    assert len(encode(Order.RUN, plan)) < 120


def test_a_decoded_plan_does_not_hold_on_to_the_bytes() -> None:
    data = bytearray(encode(Order.RUN, StepPlan(1, tokens=ints([5, 6]))))
    plan = decode(data).plan
    data[:] = b"\0" * len(data)
    data.clear()  # would raise while a view of it lives
    assert plan is not None and plan.tokens == ints([5, 6])
