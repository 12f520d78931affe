"""Too few blocks: who gives way, that nothing is lost by it, and that somebody always advances."""

from __future__ import annotations

import logging

import pytest

from container.engine.request import ErrorCode, FinishReason, SamplingParams
from container.engine.scheduler import PINNED_AFTER, Scheduler
from container.engine.sequence import Sequence, State
from tests.engine.bench import Bench, capacity, request

TINY = {"blocks": 8, "sequence_tokens": 32}


FULL = {"blocks": 64, "sequence_tokens": 32, "resident_tokens": 32}  # blocks are plenty, room to hold is not


def crowd(bench: Bench, count: int = 8, **fields) -> Bench:
    for id in range(count):
        bench.submit(request(id, 3 + id % 5, max_tokens=20, seed=id, **fields))
    bench.run()
    bench.check_complete()
    return bench


def test_output_is_the_same_with_and_without_preemption():
    roomy, tiny = crowd(Bench()), crowd(Bench(**TINY))
    assert roomy.engine.stats().preemptions == 0
    assert tiny.engine.stats().preemptions > 0
    assert roomy.choices == tiny.choices


def test_output_is_the_same_when_nothing_can_be_looked_up_again():
    tiny = crowd(Bench(**TINY, prefix_cache=False))
    assert tiny.engine.stats().preemptions > 0
    whole = crowd(Bench(**TINY, prefix_cache=False, chunked_prefill=False))
    assert whole.engine.stats().preemptions > 0


@pytest.mark.parametrize("chunked_prefill", [True, False])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_output_is_the_same_when_running_sequences_may_hold_few_tokens(prefix_cache, chunked_prefill):
    full = crowd(Bench(**FULL, prefix_cache=prefix_cache, chunked_prefill=chunked_prefill))
    assert full.engine.stats().preemptions > 0
    for key, got in crowd(Bench(sequence_tokens=32)).choices.items():
        assert full.choices[key].tokens == got.tokens


def test_a_shared_block_counts_once_for_each_that_holds_it():
    bench = Bench(blocks=64, sequence_tokens=32, resident_tokens=36, slots=4)
    prompt = list(range(16))
    for id in range(4):  # three share what the first has published: 16 tokens of blocks, 64 held
        bench.submit(request(id, prompt, max_tokens=3))
    running = []
    while bench.engine.has_work:
        bench.step()
        running.append(bench.engine.stats().running)
    bench.check_complete()
    assert max(running) == 1 and bench.engine.stats().prefix_hit_tokens > 0


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_requests_that_each_fill_all_there_is_to_hold_all_finish(prefix_cache):
    bench = Bench(**FULL, slots=64, step_tokens=80, prefix_cache=prefix_cache)
    for id in range(64):
        bench.submit(request(id, 1 + id % 31, max_tokens=32 - (1 + id % 31)))
    bench.run()
    bench.check_complete()


def test_prompt_logprobs_are_whole_after_an_interrupted_prompt():
    bench = Bench(blocks=10, sequence_tokens=40, step_tokens=3, slots=2)
    bench.submit(request(1, 4, max_tokens=36))
    bench.submit(request(2, 28, max_tokens=2, sampling=SamplingParams(prompt_logprobs=0)))
    bench.run()
    bench.check_complete()
    assert bench.engine.stats().preemptions > 0
    assert len(bench.choice(2).prompt_logprobs or []) == 27


def test_a_prompt_that_finds_its_own_blocks_again_was_not_a_cache_hit():
    bench = Bench(blocks=10, sequence_tokens=40, step_tokens=3, slots=2)
    bench.submit(request(1, 4, max_tokens=36), request(2, 28, max_tokens=2))
    bench.run()
    bench.check_complete()
    stats = bench.engine.stats()
    assert stats.preemptions > 0 and bench.choice(2).cached_tokens == 0
    assert (stats.prefix_hit_tokens, stats.prefix_queried_tokens) == (0, 32)


def test_the_cached_tokens_told_to_the_client_are_those_of_the_first_admission():
    tiny = crowd(Bench(**TINY))
    assert tiny.engine.stats().preemptions > 0
    assert {choice.cached_tokens for choice in tiny.choices.values()} == {0}


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_requests_that_each_fill_the_pool_all_finish(prefix_cache):
    bench = Bench(blocks=8, sequence_tokens=32, slots=64, step_tokens=80, prefix_cache=prefix_cache)
    for id in range(64):
        bench.submit(request(id, 1 + id % 31, max_tokens=32 - (1 + id % 31)))
    bench.run()
    bench.check_complete()


def test_half_computed_prompts_do_not_wait_for_each_other():
    bench = Bench(blocks=16, sequence_tokens=64, slots=8, step_tokens=16)
    for id in range(8):
        bench.submit(request(id, 60, max_tokens=4))
    bench.run()
    bench.check_complete()
    assert bench.engine.stats().preemptions == 0  # nobody was let in whose prompt could not be computed


class Floor:
    """A scheduler alone, with sequences seated by hand."""

    def __init__(self, **sizes) -> None:
        sizes = {"blocks": 8, "slots": 6} | sizes
        self.scheduler = Scheduler(capacity(**sizes), 6)
        self.serial = 0

    def seat(self, prompt: int, computed: int, *, preemptions: int = 0) -> Sequence:
        """Return a running sequence with `computed` tokens and their blocks."""
        sequence = Sequence.of(request(self.serial, prompt, 40), 0, self.serial, b"")
        self.serial += 1
        self.scheduler.add([sequence])
        assert self.scheduler.queue.head() is sequence
        self.scheduler._seat(sequence, [])
        sequence.computed = computed
        for _ in range(self.scheduler.pool.blocks_for(computed)):
            sequence.table.append(self.scheduler.pool.allocate())
        sequence.preemptions = preemptions
        return sequence

    def plan(self) -> list[Sequence]:
        step = self.scheduler.plan(1)
        return [] if step is None else [sequence for sequence, _ in step.rows]


def test_the_newest_gives_way_to_the_oldest():
    floor = Floor()
    oldest, middle, newest = floor.seat(9, 8), floor.seat(12, 11), floor.seat(12, 11)
    assert floor.plan() == [oldest, middle]
    assert (middle.state, newest.state) == (State.RUNNING, State.PREEMPTED)
    assert newest.preemptions == 1 and floor.scheduler.preemptions == 1
    assert newest.table == [] and newest.slot is None


def test_the_oldest_never_gives_way():
    floor = Floor()
    oldest, newest = floor.seat(16, 15), floor.seat(17, 16)
    assert floor.plan() == [oldest]  # the newest needs a block, may take nobody's, and keeps its place
    assert oldest.state is newest.state is State.RUNNING


def test_a_pinned_sequence_is_spared_while_an_unpinned_one_can_go():
    floor = Floor()
    oldest, unpinned = floor.seat(9, 8), floor.seat(12, 11)
    pinned = floor.seat(12, 11, preemptions=PINNED_AFTER)
    assert floor.plan() == [oldest, pinned]
    assert unpinned.state is State.PREEMPTED


def test_when_all_are_pinned_the_newest_goes():
    floor = Floor()
    oldest = floor.seat(9, 8)
    first, second = (floor.seat(12, 11, preemptions=PINNED_AFTER) for _ in range(2))
    assert floor.plan() == [oldest, first]
    assert second.state is State.PREEMPTED


def test_the_oldest_half_computed_prompt_takes_blocks_from_younger_decodes():
    floor = Floor()
    prompt, decode, other = floor.seat(20, 8), floor.seat(12, 11), floor.seat(12, 11)
    rows = floor.plan()
    assert rows == [decode, prompt]
    assert other.state is State.PREEMPTED


def test_a_decode_preempts_the_newest_when_no_more_tokens_may_be_held():
    floor = Floor(blocks=64, resident_tokens=23)
    oldest, second, newest = floor.seat(9, 8), floor.seat(9, 8), floor.seat(8, 7)
    assert floor.plan() == [oldest, second]
    assert newest.state is State.PREEMPTED


def test_a_decode_takes_the_last_token_that_may_be_held_without_preempting():
    floor = Floor(blocks=64, resident_tokens=24)
    assert len([floor.seat(8, 7) for _ in range(3)]) == len(floor.plan()) == 3


def test_a_younger_prompt_takes_only_tokens_that_older_prompts_do_not_need():
    floor = Floor(blocks=64, step_tokens=8, resident_tokens=36)
    older, younger = floor.seat(20, 8), floor.seat(30, 8)
    decode = floor.seat(8, 7)
    # 13 of 36 are left: one goes to the decode, the rest the older prompt needs
    assert floor.plan() == [decode, older]
    assert younger.state is State.RUNNING


def test_a_prompt_is_cut_to_the_tokens_that_may_still_be_held():
    floor = Floor(blocks=64, resident_tokens=27)
    decode, prompt = floor.seat(9, 8), floor.seat(30, 8)
    step = floor.scheduler.plan(1)
    assert step is not None and step.rows == [(decode, 1), (prompt, 10)]


def test_what_a_victim_held_and_was_about_to_hold_is_given_to_others_in_the_same_step():
    floor = Floor(blocks=64, resident_tokens=28)
    older, younger, victim = floor.seat(10, 8), floor.seat(30, 8), floor.seat(12, 11)
    step = floor.scheduler.plan(1)
    assert victim.state is State.PREEMPTED
    # the victim's 12 come back; one goes to the older prompt, which will need two more
    assert step is not None and step.rows == [(older, 1), (younger, 9)]


def test_admission_leaves_tokens_for_those_who_run_to_grow_into():
    floor = Floor(blocks=64, resident_tokens=34)
    decode = floor.seat(12, 11)
    waiting = Sequence.of(request(99, 18, 2), 0, 99, b"")
    floor.scheduler.add([waiting])
    assert floor.plan() == [decode]  # 12 held, 19 for the prompt and its first token, 3 are too few to spare
    assert waiting.state is State.WAITING
    roomier = Floor(blocks=64, resident_tokens=35)
    roomier.seat(12, 11)
    roomier.scheduler.add([Sequence.of(request(99, 18, 2), 0, 99, b"")])
    assert len(roomier.plan()) == 2


def test_a_younger_prompt_takes_only_blocks_blocks_that_older_prompts_do_not_need():
    floor = Floor(blocks=9, step_tokens=8)
    older, younger = floor.seat(20, 8), floor.seat(30, 8)
    decode = floor.seat(4, 3)
    assert floor.scheduler.pool.available == 4  # the older prompt needs all four
    assert floor.plan() == [decode, older]
    assert younger.state is State.RUNNING


def test_a_prompt_preempted_for_an_older_one_is_not_computed_in_the_same_step():
    floor = Floor(blocks=6)
    older, younger = floor.seat(12, 8), floor.seat(30, 16)
    assert floor.plan() == [older]
    assert younger.state is State.PREEMPTED
    assert floor.scheduler.pool.available == 3  # enough to go on with, had it not been preempted


def test_a_step_that_preempts_admits_nobody():
    floor = Floor()
    oldest, newest = floor.seat(13, 12), floor.seat(20, 19)
    small = Sequence.of(request(99, 1, 1, tenant="another, and first in turn"), 0, 99, b"")
    floor.scheduler.add([small])
    assert floor.plan() == [oldest]
    assert newest.state is State.PREEMPTED and small.state is State.WAITING


def test_admission_leaves_blocks_for_those_who_run_to_grow_into():
    floor = Floor(blocks=8)
    decode = floor.seat(12, 11)
    waiting = Sequence.of(request(99, 18, 2), 0, 99, b"")
    floor.scheduler.add([waiting])
    assert floor.scheduler.pool.available == 5  # just what the prompt and its first token need
    assert floor.plan() == [decode]
    assert waiting.state is State.WAITING


def test_the_first_choice_of_victims_is_recorded_in_its_place_in_the_queue():
    floor = Floor()
    floor.seat(9, 8)
    floor.seat(12, 11)
    newest = floor.seat(12, 11)
    later = Sequence.of(request(99, 1, 1), 0, 99, b"")
    floor.scheduler.add([later])
    floor.plan()
    assert floor.scheduler.queue.head() is newest


def steal_blocks(bench: Bench, count: int) -> None:
    """Make blocks vanish, as only a fault of ours could: what is accepted can run alone."""
    for _ in range(count):
        bench.engine._scheduler.pool._free.pop(0)


def test_a_sequence_that_runs_alone_and_gets_no_block_fails_and_does_not_loop():
    bench = Bench(**TINY)
    bench.submit(request(1, 10, max_tokens=20))
    bench.step()
    steal_blocks(bench, 4)
    deltas = [delta for _ in range(20) for delta in bench.engine.step()]
    assert [delta.error for delta in deltas if delta.error] == [ErrorCode.KV_EXHAUSTED]
    assert bench.engine.stats().failed == 1 and not bench.engine.has_work


@pytest.mark.parametrize("chunked_prefill", [True, False])
def test_a_waiting_sequence_that_cannot_start_in_an_empty_pool_fails(chunked_prefill):
    bench = Bench(**TINY, chunked_prefill=chunked_prefill)
    bench.submit(request(1, 10, max_tokens=20, choices=2), request(2, 3, max_tokens=2))
    steal_blocks(bench, 7)
    deltas = [delta for _ in range(20) for delta in bench.engine.step()]
    errors = [(delta.key.id, delta.choice) for delta in deltas if delta.error is ErrorCode.KV_EXHAUSTED]
    assert errors == [(1, 0), (1, 1)]
    assert [delta.finish for delta in deltas if delta.finish] == [FinishReason.LENGTH]


def test_a_failed_step_is_logged_without_what_the_exception_says(caplog):
    bench = Bench()
    bench.submit(request(1))

    def fault(plan):
        raise RuntimeError("token 4711")

    bench.runner.fault = fault
    with caplog.at_level(logging.ERROR):
        bench.run()
    assert "RuntimeError" in caplog.text and "4711" not in caplog.text
