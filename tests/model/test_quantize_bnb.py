"""The formats of bitsandbytes: its own layers' results, quiet, and no way to a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from container.model.quantize_bnb import Int8, Nf4, library
from container.model.quantize_format import Obstacle

LIMIT = 0.03  # of a shard against the whole, relative


def weight(seed: int, outputs: int = 48, inputs: int = 128) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.05


def activations(seed: int, tokens: int = 5, inputs: int = 128) -> Tensor:
    return torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_gives_what_linear4bit_gives(dtype: torch.dtype) -> None:
    nn = library().nn
    dense, x = weight(1).to(dtype), activations(2).to(dtype)
    theirs = nn.Linear4bit(128, 48, bias=False, compute_dtype=dtype, quant_type="nf4")
    theirs.weight = nn.Params4bit(
        dense.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    theirs = theirs.to("cpu").eval()
    theirs.support_avx512bf16_for_cpu = False  # its packed form for some CPUs rounds otherwise
    assert torch.equal(Nf4().multiply(x, Nf4().pack(dense)), theirs(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_gives_what_linear8bitlt_gives_with_threshold_0(dtype: torch.dtype) -> None:
    nn = library().nn
    dense, x = weight(3).to(dtype), activations(4).to(dtype)
    theirs = nn.Linear8bitLt(128, 48, bias=False, has_fp16_weights=False, threshold=0.0)
    theirs.weight = nn.Int8Params(dense.clone(), requires_grad=False, has_fp16_weights=False)
    theirs = theirs.to("cpu").eval()
    assert torch.equal(Int8().multiply(x, Int8().pack(dense)), theirs(x))


@pytest.mark.parametrize(("form", "limit"), [(Nf4(), 0.11), (Int8(), 0.01)])
def test_the_error_is_that_of_the_format(form: Nf4 | Int8, limit: float) -> None:
    dense, x = weight(5), activations(6)
    parts = form.pack(dense)
    assert (form.unpack(parts) - dense).norm() / dense.norm() < limit
    expected = x @ form.unpack(parts).t()
    assert (form.multiply(x, parts) - expected).norm() / expected.norm() < 0.015


@pytest.mark.parametrize("form", [Nf4(), Int8()])
def test_parts_are_as_announced(form: Nf4 | Int8) -> None:
    for inputs in (128, 96):
        parts = form.pack(weight(7, 8, inputs))
        assert {name: (part.shape, part.dtype) for name, part in parts.items()} == {
            name: (torch.Size(part.shape), part.dtype) for name, part in form.parts(8, inputs).items()
        }


@pytest.mark.parametrize("ranks", [2, 4])
def test_aligned_nf4_shards_hold_the_bits_of_the_whole(ranks: int) -> None:
    dense = weight(8, 48, 256)
    whole = Nf4().pack(dense)
    for name, part in whole.items():
        assert torch.equal(torch.cat([Nf4().pack(shard)[name] for shard in dense.chunk(ranks, 0)]), part)
        columns = [Nf4().pack(shard)[name] for shard in dense.chunk(ranks, 1)]
        assert torch.equal(torch.cat(columns, 1), part)


@pytest.mark.parametrize("form", [Nf4(), Int8()])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_sum_over_aligned_shards_is_the_whole_within_the_limit(form: Nf4 | Int8, ranks: int) -> None:
    inputs = 64 * ranks * 2
    dense, x = weight(9, 48, inputs), activations(10, 7, inputs)
    whole = form.multiply(x, form.pack(dense))
    columns = zip(x.chunk(ranks, 1), dense.chunk(ranks, 1), strict=True)
    by_columns = sum(form.multiply(part.contiguous(), form.pack(shard)) for part, shard in columns)
    by_rows = torch.cat([form.multiply(x, form.pack(shard)) for shard in dense.chunk(ranks, 0)], 1)
    assert (by_columns - whole).norm() / whole.norm() < LIMIT
    torch.testing.assert_close(by_rows, whole, rtol=1e-5, atol=1e-5)


def test_widths_that_64_does_not_divide_have_blocks_of_32_and_are_told() -> None:
    form = Nf4()
    assert form.pack(weight(11, 4, 96))["weight_absmax"].shape == (4, 3)
    assert form.pack(weight(11, 4, 128))["weight_absmax"].shape == (4, 2)
    assert form.aligned_width == 64
    assert form.obstacle(4, 96) is None
    assert form.obstacle(4, 80) is Obstacle.WIDTH
    assert Int8().obstacle(4, 66) is Obstacle.WIDTH


@pytest.mark.parametrize("form", [Nf4(), Int8()])
def test_rows_of_zeros_stay_zeros(form: Nf4 | Int8) -> None:
    dense = weight(12)
    dense[3] = 0
    y = form.multiply(activations(13), form.pack(dense))
    assert y.isfinite().all()
    assert (y[:, 3] == 0).all()
    assert form.multiply(torch.zeros(2, 128), form.pack(dense)).abs().max() == 0


def test_int8_has_no_outlier_path_that_would_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    functional = library().functional
    honest = functional.int8_vectorwise_quant

    def watched(tensor: Tensor, threshold: float = 0.0) -> object:
        seen.append(threshold)
        return honest(tensor, threshold=threshold)

    monkeypatch.setattr(functional, "int8_vectorwise_quant", watched)
    Int8().multiply(activations(14) * 100, Int8().pack(weight(15)))
    assert seen
    assert set(seen) == {0.0}


def run(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, *sys.path)))}
    return subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True, env=environment
    )


def test_the_library_is_imported_when_its_scheme_is_asked_for_not_before_and_prints_nothing() -> None:
    code = (
        "import sys, torch\n"
        "from container.model.quantize import quantize\n"
        "from container.model.quantize_choose import Scheme\n"
        "for scheme in (Scheme.INT8_BLOCK, Scheme.BNB_NF4, Scheme.BNB_INT8):\n"
        "    net = torch.nn.Sequential(torch.nn.Linear(96, 64)).bfloat16().eval()\n"
        "    quantize(net, scheme)\n"
        "    net(torch.randn(2, 96).bfloat16())\n"
        "    assert ('bitsandbytes' in sys.modules) == (scheme is not Scheme.INT8_BLOCK)\n"
    )
    result = run(code)
    assert (result.stdout, result.stderr) == ("", "")


def test_the_library_cannot_reach_its_downloader_while_it_is_imported(tmp_path: Path) -> None:
    """On CPUs with AVX512-BF16 it asks the package `kernels`, where installed, for a kernel from a hub."""
    tmp_path.joinpath("kernels.py").write_text("")
    tmp_path.joinpath("bitsandbytes.py").write_text(
        "try:\n    import kernels\nexcept ImportError as error:\n    met = type(error).__name__\n"
    )
    code = (
        "from container.model.quantize_bnb import library\n"
        "assert library().met == 'ModuleNotFoundError'\n"
        "import kernels  # within reach again for whoever else wants it\n"
    )
    run(code, tmp_path)
