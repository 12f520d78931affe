"""The parts of `scripts/bench gpu`, each in a process of its own: the last line of stdout is its JSON.

Owns: what each part measures and how. Must not know: other parts, where results go.
Invariant: the code of a device's run is that of the tiny run on a CPU; only sizes differ.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median
from typing import TYPE_CHECKING, Any

from tests.bench.gpu_bounds import Scale, copy_gb_s, load_bound_s, step_bytes, timed

if TYPE_CHECKING:
    import torch

    from container.model.device import Device
    from container.model.device_runner import DeviceRunner
    from tests.bench.gpu_shapes import Shape

Figures = dict[str, Any]
SHAREGPT_SIGMA = 0.8  # of the log-normal lengths; medians 160 in, 180 out (engine specification, 17)


def make_device(scale: Scale) -> Device:
    """Return the device; a CPU runs the same kernels, interpreted."""
    from container.model.device_triton import TritonOperators

    if scale.device == "cuda":
        from container.model.device_cuda import CudaDevice

        return CudaDevice(TritonOperators())
    from container.model.device_cpu import CpuDevice

    return CpuDevice(TritonOperators())


def kernels(scale: Scale) -> Figures:
    """500 random shapes against the reference, in poisoned memory; several processes, since each compiles."""
    from tests.kernels.gpu.attention_cases import check_all

    count, variants, workers = scale.pick(500, 3), scale.pick(64, 3), scale.pick(8, 1)
    # A form belongs to one process, so that none is compiled twice.
    parts = [[seed for seed in range(count) if seed % variants % workers == own] for own in range(workers)]
    given = (scale.device, scale.pick(3000, 40), variants, scale.left_s() - 5)
    if workers == 1:
        done = [check_all(parts[0], *given)]
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            done = list(pool.map(check_all, parts, *([one] * workers for one in given)))
    return {
        "cases": sum(one["cases"] for one in done),
        "failed": sum(one["failed"] for one in done),
        "largest_error": max(one["largest_error"] for one in done),
    }


def attention(scale: Scale) -> Figures:
    """Bytes of keys and values read per second of decoding, by batch and context, best of the tunings."""
    copied = copy_gb_s(scale)
    full = [(64, 4096), (1, 4096), (16, 4096), (256, 4096), (1, 512), (64, 512), (256, 512), (1, 32768)]
    found: Figures = {"copy_gb_s": copied, "points": []}
    for batch, context in scale.pick(full, [(2, 40)]):
        best = best_tuning(scale, batch, context)
        if best:
            found["points"].append(
                {"batch": batch, "context": context, "of_copy": best["gb_s"] / copied, **best}
            )
    return found


def best_tuning(scale: Scale, batch: int, context: int) -> Figures:
    """Return the fastest cut of one decode with its rate; nothing where no time was left."""
    import torch

    from container.kernels.gpu.attention import PagedShape, Partials, Rows, Tuning, attend

    shape = scale.pick(PagedShape(32, 8, 128, 128, 128**-0.5), PagedShape(4, 2, 16, 16, 0.25))
    dtype = scale.pick(torch.bfloat16, torch.float32)
    page_tokens, line = 16, -(-context // 16)
    made = {"device": scale.device, "dtype": torch.int32}
    pages = torch.randperm(batch * line, device=scale.device).to(torch.int32).view(batch, line) + 1
    numbers = torch.arange(batch + 1, **made)
    rows = Rows(numbers, torch.full((batch,), context, **made), numbers[:-1], pages)
    sizes = (2, batch * line + 1, page_tokens, shape.kv_heads, shape.key_dim)
    pool = torch.randn(sizes, device=scale.device, dtype=dtype)
    query = torch.randn((batch, shape.heads, shape.key_dim), device=scale.device, dtype=dtype)
    out = torch.empty_like(query)
    moved = batch * context * 2 * shape.kv_heads * shape.key_dim * dtype.itemsize
    best: Figures = {}
    for tile in scale.pick((32, 64, 128), (16,)):
        for splits in scale.pick((1, 4, 16), (1, 2)):
            for warps, stages in scale.pick(((4, 2), (4, 3)), ((4, 2),)):
                if splits * 32 > context or scale.left_s() < scale.pick(3, 0):
                    continue
                tuning = Tuning(16, tile, splits, warps, stages)
                room = Partials.of(shape, batch, splits, query.device) if splits > 1 else None

                def work(tuning: Tuning = tuning, room: Partials | None = room) -> None:
                    attend(shape, rows, query, pool[0], pool[1], out, tuning, partials=room)

                seconds = timed(scale, work, scale.pick(10, 1))
                if not best or seconds < best["seconds"]:
                    cut = {"tile": tile, "splits": splits, "warps": warps, "stages": stages}
                    best = {"seconds": seconds, "gb_s": moved / seconds / 1e9, **cut}
    return best


def runner_of(
    scale: Scale, shape: Shape, form: str, slots: int, sequence_tokens: int, step_tokens: int
) -> DeviceRunner:
    """Return a runner of random weights of `shape`, its decode sizes captured."""
    import torch

    from container.model.device_model import DeviceModel
    from container.model.device_runner import DeviceRunner
    from container.model.device_step import captured_sizes
    from container.model.sampler import Sampler, score
    from container.model.shape import Sizes
    from tests.bench.gpu_shapes import weights

    device = make_device(scale)
    held = weights(shape, device, form, sequence_tokens, scale.pick(torch.bfloat16, torch.float32))
    blocks = slots * -(-sequence_tokens // 16)
    sizes = Sizes(sequence_tokens, slots, step_tokens, blocks, 16, None)
    wanted = {1, 64, 256, slots}
    captures = [size for size in captured_sizes(slots, 1) if size.rows in wanted]
    model = DeviceModel(device, held, sizes.limits(), captures=captures)
    capacity = sizes.capacity(shape.vocabulary)
    return DeviceRunner(model, Sampler(shape.vocabulary), score, sizes, capacity)


def steps_of(scale: Scale, form: str) -> Figures:
    """Step times of the 8B shape at 512 positions, pipelined, with the memory bound beside."""
    from tests.bench.gpu_load import decode
    from tests.bench.gpu_shapes import LLAMA_8B, TINY

    shape = scale.pick(LLAMA_8B, TINY)
    context, batches = scale.pick(512, 6), scale.pick((1, 64, 256), (1, 2))
    runner = runner_of(scale, shape, form, max(batches), context + scale.pick(128, 12), scale.pick(2048, 32))
    copied, weight = copy_gb_s(scale), step_bytes(runner._model.weights)
    found: Figures = {"copy_gb_s": copied, "weight_bytes": weight, "points": []}
    for batch in batches:
        if scale.left_s() < scale.pick(8, 0):
            break
        trace = decode(runner, batch, context, scale.pick(48, 3), shape.vocabulary)
        bound = (weight + batch * context * shape.kv_bytes) / copied / 1e9
        middle = median(trace["step_s"])
        found["points"].append(
            {"batch": batch, "context": context, "step_ms": middle * 1e3, "bound_ms": bound * 1e3,
             "of_bound": bound / middle, "tok_s": batch / middle, "host_ms": median(trace["host_s"]) * 1e3}
        )  # fmt: skip
    return found


def gap(scale: Scale) -> Figures:
    """How much longer pipelined steps at batch 64 take than their captured launch alone.

    Sampling counts as gap, so that the share is an upper bound.
    """
    from tests.bench.gpu_load import decode
    from tests.bench.gpu_shapes import LLAMA_8B, TINY

    shape, batch, context = scale.pick(LLAMA_8B, TINY), scale.pick(64, 2), scale.pick(512, 6)
    runner = runner_of(scale, shape, "bf16", batch, context + scale.pick(256, 24), scale.pick(2048, 32))
    trace = decode(runner, batch, context, scale.pick(100, 3), shape.vocabulary)
    model = runner._model
    size = next(size for size in model._replays if size.rows == batch)
    # The last step's rows again, launch behind launch: the same reads, no sampling, no gap.
    alone = timed(scale, model._replays[size], scale.pick(30, 1))
    step = median(trace["step_s"])
    waited = decode(runner, batch, context, scale.pick(50, 3), shape.vocabulary, ahead=False)
    moved = step_bytes(model.weights) + batch * context * shape.kv_bytes
    return {
        "batch": batch,
        "step_ms": step * 1e3,
        "device_ms": alone * 1e3,
        "bound_ms": moved / copy_gb_s(scale) / 1e6,
        "gap_share": max(0.0, 1 - alone / step),
        "without_running_ahead_ms": median(waited["step_s"]) * 1e3,
        "trace_ms": [seconds * 1e3 for seconds in trace["step_s"]],
    }


def load(scale: Scale) -> Figures:
    """1,000 requests of ShareGPT-like lengths at once, greedy, lengths exact: output tokens per second."""
    from tests.bench.gpu_load import offline, sharegpt_lengths
    from tests.bench.gpu_shapes import LLAMA_8B, TINY

    shape = scale.pick(LLAMA_8B, TINY)
    lengths = sharegpt_lengths(scale.pick(1000, 3), scale.pick(1024, 5), SHAREGPT_SIGMA)
    runner = runner_of(scale, shape, "bf16", scale.pick(256, 3), scale.pick(2048, 40), scale.pick(4096, 32))
    found = offline(runner, lengths, shape.vocabulary, lambda: scale.left_s() - scale.pick(4, 0))
    bound = load_bound_s(scale, runner._model.weights, shape, lengths, found["steps"])
    return {**found, "bound_tok_s": sum(output for _, output in lengths) / bound}


def large(scale: Scale) -> Figures:
    """A 70B shape in fp8 and in 4 bits on one device: that it runs, its memory, its step times."""
    from tests.bench.gpu_load import decode
    from tests.bench.gpu_shapes import LLAMA_70B, TINY_LARGE

    shape, found = scale.pick(LLAMA_70B, TINY_LARGE), {}
    for form in scale.pick(("fp8",), ("int4",)):
        runner = runner_of(scale, shape, form, scale.pick(16, 2), scale.pick(640, 32), scale.pick(1024, 32))
        weight, copied = step_bytes(runner._model.weights), copy_gb_s(scale)
        for batch in scale.pick((1, 16), (1,)):
            trace = decode(runner, batch, scale.pick(256, 6), scale.pick(16, 3), shape.vocabulary)
            found[f"{form}_batch_{batch}_ms"] = median(trace["step_s"]) * 1e3
            moved = weight + batch * scale.pick(256, 6) * shape.kv_bytes
            found[f"{form}_batch_{batch}_bound_ms"] = moved / copied / 1e6
        found[f"{form}_weight_gib"] = weight / 2**30
    return found


def transformers_model(scale: Scale) -> Any:
    """Return transformers' own model of the 8B shape, random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.bench.gpu_shapes import LLAMA_8B, TINY

    shape = scale.pick(LLAMA_8B, TINY)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        pad_token_id=0,
    )
    with torch.device(scale.device):
        model = LlamaForCausalLM._from_config(config, dtype=scale.pick(torch.bfloat16, torch.float32))
    return model.eval()


def peers(scale: Scale) -> Figures:
    """transformers' `generate`, as it comes, and our steps in turn: milliseconds at batch 1 and 64."""
    import torch

    from tests.bench.gpu_load import decode
    from tests.bench.gpu_shapes import LLAMA_8B, TINY

    model, found, shape = transformers_model(scale), {}, scale.pick(LLAMA_8B, TINY)
    context, new = scale.pick(512, 12), scale.pick(24, 2)
    runner = runner_of(scale, shape, "bf16", scale.pick(64, 1), context + new + 8, scale.pick(2048, 32))
    copied, weight = copy_gb_s(scale), step_bytes(runner._model.weights)
    for batch in scale.pick((1, 64), (1,)):
        ids = torch.randint(3, model.config.vocab_size, (batch, context), device=scale.device)

        def work(tokens: int, ids: torch.Tensor = ids) -> None:
            seen = torch.ones_like(ids)
            model.generate(
                ids, attention_mask=seen, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )

        first, whole = timed(scale, lambda: work(1), 1), timed(scale, lambda: work(new), 1)
        # Of few short steps noise may be more than the difference.
        found[f"generate_batch_{batch}_ms"] = max(0.0, whole - first) / (new - 1) * 1e3
        trace = decode(runner, batch, context, scale.pick(24, 3), shape.vocabulary)
        found[f"ours_batch_{batch}_ms"] = median(trace["step_s"]) * 1e3
        found[f"bound_batch_{batch}_ms"] = (weight + batch * context * shape.kv_bytes) / copied / 1e6
    return found


def batching(scale: Scale) -> Figures:
    """transformers' continuous batching and our runner in turn, equal requests: output tokens per second."""
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    from tests.bench.gpu_load import offline
    from tests.bench.gpu_shapes import LLAMA_8B, TINY

    shape, count = scale.pick(LLAMA_8B, TINY), scale.pick(128, 2)
    prompt, new = scale.pick((160, 180), (6, 3))
    with torch.inference_mode(False):  # it computes in a thread of its own, where another mode holds
        model = transformers_model(scale).requires_grad_(False)
    runner = runner_of(scale, shape, "bf16", count, prompt + new + 16, scale.pick(4096, 32))
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=new)
    # Of 256 tokens each: room for every request at once. Left alone it takes most of the memory.
    room = ContinuousBatchingConfig(num_blocks=scale.pick(512, 8), max_batch_tokens=scale.pick(8192, 64))
    prompts = [[3 + (7 * at + number) % 90 for at in range(prompt)] for number in range(count)]
    found: Figures = {"theirs_tok_s": [], "ours_tok_s": []}
    for _ in range(scale.pick(2, 1)):
        begun = time.perf_counter()
        with torch.inference_mode(False):
            answers = model.generate_batch(prompts, generation, room)
        made = sum(len(answer.generated_tokens) for answer in answers.values())
        found["theirs_tok_s"].append(made / (time.perf_counter() - begun))
        ours = offline(runner, [(prompt, new)] * count, shape.vocabulary, scale.left_s)
        found["ours_tok_s"].append(ours["output_tok_s"])
    lengths = [(prompt, new)] * count
    bound = load_bound_s(scale, runner._model.weights, shape, lengths, ours["steps"])
    found["bound_tok_s"] = count * new / bound
    found["ratio"] = median(found["ours_tok_s"]) / median(found["theirs_tok_s"])
    return found


SECTIONS: dict[str, Callable[[Scale], Figures]] = {
    "kernels": kernels,
    "attention": attention,
    "steps_bf16": lambda scale: steps_of(scale, "bf16"),
    "gap": gap,
    "steps_fp8": lambda scale: steps_of(scale, scale.pick("fp8", "bf16")),  # interpreted fp8 rounds wrongly
    "load": load,
    "peers": peers,
    "batching": batching,
    "large": large,
    "steps_int4": lambda scale: steps_of(scale, "int4"),
}


def main() -> int:
    """Run one part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--budget-s", type=float, required=True)
    options = parser.parse_args()
    # Before any kernel is imported: Triton's decorator decides.
    os.environ["TRITON_INTERPRET"] = "0" if options.device == "cuda" else "1"
    scale = Scale(options.device, options.tiny, options.budget_s, time.monotonic())
    import torch

    with torch.inference_mode():
        figures = SECTIONS[options.section](scale)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
