"""When a notebook is at its end: every rank that the kernel has started is waited for, from the moment that it is started."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager

import psutil
import pytest

from dlnb.launch.failure import unfinished_ranks
from dlnb.launch.job_folder import job_folder
from dlnb.launch.rank_record import Rank
from dlnb.launch.rank_watch import RankWatch
from dlnb.system.progress import PROGRESS, announce_ending

pytestmark = [pytest.mark.fast, pytest.mark.timeout(120)]

# A rank as far as the supervisor sees it: its record is there, and is not, then stays; it ends with its input.
RANK = """
import os, sys, time
from pathlib import Path
from dlnb.launch.rank_record import Rank
record = Path(sys.argv[1]).with_name("rank-1.json")
end = time.monotonic() + 2
while time.monotonic() < end:
    Rank(1, os.getpid()).write(record.parent)
    record.unlink()
print("written", flush=True)
sys.stdin.read()
"""

# A process without a command line, as a new one is for some milliseconds: it has removed the memory where the system looks for that.
NAMELESS = """
import ctypes, mmap, sys
begin, end = map(int, open("/proc/self/stat").read().rpartition(")")[2].split()[45:47])
begin -= begin % mmap.PAGESIZE
assert ctypes.CDLL(None).munmap(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin)) == 0
print("nameless", flush=True)
sys.stdin.read()
"""


@contextmanager
def started(code: str, script: str):
    "A child that runs the job's script."
    with subprocess.Popen([sys.executable, "-c", code, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_rank_is_waited_for_while_the_system_starts_it():
    "At one start of a hundred it has no command line yet, at one of three where all cores are busy."
    with job_folder("{}") as folder, started(NAMELESS, str(folder / "rank.py")) as process:
        assert process.stdout.readline() == b"nameless\n"
        assert psutil.Process(process.pid).cmdline() == []
        assert [rank.pid for rank in unfinished_ranks(folder, os.getpid())] == [process.pid]


def test_the_ranks_that_a_launcher_starts_are_waited_for_before_they_have_a_record():
    with job_folder("{}") as folder:
        Rank(2, os.getpid(), status="finished").write(folder)
        late = unfinished_ranks(folder, os.getpid(), others=[1, 2, 3], cell=4)
        assert [(rank.rank, rank.cell) for rank in late] == [(1, 4), (3, 4)]


def test_a_rank_is_waited_for_while_it_writes_its_record():
    with job_folder("{}") as folder, started(RANK, str(folder / "rank.py")) as process:
        os.set_blocking(process.stdout.fileno(), False)
        while not process.stdout.read():
            assert {rank.pid for rank in unfinished_ranks(folder, os.getpid())} == {process.pid}


def test_a_rank_0_that_fails_again_and_again_is_not_waited_for_longer_than_a_minute(monkeypatch):
    "As in a notebook that catches the error and trains again, while another rank is dead."
    with job_folder("{}") as folder:
        monkeypatch.setenv(PROGRESS, str(folder))
        watch = RankWatch(folder)
        watch.failure = Rank(1, 0, status="failed", ename="ValueError", time=time.time() - 50)
        announce_ending()
        assert not watch.has_failed
        watch.failure.time -= 20
        announce_ending()
        assert watch.has_failed
