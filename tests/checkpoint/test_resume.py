"""A training that is killed and given again ends with the bytes of one that nobody disturbed: real kills of real ranks."""

import hashlib
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from conftest import ALL, REPOSITORY, TRAIN
from warm import processes_left, warm_python

pytestmark = pytest.mark.timeout(400)
SETTINGS = dict(accelerator="cpu", devices=2, max_epochs=4, batch_size=16, accumulate_grad_batches=2, optimizer="AdamW")
SETTINGS |= dict(save_every_n_steps=3, data_args='{"num_workers": 1}')


RUN = "*/*/*/*/run.json"  # found without a look into the checkpoints, whose folders come and go


def run_of(root):
    "The folder of the one run under `root`, and its record."
    (path,) = root.glob(RUN)
    return path.parent, json.loads(path.read_text())


def weights_of(root) -> str:
    "The SHA-256 of the last checkpoint's weights and of the best one's."
    from dlnb.consolidate import consolidate

    folder, _ = run_of(root)
    last = consolidate(folder / "checkpoints" / "last.ckpt", folder / "last.safetensors", overwrite=True)
    return "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in (last, folder / "model.safetensors"))


def victim(job, kind: str) -> psutil.Process:
    "papermill, the kernel (which is rank 0), or another rank."
    job.look()
    if kind == "papermill":
        return psutil.Process(job.process.pid)
    word = {"kernel": "ipykernel", "rank": "rank.py"}[kind]
    return next(process for process in job.family.values() if process.is_running() and word in " ".join(process.cmdline()))


TRACED = REPOSITORY / "tests" / "traced.py"
KILLS = {"ddp": 6, "deepspeed_stage_1": 3, "deepspeed_stage_2": 3, "deepspeed_stage_3": 3}  # a third of each kind of process
KILLS = dict.fromkeys(KILLS, 9) if ALL else KILLS
LONG = SETTINGS | dict(model=f"{TRACED}:TracedNet", data=f"{TRACED}:TracedDigits", max_epochs=12)


def batches_of(trace) -> dict[int, Counter]:
    "The batches of each epoch with their step; one that was trained again after a kill counts once, if it was the same."
    lines = [line for path in trace.iterdir() for line in path.read_text().splitlines()]
    lines = [json.loads(line)[1:] for line in lines if line.endswith("]")]  # a kill may cut the last one
    batches = {(epoch, step, tuple(samples)) for epoch, step, samples in lines}
    return {epoch: Counter((step, samples) for of, step, samples in batches if of == epoch) for epoch, *_ in batches}


def kill_at_random(job, root, draw, kind: str, during_a_save: bool) -> None:
    "Kill one of a training's processes once it trains: while it saves, or at any moment."
    while not (root.exists() and any(root.glob(RUN)) and run_of(root)[1]["pid"] in job.family):
        job.look()
        if job.process.poll() is not None:
            return
        time.sleep(0.02)
    checkpoints, deadline = run_of(root)[0] / "checkpoints", time.monotonic() + 5
    time.sleep(draw.uniform(0, 1.5))
    while during_a_save and not list(checkpoints.glob("*.unfinished")) and time.monotonic() < deadline:
        time.sleep(0.0005)
    try:
        victim(job, kind).send_signal(signal.SIGKILL)
    except (psutil.NoSuchProcess, StopIteration):
        pass  # it has just ended


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", KILLS)
def test_a_training_that_is_killed_again_and_again_ends_with_the_same_bytes(papermill, tmp_path, monkeypatch, strategy):
    settings, roots = LONG | {"strategy": strategy}, {name: tmp_path / name for name in ("whole", "killed")}
    for name in roots:
        (tmp_path / f"{name}-trace").mkdir()
    monkeypatch.setenv("TRACE", str(tmp_path / "whole-trace"))
    assert papermill(TRAIN, **settings, root=roots["whole"]).wait() == 0
    monkeypatch.setenv("TRACE", str(tmp_path / "killed-trace"))
    draw, kills = random.Random(strategy), 0
    for number in range(KILLS[strategy]):
        job = papermill(TRAIN, **settings, root=roots["killed"])
        kill_at_random(job, roots["killed"], draw, ("rank", "kernel", "papermill")[number % 3], during_a_save=number % 2 == 1)
        kills += job.wait() != 0
        assert job.leftover() == []
    again = papermill(TRAIN, **settings, root=roots["killed"])
    assert again.wait() == 0, again.log.read_text()[-2000:]
    (whole, _), (killed, record) = run_of(roots["whole"]), run_of(roots["killed"])
    print(strategy, kills, "kills,", record["attempts"], "attempts that trained")
    assert record["status"] == "finished" and kills >= KILLS[strategy] - 1
    assert sorted(os.listdir(killed / "checkpoints")) == sorted(os.listdir(whole / "checkpoints"))
    assert weights_of(roots["killed"]) == weights_of(roots["whole"])
    assert batches_of(tmp_path / "killed-trace") == batches_of(tmp_path / "whole-trace")


ALONE = dict(model=f"{TRACED}:KilledNet", data=f"{TRACED}:TracedDigits", accelerator="cpu", devices=1, strategy="single_device")
ALONE |= dict(max_epochs=12, batch_size=64, optimizer="AdamW", save_every_n_steps=3, log_every_n_steps=1)
ALONE |= dict(data_args={"num_workers": 0}, trainer_args={"enable_progress_bar": False})


def elsewhere(place: Path, number: int) -> tuple[Path, str]:
    "Where the runs' folder is now, and by which path the next attempt is given it: as it is, moved, or through links."
    if number % 3 == 0:
        place = place.rename(place.with_name(f"moved-{number}"))
    link = place.with_name(f"link-{number}")
    if number % 4 == 1:
        link.symlink_to(place)
    elif number % 4 == 2:
        link.symlink_to(place.name)
    elif number % 4 == 3:
        (folder := place.with_name(f"deep-{number}") / "deeper").mkdir(parents=True)
        (link := folder / "runs").symlink_to(Path("..") / ".." / place.name)
    return place, str(link if link.is_symlink() else place)


def claims(folder: Path) -> None:
    "The record says no more than the disk holds."
    from dlnb.checkpoint.manifest import read_manifest

    record = json.loads((folder / "run.json").read_text())
    found = [read_manifest(path).step for path in (folder / "checkpoints").glob("*.ckpt")]
    assert record["step"] <= max(found, default=0)
    assert all(name is None or (folder / name).exists() for name in (record["best_checkpoint"], record["last_checkpoint"]))


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_sixty_six_kills_at_chosen_moments_on_moved_and_linked_roots_lose_nothing(tmp_path):
    def attempt(root: str, trace: str, **environment: str) -> int:
        (tmp_path / trace).mkdir(exist_ok=True)
        command = [warm_python(), TRACED, json.dumps(ALONE | {"root": root})]
        environment = os.environ | environment | {"TRACE": str(tmp_path / trace)}
        with (tmp_path / "output.txt").open("a") as output:
            done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=output, stderr=output, timeout=120)
        return done.returncode

    assert attempt("whole", "whole-trace") == 0
    (place := tmp_path / "killed").mkdir()
    draw, kills = random.Random(66), Counter()
    moments = [moment for moment in ("setup", "start", "save", "0", "1", "4") for _ in range(11)]
    draw.shuffle(moments)
    for number, moment in enumerate(moments):
        place, root = elsewhere(place, number)
        if attempt(root, "killed-trace", KILL=moment) == -signal.SIGKILL:
            kills[moment] += 1
        if list(place.rglob("run.json")):
            claims(run_of(place)[0])
    assert attempt(str(place), "killed-trace") == 0
    print(sum(kills.values()), "kills:", dict(kills))
    assert sum(kills.values()) >= 64 and len(kills) == 6
    (whole, _), (killed, record) = run_of(tmp_path / "whole"), run_of(place)
    assert record["status"] == "finished"
    assert weights_of(place) == weights_of(tmp_path / "whole")
    assert batches_of(tmp_path / "killed-trace") == batches_of(tmp_path / "whole-trace")
    assert sorted((killed / "metrics.csv").read_text().split()) == sorted((whole / "metrics.csv").read_text().split())
    assert sorted(os.listdir(killed / "checkpoints")) == sorted(os.listdir(whole / "checkpoints"))
    left = [path.name for path in killed.rglob("*") if path.name.endswith((".new", ".unfinished", ".room"))]
    assert not [name for name in left if not name.startswith(".run.json.")]  # which are removed when nobody can be writing them
    assert processes_left() == []
