"""The share of CPU that others used, from recorded /proc files and from a real process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.bench.foreign import (
    CpuSample,
    available_mib,
    foreign_share,
    machine_ticks,
    memory_mib,
    process_fields,
    run_s,
    sample,
    tree,
)

# user nice system idle iowait irq softirq steal guest guest_nice
BEFORE = "cpu  1000 100 500 8000 400 0 0 0 300 0\ncpu0 1 1 1 1 1 1 1 1 1 1\nintr 5\n"
AFTER = "cpu  1150 110 520 8300 410 4 6 10 400 0\ncpu0 1 1 1 1 1 1 1 1 1 1\nintr 5\n"


def write_process(proc: Path, pid: int, parent: int, name: str, ticks: tuple[int, int, int, int]) -> None:
    """Write a recorded `stat`: utime, stime and those of children waited for."""
    folder = proc / str(pid)
    folder.mkdir(parents=True, exist_ok=True)
    utime, stime, cutime, cstime = ticks
    head = f"{pid} ({name}) S {parent} {pid} 1 0 -1 4194304 10 20 0 0"
    (folder / "stat").write_text(f"{head} {utime} {stime} {cutime} {cstime} 20 0 1 0 55 1000 50\n")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "stat").write_text(BEFORE)
    (tmp_path / "meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable: 2048000 kB\n")
    write_process(tmp_path, 10, 1, "bench", (50, 10, 5, 5))
    write_process(tmp_path, 11, 10, "llama (server) 1", (100, 20, 0, 0))
    write_process(tmp_path, 12, 11, "worker", (7, 3, 0, 0))
    write_process(tmp_path, 20, 1, "somebody", (900, 90, 0, 0))
    return tmp_path


def test_all_and_busy_ticks_leave_idle_and_guests_out() -> None:
    assert machine_ticks(BEFORE) == (10000, 1600)
    assert machine_ticks(AFTER) == (10510, 1800)
    with pytest.raises(ValueError, match="sum of all CPUs"):
        machine_ticks("intr 1 2 3\n")


def test_the_tree_holds_all_descendants_and_nobody_else(proc: Path) -> None:
    assert tree(10, proc) == {10, 11, 12}


def test_a_process_name_may_hold_blanks_and_brackets(proc: Path) -> None:
    fields = process_fields(11, proc)
    assert fields is not None and fields[1] == "10" and fields[11:15] == ["100", "20", "0", "0"]
    assert process_fields(99, proc) is None


def test_the_share_of_others_is_what_is_busy_and_not_ours(proc: Path) -> None:
    before = sample(10, proc)
    assert before == CpuSample(total=10000, busy=1600, own=200)
    (proc / "stat").write_text(AFTER)
    write_process(proc, 11, 10, "llama (server) 1", (180, 60, 0, 0))
    after = sample(10, proc)
    # 200 busy ticks of 510, 120 of them ours
    assert foreign_share(before, after) == pytest.approx(80 / 510)


def test_a_child_that_ended_is_counted_once(proc: Path) -> None:
    before = sample(10, proc)
    (proc / "12" / "stat").unlink()
    (proc / "12").rmdir()
    write_process(proc, 11, 10, "llama (server) 1", (100, 20, 7, 3))  # it waited for its worker
    assert sample(10, proc).own == before.own


def test_a_share_is_never_negative_and_nothing_is_no_share() -> None:
    assert foreign_share(CpuSample(100, 50, 10), CpuSample(200, 60, 30)) == 0.0
    assert foreign_share(CpuSample(100, 50, 10), CpuSample(100, 50, 10)) == 0.0


def test_peaks_of_a_tree_are_added_and_shared_pages_divided(proc: Path) -> None:
    for pid, peak, part in ((10, 1024, 512), (11, 2048, 1536), (12, 4096, 2048)):
        (proc / str(pid) / "status").write_text(f"Name: x\nVmHWM:\t {peak} kB\nVmRSS:\t 1 kB\n")
        (proc / str(pid) / "smaps_rollup").write_text(f"00-ff ---p\nRss: 9 kB\nPss: {part} kB\n")
    assert memory_mib([11], proc) == {"peak_rss_mib": 6.0, "pss_mib": 3.5}
    assert memory_mib([10, 11], proc)["peak_rss_mib"] == 7.0
    assert available_mib(proc) == 2000.0


def test_a_busy_child_of_ours_is_not_foreign() -> None:
    code = "import time; t = time.process_time()\nwhile time.process_time() - t < 0.3: pass\nprint(1)"
    before = sample(os.getpid())
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    after = sample(os.getpid())
    # 0.3 s of its own is at least 25 ticks at the usual 100 a second
    assert after.own - before.own >= 25
    assert 0.0 <= foreign_share(before, after) <= 1.0


def test_what_threads_ran_is_counted_to_the_nanosecond_and_one_that_ended_is_left_out(tmp_path: Path) -> None:
    for task, text in ((7, "1500000000 9 9\n"), (8, "250000001 9 9\n")):
        folder = tmp_path / "7" / "task" / str(task)
        folder.mkdir(parents=True)
        (folder / "schedstat").write_text(text)
    (tmp_path / "7" / "task" / "9").mkdir()
    assert run_s([7, 99], tmp_path) == 1.750000001


def test_a_process_that_works_runs_and_one_that_sleeps_does_not() -> None:
    def ran(code: str) -> float:
        with subprocess.Popen([sys.executable, "-I", "-c", code], stdin=subprocess.PIPE) as child:
            before = 0.0
            while (now := run_s([child.pid])) != before or not now:  # it has come to its sleep
                before = now
                time.sleep(0.3)
            child.terminate()
        return before

    assert ran("sum(range(20_000_000)); import time; time.sleep(60)") > 2 * ran("import time; time.sleep(60)")
