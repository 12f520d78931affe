"""Whose turn it is: between tenants, inside one, and how long anybody can be made to wait."""

from __future__ import annotations

import random

import pytest

from container.engine.admission import EngineLimits
from container.engine.request import RequestKey
from container.engine.sequence import Sequence, State
from container.engine.tenants import TenantQueues, cost
from tests.engine.bench import VOCABULARY, Bench, request

QUANTUM = 32


class Line:
    """A queue alone."""

    def __init__(self) -> None:
        self.queues = TenantQueues(QUANTUM)
        self.serial = 0

    def push(self, tenant: str, tokens: int, max_tokens: int = 1) -> Sequence:
        asked = request(self.serial, tokens - max_tokens, max_tokens, tenant=tenant)
        sequence = Sequence.of(asked, 0, self.serial, b"")
        self.serial += 1
        self.queues.push(sequence)
        return sequence

    def take(self) -> Sequence:
        sequence = self.queues.head()
        assert sequence is not None and self.queues.head() is sequence
        self.queues.take(sequence)
        return sequence


def test_one_tenant_is_served_in_order_of_arrival():
    line = Line()
    pushed = [line.push("a", tokens) for tokens in (90, 2, 33, 500, 1 + 1)]
    assert [line.take() for _ in pushed] == pushed
    assert line.queues.head() is None and len(line.queues) == 0


def test_two_tenants_get_equal_tokens_whatever_their_requests_look_like():
    line = Line()
    for _ in range(400):
        line.push("many", 4)
    for _ in range(20):
        line.push("large", 80)
    served = {"many": 0, "large": 0}
    for _ in range(200):
        sequence = line.take()
        served[sequence.tenant] += cost_of(sequence)
        assert abs(served["many"] - served["large"]) <= QUANTUM + 2 * 80
    assert min(served.values()) > 600


def cost_of(sequence: Sequence) -> int:
    return sequence.limit_tokens


def test_a_flood_does_not_keep_a_newcomer_waiting():
    line = Line()
    for _ in range(1000):
        line.push("flood", 20)
    for _ in range(10):
        line.take()
    line.push("newcomer", 20)
    taken = [line.take().tenant for _ in range(4)]
    assert "newcomer" in taken


def test_unused_output_goes_back_to_the_tenant_but_never_becomes_a_hoard():
    line = Line()
    # The tenant alone takes 100 sequences and ends them all early while one more waits.
    early = [line.push("early", 1000, max_tokens=990) for _ in range(100)]
    for _ in early:
        line.take()
    line.push("early", 1000, max_tokens=990)
    for sequence in early:
        line.queues.refund(sequence)
    for _ in range(5):
        line.push("early", 1000, max_tokens=990)
    line.push("other", 20)
    taken = [line.take().tenant for _ in range(3)]
    assert "other" in taken


def test_declaring_more_than_is_used_costs_nothing_when_the_rest_comes_back():
    line = Line()
    served = {"honest": 0, "lavish": 0}
    for _ in range(300):
        line.push("honest", 40, max_tokens=10)
        line.push("lavish", 400, max_tokens=370)
    for _ in range(200):
        sequence = line.take()
        used = sequence.prompt_tokens + 10
        sequence.history.extend([1] * 10)
        served[sequence.tenant] += used
        line.queues.refund(sequence)
    assert served["lavish"] / served["honest"] == pytest.approx(1.0, abs=0.35)


def test_endings_of_early_requests_do_not_starve_a_large_one():
    line = Line()
    for _ in range(500):
        line.push("early", 400, max_tokens=399)
    line.push("large", 400)
    passed = 0  # each uses two of the 400 tokens it declared
    while (sequence := line.take()).tenant == "early":
        sequence.history.append(1)
        line.queues.refund(sequence)
        passed += 1
    rounds = -(-400 // QUANTUM)
    assert passed <= 3 * rounds  # in one turn its capped credit pays for three at the most


def test_what_an_ended_sequence_did_not_use_goes_back_to_its_tenant():
    bench = Bench(EngineLimits(running=1, waiting=1000, waiting_s=1e9))
    anything = frozenset(range(VOCABULARY))
    for id in range(0, 120, 2):
        bench.submit(request(id, 4, max_tokens=1, tenant="honest"))
        bench.submit(request(id + 1, 4, max_tokens=60, stop_token_ids=anything, tenant="lavish"))
    for _ in range(40):
        bench.step()
    ended = [sum(bench.choice(id).ended for id in range(first, 120, 2)) for first in (0, 1)]
    # Two rounds pay for what it declares, one when the last request's rest came back.
    assert min(ended) > 5


def test_tenants_with_one_request_each_are_served_in_order_of_arrival():
    line = Line()
    pushed = [line.push(tenant, 3 * QUANTUM) for tenant in "abcd"]
    assert [line.take() for _ in pushed] == pushed


def test_a_round_gives_each_tenant_one_quantum():
    line = Line()
    line.push("a", 2 * QUANTUM)
    line.push("b", 3 * QUANTUM)
    line.push("c", 3 * QUANTUM)
    assert line.queues.head().tenant == "a"
    assert [line.queues._lanes[tenant].credit for tenant in "abc"] == [2 * QUANTUM, QUANTUM, QUANTUM]


def test_a_preempted_sequence_comes_first_and_is_not_charged_again():
    line = Line()
    first = line.push("a", 64)
    others = [line.push("a", 64) for _ in range(3)]
    assert line.take() is first
    line.queues.push(first)
    assert cost(first) == 0
    assert line.queues.head() is first
    assert [line.take() for _ in range(4)] == [first, *others]


def test_a_sequence_that_leaves_the_queue_is_not_chosen():
    line = Line()
    gone, kept, last = line.push("a", 40), line.push("b", 40), line.push("a", 40)
    assert line.queues.head() is gone
    line.queues.discard(gone)
    assert line.take() is last  # its tenant still has the turn
    line.queues.discard(kept)
    assert line.queues.head() is None and len(line.queues) == 0


def test_only_the_head_can_be_taken():
    line = Line()
    line.push("a", 5)
    second = line.push("a", 5)
    line.queues.head()
    with pytest.raises(AssertionError):
        line.queues.take(second)


def test_a_refund_for_what_was_never_charged_gives_nothing():
    line = Line()
    waiting = line.push("a", 500)
    line.queues.refund(waiting)
    assert line.queues._lanes["a"].credit == 0


def test_two_tenants_finish_work_at_the_same_pace():
    bench = Bench(EngineLimits(running=4, waiting=1000, waiting_s=1e9), step_tokens=16)
    for id in range(60):
        bench.submit(request(id, 10, max_tokens=6, tenant="early"))
    for id in range(60, 90):
        bench.submit(request(id, 10, max_tokens=6, tenant="late"))
    while sum(bench.choice(id).ended for id in range(60)) < 20:
        bench.step()
    late = sum(bench.choice(id).ended for id in range(60, 90))
    assert 15 <= late <= 25
    bench.run()
    bench.check_complete()


def test_a_large_request_is_not_passed_over_by_small_ones():
    bench = Bench(blocks=16, sequence_tokens=64, slots=8)
    bench.submit(*(request(id, 6, max_tokens=10) for id in range(5)))
    bench.step()
    bench.submit(request(50, 60, max_tokens=4))
    bench.submit(*(request(id, 3, max_tokens=2) for id in range(60, 90)))
    order: list[int] = []
    while bench.engine.has_work:
        order += [delta.key.id for delta in bench.step() if delta.finish]
    assert order.index(50) == 5


def outstanding_tokens(bench: Bench) -> int:
    """Tokens declared by everything accepted and not ended."""
    return sum(s.limit_tokens for live in bench.engine._live.values() for s in live.open)


def bound_steps(bench: Bench, key: RequestKey, largest: int) -> int:
    """The promise: a sequence runs after no more steps than those ahead of it declared tokens.

    Ahead of it are all accepted before it, and of those that come later what round robin grants the other
    tenants: in each round that the own tenant needs, a quantum and twice the largest request.
    """
    live = bench.engine._live
    tenant = bench.requests[key].tenant
    own = sum(s.limit_tokens for each in live.values() for s in each.open if s.tenant == tenant)
    rounds = -(-own // bench.engine.capacity.step_tokens)
    others = 0 if tenant == "only" else 2
    return outstanding_tokens(bench) + others * (rounds + 1) * (
        bench.engine.capacity.step_tokens + 2 * largest
    )


@pytest.mark.parametrize("tenants", [("only",), ("a", "b", "c")], ids=["one tenant", "three tenants"])
@pytest.mark.parametrize("seed", range(4))
def test_the_wait_of_every_request_is_bounded(tenants, seed):
    draw = random.Random(seed)
    bench = Bench(blocks=10, sequence_tokens=40, slots=4, step_tokens=12)
    waiting: dict[RequestKey, tuple[int, int]] = {}  # submitted at step, latest step to start
    waited = 0
    for number in range(900):
        if number < 600:
            for _ in range(draw.choice((0, 0, 0, 1, 2))):  # more than the engine can serve
                if len(bench.engine._live) < 60:
                    asked = request(
                        10_000 * seed + number * 3 + len(waiting) % 3,
                        draw.randint(1, 30),
                        draw.randint(1, 10),
                        tenant=draw.choice(tenants),
                    )
                    if asked.key not in bench.requests:
                        bench.submit(asked)
                        waiting[asked.key] = (number, number + bound_steps(bench, asked.key, 40))
        bench.step()
        for key in list(waiting):
            live = bench.engine._live.get(key)
            if live is None or live.open[0].state is not State.WAITING:
                submitted, latest = waiting.pop(key)
                assert number <= latest
                waited = max(waited, number - submitted)
    assert waited > 20, "nobody had to wait, so nothing was shown"
    bench.run()
    bench.check_complete()


def test_a_stream_of_younger_requests_cannot_stop_the_oldest():
    bench = Bench(blocks=8, sequence_tokens=32, slots=8, step_tokens=12)
    bench.submit(request(0, 4, max_tokens=28))
    id = 1
    steps = 0
    while not bench.choice(0).ended:
        for _ in range(3):
            bench.submit(request(id, 6, max_tokens=8))
            id += 1
        bench.step()
        steps += 1
    assert steps == 28  # a token in every step, whatever else there is


def test_a_tenant_that_is_passed_by_is_given_its_quantum():
    line = Line()
    line.push("large", 3 * QUANTUM)
    line.push("refunded", QUANTUM)
    line.queues._lanes["refunded"].credit = QUANTUM
    assert line.queues.head().tenant == "refunded"
    assert line.queues._lanes["large"].credit == QUANTUM
