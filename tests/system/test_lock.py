"""One process at a time writes a run's folder: across hosts and containers, after kills, whatever the clock says."""

import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
from conftest import TRAIN as WORKFLOW

from dlnb.config import RunConfig
from dlnb.infer import evaluate
from dlnb.system.heartbeat import touching
from dlnb.system.lock import LOCK, Watch, find_holder, hold, open_lock
from dlnb.system.processes import Process, began_at, machine
from dlnb.track import RunRecord, runs
from dlnb.trainer import fit
from dlnb.training.start import find_run

pytestmark = pytest.mark.timeout(500)
TASK = dict(model="dlnb.examples:DigitsNet", data="dlnb.examples:Digits", model_args={"width": 8}, data_args={"num_workers": 0})
TASK |= dict(accelerator="cpu", devices=1, batch_size=64, trainer_args={"enable_progress_bar": False})

HOST = ("unshare", "--uts", "sh", "-c", 'hostname node7 && exec "$0" "$@"')  # another host name, the same files
CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")  # other process numbers, the same files
isolated = pytest.mark.skipif(subprocess.run([*CONTAINER[:-1], "true"], capture_output=True).returncode != 0, reason="namespaces need root")


@contextmanager
def running(*command: str):
    "A process that ends with the block, and whatever it has started."
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        process.stdout.close()


HOLD = """
import os, shutil, sys, time
from dlnb.system.lock import hold
with hold(sys.argv[1], "trained"):
    {}
    print(os.getpid(), flush=True)
    time.sleep(100)
"""


@contextmanager
def held(folder: Path, *where: str, do: str = "pass"):
    "The lock, in another process, after it has done something."
    with running(*where, sys.executable, "-c", HOLD.format(do), str(folder)) as process:
        process.stdout.readline()
        yield process


def content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def sign(folder: Path, process: Process) -> Path:
    "The lock's file as that process leaves it."
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK).write_text(json.dumps(asdict(process) | {"since": "then", "folder": str(folder.resolve())}))
    return folder / LOCK


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A run of one epoch."
    return fit(RunConfig(**TASK, max_epochs=1, root=str(tmp_path_factory.mktemp("runs"))))


TRAIN = "import sys; from dlnb.config import RunConfig; from dlnb.trainer import fit; fit(RunConfig(**eval(sys.argv[1])))"


@isolated
@pytest.mark.soak
def test_a_second_host_or_container_is_refused_the_first_trains_on_and_its_kill_frees_the_run_at_once(tmp_path):
    settings = TASK | dict(data_args={"num_workers": 1}, root=str(tmp_path))  # loading processes outlive a kill for seconds
    folder = RunConfig(**settings).folder()
    apart = (*HOST, "env", f"TMPDIR={tmp_path}")  # a host has a temporary folder of its own
    with running(*apart, sys.executable, "-c", TRAIN, repr(settings | {"max_epochs": 10_000})) as first:
        while not (folder / "run.json").exists() or RunRecord.read(folder).step < 20:
            assert first.poll() is None
            time.sleep(0.1)
        record = RunRecord.read(folder)
        assert (record.host, record.pid, record.state) == ("node7", first.pid, "running")
        told = f"is being trained by process {first.pid} on node7 since .*resume='never' to train beside it"
        with pytest.raises(ValueError, match=told):
            fit(RunConfig(**settings, max_epochs=20_000))
        command = [*CONTAINER, sys.executable, "-c", TRAIN, repr(settings | {"max_epochs": 20_000})]
        second = subprocess.run(command, capture_output=True, text=True)
        assert second.returncode == 1 and "on node7 since" in second.stderr.splitlines()[-1]
        beside = RunConfig(**TASK | {"batch_size": 32}, resume=str(folder), max_epochs=20_000, root=str(tmp_path / "beside"))
        with pytest.raises(ValueError, match=f"{folder} is being trained by process {first.pid} on node7"):
            fit(beside)
        assert not (tmp_path / "beside").exists() and runs(tmp_path)["status"].tolist() == ["running"]
        step = RunRecord.read(folder).step
        while RunRecord.read(folder).step <= step:
            assert first.poll() is None
            time.sleep(0.1)
        assert RunRecord.read(folder).attempts == 1 and RunRecord.read(folder).error is None
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        began = time.monotonic()
        with hold(folder):
            assert time.monotonic() - began < 10  # sooner than its heartbeat is stale
        assert RunRecord.read(folder).state == "interrupted"


def test_who_is_refused_writes_nothing(trained):
    before = content(trained.folder)
    with held(trained.folder), pytest.raises(ValueError, match="is being trained by process"):
        fit(RunConfig(**trained.settings | {"max_epochs": 2}))
    assert content(trained.folder) == before and RunRecord.read(trained.folder).status == "finished"


SLOW = """
import time
from pathlib import Path
from dlnb.examples import DigitsNet

class SlowNet(DigitsNet):
    def test_step(self, batch, batch_idx):
        Path(__file__).with_name("begun").touch()
        time.sleep(100)
"""
EVALUATE = "import sys; from dlnb.infer import evaluate; evaluate(sys.argv[1], **eval(sys.argv[2]))"


@isolated
@pytest.mark.soak
def test_two_evaluations_of_one_run_do_not_write_into_one_folder(trained, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    settings = dict(model=f"{tmp_path}/slow.py:SlowNet", model_args={"width": 8}, accelerator="cpu", root=str(tmp_path))
    with running(*HOST, sys.executable, "-c", EVALUATE, str(trained.folder), repr(settings)) as first:
        while not (tmp_path / "begun").exists():
            assert first.poll() is None
            time.sleep(0.1)
        before = content(tmp_path)
        with pytest.raises(ValueError, match=f"/test/.* is being filled by process {first.pid} on node7"):
            evaluate(trained.folder, **settings)
        assert content(tmp_path) == before and first.poll() is None


def test_of_many_that_begin_at_once_one_gets_the_run(tmp_path):
    code = """
import sys, time
from pathlib import Path
from dlnb.system.lock import hold
root = Path(sys.argv[1])
while not (root / "go").exists(): time.sleep(0.001)
try:
    with hold(root / "run", stale_after=1):
        print("held", flush=True)
        while not (root / "stop").exists(): time.sleep(0.01)
except ValueError:
    print("refused", flush=True)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) for _ in range(6)]
    (tmp_path / "go").touch()
    try:
        while sum(process.poll() is None for process in processes) > 1:
            time.sleep(0.05)
    finally:
        (tmp_path / "stop").touch()
        outputs = [process.communicate(timeout=30)[0] for process in processes]
    # The first lines may say that one waited: for another that had made the lock's file and not signed it yet.
    assert sorted(output.splitlines()[-1] for output in outputs) == ["held"] + ["refused"] * 5
    assert not [
        *(tmp_path / "run").glob("*")
    ]  # who has made the folder may have been refused, and the holder leaves a folder that it found


@pytest.mark.parametrize(
    "do, holds",
    [
        ("os.fork() or (print('forked', flush=True), time.sleep(100))", False),
        ("shutil.copytree(sys.argv[1], sys.argv[1] + '-copy')", True),
    ],
    ids=["a forked process does not keep the lock of a killed one", "a copy by the holder does not lose it"],
)
def test_the_lock_is_the_holders_as_long_as_it_lives(tmp_path, do, holds):
    with held(tmp_path / "run", do=do) as process:
        if holds:
            assert find_holder(tmp_path / "run").process.pid == process.pid
            assert find_holder(tmp_path / "run-copy") is None  # a copied file is nothing
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        began = time.monotonic()
        with hold(tmp_path / "run"):
            assert time.monotonic() - began < 10  # sooner than its heartbeat is stale
        assert holds or [child for child in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(child.info["cmdline"] or ())]


def test_a_moved_run_is_still_its_holders(tmp_path):
    with held(tmp_path / "run"):
        (tmp_path / "run").rename(tmp_path / "moved")
        with pytest.raises(ValueError, match="is being used by process"), hold(tmp_path / "moved"):
            pass


@pytest.mark.parametrize("hours", [-1, 1, 1e5])
def test_a_corrected_clock_makes_no_live_process_dead_and_no_dead_one_alive(tmp_path, monkeypatch, hours):
    record = RunRecord(folder=tmp_path)
    record.begin()
    record.write()
    clock, create_time = time.time, psutil.Process.create_time
    monkeypatch.setattr(time, "time", lambda: clock() + hours * 3600)
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: create_time(process) + hours * 3600)
    os.utime(record.path, (0, 0))
    again = RunRecord.read(tmp_path)
    assert again.is_alive and again.is_own and again.state == "running"
    ticks = int(Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[19])  # proc(5), field 22
    assert (again.pid_began, again.machine) == (ticks, machine())
    again.pid_began -= 1  # the number's former owner
    assert not again.is_alive and again.state == "interrupted"


@pytest.mark.parametrize("there", [machine().replace("-", "0"), f"{machine()} another container"], ids=["machine", "container"])
def test_a_process_that_cannot_be_seen_keeps_its_run_by_any_sign_of_life(tmp_path, capsys, there):
    "Whatever its clock says: here it stands still at the epoch, but for a nanosecond."
    path = sign(tmp_path, Process("node7", there, os.getpid(), began_at(os.getpid())))
    times = iter(range(10**6))

    class Backwards(os.PathLike):
        def __fspath__(self):
            os.utime(path, ns=(0, 10**9 - next(times)))
            return str(tmp_path)

    with touching(Backwards(), every=0.2), pytest.raises(ValueError, match="is being trained by process .* on node7 since then"):
        with hold(tmp_path, "trained", stale_after=30):
            pass
    assert "cannot be seen from here" in capsys.readouterr().out


def test_a_process_that_cannot_be_seen_is_taken_for_dead_when_it_is_silent(tmp_path):
    sign(tmp_path, Process("node7", "another boot", os.getpid(), began_at(os.getpid())))
    waiting = Watch(tmp_path, seconds=0.5)
    assert find_holder(tmp_path) is None and waiting.may_be_held
    with hold(tmp_path, stale_after=0.6):
        assert waiting.may_be_held  # now by this process
    assert not waiting.may_be_held


def test_of_two_that_take_a_dead_run_over_where_locks_do_not_reach_one_gives_way(tmp_path):
    sign(tmp_path, Process("node7", "another boot", 1, 1.0))
    code = f"""
import time, dlnb.system.lock, dlnb.system.processes
dlnb.system.lock._lock = lambda descriptor: True
dlnb.system.processes.machine = lambda: "another one"
try:
    with dlnb.system.lock.hold({str(tmp_path)!r}, stale_after=3): print("held", flush=True), time.sleep(100)
except ValueError: print("refused", flush=True)
"""
    with running(sys.executable, "-c", code) as one, running(sys.executable, "-c", code) as other:
        said = [[process.stdout.readline() for _ in range(2)][-1] for process in (one, other)]
    assert "held\n" in said and said != ["held\n"] * 2


def test_where_the_filesystem_has_no_locks_the_process_itself_is_looked_at(tmp_path, monkeypatch):
    with held(tmp_path / "run") as process:

        def without_locks(*_):
            raise OSError(errno.ENOLCK, "no locks here")

        monkeypatch.setattr(fcntl, "fcntl", without_locks)
        assert find_holder(tmp_path / "run").process.pid == process.pid
        with pytest.raises(ValueError, match=f"by process {process.pid}"), hold(tmp_path / "run"):
            pass
        process.kill()
        process.wait()
        with hold(tmp_path / "run"):
            with pytest.raises(ValueError, match=f"by process {os.getpid()}"), hold(tmp_path / "run"):
                pass


def test_a_planted_link_is_refused_before_anything_is_written(trained, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("do not touch")
    config = RunConfig(**trained.settings | {"root": str(tmp_path / "runs")})
    config.folder().mkdir(parents=True)
    (config.folder() / LOCK).symlink_to(precious)
    with pytest.raises(ValueError, match="run.lock must be a plain file with one name"):
        fit(config)
    assert precious.read_text() == "do not touch" and [path.name for path in config.folder().iterdir()] == [LOCK]
    assert runs(tmp_path / "runs").empty
    for target in ("precious", "nowhere"):
        link = tmp_path / f"{target}.link"
        link.symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match="Remove it"):
            open_lock(link)
    assert not (tmp_path / "nowhere").exists()


OLD = {"mode": "train", "status": "running", "attempts": 1, "host": "node7", "pid": 17, "pid_created": 1e9, "started": "then"}


def test_a_run_of_an_older_version_is_watched_by_its_record(trained, tmp_path, monkeypatch, capsys):
    from dlnb.training import start

    waited, has_heartbeat = [], start.has_heartbeat
    monkeypatch.setattr(start, "has_heartbeat", lambda path, seconds: waited.append(seconds) or has_heartbeat(path, 1))  # not 40 s
    config = RunConfig(**trained.settings | {"root": str(tmp_path)})
    config.folder().mkdir(parents=True)
    record = config.folder() / "run.json"
    record.write_text(json.dumps(OLD))
    with touching(record, every=0.1), pytest.raises(ValueError, match="is being trained by process 17 on node7 since then"):
        fit(config)
    assert json.loads(record.read_text()) == OLD
    assert fit(config).status == "finished" and waited == [40, 40]
    assert "an older version of dlnb" in capsys.readouterr().out


def test_each_of_two_trainings_beside_another_gets_a_folder_of_its_own(trained):
    config = RunConfig(**trained.settings | {"resume": "never"})
    folder = find_run(config).folder
    assert folder.name == f"{trained.folder.name}-2"
    with hold(folder):  # its first rank has found it free, and has written nothing yet
        assert find_run(config).folder.name == f"{trained.folder.name}-3"
    assert not folder.exists()


def test_all_ranks_of_a_training_beside_another_write_into_the_first_ones_folder(papermill, tmp_path):
    settings = dict(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, batch_size=64, resume="never", root=tmp_path / "runs")
    for _ in range(2):
        job = papermill(WORKFLOW, **settings)
        assert job.wait() == 0, job.log.read_text()[-2000:]
    names = sorted(path.parent.name for path in (tmp_path / "runs").rglob("run.json"))
    assert len(names) == 2 and names[1] == f"{names[0]}-2"


def test_a_worker_that_cannot_be_seen_loses_its_trial_only_when_it_is_silent(tmp_path, monkeypatch):
    "Its clock is an hour behind."
    import optuna

    from dlnb.search import trial_queue
    from dlnb.search.storage import open_storage

    monkeypatch.setattr(trial_queue, "WORKER_STALE_AFTER", 0.5)
    storage = open_storage(None, tmp_path)
    optuna.create_study(study_name="study", storage=storage)
    rows = trial_queue.TrialQueue("study", storage, 1, tmp_path)
    row = rows.claim()
    far = {"host": "node7", "machine": "another boot", "pid": 1, "began": 1.0}
    rows.storage.set_trial_user_attr(row._trial_id, "worker", far)
    for minutes in range(3):
        rows.storage.set_trial_user_attr(row._trial_id, "alive", time.time() - 3600 + minutes)
        rows.requeue_stale()
        assert rows.all()[0].state == optuna.trial.TrialState.RUNNING
        time.sleep(0.3)
    time.sleep(0.5)
    rows.requeue_stale()
    assert rows.all()[0].state == optuna.trial.TrialState.WAITING
