"""What `strongroom doctor` finds out about a model and about memory."""

from __future__ import annotations

from pathlib import Path

from infra import doctor


def test_doctor_looks_at_the_model(tmp_path: Path) -> None:
    assert not doctor.check_model(tmp_path / "gone", None).ok
    assert not doctor.check_model(tmp_path, None).ok
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    assert "config.json" in doctor.check_model(tmp_path, None).detail
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert doctor.check_model(tmp_path, 100).ok
    assert not doctor.check_model(tmp_path, 99).ok


def test_doctor_reads_memory_within_the_cgroups_limit(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n", encoding="ascii")
    assert doctor.available_memory_bytes(meminfo, tmp_path) == 8000 * 1024
    (tmp_path / "memory.current").write_text("1000\n", encoding="ascii")
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    assert doctor.available_memory_bytes(meminfo, tmp_path) == 8000 * 1024
    (tmp_path / "memory.max").write_text("5000\n", encoding="ascii")
    assert doctor.available_memory_bytes(meminfo, tmp_path) == 4000
    assert doctor.available_memory_bytes(tmp_path / "none", tmp_path) is None
    assert not doctor.check_memory(None).ok
    assert not doctor.check_memory(doctor.MEMORY_BYTES - 1).ok
    assert doctor.check_memory(doctor.MEMORY_BYTES).ok
