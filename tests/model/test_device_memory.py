"""A 70B shape on one device: what its weights take in each form, what is chosen, what is left for sequences.

Tensors are empty (meta): sizes are exact, nothing is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from container.model import device_start
from container.model.device_cpu import CpuDevice
from container.model.device_format import chosen
from container.model.kv_limits import LayerShape
from container.model.preparation import facts_of
from container.model.quantize_choose import Facts, Scheme, needed_bytes
from container.model.replay import Measured
from container.model.shape import RunnerConfig
from tests.bench.gpu_shapes import LLAMA_70B, weights

H200_BYTES = 139 * 2**30
TOKENS = 8192
FORMS = {Scheme.NONE: "bf16", Scheme.FP8: "fp8", Scheme.INT4_BLOCK: "int4"}


class Empty(CpuDevice):
    """A device whose memory is counted, not held."""

    def __init__(self, held_bytes: int = 0) -> None:
        super().__init__(capability=(9, 0))
        self.held_bytes = held_bytes

    def free_bytes(self) -> int:
        return H200_BYTES - self.held_bytes

    def zeros(self, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(sizes), dtype=dtype, device="meta")


@pytest.fixture(scope="module")
def facts() -> Facts:
    shape = LLAMA_70B
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=False,
    )
    return facts_of(config, torch.bfloat16)


def exact_bytes(scheme: Scheme) -> int:
    return sum(tensor.nbytes for tensor in weights(LLAMA_70B, Empty(), FORMS[scheme], TOKENS).tensors())


@pytest.mark.parametrize("scheme", FORMS)
def test_what_is_planned_for_weights_is_what_they_take(scheme: Scheme, facts: Facts) -> None:
    """4 bits are planned for as a CPU keeps them, in smaller groups: never less than a device takes."""
    exact, planned = exact_bytes(scheme), needed_bytes(scheme, facts)
    assert 0.995 * exact <= planned <= exact * (1.25 if scheme is Scheme.INT4_BLOCK else 1.02)


def test_one_device_takes_it_in_8_bits_unasked_and_in_4_when_asked(facts: Facts) -> None:
    unasked, asked = chosen(Empty(), "auto", facts), chosen(Empty(), "int4-block", facts)
    assert unasked is not None and unasked.scheme is Scheme.FP8
    assert asked is not None and asked.scheme is Scheme.INT4_BLOCK
    assert exact_bytes(Scheme.NONE) > 0.7 * H200_BYTES, "else it need not be quantized"


@pytest.mark.parametrize(("scheme", "sequences"), [(Scheme.FP8, 16), (Scheme.INT4_BLOCK, 32)])
def test_what_is_left_holds_many_whole_sequences(scheme: Scheme, sequences: int) -> None:
    shape = LLAMA_70B
    measured = Measured(
        [LayerShape(shape.kv_heads, shape.dim, shape.dim, None)] * shape.layers, shape.vocabulary
    )
    device = Empty(exact_bytes(scheme))
    sized = device_start.sizes(device, RunnerConfig(), measured, TOKENS, torch.bfloat16)
    taken = sized.blocks * sized.block_tokens * shape.kv_bytes
    assert sized.sequence_tokens == TOKENS
    assert sequences * TOKENS <= sized.blocks * sized.block_tokens
    assert taken <= (1 - device_start.KEPT_FREE) * device.free_bytes()
