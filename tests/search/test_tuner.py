"""A search over several ranks: one row a trial whatever fails or is killed, side by side, on any storage."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import optuna
import psutil
import pytest
from conftest import ALL, HELPERS, REPOSITORY, TRAIN, Papermill
from wandb_files import wandb_runs
from warm import descendants, warm_python

from dlnb.config import RunConfig
from dlnb.errors import TuningError
from dlnb.search.results import trials_table
from dlnb.search.storage import open_storage
from dlnb.search.study import StudyConfig
from dlnb.search.trial import run_trial
from dlnb.search.trial_ranks import Outcome, TrialRanks
from dlnb.track import RunRecord, runs
from dlnb.tuner import tune

TUNED = HELPERS / "tuned.py"
TUNE = TRAIN.with_name("tune.ipynb")
SETTINGS = dict(model=f"{TUNED}:TunedNet", data="dlnb.examples:Digits", data_args={"num_workers": 0}, accelerator="cpu")
SETTINGS |= dict(devices=2, batch_size=64, max_epochs=3, lr=2e-3)
LR = {"lr": {"low": 1e-3, "high": 1e-2, "log": True}}


@pytest.fixture
def search(tmp_path, monkeypatch):
    "Runs a search below the test's folder; nothing of it is left running."
    monkeypatch.setenv("TRACE", str(tmp_path))
    monkeypatch.setattr("multiprocessing.spawn._python_exe", os.fsencode(warm_python()))  # the server that trials are forked from

    def run(settings: dict | None = None, **study):
        config = RunConfig(**SETTINGS | {"root": str(tmp_path / "runs")} | (settings or {}))
        return tune(config, StudyConfig(**{"search_space": LR, "n_trials": 3} | study))

    yield run
    assert ranks_alive(tmp_path) == []


def ranks_alive(root: Path) -> list[str]:
    "Processes that write into a log below this folder; those of W&B get a moment to see that their rank has ended."
    deadline = time.monotonic() + 30
    while (found := list(writers(root))) and time.monotonic() < deadline:
        time.sleep(0.2)
    return [" ".join(psutil.Process(pid).cmdline()) for pid in found if psutil.pid_exists(pid)]


def writers(root: Path):
    for process in psutil.process_iter():
        try:
            if any(file.path.startswith(str(root)) and file.path.endswith(".log") for file in process.open_files()):
                yield process.pid
        except (psutil.Error, OSError):
            continue


def trained(root: Path) -> list[list[str]]:
    "The process, the rank, the settings' hash and the cores of each rank of each trial that began to train."
    path = root / "trials.txt"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def states(study) -> list[str]:
    return [trial.state.name for trial in study.trials]


@pytest.mark.parametrize(
    "strategy", [pytest.param(name, marks=pytest.mark.soak) for name in ("ddp", "deepspeed_stage_2", "deepspeed_stage_3")]
)
def test_a_trial_is_one_row_with_the_same_parameters_on_all_ranks(search, tmp_path, strategy):
    study = search({"strategy": strategy})
    assert len(study.trials) == 3 and set(states(study)) <= {"COMPLETE", "PRUNED"}
    seen = trained(tmp_path)
    assert Counter(rank for _, rank, *_ in seen) == {"0": 3, "1": 3}
    assert sorted(Counter(settings for _, _, settings, _ in seen).values()) == [2, 2, 2]
    folder = Path(study.trials[0].user_attrs["folder"])
    assert {"run.json", "metrics.csv", "rank-0.log", "rank-1.log"} <= {path.name for path in folder.iterdir()}
    assert not (folder / "checkpoints").exists() and RunRecord.read(folder).resolved["world_size"] == 2


@pytest.mark.soak
def test_one_rank_and_two_prune_the_same_trials(search, tmp_path):
    # Hyperband's brackets are drawn from the study's name.
    one = search({"devices": 1, "batch_size": 128, "max_epochs": 9}, n_trials=6, study_name="one")
    two = search({"devices": 2, "batch_size": 64, "max_epochs": 9, "root": str(tmp_path / "two")}, n_trials=6, study_name="one")
    assert states(one) == states(two) and "PRUNED" in states(one)
    for ours, theirs in zip(one.trials, two.trials):
        assert ours.params == pytest.approx(theirs.params) and ours.intermediate_values.keys() == theirs.intermediate_values.keys()


def test_early_stopping_ends_a_trial_on_all_ranks(search):
    study = search({"max_epochs": 50, "patience": 1, "min_delta": 0.5}, n_trials=2, pruner="NopPruner", keep_checkpoints=True)
    assert (Path(study.best_trial.user_attrs["folder"]) / "checkpoints").is_dir(), "asked for"
    assert states(study) == ["COMPLETE"] * 2 and all(len(trial.intermediate_values) < 10 for trial in study.trials)


FAULTS = {
    "raises@1": "RuntimeError: the model is at fault",
    "raises": "RuntimeError: the model is at fault",
    "eats": "MemoryError",
    "dies@1": "was killed by SIGKILL",
    "hangs@1": "TimeoutError: the trial took longer than trial_timeout=40.0 seconds.",
}


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[] if fault in ("raises@1", "eats") else [pytest.mark.soak]) for fault in FAULTS]
)
def test_a_failure_is_an_outcome_and_the_study_goes_on(search, tmp_path, monkeypatch, fault):
    monkeypatch.setenv("FAULT", fault)
    limit = 40 if fault == "hangs@1" else None  # long enough for the two trials that are well, on a busy machine
    study = search(search_space=f"{TUNED}:one_at_fault", trial_timeout=limit)
    assert states(study)[1] == "FAIL" and states(study).count("FAIL") == 1
    assert FAULTS[fault] in study.trials[1].user_attrs["error"]
    assert trials_table(study)["state"].tolist()[-1] == "FAIL"


def test_a_value_that_is_never_finite_is_a_failure(search, monkeypatch):
    monkeypatch.setenv("FAULT", "nan")
    study = search(search_space=f"{TUNED}:one_at_fault", n_trials=2, pruner="NopPruner")
    assert states(study) == ["COMPLETE", "FAIL"] and "val_loss was never a finite number" in study.trials[1].user_attrs["error"]


def run_one(folder: Path, report) -> Outcome:
    "One trial on two ranks."
    return run_trial(RunConfig(**SETTINGS, root=str(folder)), folder / "trial", report, "search")


def test_a_rank_that_is_killed_while_its_report_is_answered_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACE", str(tmp_path))

    def kill_all(number, value):
        for pid in writers(tmp_path):
            os.kill(pid, signal.SIGKILL)
        assert ranks_alive(tmp_path) == []
        return False

    outcome = run_one(tmp_path, kill_all)
    assert outcome.state == "failed" and "was killed by SIGKILL" in outcome.error


def test_rank_0_of_a_trial_completes_what_it_writes_where_all_ranks_fail(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACE", str(tmp_path))
    config = RunConfig(**SETTINGS | {"devices": 3, "callbacks": [f"{REPOSITORY}/tests/failing.py:Fails"]}, root=str(tmp_path))
    outcome = run_trial(config, tmp_path / "trial", lambda number, value: False, "search")
    assert outcome.state == "failed" and "ValueError: on all ranks" in outcome.error
    assert list(tmp_path.rglob("completed")) and RunRecord.read(tmp_path / "trial").status == "failed"


def test_a_lost_connection_is_not_told_where_another_rank_ran_out_of_memory():
    ranks = TrialRanks()
    ranks.outcomes[0] = Outcome("failed", "rank 0: Traceback ...\nRuntimeError: [gloo] Connection closed by peer\n")
    assert ranks.failure is ranks.outcomes[0]
    ranks.outcomes[1] = Outcome("failed", "rank 1: Traceback ...\ntorch.OutOfMemoryError: CUDA out of memory.\n")
    assert ranks.failure is ranks.outcomes[1]


def test_where_a_rank_cannot_be_started_the_others_are_ended(tmp_path, monkeypatch):
    start, started = ForkServerProcess.start, []

    def start_once(process):
        if started:
            raise OSError(errno.EAGAIN, "no more processes")
        start(process)
        started.append(psutil.Process(process.pid))

    monkeypatch.setattr(ForkServerProcess, "start", start_once)
    with pytest.raises(OSError, match="no more processes"):
        run_one(tmp_path, lambda number, value: False)
    assert len(started) == 1 and not started[0].is_running()


def test_failures_in_a_row_stop_the_search_with_the_last_one(search):
    with pytest.raises(TuningError, match="(?s)2 trials failed one after the other; the last, trial 1.*the model is at fault"):
        search(search_space=f"{TUNED}:all_at_fault", max_failures=2, n_trials=9)


def test_trials_run_side_by_side_on_their_own_devices(search, tmp_path):
    study = search(devices_per_trial=1, n_trials=4, pruner="NopPruner")
    spans = sorted((trial.datetime_start, trial.datetime_complete) for trial in study.trials)
    assert spans[1][0] < spans[0][1], "the second began before the first had ended"
    assert [rank for _, rank, *_ in trained(tmp_path)] == ["0"] * 4 and states(study) == ["COMPLETE"] * 4
    cores = {frozenset(line[3].split(",")) for line in trained(tmp_path)}
    assert len(os.sched_getaffinity(0)) == 1 or len(cores) == 2 and not frozenset.intersection(*cores)


def test_more_trials_go_on_from_those_there_are_and_none_is_run_again(search, tmp_path):
    seeded = {"sampler_args": {"seed": 7}}
    first = [trial.params for trial in search(n_trials=2, **seeded).trials]
    assert [trial.params for trial in search(n_trials=3, **seeded).trials[:2]] == first and first[0] != first[1]
    assert len(trained(tmp_path)) == 6 and len(search(n_trials=2, **seeded).trials) == 3


def test_the_best_parameters_train_and_say_where_they_come_from(search, launch, tmp_path):
    study = search()
    folder = next((tmp_path / "runs").rglob("best_params.json")).parent
    best = json.loads((folder / "best_params.json").read_text())
    assert best["value"] == study.best_value and best["trial"] == study.best_trial.number and best["study"] == study.study_name
    notebook, run = launch(
        TRAIN, None, **SETTINGS | {"max_epochs": 1}, root=str(tmp_path / "runs"), best_params=str(folder / "best_params.json")
    )
    record = RunRecord.read(run)
    assert record.settings["lr"] == best["params"]["lr"] and record.settings["best_params"] == str(folder / "best_params.json")
    table = runs(tmp_path / "runs").set_index("mode")
    assert table["status"].to_dict() == {"train": "finished", "tune": "finished"}
    assert table.loc["tune", "best_score"] == best["value"]
    assert len(runs(folder / "trials")) == 3


@pytest.mark.soak
def test_every_trial_is_one_finished_run_of_wandb_in_the_study_s_group(search, tmp_path, tmp_path_factory):
    import wandb

    own = wandb.init(mode="offline", dir=tmp_path_factory.mktemp("own"))  # the notebook's, whose W&B process trials leave alone
    study = search({"wandb": "offline"}, n_trials=2, pruner="NopPruner")
    own.finish()
    found = wandb_runs(tmp_path)
    assert len(found) == 2 and [one["exits"] for one in found] == [[0], [0]]
    assert {(one["run"].project, one["run"].run_group) for one in found} == {("Digits-TunedNet-tune", study.study_name)}


@pytest.mark.soak
def test_the_notebook_shows_the_trials_and_pictures_and_lies_in_the_study_s_folder(launch, tmp_path):
    notebook, folder = launch(
        TUNE,
        tmp_path / "out.ipynb",
        accelerator="cpu",
        devices=2,
        max_epochs=3,
        n_trials=4,
        devices_per_trial=1,
        root=str(tmp_path / "runs"),
    )
    assert (folder / "best_params.json").exists() and (folder / "tune.ipynb").exists()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert any("trial 4/4 · best val_loss" in output.get("data", {}).get("text/plain", "") for output in outputs)
    study = optuna.load_study(study_name=folder.name, storage=open_storage(None, folder))
    assert len(study.trials) == 4


COMMAND = """
import sys
from dlnb.config import RunConfig
from dlnb.search.study import StudyConfig
from dlnb.tuner import tune

settings, study = eval(sys.argv[1]), eval(sys.argv[2])
tune(RunConfig(**settings), StudyConfig(**study))
"""


def start(root: Path, settings: dict | None = None, **study) -> subprocess.Popen:
    "The same search as a process of its own, from a script that does not ask whether it is `__main__`."
    script = root / "tuned_search.py"
    script.write_text(COMMAND)
    settings = SETTINGS | {"root": str(root / "runs")} | (settings or {})
    command = [warm_python(), str(script), repr(settings), repr({"search_space": LR, "n_trials": 4} | study)]
    environment = os.environ | {"TRACE": str(root), "PYTHONPATH": str(REPOSITORY)}
    with (root / "output.txt").open("a") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def the_study(root: Path, storage: str | None = None) -> optuna.Study:
    folder = next((root / "runs").rglob("run.json")).parent
    return optuna.load_study(study_name=folder.name, storage=open_storage(storage, folder))


def start_notebook(root: Path, **study) -> subprocess.Popen:
    "The same search as papermill runs it."
    parameters = SETTINGS | {"root": root / "runs", "search_space": LR} | study
    words = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in parameters.items()}
    return Papermill(TUNE, root / "out.ipynb", launcher=(warm_python(),), **words).process


def kill_one(name: str, root: Path, process: subprocess.Popen, choice: random.Random) -> bool:
    "Kill a rank, the kernel, or the process that was started; whether there was one."
    try:
        family = descendants(psutil.Process(process.pid))
        victims = {
            "started": [process],
            "kernel": [child for child in family if "ipykernel_launcher" in child.cmdline()],
            "rank": [child for child in family if child.pid in set(writers(root))],
        }[name]
        if victims:
            choice.choice(victims).kill()
        return bool(victims)
    except psutil.Error:  # it has just ended
        return False


def campaign(root: Path, names: list[str], choice: random.Random, **study) -> list[str]:
    "Begin the same search again and again, killing these in turn at random moments, until it ends; who was killed."
    killed, process = [], start_notebook(root, **study)
    try:
        while len(killed) < len(names) and process.poll() != 0:
            time.sleep(choice.uniform(1, 12))
            if process.poll():
                process = start_notebook(root, **study)
            elif process.poll() is None and kill_one(name := names[len(killed)], root, process, choice):
                killed.append(name)
        if process.wait(300) != 0:
            process = start_notebook(root, **study)
            assert process.wait(300) == 0
        return killed
    finally:
        process.kill()


def check_counts(root: Path, n_trials: int, killed: list[str]) -> None:
    study = the_study(root)
    found = Counter(states(study))
    assert sum(found.values()) == n_trials and set(found) <= {"COMPLETE", "PRUNED", "FAIL"}
    assert found["FAIL"] <= killed.count("rank")
    assert ranks_alive(root) == []


@pytest.mark.soak
def test_a_search_that_is_killed_goes_on_with_the_same_command(tmp_path):
    study = {"search_space": f"{TUNED}:slow", "n_trials": 3}
    process, deadline = start(tmp_path, **study), time.monotonic() + 60
    try:
        while not trained(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.kill()
        assert process.wait(10) == -signal.SIGKILL and "RUNNING" in states(the_study(tmp_path))
        process = start(tmp_path, **study)
        assert process.wait(120) == 0
    finally:
        process.kill()
    check_counts(tmp_path, 3, [])


def test_a_trial_that_another_machine_has_ended_meanwhile_stays_as_it_is(tmp_path):
    "As after a sleep of this machine: the other one's worker is written into the study."
    process, deadline = start(tmp_path, {"max_epochs": 1000}, n_trials=1, pruner="NopPruner"), time.monotonic() + 100
    try:
        while not trained(tmp_path):
            assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "output.txt").read_text()[-3000:]
            time.sleep(0.1)
        study = the_study(tmp_path)
        id = study.trials[0]._trial_id
        study._storage.set_trial_user_attr(id, "worker", study.trials[0].user_attrs["worker"] | {"machine": "another"})
        study._storage.set_trial_state_values(id, optuna.trial.TrialState.COMPLETE, [0.125])
        assert process.wait(60) == 0, (tmp_path / "output.txt").read_text()[-3000:]
    finally:
        process.kill()
    assert the_study(tmp_path).best_value == 0.125
    assert ranks_alive(tmp_path) == []


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_papermill_the_kernel_and_ranks_are_killed_at_any_moment_and_the_counts_hold(tmp_path, monkeypatch):
    names, choice = ["started", "kernel", "rank"] * (5 if ALL else 2), random.Random(2)
    choice.shuffle(names)
    while names:  # a fast machine ends a search before so many are killed, and then does the next one
        root = Path(tempfile.mkdtemp(dir=tmp_path))
        monkeypatch.setenv("TRACE", str(root))
        killed = campaign(root, names, choice, search_space=f"{TUNED}:slow", max_failures=99, n_trials=24)
        check_counts(root, 24, killed)
        names = names[len(killed) :]


def workers(root: Path, n_trials: int, **study) -> None:
    "Four at once, with the same command."
    processes = [start(root, {"devices": 1}, n_trials=n_trials, **study) for _ in range(4)]
    try:
        assert [process.wait(180) for process in processes] == [0] * 4, (root / "output.txt").read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()


def check_once_each(root: Path, study: optuna.Study, n_trials: int) -> None:
    assert len(study.trials) == n_trials and set(states(study)) <= {"COMPLETE", "PRUNED"}
    assert len({str(trial.params) for trial in study.trials}) == n_trials
    assert Counter(settings for _, _, settings, _ in trained(root)).most_common(1)[0][1] == 1


@pytest.mark.soak
def test_four_workers_share_a_study(tmp_path):
    workers(tmp_path, 6)
    check_once_each(tmp_path, the_study(tmp_path), 6)


@pytest.fixture(scope="module")
def postgres():
    "A server of this test's own; its URL."
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not programs:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    bin_folder, port = programs[-1].parent, 20000 + os.getpid() % 20000
    run = lambda *words: subprocess.run([*as_user, *map(str, words)], check=True, text=True, timeout=60)
    with tempfile.TemporaryDirectory() as folder:  # not in pytest's own, which it keeps for its user alone
        if as_user:
            shutil.chown(folder, "postgres")
        run(bin_folder / "initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "tuner")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder}"
        run(bin_folder / "pg_ctl", "-D", f"{folder}/data", "-w", "-l", f"{folder}/log", "-o", options, "start")
        yield f"postgresql+psycopg://tuner@127.0.0.1:{port}/postgres"
        run(bin_folder / "pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")


@pytest.mark.soak
def test_four_workers_share_a_study_on_a_postgresql_server(tmp_path, postgres):
    workers(tmp_path, 6, storage=postgres, study_name="shared")
    check_once_each(tmp_path, the_study(tmp_path, postgres), 6)


MISTAKES = {
    "low above high": (dict(search_space={"lr": {"low": 1, "high": 1e-3}}), "search_space['lr']"),
    "logarithm of zero": (dict(search_space={"lr": {"low": 0, "high": 1.0, "log": True}}), "search_space['lr']"),
    "a step and a logarithm": (dict(search_space={"lr": {"low": 1e-3, "high": 1.0, "log": True, "step": 0.1}}), "search_space['lr']"),
    "no upper end": (dict(search_space={"lr": {"low": 1e-3}}), "needs high"),
    "a word for a number": (dict(search_space={"lr": {"low": "small", "high": 1}}), "finite numbers"),
    "unknown key": (dict(search_space={"lr": {"low": 1e-3, "high": 1, "logarithmic": True}}), "'logarithmic' is not known"),
    "a number alone": (dict(search_space={"lr": 1e-3}), "must be a list of choices"),
    "no choice": (dict(search_space={"lr": []}), "one choice or more"),
    "unknown setting": (dict(search_space={"learning_rate": [1e-3]}), "'learning_rate' is not known"),
    "unknown argument": (dict(search_space={"model_args.widht": [8]}), "Did you mean 'width'"),
    "impossible value": (dict(search_space={"batch_size": {"low": 0, "high": 64}}), "0 is impossible"),
    "not in a list": (
        dict(search_space={"model_args.width.2": [8, 16]}, settings=dict(model_args={"width": [8, 8]})),
        "it is a list of 2, numbered",
    ),
    "the search's own": (dict(search_space={"devices": [1, 2]}), "is not for a search to set"),
    "empty space": (dict(search_space={}), "must name a setting"),
    "no such function": (dict(search_space="dlnb.tuner:spcae"), "'spcae' is not known"),
    "unknown sampler": (dict(sampler="TPESampelr"), "Did you mean 'TPESampler'"),
    "unknown pruner": (dict(pruner="Hyperband"), "Did you mean 'HyperbandPruner'"),
    "unknown argument of the sampler": (dict(sampler_args={"n_startup": 5}), "Did you mean 'n_startup_trials'"),
    "no trials": (dict(n_trials=0), "n_trials"),
    "unknown setting of the study": (dict(n_trial=5), "Did you mean 'n_trials'"),
    "devices that cannot be divided": (dict(devices_per_trial=3), "devices_per_trial=3 does not divide the 2 devices"),
    "no monitor": (dict(settings=dict(monitor=None, patience=None, save_top_k=1)), "needs a metric to judge"),
    "wrong direction": (dict(settings=dict(monitor_mode="down")), "monitor_mode"),
    "no database": (dict(storage="study.db"), "is not a URL of a database"),
    "no server": (dict(storage="postgresql+psycopg://nobody@127.0.0.1:9/none"), "cannot be opened"),
    "in memory": (dict(storage="sqlite://"), "would be lost with this process"),
    "a checkpoint to go on from": (dict(settings=dict(resume="never")), "a search resumes by itself"),
}


@pytest.mark.parametrize("given, told", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_before_a_process_starts_or_a_file_is_written(search, tmp_path, given, told):
    with pytest.raises(ValueError) as error:
        search(given.get("settings"), **{name: value for name, value in given.items() if name != "settings"})
    assert told in str(error.value)
    assert not (tmp_path / "runs").exists() and not trained(tmp_path)


def test_under_torchrun_a_search_says_to_start_it_once(search, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE=2.*without torchrun"):
        search()


def test_a_study_of_another_space_or_direction_is_refused(search):
    search(n_trials=1, study_name="mine")
    with pytest.raises(ValueError, match="of another search_space"):
        search(n_trials=1, study_name="mine", search_space={"lr": [1e-3]})
    with pytest.raises(ValueError, match="of other settings: weight_decay=0.01"):
        search({"weight_decay": 0.5}, n_trials=1, study_name="mine")
    with pytest.raises(ValueError, match="minimizes, and monitor_mode='max' asks to maximize"):
        search({"monitor_mode": "max", "monitor": "val_acc"}, n_trials=1, study_name="mine")


def test_sqlite_on_a_network_filesystem_is_refused_with_what_to_use_instead(tmp_path, monkeypatch):
    from collections import namedtuple

    mount = namedtuple("mount", "mountpoint fstype")
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [mount("/", "ext4"), mount(str(tmp_path), "nfs4")])
    with pytest.raises(ValueError, match=r"network filesystem \(nfs4\).*Use storage=None"):
        open_storage(f"sqlite:///{tmp_path}/study.db", tmp_path)


def test_a_journal_whose_last_line_is_cut_anywhere_is_mended(tmp_path):
    study = optuna.create_study(study_name="a", storage=open_storage(None, tmp_path))
    for number in range(5):
        study.enqueue_trial({"lr": number})
    whole = (tmp_path / "study.log").read_bytes()
    last = len(whole) - whole[:-1].rfind(b"\n") - 1
    for cut in range(1, last + 1):
        (tmp_path / "study.log").write_bytes(whole[:-cut])
        again = optuna.load_study(study_name="a", storage=open_storage(None, tmp_path))
        again.enqueue_trial({"lr": 9})
        assert len(optuna.load_study(study_name="a", storage=open_storage(None, tmp_path)).trials) in (5, 6)
