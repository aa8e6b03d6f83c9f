"""When a notebook is at its end: every rank that has been started is waited for, and one that dies while Python starts is known."""

import os
import time

import pytest
from conftest import write_notebook

from dlnb.launch.failure import find_failure, unfinished_ranks
from dlnb.launch.job_folder import job_folder
from dlnb.launch.rank_record import Rank, read_ranks
from dlnb.launch.rank_watch import RankWatch
from dlnb.system.progress import PROGRESS, announce_ending

pytestmark = pytest.mark.timeout(300)


@pytest.mark.fast
def test_the_ranks_that_a_launcher_starts_are_waited_for_before_they_have_a_record():
    with job_folder("{}") as folder:
        Rank(2, os.getpid(), status="finished").write(folder)
        late = unfinished_ranks(folder, others=[1, 2, 3], cell=4)
        assert [(rank.rank, rank.cell) for rank in late] == [(1, 4), (3, 4)]


@pytest.mark.fast
def test_a_rank_that_has_only_been_started_is_waited_for_and_its_own_record_is_kept():
    with job_folder("{}") as folder:
        Rank(1, os.getpid()).announce(folder)
        assert [rank.rank for rank in unfinished_ranks(folder)] == [1] and find_failure(folder) is None
        Rank(1, os.getpid(), status="finished").write(folder)
        Rank(1, os.getpid()).announce(folder)
        assert [rank.status for rank in read_ranks(folder)] == ["finished"] and unfinished_ranks(folder) == []


TRAIN = """from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
Trainer(accelerator='cpu', devices=devices, strategy='ddp', max_steps=1, logger=False).fit(BoringModel())"""


def test_a_rank_that_is_killed_while_python_starts_is_reported_at_once(cold_papermill, tmp_path, monkeypatch):
    "As by the system, where memory is short: it has not written anything yet."
    (tmp_path / "sitecustomize.py").write_text("import os\nif os.environ.get('LOCAL_RANK') == '1':\n    os.kill(os.getpid(), 9)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    job = cold_papermill(write_notebook(tmp_path / "in.ipynb", "devices = 1", TRAIN), devices=2)
    assert job.wait(200) == 1
    (index, error, _), *_ = job.errors()
    assert index == 0 and "[rank 1]" in error and "was killed by SIGKILL" in error
    assert job.leftover() == []


@pytest.mark.fast
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
