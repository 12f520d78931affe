"""Who may reuse whose blocks, and which."""

from __future__ import annotations

from array import array

import pytest

from container.engine import prefix
from container.engine.engine import Engine
from container.engine.prefix import PrefixNames, extend
from container.engine.request import ErrorCode, RequestKey, SamplingParams
from tests.engine.bench import BOOT_KEY, Bench, request

PROMPT = list(range(100, 122))  # five full blocks of four, and two tokens


def hit(bench: Bench, id: int, prompt=PROMPT, **fields) -> int | None:
    """Run one request to its end and return how many of its prompt tokens were taken from the cache."""
    bench.submit(request(id, prompt, max_tokens=3, **fields))
    bench.run()
    bench.check_complete(id)
    return bench.choice(id).cached_tokens


def test_the_second_of_two_equal_prompts_computes_only_the_partial_block():
    bench = Bench()
    assert hit(bench, 1) == 0
    assert hit(bench, 2) == 20
    assert list(bench.runner.plans[-3].counts) == [2]


def test_answers_are_cached_too():
    bench = Bench()
    hit(bench, 1)
    longer = PROMPT + bench.choice(1).tokens[:2]
    assert hit(bench, 2, [*longer, 1]) == 24


def test_the_last_prompt_token_is_always_computed():
    bench = Bench()
    for id, prompt_tokens in enumerate((20, 20, 21, 19, 4, 1)):
        cached = hit(bench, id, PROMPT[:prompt_tokens])
        assert cached == (0 if id == 0 else (prompt_tokens - 1) // 4 * 4)


def test_a_prompt_shares_only_what_is_equal_from_its_first_token_on():
    bench = Bench()
    hit(bench, 1)
    assert hit(bench, 2, [*PROMPT[:9], 1, *PROMPT[10:]]) == 8
    assert hit(bench, 3, [1, *PROMPT[1:]]) == 0
    assert hit(bench, 4, PROMPT[4:]) == 0


def test_tenants_never_share_blocks():
    bench = Bench()
    assert hit(bench, 1, tenant="a") == 0
    assert hit(bench, 2, tenant="b") == 0
    assert hit(bench, 3, tenant="") == 0
    assert hit(bench, 4, tenant="a") == 20


def test_a_client_s_salt_divides_within_a_tenant_and_never_joins_two():
    bench = Bench()
    assert hit(bench, 1, tenant="a", cache_salt="x") == 0
    assert hit(bench, 2, tenant="b", cache_salt="x") == 0
    assert hit(bench, 3, tenant="a", cache_salt="y") == 0
    assert hit(bench, 4, tenant="a") == 0
    assert hit(bench, 5, tenant="ax") == 0
    assert hit(bench, 6, tenant="a", cache_salt="x") == 20


def test_roots_depend_on_boot_key_tenant_salt_and_model_and_parts_do_not_run_together():
    roots = {
        PrefixNames(BOOT_KEY).root("a", "b"),
        PrefixNames(BOOT_KEY[::-1]).root("a", "b"),
        PrefixNames(BOOT_KEY, b"model").root("a", "b"),
        PrefixNames(BOOT_KEY).root("b", "b"),
        PrefixNames(BOOT_KEY).root("a", "a"),
        PrefixNames(BOOT_KEY, b"b").root("a", ""),
        PrefixNames(BOOT_KEY, b"bb").root("a", ""),
        PrefixNames(BOOT_KEY, b"b").root("a", "b"),
    }
    assert len(roots) == 8


def test_a_key_names_the_whole_prefix():
    history = array("i", range(12))
    keys: list[bytes] = []
    extend(keys, b"root", history, 4, 2)
    first = list(keys)
    extend(keys, b"root", history, 4, 3)
    assert keys[:2] == first and len(set(keys)) == 3
    other: list[bytes] = []
    extend(other, b"root", array("i", [9, *range(1, 12)]), 4, 3)
    assert not set(keys) & set(other)


def test_a_short_boot_key_is_refused_and_a_missing_one_is_drawn():
    runner = Bench().runner
    with pytest.raises(ValueError, match="boot_key"):
        Engine(runner, boot_key=b"short")
    roots = {Engine(runner)._names.root("a", "") for _ in range(2)}
    assert len(roots) == 2


def test_a_forced_hash_collision_is_a_miss(monkeypatch):
    monkeypatch.setattr(prefix, "chain", lambda previous, tokens: b"the same for all")
    bench = Bench()
    assert hit(bench, 1, PROMPT, tenant="a") == 0
    assert hit(bench, 2, PROMPT, tenant="b") == 0  # same tokens, other tenant
    assert hit(bench, 3, [1, *PROMPT[1:]], tenant="a") == 0  # other tokens
    assert hit(bench, 4, PROMPT[:4] * 3, tenant="a") == 4  # same tokens, other position


def test_a_prompt_with_logprobs_takes_no_hits_and_gives_them():
    bench = Bench()
    hit(bench, 1)
    assert hit(bench, 2, sampling=SamplingParams(prompt_logprobs=0)) == 0
    assert len(bench.choice(2).prompt_logprobs or []) == len(PROMPT) - 1
    bench = Bench()
    hit(bench, 1, sampling=SamplingParams(prompt_logprobs=0))
    assert hit(bench, 2) == 20


def test_without_a_cache_nothing_is_saved_or_found():
    bench = Bench(prefix_cache=False)
    assert [hit(bench, id) for id in (1, 2)] == [0, 0]
    assert not any(len(plan.saves) for plan in bench.runner.plans)
    assert bench.engine.stats().prefix_queried_tokens == 0


def test_a_block_is_published_only_when_the_step_that_wrote_it_is_done():
    bench = Bench(step_tokens=9)
    bench.submit(request(1, PROMPT))
    bench.step()
    bench.submit(request(2, [*PROMPT[:12], *range(10)]))
    bench.step()
    second = bench.runner.plans[1]
    assert list(second.starts) == [8, 8]  # the block that the first row writes is not taken by the second
    bench.run()
    bench.check_complete()


def test_a_cancelled_prefill_leaves_only_whole_confirmed_blocks():
    bench = Bench(step_tokens=10)
    bench.submit(request(1, PROMPT))
    bench.step()
    bench.engine.cancel(RequestKey(0, 1))
    bench.run()
    assert hit(bench, 2) == 8


def test_equal_prompts_in_one_step_are_saved_once():
    bench = Bench()
    bench.submit(request(1, PROMPT[:14], 3), request(2, [*PROMPT[:4], *range(10)], 3))
    bench.step()
    assert len(bench.runner.plans[0].counts) == 2
    assert len(bench.runner.plans[0].saves) == 3 * (3 + 2)
    bench.run()
    bench.check_complete()


def test_what_a_failed_row_computed_is_never_reused():
    bench = Bench()
    bench.runner.bad_rows = lambda plan: {0}
    bench.submit(request(1, PROMPT))
    bench.run()
    assert bench.choice(1).error is ErrorCode.NUMERICAL
    bench.runner.bad_rows = lambda plan: set()
    assert hit(bench, 2) == 0


def test_the_earlier_blocks_of_a_failed_sequence_are_forgotten():
    bench = Bench(step_tokens=9)
    bench.submit(request(1, PROMPT))
    bench.step()
    bench.runner.bad_rows = lambda plan: set(range(plan.rows))
    bench.run()
    assert bench.choice(1).error is ErrorCode.NUMERICAL
    bench.runner.bad_rows = lambda plan: set()
    assert hit(bench, 2) == 0


def test_cached_blocks_make_room_for_new_work_oldest_first():
    bench = Bench(blocks=12, sequence_tokens=48)
    hit(bench, 1, PROMPT)
    hit(bench, 2, [1, *PROMPT])
    assert hit(bench, 3, [2, *PROMPT]) == 0
    assert hit(bench, 4, [2, *PROMPT]) == 20
    assert hit(bench, 5, PROMPT) < 20


def test_hits_and_queries_are_counted_in_tokens_once_per_choice():
    bench = Bench()
    hit(bench, 1)
    hit(bench, 2)
    stats = bench.engine.stats()
    assert (stats.prefix_hit_tokens, stats.prefix_queried_tokens) == (20, 44)


def test_siblings_wait_for_the_first_choice_and_share_its_prompt():
    bench = Bench(step_tokens=12)
    bench.submit(request(1, PROMPT, choices=4))
    bench.step()
    assert (bench.engine.stats().running, bench.engine.stats().waiting) == (1, 3)
    bench.run()
    bench.check_complete()
    assert [bench.choice(1, number).cached_tokens for number in range(4)] == [0, 20, 20, 20]
    assert sum(len(plan.tokens) for plan in bench.runner.plans) == 22 + 3 * 2 + 4 * 3


@pytest.mark.parametrize(
    ("prompt", "fields", "sizes"),
    [
        (PROMPT, {}, {"prefix_cache": False}),
        (PROMPT[:4], {}, {}),
        (PROMPT, {"sampling": SamplingParams(prompt_logprobs=0)}, {}),
    ],
    ids=["no cache", "no full block", "prompt logprobs"],
)
def test_siblings_run_at_once_when_there_is_nothing_to_share(prompt, fields, sizes):
    bench = Bench(step_tokens=120, **sizes)
    bench.submit(request(1, prompt, choices=4, **fields))
    bench.step()
    assert bench.engine.stats().running == 4
    bench.run()
    bench.check_complete()


def test_siblings_do_not_hold_up_those_behind_them():
    bench = Bench(slots=2, step_tokens=8)
    bench.submit(request(1, PROMPT, choices=3), request(2, 3))
    bench.step()
    bench.step()
    assert bench.choice(2).tokens
    bench.run()
    bench.check_complete()


def test_siblings_survive_the_preemption_of_the_first_choice():
    bench = Bench(blocks=8, sequence_tokens=32, slots=3, step_tokens=8)
    bench.submit(request(1, 4, max_tokens=24), request(2, PROMPT[:18], max_tokens=8, choices=3))
    bench.run()
    bench.check_complete()
    assert bench.engine.stats().preemptions > 0


def computed_tokens(bench: Bench) -> int:
    return sum(sum(plan.counts) for plan in bench.runner.plans)


def held(bench: Bench) -> set[int]:
    waiting = bench.engine._scheduler._holding._waiting
    return {waiter.key.id for waiters in waiting.values() for waiter in waiters}


def test_prompts_that_arrive_together_compute_what_they_share_once():
    bench = Bench(step_tokens=10)
    for id in range(6):
        bench.submit(request(id, [*PROMPT, id], max_tokens=1))
    bench.step()
    assert held(bench) == {1, 2, 3, 4, 5}
    bench.run()
    bench.check_complete()
    assert [bench.choice(id).cached_tokens for id in range(6)] == [0, 20, 20, 20, 20, 20]
    assert computed_tokens(bench) == 23 + 5 * 3


def test_who_waits_for_a_shared_prompt_waits_no_longer_than_until_it_is_there():
    """The first one's prompt goes on for long after the part that both have."""
    bench = Bench(step_tokens=9, sequence_tokens=128)
    bench.submit(request(1, [*PROMPT[:20], *range(60)], max_tokens=1), request(2, PROMPT, max_tokens=1))
    bench.step()
    assert held(bench) == {2}
    while held(bench):
        bench.step()
    assert sum(bench.runner.plans[at].counts[0] for at in range(len(bench.runner.plans))) < 32
    bench.run()
    bench.check_complete()
    assert bench.choice(2).cached_tokens == 20


def test_others_go_on_while_equal_prompts_wait():
    bench = Bench(step_tokens=12)
    bench.submit(request(1, PROMPT), request(2, PROMPT), request(3, 4, max_tokens=1))
    deltas = bench.step()
    assert held(bench) == {2}
    assert {delta.key.id for delta in deltas} == {3}
    bench.run()
    bench.check_complete()


def test_a_common_preamble_is_not_worth_waiting_for():
    bench = Bench(step_tokens=64)
    bench.submit(request(1, PROMPT), request(2, [*PROMPT[:8], *range(12)]))
    bench.step()
    assert len(bench.runner.plans[0].counts) == 2
    bench.run()
    bench.check_complete()


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_who_waited_for_a_prompt_that_never_came_computes_it(how):
    bench = Bench(step_tokens=9)
    if how == "failed":
        bench.runner.bad_rows = lambda plan: {0} if plan.number == 3 else set()
    bench.submit(request(1, PROMPT), request(2, PROMPT), request(3, PROMPT))
    bench.step()
    assert held(bench) == {2, 3}
    if how == "cancelled":
        bench.engine.cancel(RequestKey(0, 1))
        bench.engine.check()
    bench.run()
    for id in (2, 3):
        bench.check_complete(id)


def test_one_that_waits_for_another_s_prompt_can_be_cancelled():
    bench = Bench(step_tokens=9)
    bench.submit(request(1, PROMPT), request(2, PROMPT, choices=2), request(3, PROMPT))
    bench.step()
    assert held(bench) == {2, 3}
    bench.engine.cancel(RequestKey(0, 2))
    bench.engine.check()
    assert held(bench) == {3}
    bench.run()
    bench.check_complete(1)
    bench.check_complete(3)
    assert bench.engine.stats().waiting == 0


def test_nobody_waits_for_another_tenant_s_prompt():
    bench = Bench(step_tokens=64)
    bench.submit(request(1, PROMPT, tenant="a"), request(2, PROMPT, tenant="b"))
    bench.submit(request(3, PROMPT, tenant="a", cache_salt="x"))
    bench.step()
    assert not held(bench)
    bench.run()
    bench.check_complete()
