"""The pool: which move is legal in which state, what is evicted first, that `check` sees faults."""

from __future__ import annotations

import pytest

from container.engine.blocks import BlockPool, BlockState, PoolError, Published


def content(name: int, index: int = 0) -> Published:
    return Published(b"key%d" % name, b"root", index, b"tokens%d" % name)


def published(pool: BlockPool, *names: int) -> list[int]:
    """Return blocks that one sequence wrote and published, in use."""
    table = [pool.allocate() for _ in names]
    for block, name in zip(table, names, strict=True):
        pool.publish(block, content(name))
    return table


def test_every_block_but_block_zero_is_handed_out_once():
    pool = BlockPool(5, 4)
    table = [pool.allocate() for _ in range(5)]
    assert sorted(table) == [1, 2, 3, 4, 5]
    assert pool.available == 0 and pool.used == 5
    with pytest.raises(PoolError):
        pool.allocate()
    pool.check([table])


def test_a_private_block_is_free_again_when_released():
    pool = BlockPool(2, 4)
    table = [pool.allocate()]
    pool.release(table)
    assert pool.state(table[0]) is BlockState.FREE and pool.available == 2
    pool.check([])


def test_a_published_block_outlives_its_owner_and_can_be_found_and_read():
    pool = BlockPool(3, 4)
    (block,) = published(pool, 1)
    assert pool.state(block) is BlockState.SHARED
    pool.release([block])
    assert pool.state(block) is BlockState.CACHED and pool.used == 0
    assert pool.find(content(1)) == block
    pool.acquire(block)
    pool.acquire(block)
    pool.check([[block], [block]])
    pool.release([block])
    assert pool.state(block) is BlockState.SHARED
    pool.release([block])
    pool.check([])


@pytest.mark.parametrize(
    "wanted",
    [
        Published(b"key1", b"root", 0, b"tokens2"),
        Published(b"key1", b"other", 0, b"tokens1"),
        Published(b"key1", b"root", 1, b"tokens1"),
    ],
    ids=["other tokens", "other tenant", "other position"],
)
def test_an_equal_key_with_other_content_is_a_miss(wanted):
    pool = BlockPool(3, 4)
    published(pool, 1)
    assert pool.knows(b"key1")
    assert pool.find(wanted) is None


def test_free_blocks_go_first_then_the_least_recently_used_tail_first():
    pool = BlockPool(5, 4)
    old, new = published(pool, 1, 2), published(pool, 3, 4)
    pool.release(old)
    pool.release(new)
    order = [pool.allocate() for _ in range(5)]
    assert order == [5, old[1], old[0], new[1], new[0]]
    assert not any(pool.knows(content(name).key) for name in (1, 2, 3, 4))
    pool.check([order])


def test_a_hit_makes_a_block_recently_used():
    pool = BlockPool(2, 4)
    first, second = published(pool, 1), published(pool, 2)
    pool.release(first)
    pool.release(second)
    pool.acquire(first[0])
    pool.release(first)
    assert pool.allocate() == second[0]


def test_a_forgotten_block_serves_its_readers_and_nobody_else():
    pool = BlockPool(2, 4)
    table = published(pool, 1)
    pool.forget(table[0])
    assert pool.state(table[0]) is BlockState.RETIRED
    assert pool.find(content(1)) is None
    with pytest.raises(PoolError):
        pool.acquire(table[0])
    pool.check([table])
    pool.release(table)
    assert pool.state(table[0]) is BlockState.FREE
    pool.check([])


def test_forgetting_a_private_block_changes_nothing():
    pool = BlockPool(2, 4)
    block = pool.allocate()
    pool.forget(block)
    assert pool.state(block) is BlockState.WRITING


def test_illegal_moves_are_refused():
    pool = BlockPool(3, 4)
    free = 3
    private = pool.allocate()
    (shared,) = published(pool, 1)
    with pytest.raises(PoolError):
        pool.acquire(private)
    with pytest.raises(PoolError):
        pool.acquire(free)
    with pytest.raises(PoolError):
        pool.publish(shared, content(2))
    with pytest.raises(PoolError):
        pool.publish(free, content(2))
    with pytest.raises(PoolError):
        pool.publish(private, content(1))
    with pytest.raises(PoolError):
        pool.release([free])
    pool.check([[private], [shared]])


def test_a_reset_pool_is_all_free_and_knows_nothing():
    pool = BlockPool(3, 4)
    published(pool, 1, 2)
    pool.reset()
    assert pool.available == 3 and pool.find(content(1)) is None
    pool.check([])


def test_blocks_needed_are_rounded_up():
    pool = BlockPool(3, 4)
    assert [pool.blocks_for(tokens) for tokens in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize(("blocks", "block_tokens"), [(0, 4), (3, 0)])
def test_a_pool_of_nothing_is_refused(blocks, block_tokens):
    with pytest.raises(ValueError, match="pool"):
        BlockPool(blocks, block_tokens)


def lose_a_block(pool):
    pool._free.pop()


def hand_out_block_zero(pool):
    pool._free.append(0)


def free_twice(pool):
    pool._free[-1] = pool._free[0]


def count_wrongly(pool):
    pool._readers[1] += 1


def two_writers(pool):
    pool._readers[1] += 1


def lose_the_index(pool):
    pool._index.clear()


def lose_content(pool):
    pool._published[2] = None


def lose_the_lru(pool):
    pool._cached.clear()


def swap_the_lru(pool):
    pool._cached = type(pool._cached)({4: None})


def misname(pool):
    pool._index[b"stray"] = 2


@pytest.mark.parametrize(
    "damage",
    [
        lose_a_block,
        hand_out_block_zero,
        free_twice,
        count_wrongly,
        lose_the_index,
        lose_content,
        lose_the_lru,
        swap_the_lru,
        misname,
    ],
    ids=lambda damage: damage.__name__,
)
def test_the_checker_sees_every_kind_of_damage(damage):
    pool = BlockPool(6, 4)
    private = pool.allocate()
    shared, cached = published(pool, 1, 2)
    assert (private, shared, cached) == (1, 2, 3)
    pool.release([cached])
    pool.check([[private], [shared]])
    damage(pool)
    with pytest.raises(PoolError):
        pool.check([[private], [shared]])


def test_the_checker_sees_a_table_that_holds_what_it_does_not_own():
    pool = BlockPool(6, 4)
    private = pool.allocate()
    for tables in ([], [[private], [private]], [[private, 4]], [[private, 0]]):
        with pytest.raises(PoolError):
            pool.check(tables)


def test_the_checker_sees_two_writers_and_a_used_block_zero():
    pool = BlockPool(6, 4)
    private = pool.allocate()
    two_writers(pool)
    with pytest.raises(PoolError, match="writers"):
        pool.check([[private], [private]])
    pool = BlockPool(6, 4)
    pool._state[0] = BlockState.WRITING
    with pytest.raises(PoolError, match="block 0"):
        pool.check([])
