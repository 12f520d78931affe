"""What a sequence reads from its own past."""

from __future__ import annotations

import itertools
import math
import random
from array import array

import pytest

from container.engine.guesses import LONGEST_PROBE_TOKENS, PROBE_TOKENS, WORTHWHILE_RATE, Guesses
from container.engine.ngram import CATCH_UP_TOKENS, MOST_BITS, SIZES, NgramIndex


def plain(history: list[int], count: int) -> list[int]:
    """Return the same by looking through all of the history."""
    end = len(history)
    for size in SIZES:
        for at in range(end - 1, size - 1, -1):
            if end >= size and history[at - size : at] == history[end - size :]:
                period = history[at:]
                return (period * count)[:count]
    return []


@pytest.mark.parametrize("alphabet", [1, 2, 5, 40])
@pytest.mark.parametrize("seed", range(3))
def test_the_latest_longest_occurrence_is_what_a_search_finds(alphabet, seed):
    """Small alphabets in tables large enough: no two n-grams of these share a slot often."""
    rng = random.Random(seed)
    index, history, same = NgramIndex(16_000), array("i"), 0
    for _ in range(300):
        history.append(rng.randrange(alphabet))
        index.extend(history)
        found = index.propose(history, 4)
        same += list(found) == plain(history.tolist(), 4)
    assert same >= 295  # a slot two n-grams share hides one of them


def test_what_the_index_finds_was_compared_with_the_history():
    """With tables of 256 slots most n-grams collide, and none is taken for another."""
    rng = random.Random(1)
    index, history = NgramIndex(1), array("i")
    for _ in range(2000):
        history.append(rng.randrange(30))
        index.extend(history)
        found = index.propose(history, 1)
        if found:
            pairs = zip(history, history[1:], history[2:], strict=False)
            assert (history[-2], history[-1], found[0]) in set(pairs)


def test_a_short_repetition_is_taken_to_go_on():
    index = NgramIndex(100)
    history = array("i", [9, 1, 2, 1, 2])
    index.extend(history)
    assert list(index.propose(history, 5)) == [1, 2, 1, 2, 1]


def test_nothing_is_guessed_from_too_little():
    for tokens in ([], [1], [1, 2], [1, 2, 3]):
        index = NgramIndex(100)
        index.extend(array("i", tokens))
        assert not index.propose(array("i", tokens), 4)


def test_a_long_history_is_indexed_in_bounded_parts_and_bounded_memory():
    history = array("i", range(100_000))
    index = NgramIndex(1_000_000)
    assert index.table_bytes == len(SIZES) * 4 << MOST_BITS
    calls = 0
    while index._known < len(history) - 1:
        before = index._known
        index.extend(history)
        calls += 1
        assert calls == 1 or index._known - before <= CATCH_UP_TOKENS
    assert calls <= (1 << MOST_BITS) // CATCH_UP_TOKENS + 1, "what would be overwritten is left out"
    history.extend(range(99_000, 99_010))
    index.extend(history)
    assert list(index.propose(history, 3)) == [99_010, 99_011, 99_012]


def repeating() -> array[int]:
    return array("i", [1, 2, 3, 4, 5] * 6)


def test_guesses_grow_while_they_hold():
    guesses, history, sizes = Guesses(1000), repeating(), []
    for _ in range(4):
        drafts = guesses.propose(history, 4)
        sizes.append(len(drafts))
        guesses.settle(history, len(drafts), len(drafts))
        history.extend(drafts)
    assert sizes == [2, 4, 4, 4]


@pytest.mark.parametrize(("rate", "count"), [(0.95, 8), (0.8, 4), (0.6, 1)])
def test_guesses_that_fail_shrink_to_what_may_still_hold(rate, count):
    """As many as hold together with a chance of 0.3, at the rate after the failure."""
    guesses, history = Guesses(1000, rate), repeating()
    guesses.settle(history, 8, 0)
    assert guesses.rate == pytest.approx(0.85 * rate)
    assert len(guesses.propose(history, 8)) <= count
    assert len(guesses.propose(history, 8)) == max(1, int(math.log(0.3) / math.log(guesses.rate)))


def test_drafts_behind_the_first_that_failed_say_nothing():
    long, short = Guesses(1000), Guesses(1000)
    long.settle(repeating(), 8, 1)
    short.settle(repeating(), 2, 1)
    assert long.rate == short.rate


def test_pairs_of_tokens_are_guessed_from_only_while_guesses_hold():
    history = array("i", [7, 1, 2, 3, 4, 9, 1, 2])
    assert not Guesses(1000, 0.5).propose(history, 2)
    assert list(Guesses(1000, 0.7).propose(history, 2)) == [3, 4]


def test_a_new_sequence_is_expected_to_do_as_others_did():
    history = repeating()
    assert Guesses(1000).propose(history, 4)
    wary = Guesses(1000, 0.1)
    assert not wary.propose(history, 4)
    history.extend([1 + n % 5 for n in range(PROBE_TOKENS)])
    assert wary.propose(history, 4)


def test_failing_guesses_stop_below_the_worthwhile_rate_and_are_probed_ever_less_often():
    guesses, history, probes = Guesses(10_000), repeating(), []
    for _ in range(2000):
        drafts = guesses.propose(history, 4)
        if drafts:
            assert guesses.rate >= WORTHWHILE_RATE or len(history) >= guesses._next
            guesses.settle(history, len(drafts), 0)
            probes.append(len(history))
        history.append(1 + len(history) % 5)
    gaps = [later - earlier for earlier, later in itertools.pairwise(probes)]
    assert set(gaps[:4]) == {1, PROBE_TOKENS} and max(gaps) == LONGEST_PROBE_TOKENS
    assert gaps == sorted(gaps)


def test_one_probe_that_holds_brings_guessing_back():
    guesses, history = Guesses(10_000), repeating()
    while guesses.rate > 0.001:
        guesses.settle(history, 1, 0)
    history.extend([1 + n % 5 for n in range(LONGEST_PROBE_TOKENS)])
    assert guesses.propose(history, 4) and guesses.probing
    guesses.settle(history, 1, 1)
    assert guesses.rate >= WORTHWHILE_RATE
