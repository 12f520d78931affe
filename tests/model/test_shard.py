"""One rank's part of a model: which part it is, how it arrives, and that all parts make the whole."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from container.model import division, layout
from container.model.errors import LoadError, ShardRefused
from container.model.layout import lay_out
from container.model.load import LoadedModel, load, read_config
from container.model.parallel import RowParallel, arm, wide_norm
from container.model.partition import Cut, Heads, even, even_vectors
from container.model.replay import ProbeFailed, ProbeReason
from container.model.source import StoredTensor
from tests.model.divided import (
    KINDS,
    LIMIT,
    SIZES,
    TABLE,
    divided_config,
    divided_logits,
    divided_source,
    render,
    whole_model,
)
from tests.model.ranks import ThreadGroup, together
from tests.model.tiny import TinySource

DECODED = 2  # layers of the tiny models


def part(name: str, rank: int, size: int, **options: Any) -> LoadedModel:
    return load(
        divided_source(name, size),
        torch.float32,
        lambda _: 64,
        lambda _: None,
        rank=rank,
        size=size,
        **options,
    )


def skeleton(name: str, size: int, **changes: Any) -> Any:
    config = divided_config(name, size)
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.timeout(600)
def test_divided_models_give_the_logits_of_the_whole_and_the_table_is_current() -> None:
    assert TABLE.read_text(encoding="utf-8") == render()


def test_the_table_shows_what_it_should() -> None:
    rows = [line.split("|")[1:5] for line in TABLE.read_text(encoding="utf-8").splitlines()[7:]]
    assert [row[0].strip() for row in rows] == sorted(KINDS)
    whole = [row for row in rows if all(cell.strip() == f"<= {LIMIT:g}" for cell in row[1:])]
    assert len(whole) >= 25


@pytest.mark.parametrize("total", [3, 8, 32, 49, 96, 97, 101, 1536, 11008, 49152])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_parts_of_a_width_cover_it_once_and_hardly_differ(total: int, size: int) -> None:
    parts = [even(total, rank, size) for rank in range(size)]
    assert (parts[0][0], parts[-1][1]) == (0, total)
    assert all(left[1] == right[0] for left, right in pairwise(parts))
    widths = [stop - start for start, stop in parts]
    assert min(widths) > 0
    assert max(widths) - min(widths) <= max(8, max(widths) // 7)


def test_parts_end_where_quantization_blocks_end() -> None:
    assert even(11008, 0, 3) == (0, 57 * 64)
    assert even(1536, 1, 3) == (512, 1024)
    assert even(32, 2, 3) == (16, 32)  # vectors of 8 stay whole, though one rank gets two


def test_a_width_smaller_than_the_ranks_is_refused_with_its_size() -> None:
    with pytest.raises(ShardRefused, match="width of 3 cannot be divided among 4 ranks"):
        even(3, 0, 4)
    with pytest.raises(ShardRefused, match="expert width of 20 cannot be divided among 2 ranks"):
        even_vectors(20, 0, 2)


@pytest.mark.parametrize(
    ("total", "kv_total", "size", "sentence"),
    [
        (
            9,
            3,
            2,
            "9 attention heads cannot be divided among 2 ranks\nhint: this model divides among 1, 3, 9",
        ),
        (12, 4, 3, "4 key and value heads cannot be divided among 3 ranks"),
        (8, 8, 16, "8 attention heads cannot be divided among 16 ranks"),
    ],
)
def test_heads_that_do_not_divide_are_refused_with_their_counts(
    total: int, kv_total: int, size: int, sentence: str
) -> None:
    with pytest.raises(ShardRefused) as caught:
        Heads(total, kv_total, 0, size)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(("total", "kv_total", "size"), [(9, 3, 3), (8, 2, 4), (8, 1, 8), (12, 4, 2)])
def test_every_query_head_lies_with_its_own_kv_head(total: int, kv_total: int, size: int) -> None:
    seen = []
    for rank in range(size):
        heads = Heads(total, kv_total, rank, size)
        first, last = heads.query(1)
        kv_first, kv_last = heads.key_value(1)
        wanted = {head // (total // kv_total) for head in range(first, last)}
        assert wanted == set(range(kv_first, kv_last))
        seen += range(first, last)
    assert seen == list(range(total))


def test_fewer_kv_heads_than_ranks_are_held_by_neighbours() -> None:
    assert [Heads(8, 2, rank, 4).key_value(1)[0] for rank in range(4)] == [0, 0, 1, 1]
    assert Heads(8, 2, 0, 4).kv_copies == 2


def test_a_cut_does_not_keep_the_whole_alive() -> None:
    whole = torch.arange(24.0).view(4, 6)
    for cut in (Cut(0, ((1, 3),)), Cut(1, ((0, 2), (4, 6)))):
        kept = cut.of(whole)
        assert kept.untyped_storage().nbytes() == kept.nbytes
        assert kept.shape[cut.dim] == cut.width
        assert kept.is_contiguous()


def test_a_model_without_a_plan_is_refused() -> None:
    with pytest.raises(ShardRefused, match="no plan for tensor parallelism"):
        part("gpt2", 0, 2)


def test_a_plan_with_an_unknown_style_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = skeleton("llama", 2)
    model._tp_plan["model.layers.*.mlp.up_proj"] = "diagonal"
    with pytest.raises(ShardRefused, match="`diagonal`"):
        lay_out(model, 0, 2)


@pytest.mark.parametrize("owner", ["self_attn", "mlp.experts"])
def test_a_parameter_of_an_unknown_kind_in_a_divided_module_is_refused(owner: str) -> None:
    model = skeleton("mixtral", 2)
    module = model.model.layers[0].get_submodule(owner)
    module.extra = nn.Parameter(torch.ones(4, device="meta"))
    with pytest.raises(ShardRefused, match="not known here"):
        lay_out(model, 0, 2)


def test_shard_refusals_are_refusals_to_load() -> None:
    assert issubclass(ShardRefused, LoadError)


@pytest.mark.parametrize(("name", "size"), [("llama_tied", 3), ("gemma", 2)])
def test_a_tied_head_is_a_view_of_the_embedding(name: str, size: int) -> None:
    for rank in range(size):
        model = part(name, rank, size).model
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert head.untyped_storage().data_ptr() == embedding.untyped_storage().data_ptr()
        start, stop = even(96, rank, size)
        assert torch.equal(head, embedding[start:stop])


def test_a_row_layers_bias_is_added_once_after_the_sum() -> None:
    inner = nn.Linear(4, 3, bias=False)
    row = RowParallel(inner, nn.Parameter(torch.full((3,), 10.0)))
    hidden = torch.ones(2, 4)
    alone = inner(hidden)
    together_ = together(2, lambda group: _armed(row, group)(hidden))
    for result in together_:
        torch.testing.assert_close(result, 2 * alone + 10.0)


def _armed(module: RowParallel, group: ThreadGroup) -> RowParallel:
    copy = RowParallel(module.inner, module.bias)
    arm(copy, group)
    return copy


class Norm(nn.Module):
    """An RMS norm in one of the two usual roundings, or in none of them."""

    def __init__(self, form: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, dtype=dtype))
        self.variance_epsilon = 1e-5
        self.form = form

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        if self.form == "cast first":
            return self.weight * wide.to(hidden.dtype)
        if self.form == "cast last":
            return (self.weight * wide).to(hidden.dtype)
        return ((1 + self.weight) * wide).to(hidden.dtype)


@pytest.mark.parametrize("form", ["cast first", "cast last"])
def test_a_norm_over_all_heads_keeps_the_rounding_of_its_model(form: str) -> None:
    found = wide_norm(Norm(form, torch.bfloat16), 12, 1)
    assert found.cast_first == (form == "cast first")
    assert torch.equal(found.weight, torch.ones(6, dtype=torch.bfloat16))


def test_a_norm_over_all_heads_of_another_kind_is_refused() -> None:
    with pytest.raises(ShardRefused, match="norm"):
        wide_norm(Norm("one plus", torch.float32), 12, 1)


def test_layers_are_finished_one_by_one_while_those_after_them_are_not_yet_read() -> None:
    names: list[str] = []
    source = divided_source("qwen3_moe", 2)
    read: list[str] = []

    class Watched(TinySource):
        def stored(self) -> Any:
            for name, stored in source.stored():
                yield name, StoredTensor(stored.shape, lambda n=name, s=stored: (read.append(n), s.read())[1])

    def finish(layer: nn.Module) -> None:
        number = len(names)
        names.append(type(layer).__name__)
        assert not any(p.is_meta for p in layer.parameters())
        later = [name for name in read if any(f"layers.{n}." in name for n in range(number + 1, DECODED))]
        assert len(later) <= 1, "more than the tensor that announced the next layer was read"

    watched = Watched({"config.json": source.file("config.json") or b""}, {})
    load(watched, torch.float32, lambda _: 64, lambda _: None, rank=1, size=2, finish=finish)
    assert len(names) == DECODED


class Packed(nn.Module):
    """Stands for a quantized layer: buffers only, one of them not persistent."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("packed", linear.weight.data.clone())
        self.register_buffer("scratch", torch.full((3,), 7.0), persistent=False)
        self.bias = linear.bias
        self.extra = nn.Parameter(torch.full((2,), 5.0), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.packed, self.bias)


def pack(layer: nn.Module) -> None:
    for name, child in list(layer.named_modules()):
        if isinstance(child, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(parent), leaf, Packed(child))


@pytest.mark.parametrize("size", [1, 2])
def test_what_finishing_a_layer_made_survives_the_rest_of_loading(size: int) -> None:
    plain, packed = part("llama_biased", 0, size), part("llama_biased", 0, size, finish=pack)
    made = [module for module in packed.model.modules() if isinstance(module, Packed)]
    assert len(made) == 7 * DECODED
    for module in made:
        assert torch.equal(module.scratch, torch.full((3,), 7.0))
        assert torch.equal(module.extra, torch.full((2,), 5.0))
    tokens = torch.arange(9)[None]
    torch.testing.assert_close(packed.model(tokens).logits, plain.model(tokens).logits)


def test_an_error_of_a_finishing_step_is_told_as_it_is() -> None:
    def fail(layer: nn.Module) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        part("llama", 0, 2, finish=fail)
    part("llama", 0, 2)  # and the next load is not disturbed


def test_position_frequencies_are_those_of_the_whole_model() -> None:
    for name in ("llama", "phi3", "gemma3_text"):
        mine = dict(part(name, 1, 2).model.named_buffers())
        for key, buffer in whole_model(name, 2).named_buffers():
            assert torch.equal(mine[key], buffer)


def test_a_lacking_tensor_is_refused_on_every_rank() -> None:
    source = divided_source("llama", 2)
    tensors = dict(source.tensors())
    del tensors[next(name for name in tensors if "o_proj" in name)]
    for rank in range(2):
        with pytest.raises(LoadError, match="1 tensors"):
            load(
                TinySource({"config.json": source.file("config.json") or b""}, tensors),
                torch.float32,
                lambda _: 64,
                lambda _: None,
                rank=rank,
                size=2,
            )


@pytest.mark.parametrize("name", ["llama", "olmo2", "gpt_oss", "deepseek_v3", "gemma2", "mixtral"])
@pytest.mark.parametrize("size", SIZES)
def test_the_division_probe_passes_what_is_right(name: str, size: int) -> None:
    config = read_config(divided_source(name, size))
    assert together(size, lambda group: division.probe_division(config, group)) == [True] * size


@pytest.mark.parametrize("fault", ["heads", "norm", "width", "bias"])
def test_the_division_probe_notices_a_wrong_cut(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(model: Any, rank: int, size: int) -> Any:
        made = lay_out(model, rank, size)
        for name, cut in made.cuts.items():
            if fault == "heads" and "k_proj" in name:
                made.cuts[name] = Cut(cut.dim, ((0, cut.width),))  # every rank takes the first
        if fault == "width":
            wrong = next(name for name in made.cuts if "down_proj" in name)
            made.cuts[wrong] = Cut(1, ((0, made.cuts[wrong].width),))
        if fault == "norm":
            made.norms = {name: layout.SharedNorm(n.width, n.copies * 2) for name, n in made.norms.items()}
        if fault == "bias":
            made.first_only = set()
        return made

    name = "gpt_oss" if fault == "bias" else "olmo2"
    config = read_config(divided_source(name, 2))
    monkeypatch.setattr("container.model.load.lay_out", spoiled)
    with pytest.raises(ProbeFailed) as caught:
        together(2, lambda group: division.probe_division(config, group))
    assert caught.value.reason is ProbeReason.PROBE_DIFF


def test_logits_are_the_same_bits_whichever_thread_comes_first() -> None:
    tokens = [5, 9, 11, 4]
    first = divided_logits("llama", 3, tokens)
    assert torch.equal(first, divided_logits("llama", 3, tokens))
