"""Philox gives Random123's published outputs, and noise depends on seed, position and token id alone."""

from __future__ import annotations

import numpy as np
import pytest

from container.model.rng import gumbel, gumbel_of, philox

# Random123, tests/kat_vectors, lines `philox4x32 10`: counter, key, output
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
EULER_GAMMA = 0.5772156649015329


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), VECTORS)
def test_philox_gives_the_published_outputs(counter: str, key: str, output: str) -> None:
    low, high = words(key)
    c0, c1, c2, c3 = (np.array([word], np.uint64) for word in words(counter))
    result = philox((c0, c1, c2, c3), low | high << 32)
    assert [int(word[0]) for word in result] == words(output)


def test_philox_is_the_same_alone_and_in_a_batch() -> None:
    columns = list(zip(*(words(counter) for counter, _, _ in VECTORS), strict=True))
    c0, c1, c2, c3 = (np.array(column, np.uint64) for column in columns)
    batch = philox((c0, c1, c2, c3), 7)
    for i, (counter, _, _) in enumerate(VECTORS):
        d0, d1, d2, d3 = (np.array([word], np.uint64) for word in words(counter))
        assert [int(w[i]) for w in batch] == [int(w[0]) for w in philox((d0, d1, d2, d3), 7)]


def test_noise_of_chosen_tokens_is_that_of_the_whole_row() -> None:
    tokens = np.array([0, 1, 2, 3, 4, 7, 500, 1000, 1001, 1002])
    whole = gumbel(123, 45, 1003)  # not a multiple of four: the last block is cut
    assert whole.shape == (1003,)
    assert np.array_equal(gumbel_of(123, 45, tokens), whole[tokens])


def test_a_wider_vocabulary_does_not_change_the_noise_of_a_token() -> None:
    assert np.array_equal(gumbel(5, 6, 1000), gumbel(5, 6, 4096)[:1000])


@pytest.mark.parametrize(
    ("seed", "position"), [(1, 0), (1 << 32, 0), (1 << 63, 0), (0, 1), (0, 1 << 31), (0, 1 << 32)]
)
def test_every_bit_of_seed_and_position_matters(seed: int, position: int) -> None:
    assert not np.isclose(gumbel(seed, position, 64), gumbel(0, 0, 64)).any()


def test_noise_is_finite_at_both_ends_of_the_words() -> None:
    from container.model.rng import _noise

    ends = _noise(np.array([0, 0xFFFFFFFF], np.uint64))
    # -ln(-ln u) at u = 2**-33 and 1 - 2**-33
    assert ends == pytest.approx([-3.1299, 22.8739], abs=1e-3)


def test_noise_has_the_moments_of_a_gumbel_distribution() -> None:
    noise = np.concatenate([gumbel(9, position, 50_000) for position in range(8)])
    # 400,000 samples: standard error of the mean 0.0020, of the variance about 0.0055; four of each allowed
    assert noise.mean() == pytest.approx(EULER_GAMMA, abs=0.008)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.022)


def test_noise_is_uncorrelated_between_neighbours_in_every_direction() -> None:
    here = gumbel(3, 10, 40_000)
    for other in (gumbel(3, 11, 40_000), gumbel(4, 10, 40_000), np.roll(here, 1), np.roll(here, 4)):
        assert abs(np.corrcoef(here, other)[0, 1]) < 4 / np.sqrt(40_000)


def test_noise_does_not_depend_on_how_the_row_is_cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gumbel(1, 2, 50_000)
    monkeypatch.setattr("container.model.rng.CHUNK", 400)
    assert np.array_equal(gumbel(1, 2, 50_000), whole)
