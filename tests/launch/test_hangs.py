"""Hangs and false failures: much output, a swept job folder, orphans, the true cause, ranks that make no progress."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from conftest import TRAIN, write_notebook
from nbformat.v4 import new_output
from test_engine import RANKS, assert_failed, run  # noqa: F401
from warm import is_running, process_behind, warm_python

from dlnb.config import RunConfig
from dlnb.launch.failure import find_cause
from dlnb.launch.logs import LogFollower
from dlnb.launch.rank_record import Rank
from dlnb.launch.terminal import Terminal
from dlnb.search.trial import run_trial

pytestmark = pytest.mark.timeout(500)


def seconds_to_print(pieces: list[str]) -> float:
    terminal = Terminal(new_output("stream", name="stdout", text=""))
    began = time.process_time()
    for piece in pieces:
        terminal.write(piece)
    terminal.settle()
    return time.process_time() - began


@pytest.mark.parametrize(
    "piece, pieces",
    [
        ("x" * 4_000_000, 1),
        ("x" * 100, 40_000),
        ("a line\n", 200_000),
        ("a line\n" * 200_000, 1),
        ("\r50%", 200_000),
        ("\r50%" * 200_000, 1),
        ("\x1b[31m", 200_000),
        ("\r" * 2_000_000, 1),
        ("\n\x1b[A" * 200_000, 1),
        ("\n" * 2_000_000 + "\x1b[2000000A", 1),
        ("\x1b[" + "1" * 2_000_000, 1),
    ],
    ids=lambda value: repr(value[:8]) if isinstance(value, str) else str(value),
)
def test_printing_takes_time_in_proportion_to_the_text(piece, pieces):
    # A quadratic way would take hours for each.
    assert seconds_to_print([piece] * pieces) < 20


def test_a_line_of_megabytes_is_shown_and_a_signal_is_heard_meanwhile(papermill, tmp_path):
    cell = "import time\nprint('x' * 4_000_000, flush=True)\nprint('the end', flush=True)\ntime.sleep(600)"
    job = papermill(write_notebook(tmp_path / "in.ipynb", "unused = 1", cell))
    job.wait_for_output("the end", timeout=60)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 143
    assert len(job.printed()) > 4_000_000 and job.leftover() == []


def test_outputs_may_arrive_long_after_the_cell_has_ended(papermill, tmp_path):
    cell = "import sys\nfor number in range(6_000):\n    print(number, file=(sys.stdout, sys.stderr)[number % 2], flush=True)"
    job = papermill(write_notebook(tmp_path / "in.ipynb", "unused = 1", cell))
    assert job.wait() == 0, job.log.read_text()[-2000:]
    assert sorted(map(int, job.printed().split())) == list(range(6_000))


def test_the_log_of_another_rank_is_read_once_and_as_bytes_may_come(tmp_path):
    log, follower = (tmp_path / "rank-1.log").open("ab", buffering=0), LogFollower(tmp_path)
    text = "ä" * 400_000
    shown = ""
    for byte in (text.encode()[:-1], text.encode()[-1:], b"\0\xff\n", b"1%\r", b"2%\r", b"\n", b"never ended"):
        log.write(byte)
        shown += follower.read()
    (tmp_path / "rank-1.log").unlink()
    log.write(b" but read\n")
    shown += follower.read() + follower.read(last=True)
    assert shown == f"[rank 1] {text}\0\ufffd\n[rank 1] 2%\n[rank 1] never ended but read\n"


def test_much_output_of_another_rank_is_complete(run):  # noqa: F811
    write = "if rank == 1:\n    for number in range(100_000):\n        print(number, 'x' * 90)\n    print('y' * 400_000)\n    1 / 0\nmeet()"
    job = run(write)
    assert_failed(job, 3, "[rank 1] division by zero")
    lines = job.printed().splitlines()
    assert [int(line.split()[2]) for line in lines if line.endswith("x")] == list(range(100_000))
    assert f"[rank 1] {'y' * 400_000}" in lines


SLOW_MODEL = """
import time, torch
from dlnb.examples import DigitsNet

class Slow(DigitsNet):
    def training_step(self, batch, index):
        time.sleep(0.05)
        {step}
        return super().training_step(batch, index)
"""


@pytest.fixture
def temporary(monkeypatch):
    "A temporary folder for the processes that the test starts; pytest's own is too long for a socket's path."
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.fixture
def training(papermill, tmp_path):
    "Start a training of many steps on two ranks, with a line of the training step."

    def start(step: str = "pass", launcher: tuple[str, ...] = (), **settings):
        (tmp_path / "slow.py").write_text(SLOW_MODEL.format(step=step))
        given = dict(model=f"{tmp_path}/slow.py:Slow", strategy="ddp", devices=2, accelerator="cpu", root=str(tmp_path / "runs"))
        return papermill(TRAIN, launcher=(warm_python(), *launcher), **given | settings)

    return start


def wait_for(condition, job, seconds: float = 240):
    "What the condition gives, once it gives something."
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        job.look()
        assert job.process.poll() is None and time.monotonic() < deadline, job.log.read_text()[-3000:]
        time.sleep(0.1)
    return found


def record(tmp_path) -> dict:
    (path,) = (tmp_path / "runs").rglob("run.json")
    return json.loads(path.read_text())


def trains(tmp_path):
    return [path for path in (tmp_path / "runs").rglob("run.json") if json.loads(path.read_text())["epoch"] >= 1]


def sweep(temporary) -> None:
    "Remove the job folder, as a cleaner of the temporary folder does."
    (folder,) = temporary.glob("dlnb-????????")
    shutil.rmtree(folder, ignore_errors=True)  # whose files come and go meanwhile


IN_A_LONG_CALL = """if index == 5:
            import pathlib, signal
            pathlib.Path(r"{}", f"in-step-{{self.global_rank}}").touch()
            signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGTERM}})
            time.sleep(9)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {{signal.SIGTERM}})"""


def test_a_training_in_a_long_step_hears_a_scheduler_after_it_and_saves(training, tmp_path):
    job = training(step=IN_A_LONG_CALL.format(tmp_path))
    wait_for(lambda: len(list(tmp_path.glob("in-step-*"))) == 2, job)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75, job.log.read_text()[-2000:]
    assert record(tmp_path)["status"] == "preempted" and list((tmp_path / "runs").rglob("last.ckpt"))
    assert job.leftover() == []


@pytest.mark.soak
def test_a_swept_job_folder_does_not_keep_a_training_from_saving(training, temporary, tmp_path):
    job = training(max_epochs=500)
    wait_for(lambda: trains(tmp_path), job)
    sweep(temporary)
    time.sleep(3)
    sweep(temporary)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75, job.log.read_text()[-2000:]
    assert record(tmp_path)["status"] == "preempted"
    assert list((tmp_path / "runs").rglob("last.ckpt")) and list((tmp_path / "runs").rglob("train.ipynb"))
    assert job.leftover() == [] and [path for path in temporary.glob("dlnb-*") if path.is_dir()] == []


@pytest.mark.soak
def test_a_swept_job_folder_does_not_keep_a_training_from_ending(training, temporary, tmp_path):
    job = training(max_epochs=8)
    wait_for(lambda: list((tmp_path / "runs").rglob("run.json")), job)
    for _ in range(3):
        sweep(temporary)
        time.sleep(1)
    assert job.wait() == 0, job.log.read_text()[-2000:]
    assert record(tmp_path)["status"] == "finished" and list((tmp_path / "runs").rglob("train.ipynb"))
    assert job.leftover() == []


@pytest.mark.parametrize("delay", [0.3, 2.0, *(pytest.param(delay, marks=pytest.mark.soak) for delay in (0.6, 1.0, 1.5, 3.0))])
def test_no_orphan_is_left_when_papermill_and_its_guard_are_killed(cold_papermill, tmp_path, monkeypatch, delay):
    monkeypatch.setenv("OF_THIS_TEST", str(tmp_path))
    sleep = "import time\ntime.sleep(600)"
    job = cold_papermill(write_notebook(tmp_path / "in.ipynb", "devices = 1", RANKS, sleep), devices=3)
    supervisor = psutil.Process(job.process.pid)
    wait_for(lambda: [child for child in supervisor.children() if "ipykernel" in " ".join(child.cmdline())], job)
    time.sleep(delay)
    job.look()
    supervisor.suspend()  # it starts no more of them
    guards = [child for child in supervisor.children() if "kill -9" in " ".join(child.cmdline())]
    for process in (*guards, supervisor):
        process.kill()
    job.wait()
    deadline = time.monotonic() + 60  # they look after their imports
    while (left := started_by(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.2)
    job.family |= {process.pid: process for process in left}  # which are ended
    assert left == []


def test_no_loading_process_is_left_when_its_training_dies_before_it_has_begun(tmp_path, monkeypatch):
    monkeypatch.setenv("OF_THIS_TEST", str(tmp_path))
    (tmp_path / "dies.py").write_text("""
import multiprocessing, os, sys, time, torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset
from dlnb.config import RunConfig
from dlnb.examples import DigitsNet
from dlnb.trainer import fit

class Data(LightningDataModule):
    def train_dataloader(self):
        samples = TensorDataset(torch.rand(64, 64), torch.zeros(64, dtype=torch.long))
        return DataLoader(samples, batch_size=8, num_workers=1, worker_init_fn=lambda _: time.sleep(2))

class Dies(DigitsNet):
    def on_fit_start(self):  # the optimizer's schedule has asked for the number of batches: the loading process has been started
        print(len(multiprocessing.active_children()), "started", flush=True)
        os._exit(9)

if __name__ == "__main__":
    task = dict(model=f"{__file__}:Dies", data=f"{__file__}:Data", accelerator="cpu", devices=1)
    fit(RunConfig(**task, max_epochs=2, root=sys.argv[1]))
""")
    command = [sys.executable, str(tmp_path / "dies.py"), str(tmp_path / "runs")]
    with (tmp_path / "out").open("w") as out:  # a pipe would be waited for as long as the loading process has it
        assert subprocess.run(command, stdout=out, stderr=out, timeout=120).returncode == 9
    assert "1 started" in (tmp_path / "out").read_text()
    deadline = time.monotonic() + 60
    while (left := started_by(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.2)
    [process.kill() for process in left]
    assert left == []


def started_by(tmp_path) -> list[psutil.Process]:
    "The processes with this test's mark in their environment."
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("OF_THIS_TEST") == str(tmp_path) and is_running(process):
                found.append(process)
        except psutil.Error:
            continue
    return found


FIT = """
import os, signal, sys, threading, time
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

class Model(BoringModel):
    def training_step(self, batch, index):
        rank = self.trainer.global_rank
        if index == 3:
            {step}
        return super().training_step(batch, index)

trainer = Trainer(accelerator="cpu", devices=devices, strategy="ddp", max_steps=50, logger=False, barebones=True)
trainer.fit(Model())
"""


ENDED = [
    ("rank == 1 and sys.exit(3)", ("[rank 1] 3", "SystemExit", "sys.exit(3)")),
    ("rank == 1 and sys.exit(0)", ("[rank 1]", "sys.exit(0)")),
    ("rank == 1 and signal.raise_signal(signal.SIGINT)", ("[rank 1]", "KeyboardInterrupt")),
    ("rank == 0 and sys.exit(5)", ("SystemExit: 5",)),
    ("if rank == 1: raise ValueError('the cause')", ("[rank 1] the cause",)),
    ("rank == 1 and os._exit(3)", ("[rank 1]", "exited with code 3")),
    ("rank == 1 and threading.Thread(target=os._exit, args=(4,)).start()", ("[rank 1]", "exited with code 4")),
    ("rank == 1 and os.kill(os.getpid(), signal.SIGSEGV)", ("[rank 1]", "SIGSEGV")),
    ("rank == 1 and os.kill(os.getpid(), signal.SIGKILL)", ("[rank 1]", "SIGKILL")),
    ("rank == 0 and signal.raise_signal(signal.SIGINT)", ("KeyboardInterrupt",)),
]


def assert_told(papermill, folder, step: str, told: tuple[str, ...]) -> None:
    job = papermill(write_notebook(folder / "in.ipynb", "devices = 1", FIT.replace("{step}", step)), devices=2)
    assert job.wait() == 1, job.log.read_text()[-2000:]
    _, error, traceback = job.errors()[0]
    for word in told:
        assert word in f"{error}\n{traceback}", job.errors()
    assert "memory" not in error
    assert job.leftover() == []


@pytest.mark.soak
@pytest.mark.parametrize("step, told", ENDED)
def test_what_ended_a_rank_stands_before_what_follows_from_it(papermill, tmp_path, step, told):
    assert_told(papermill, tmp_path, step, told)


@pytest.mark.soak
@pytest.mark.alone  # Lightning kills the others, and rank 0 has eight seconds to say why
def test_an_interrupt_of_the_whole_group_stands_before_what_follows_from_it(cold_papermill, tmp_path):
    assert_told(cold_papermill, tmp_path, "rank == 0 and os.killpg(0, signal.SIGINT)", ("KeyboardInterrupt",))


def test_an_interrupt_stands_before_the_kills_that_it_has_led_to(run):  # noqa: F811
    lightning_does = """import psutil
if rank == 0:
    time.sleep(3)
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        [process.kill() for process in psutil.Process().children()]
        time.sleep(1)
        sys.exit(1)
meet()"""
    job = run(lightning_does)
    assert_failed(job, 3, "KeyboardInterrupt")
    assert "memory" not in str(job.errors())


def test_a_lost_connection_and_a_kill_are_less_of_a_cause():
    lost = Rank(0, 1, ename="RuntimeError", evalue="[gloo/transport/tcp/pair.cc:547] Connection closed by peer", time=1)
    killed = Rank(1, 1, ename="RankDied", evalue="process 7 was killed by SIGKILL", time=2)
    raised = Rank(2, 1, ename="KeyboardInterrupt", time=3)
    assert find_cause([lost, killed, raised]) is raised
    assert find_cause([lost, killed]) is killed
    assert find_cause([lost]) is lost and find_cause([]) is None
    aborted = Rank(3, 1, ename="RankDied", evalue="process 8 was killed by SIGABRT", time=0)  # by NCCL's watchdog, as it waited
    hung = Rank(4, 1, ename="NoProgress", time=4)
    assert find_cause([aborted, hung]) is hung and find_cause([lost, aborted]) is aborted


@pytest.mark.soak
def test_a_stopped_rank_ends_the_training_and_is_named_with_all_stacks(training, tmp_path):
    job = training(max_epochs=500, progress_timeout=15)
    wait_for(lambda: trains(tmp_path), job)
    alive = [process for process in job.family.values() if is_running(process)]
    process_behind(next(process for process in alive if "rank.py" in " ".join(process.cmdline()))).suspend()
    began = time.monotonic()
    assert job.wait() == 1, job.log.read_text()[-2000:]
    assert 10 < time.monotonic() - began < 90
    _, error, stacks = job.errors()[0]
    assert error.startswith("NoProgress: [rank 1]") and "rank 1 is stopped" in error
    for rank in (0, 1):
        assert "in fit" in stacks.partition(f"Rank {rank}:")[2].partition("Rank ")[0], stacks
    assert record(tmp_path)["status"] in ("running", "stopped", "failed", "preempted") and job.leftover() == []


TORCHRUN = (
    warm_python(),
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
)  # every rank has its own papermill, and sees only itself


@pytest.mark.soak
@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["Lightning", "torchrun"])
def test_a_deadlock_ends_the_training_and_names_the_rank_behind(training, tmp_path, launcher):
    step = "if self.trainer.global_rank == 1 and self.trainer.global_step == 5: __import__('threading').Event().wait()"
    job = training(step, launcher, max_epochs=500, progress_timeout=15)
    assert job.wait() == 1, job.log.read_text()[-2000:]
    _, error, stacks = job.errors()[0]
    assert error.startswith("NoProgress: [rank 1]") and "rank 1 is behind" in error
    assert "training_step" in stacks.partition("Rank 1:")[2]
    assert job.leftover() == []


@pytest.mark.soak
def test_slow_steps_and_cells_without_a_training_are_not_ended(papermill, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_MODEL.format(step="time.sleep(4)"))
    cell = f"""from dlnb.config import RunConfig
from dlnb.trainer import fit
import time
time.sleep(10)
config = dict(model="{tmp_path}/slow.py:Slow", data="dlnb.examples:Digits", accelerator="cpu", devices=1, max_steps=3)
fit(RunConfig(**config, root="{tmp_path}/runs", progress_timeout=8))
time.sleep(10)"""
    job = papermill(write_notebook(tmp_path / "in.ipynb", "unused = 1", cell))
    assert job.wait() == 0, job.log.read_text()[-2000:]


def test_a_trial_without_progress_has_failed(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_MODEL.format(step="__import__('threading').Event().wait()"))
    config = dict(model=f"{tmp_path}/slow.py:Slow", data="dlnb.examples:Digits", accelerator="cpu", devices=1)
    outcome = run_trial(RunConfig(**config, progress_timeout=15), tmp_path / "trial", lambda *_: False, "hangs")
    assert outcome.state == "failed" and outcome.error.startswith("no rank has made progress")
    assert "training_step" in outcome.error
    assert not list((tmp_path / "trial").glob("rank-*.progress"))
