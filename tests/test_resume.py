"""A training that is killed and given again ends with the bytes of one that nobody disturbed: real kills of real ranks."""

import hashlib
import json
import os
import random
import signal
import time

import psutil
import pytest
from conftest import TRAIN

pytestmark = pytest.mark.timeout(400)
SETTINGS = dict(accelerator="cpu", devices=2, max_epochs=4, batch_size=16, accumulate_grad_batches=2, optimizer="AdamW")
SETTINGS |= dict(save_every_n_steps=3, data_args='{"num_workers": 1}')


def run_of(root):
    "The folder of the one run under `root`, and its record."
    (path,) = root.rglob("run.json")
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


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_a_killed_training_ends_with_the_same_bytes(papermill, tmp_path, strategy):
    settings = SETTINGS | {"strategy": strategy}
    assert papermill(TRAIN, **settings, root=tmp_path / "whole").wait() == 0
    root, draw = tmp_path / "killed", random.Random(strategy)
    for kind in ("rank", "papermill"):
        job = papermill(TRAIN, **settings, root=root)
        while not any(root.rglob("last.ckpt")) and job.process.poll() is None:
            time.sleep(0.02)
        while not (root.exists() and any(root.rglob("run.json")) and run_of(root)[1]["pid"] in job.family):
            job.look()
            assert job.process.poll() is None, job.log.read_text()[-2000:]
            time.sleep(0.02)
        time.sleep(draw.random())
        victim(job, kind).send_signal(signal.SIGKILL)
        job.wait()
        assert job.leftover() == []
    again = papermill(TRAIN, **settings, root=root)
    assert again.wait() == 0, again.log.read_text()[-2000:]
    folder, record = run_of(root)
    assert (record["status"], record["attempts"]) == ("finished", 3)
    assert sorted(os.listdir(folder / "checkpoints")) == sorted(os.listdir(run_of(tmp_path / "whole")[0] / "checkpoints"))
    assert weights_of(root) == weights_of(tmp_path / "whole")
