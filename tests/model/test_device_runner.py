"""A device's runner gives the reference's tokens: in chunks, beside others, captured, shared, preempted."""

from __future__ import annotations

import pytest
import torch

from container.engine.request import SamplingParams
from container.engine.step import ROW_FED, ROW_PROMPT_LOGPROBS, ROW_SAMPLES, StepPlan
from container.model.device_runner import DeviceRunner
from tests.model import devices
from tests.model.devices import KINDS, NO_CAPTURES, SIZES, SMALL_CAPTURES, continued, prompts
from tests.model.driving import Driver, greedy

LENGTHS = (13, 1, 22)
NEW = 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [3, 32])
def test_tokens_are_those_of_the_reference(kind: str, chunk: int) -> None:
    given = prompts(*LENGTHS)
    found = greedy(devices.runner(kind), given, NEW, chunk if chunk < 32 else 10)
    assert found == [continued(kind, prompt, NEW) for prompt in given]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_tokens_of_the_kernels_are_those_of_the_reference(kind: str) -> None:
    """The accelerator's own operators, interpreted, with captured sizes and their padding."""
    given = prompts(7, 11)
    found = greedy(devices.runner(kind, devices.interpreted(), SMALL_CAPTURES), given, 3, 8)
    assert found == [continued(kind, prompt, 3) for prompt in given]


@pytest.mark.parametrize("captures", [NO_CAPTURES, SMALL_CAPTURES, None])
def test_captured_sizes_change_nothing(captures: tuple[devices.StepSize, ...] | None) -> None:
    given = prompts(*LENGTHS)
    model = devices.DeviceModel(
        devices.CpuDevice(), devices.weights("llama"), SIZES.limits(), captures=captures
    )
    sampler = devices.Sampler(devices.VOCABULARY)
    runner = DeviceRunner(model, sampler, devices.score, SIZES, SIZES.capacity(devices.VOCABULARY))
    assert greedy(runner, given, NEW, 5) == [continued("llama", prompt, NEW) for prompt in given]


def poison(runner: DeviceRunner) -> torch.Tensor:
    """Fill every page that nobody holds with NaN; return a mark of those pages."""
    pages = runner._model.pages
    free = torch.ones(len(pages.pool), dtype=torch.bool)
    free[list(pages._held)] = False
    pages.pool[free] = float("nan")
    return free


@pytest.mark.parametrize("interpreted", [False, True])
def test_padding_touches_no_page_that_is_not_the_steps_own(interpreted: bool) -> None:
    device = devices.interpreted() if interpreted else devices.CpuDevice()
    runner = devices.runner("llama", device, SMALL_CAPTURES)
    driver = Driver(runner)
    prompt = prompts(9)[0]
    sequence = driver.start(2, prompt)
    driver.row(sequence, 8, 0)  # two pages; the next step takes a third
    driver.step()
    for _ in range(3 if interpreted else 40):
        if len(sequence.tokens) > sequence.computed + 1:
            break
        driver.row(sequence, 1)
        before = set(runner._model.pages._held)
        free = poison(runner)
        sequence.tokens.append(driver.step().rows[0].sampled.token)  # type: ignore[union-attr]
        free[list(set(runner._model.pages._held) - before)] = False
        assert bool(runner._model.pages.pool[free].isnan().all())
    assert sequence.tokens[9:] == continued("llama", prompt, len(sequence.tokens) - 9)


def test_a_thousand_padded_steps_leave_page_0_as_it_was() -> None:
    model = devices.runner("llama", captures=SMALL_CAPTURES)._model
    model.pages.pool.fill_(float("nan"))
    for turn in range(1000):
        size = SMALL_CAPTURES[turn % 3]
        model._idle(size)
        model._replays[size]()
    assert bool(model.pages.pool.isnan().all())


def test_a_preempted_sequence_goes_on_from_shared_pages() -> None:
    runner = devices.runner("llama", captures=SMALL_CAPTURES)
    driver = Driver(runner)
    prompt = prompts(14)[0]
    sequence = driver.start(0, prompt)
    driver.row(sequence, 14)
    sequence.tokens.append(driver.step().rows[0].sampled.token)  # type: ignore[union-attr]
    driver.preempt(sequence, 3)
    driver.row(sequence, len(sequence.tokens) - sequence.computed)
    sequence.tokens.append(driver.step().rows[0].sampled.token)  # type: ignore[union-attr]
    assert sequence.tokens[14:] == continued("llama", prompt, 2)
    runner._model.kv.check()


def test_a_token_that_stayed_on_the_device_is_the_one_sampled() -> None:
    """Steps launched before the last one's result is known: their token is fed where it was sampled."""
    runner = devices.runner("llama", captures=SMALL_CAPTURES)
    driver = Driver(runner)
    given = prompts(9, 5)
    sequences = [driver.start(slot, prompt) for slot, prompt in enumerate(given)]
    for sequence in sequences:
        driver.row(sequence, len(sequence.tokens))
    ticket = runner.launch(driver._plan)
    produced: list[list[int]] = [[], []]
    for number in range(1, 6):
        driver._plan = StepPlan(number)
        for sequence in sequences:
            sequence.tokens.append(0)  # not known here
            driver.row(sequence, 1, ROW_SAMPLES | ROW_FED)
        following = runner.launch(driver._plan)
        for row in runner.collect(ticket).rows:
            produced[row.row].append(row.sampled.token)  # type: ignore[union-attr]
        ticket = following
    runner.collect(ticket)
    assert produced == [continued("llama", prompt, 5) for prompt in given]


def test_sampled_rows_and_greedy_ones_share_a_step() -> None:
    """Seeded draws are the host's; both kinds of token can be fed to the next step."""
    alone, beside = devices.runner("llama"), devices.runner("llama", captures=SMALL_CAPTURES)
    warm = SamplingParams(temperature=0.8, seed=17, top_logprobs=2)
    results = []
    for runner, count in ((alone, 1), (beside, 2)):
        driver = Driver(runner)
        sequences = [driver.start(slot, prompts(8)[0], warm if slot == 0 else None) for slot in range(count)]
        for sequence in sequences:
            driver.row(sequence, 8)
        first = driver.step()
        results.append(first.rows[0])
        for sequence, row in zip(sequences, first.rows, strict=True):
            sequence.tokens.append(row.sampled.token)  # type: ignore[union-attr]
            driver.row(sequence, 1, ROW_SAMPLES | ROW_FED)
            driver._plan.tokens[-1] = 0
        results.append(driver.step().rows[0])
    assert [r.sampled.token for r in results[:2]] == [r.sampled.token for r in results[2:]]  # type: ignore[union-attr]
    assert results[0].sampled.logprob == pytest.approx(results[2].sampled.logprob, abs=1e-5)  # type: ignore[union-attr]


def test_prompt_logprobs_come_from_every_row_of_logits() -> None:
    driver = Driver(devices.runner("llama"))
    prompt = prompts(12)[0]
    driver.row(driver.start(1, prompt, SamplingParams(temperature=0.0, prompt_logprobs=0)), 12,
               ROW_SAMPLES | ROW_PROMPT_LOGPROBS)  # fmt: skip
    (row,) = driver.step().rows
    with torch.inference_mode():
        logits = devices.reference_model("llama")(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
    want = torch.log_softmax(logits.float(), -1)
    found = [each.logprob for each in row.prompt_logprobs]
    assert found == pytest.approx([float(want[i, t]) for i, t in enumerate(prompt[1:])], abs=1e-4)


def test_a_row_that_is_no_number_fails_alone() -> None:
    runner = devices.runner("llama")
    driver = Driver(runner)
    sequences = [driver.start(slot, prompt) for slot, prompt in enumerate(prompts(6, 6))]
    for sequence in sequences:
        driver.row(sequence, 5, 0)
    driver.step()
    runner._model.pages.pool[int(runner._model.kv._held[0].addresses[0])] = float("nan")
    for sequence in sequences:
        driver.row(sequence, 1)
    broken, sound = driver.step().rows
    assert broken.failed and broken.sampled is None
    assert sound.sampled is not None and sound.sampled.token == continued("llama", prompts(6, 6)[1], 1)[0]


def test_tickets_are_collected_in_order_and_two_at_most_are_under_way() -> None:
    runner = devices.runner("llama")
    driver = Driver(runner)
    sequence = driver.start(0, prompts(9)[0])
    tickets = []
    for number in range(2):
        driver.row(sequence, 3, 0)
        tickets.append(runner.launch(driver._plan))
        driver._plan = StepPlan(number + 1)
    driver.row(sequence, 3, 0)
    with pytest.raises(AssertionError, match="too many"):
        runner.launch(driver._plan)
    with pytest.raises(AssertionError, match="in order"):
        runner.collect(tickets[1])
    assert runner.collect(tickets[0]).rows == [] and runner.collect(tickets[1]).rows == []


def test_pages_are_wiped_before_they_are_taken_again() -> None:
    runner = devices.runner("llama", captures=SMALL_CAPTURES)
    driver = Driver(runner)
    sequence = driver.start(0, prompts(12)[0])
    driver.row(sequence, 12, 0)
    driver.step()
    held = sorted(runner._model.pages._held)
    assert bool(runner._model.pages.pool[held].any())
    runner.reset()
    driver = Driver(runner)
    driver.row(driver.start(0, prompts(1)[0]), 1)
    driver.step()
    left = [page for page in range(len(runner._model.pages.pool)) if page not in runner._model.pages._held]
    assert not runner._model.pages.pool[left].any()
    runner.close()
    assert not runner._model.pages.pool.any()
