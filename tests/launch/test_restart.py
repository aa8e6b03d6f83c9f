"""A scheduler's signal to whatever process, and a crash: the training saves, or starts again by itself."""

import json
import signal

import psutil
import pytest
from conftest import REPOSITORY, TRAIN
from warm import warm_python

pytestmark = pytest.mark.timeout(300)
TRACED = REPOSITORY / "tests" / "traced.py"
SETTINGS = dict(model=f"{TRACED}:TracedNet", data=f"{TRACED}:TracedDigits", accelerator="cpu", devices=2, strategy="ddp")
SETTINGS |= dict(batch_size=16, save_every_n_steps=5)
CRASH = 58  # the step, in the second epoch of 39


@pytest.fixture
def start(cold_papermill, tmp_path, monkeypatch):
    "Start a training, with variables of its environment."
    monkeypatch.setenv("TRACE", str(tmp_path))

    def start(*arguments, launcher=(warm_python(),), settings={}, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        return cold_papermill(TRAIN, *arguments, launcher=launcher, **SETTINGS | settings, root=tmp_path / "runs")

    return start


def record_of(tmp_path) -> dict:
    found = list((tmp_path / "runs").rglob("run.json"))
    return json.loads(found[0].read_text()) if found else {"step": 0}


def wait_until_it_trains(job, tmp_path) -> None:
    "Past an epoch."
    while record_of(tmp_path)["step"] < 39:
        job.look()
        assert job.process.poll() is None, job.log.read_text()[-2000:]


def is_python(process: psutil.Process) -> bool:
    return process.is_running() and "python" in process.name()


@pytest.mark.parametrize("whom", ["every process", "one rank", "papermill"])
@pytest.mark.soak
def test_a_schedulers_signal_stops_all_ranks_and_the_exit_code_asks_for_more(start, tmp_path, whom):
    launcher = () if whom == "every process" else (warm_python(),)
    job = start(launcher=launcher, settings=dict(max_epochs=2000, data_args='{"num_workers": 1}'))
    wait_until_it_trains(job, tmp_path)
    family = [process for process in job.family.values() if is_python(process)]
    if whom == "every process":  # as SLURM does; data are loaded in processes too
        for process in [psutil.Process(job.process.pid), *family]:
            process.send_signal(signal.SIGTERM)
    elif whom == "one rank":
        rank = next(process for process in job.family.values() if process.is_running() and "rank.py" in " ".join(process.cmdline()))
        rank.send_signal(signal.SIGUSR1)
    else:
        job.process.send_signal(signal.SIGUSR1)
    assert job.wait() == 75
    assert job.leftover() == []
    record = record_of(tmp_path)
    assert record["status"] == "preempted" and "it is saved. The same command resumes from there." in record["error"]
    assert any("stopped all ranks after step" in error for _, error, _ in job.errors())


def test_a_crashed_training_is_started_again_and_goes_on(start, tmp_path):
    job = start(settings=dict(max_epochs=2, max_restarts=2), STOP_AT=CRASH, STOP_ONCE=tmp_path / "once")
    assert job.wait() == 0, job.log.read_text()[-2000:]
    assert job.leftover() == []
    record = record_of(tmp_path)
    assert (record["status"], record["attempts"], record["step"]) == ("finished", 2, 78)
    assert [attempt["error"] for attempt in record["earlier"]] == ["RuntimeError: STOP_AT"]
    assert job.notebook().cells[0].source == "Attempt 1 crashed: RuntimeError: STOP_AT"
    assert "last.ckpt: step 55" in job.printed() and set(job.statuses()) == {"completed"}


@pytest.mark.soak
def test_restarts_come_to_an_end(start, tmp_path):
    job = start(settings=dict(max_epochs=2, max_restarts=1), STOP_AT=CRASH)
    assert job.wait() == 1
    assert job.leftover() == []
    assert (record_of(tmp_path)["status"], record_of(tmp_path)["attempts"]) == ("failed", 2)
    assert "RuntimeError: STOP_AT" in str(job.errors())


@pytest.mark.soak
def test_torchrun_starts_a_crashed_training_again(start, tmp_path):
    launcher = (warm_python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    job = start(launcher=launcher, settings=dict(max_epochs=2), STOP_AT=CRASH, STOP_ONCE=tmp_path / "once")
    assert job.wait() == 0, job.log.read_text()[-3000:]
    assert job.leftover() == []
    assert (record_of(tmp_path)["status"], record_of(tmp_path)["attempts"]) == ("finished", 2)


def test_a_bad_number_of_restarts_is_refused(start, tmp_path):
    job = start(settings=dict(max_restarts=-1))
    assert job.wait() == 1
    assert "max_restarts=-1 must be an integer, 0 or more" in job.log.read_text()
    assert not (tmp_path / "runs").exists()
