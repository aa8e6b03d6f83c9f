"""No work is lost: by a run root behind a link, a moved folder, a loss that is NaN, a second kill, a full disk."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dlnb.checkpoint.manifest import read_manifest
from dlnb.config import RunConfig
from dlnb.examples import DigitsNet
from dlnb.trainer import fit

HERE = Path(__file__)


class Scripted(DigitsNet):
    "Its validation loss is what `VAL_LOSS` says of each epoch; `STOP_BEFORE`, an optimizer step, ends it there with an error."

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == int(os.environ.get("STOP_BEFORE", -1)):
            raise RuntimeError("STOP_BEFORE")

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_step == int(os.environ.get("NAN_AT", -1)) else loss

    def validation_step(self, batch, batch_idx):
        scores = json.loads(os.environ.get("VAL_LOSS", "[]")) or [1.0]
        self.log("val_loss", float(scores[min(self.current_epoch, len(scores) - 1)]))


def config(root, **settings) -> RunConfig:
    "A training of two steps an epoch, on this process alone."
    small = dict(accelerator="cpu", devices=1, batch_size=64, optimizer="AdamW", trainer_args={"limit_train_batches": 2})
    task = dict(model=f"{HERE}:Scripted", data="dlnb.examples:Digits", root=str(root), max_epochs=2)
    return RunConfig(**task | small | settings)


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def checkpoints_of(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "checkpoints"))


def stopped(monkeypatch, settings: RunConfig, before_step: int) -> Path:
    "Train until an error; the run's folder."
    monkeypatch.setenv("STOP_BEFORE", str(before_step))
    with pytest.raises(RuntimeError, match="STOP_BEFORE"):
        fit(settings)
    monkeypatch.delenv("STOP_BEFORE")
    return settings.folder()


@pytest.mark.parametrize("link", ["absolute", "relative", "parent", "two", "deeper"])
def test_a_run_root_behind_a_link_is_a_run_root(tmp_path, monkeypatch, link):
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "scratch" / "me" / "deep"
    target.mkdir(parents=True)
    if link == "absolute":
        Path("runs").symlink_to(target)
    elif link == "relative":
        Path("runs").symlink_to("scratch/me/deep")
    elif link == "two":
        Path("first").symlink_to("scratch/me")
        Path("runs").symlink_to("first/deep")
    else:
        Path("linked").symlink_to("scratch")
    root = {"parent": "linked", "deeper": "linked/me/deep/new/runs"}.get(link, "runs")
    record = fit(config(root))
    assert (record.status, record.best_checkpoint, record.last_checkpoint) == (
        "finished",
        "checkpoints/epoch=0.ckpt",
        "checkpoints/last.ckpt",
    )
    assert (record.folder / record.weights).is_file() and record_of(record.folder)["epoch"] == 2
    longer = fit(config(os.path.realpath(root), max_epochs=3))  # by another name of the same place
    assert (longer.attempts, longer.epoch, longer.step) == (2, 3, 6)
    assert checkpoints_of(longer.folder) == ["epoch=0.ckpt", "last.ckpt"]


def test_last_is_the_newest_state_after_every_epoch_whatever_is_best(tmp_path, monkeypatch):
    monkeypatch.setenv("VAL_LOSS", "[1, 2, 3, 4, 5, 6]")
    folder = stopped(monkeypatch, config(tmp_path, max_epochs=6), before_step=9)
    manifest, record = read_manifest(folder / "checkpoints" / "last.ckpt"), record_of(folder)
    assert (manifest.epoch, manifest.step, manifest.batch) == (4, 8, 0)
    assert (record["epoch"], record["step"]) == (4, 8)
    assert (record["best_checkpoint"], record["best_score"]) == ("checkpoints/epoch=0.ckpt", 1.0)
    again = fit(config(tmp_path, max_epochs=6))
    assert (again.earlier[0].step, again.epoch, again.step) == (8, 6, 12)
    assert again.best_checkpoint == "checkpoints/epoch=0.ckpt" and checkpoints_of(folder) == ["epoch=0.ckpt", "last.ckpt"]


class Scheduled(Scripted):
    "Two schedulers that step once an epoch: by the epoch, and by what was monitored."

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        by_epoch = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        if os.environ.get("PLATEAU"):
            by_epoch = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": by_epoch, "monitor": "val_loss"}}


@pytest.mark.parametrize("plateau", ["", "1"], ids=["by the epoch", "by a metric"])
def test_a_scheduler_steps_at_the_end_of_the_epoch_that_is_resumed(tmp_path, monkeypatch, plateau):
    monkeypatch.setenv("PLATEAU", plateau)
    settings = dict(model=f"{HERE}:Scheduled", optimizer="auto", max_epochs=4, save_every_n_steps=1)
    stopped(monkeypatch, config(tmp_path / "stopped", **settings), before_step=3)
    resumed, whole = fit(config(tmp_path / "stopped", **settings)), fit(config(tmp_path / "whole", **settings))
    one, other = (load_file(record.folder / "model.safetensors") for record in (resumed, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_record_claims_no_epoch_that_is_not_on_the_disk(tmp_path):
    """The record is looked at whenever it changes, by the process that trains: what it says is there."""
    code = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(HERE.parent)!r})
from dlnb.checkpoint.manifest import read_manifest
from dlnb.checkpoint import writer
from dlnb.track import RunRecord
from dlnb.trainer import fit
from test_nothing_lost import config
import time

write, write_files, looks = RunRecord.write, writer.write_files, []
writer.write_files = lambda work: (time.sleep(0.3), write_files(work))  # slower than an epoch

def looked(record):
    write(record)
    checkpoints = record.folder / "checkpoints"
    steps = [read_manifest(path).step for path in checkpoints.glob("*.ckpt")] if checkpoints.is_dir() else []
    said = json.loads(record.path.read_text())
    looks.append((said["step"], max(steps, default=0)))
    assert said["step"] <= max(steps, default=0), looks
    for name in (said["best_checkpoint"], said["last_checkpoint"]):
        assert name is None or (record.folder / name).exists(), said

RunRecord.write = looked
assert fit(config({str(tmp_path)!r}, max_epochs=4, save_every_n_steps=1)).step == 8
assert len(looks) > 8 and looks[-1] == (8, 8)
"""
    environment = os.environ | {"VAL_LOSS": "[3, 2, 4, 1]"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def test_early_stopping_keeps_the_newest_state_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VAL_LOSS", "[1, 2, 3, 4, 5, 6]")
    record = fit(config(tmp_path, max_epochs=6, patience=2))
    assert (record.epoch, record.best_checkpoint) == (3, "checkpoints/epoch=0.ckpt")
    assert read_manifest(record.folder / "checkpoints" / "last.ckpt").step == 6
    assert "Stopped early, after 3 epochs. Monitored metric val_loss did not improve" in capsys.readouterr().out


def test_a_score_that_is_nan_is_never_the_best(tmp_path, monkeypatch):
    monkeypatch.setenv("VAL_LOSS", "[NaN, 5, NaN, 4, NaN]")
    record = fit(config(tmp_path, max_epochs=5))
    assert (record.best_checkpoint, record.best_score) == ("checkpoints/epoch=3.ckpt", 4.0)
    assert checkpoints_of(record.folder) == ["epoch=3.ckpt", "last.ckpt"]
    monkeypatch.setenv("VAL_LOSS", "[NaN]")
    lost = fit(config(tmp_path / "lost", max_epochs=2))
    assert (lost.best_checkpoint, lost.best_score, lost.weights) == (None, None, "model.safetensors")
    assert checkpoints_of(lost.folder) == ["last.ckpt"]
    kept = fit(config(tmp_path / "kept", max_epochs=2, save_top_k=-1))
    assert kept.best_checkpoint is None and checkpoints_of(kept.folder) == ["epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt"]


@pytest.mark.parametrize("way", ["moved", *(pytest.param(way, marks=pytest.mark.soak) for way in ("copied", "linked"))])
@pytest.mark.parametrize("scores", ["[2, 1, 3, 3, 3, 3]", "[2, 1, NaN, NaN, 1.5, 1.5]"])
def test_a_run_that_was_moved_resumes_as_one_that_stayed(tmp_path, monkeypatch, way, scores):
    monkeypatch.setenv("VAL_LOSS", scores)
    stayed, here, there = tmp_path / "stayed", tmp_path / "here", tmp_path / "elsewhere" / "runs"
    for root in (stayed, here):
        stopped(monkeypatch, config(root, max_epochs=5), before_step=5)
    there.parent.mkdir()
    if way == "linked":
        there.symlink_to(here)
    elif way == "copied":
        shutil.copytree(here, there)
    else:
        here.rename(there)
    records = [fit(config(root, max_epochs=5)) for root in (stayed, there)]
    first, second = [json.loads(record.path.read_text()) for record in records]
    for name in ("best_checkpoint", "best_score", "best_metrics", "last_checkpoint", "epoch", "step", "metrics"):
        assert first[name] == second[name], name
    assert second["best_checkpoint"] == "checkpoints/epoch=1.ckpt"
    assert checkpoints_of(records[0].folder) == checkpoints_of(records[1].folder) == ["epoch=1.ckpt", "last.ckpt"]
    for name in ("model.safetensors", "metrics.csv"):
        assert (records[0].folder / name).read_bytes() == (records[1].folder / name).read_bytes()


def test_a_run_that_continues_another_is_found_again_where_both_were_moved(tmp_path, monkeypatch):
    first = fit(config(tmp_path / "here", max_epochs=1))
    settings = dict(max_epochs=3, lr=1e-4)
    folder = stopped(monkeypatch, config(tmp_path / "here", resume=str(first.folder), **settings), before_step=5)
    assert record_of(folder)["best_checkpoint"] == "checkpoints/epoch=1.ckpt"  # its own, not the other run's
    (tmp_path / "here").rename(tmp_path / "there")
    moved = tmp_path / "there" / first.folder.relative_to(tmp_path / "here")
    record = fit(config(tmp_path / "there", resume=str(moved), **settings))
    assert (record.attempts, record.step, record.folder.name) == (2, 6, folder.name)


@pytest.mark.soak
def test_metrics_survive_a_second_kill_before_the_first_step(tmp_path, monkeypatch):
    folder = stopped(monkeypatch, config(tmp_path, max_epochs=4, log_every_n_steps=1), before_step=4)
    before = (folder / "metrics.csv").read_text()
    assert len(before.splitlines()) > 4
    monkeypatch.setattr(Scripted, "on_fit_start", lambda self: os._exit(9), raising=False)
    code = f"import sys; sys.path.insert(0, {str(HERE.parent)!r}); import test_nothing_lost as t; from dlnb.settings.import_path import load_class; "
    code += "net = load_class(f'{t.HERE}:Scripted'); net.on_fit_start = lambda self: __import__('os')._exit(9); "
    code += f"t.fit(t.config({str(tmp_path)!r}, max_epochs=4, log_every_n_steps=1))"
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 9
        assert (folder / "metrics.csv").read_text() == before
    fit(config(tmp_path, max_epochs=4, log_every_n_steps=1))
    steps = [line.split(",")[1] for line in (folder / "metrics.csv").read_text().splitlines()[1:]]
    whole = fit(config(tmp_path / "whole", max_epochs=4, log_every_n_steps=1)).folder / "metrics.csv"
    assert sorted(whole.read_text().splitlines()) == sorted((folder / "metrics.csv").read_text().splitlines()), steps


def test_nan_is_null_in_the_record_and_said_once_where_it_began(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NAN_AT", "3")
    monkeypatch.setenv("VAL_LOSS", "[1, NaN]")
    record = fit(config(tmp_path, max_epochs=4, log_every_n_steps=1))
    said = [line for line in capsys.readouterr().out.splitlines() if "NaN or infinite" in line]
    assert len(said) == 1 and "since optimizer step 3," in said[0]

    def strict(name):
        raise AssertionError(f"{name} is not JSON")

    content = json.loads((record.folder / "run.json").read_text(), parse_constant=strict)
    assert content["metrics"]["val_loss"] is None and content["best_score"] == 1.0
    again = fit(config(tmp_path, max_epochs=4))  # which is finished, and shown
    assert again.metrics["val_loss"] is None and "val_loss         nan" in str(again)


def test_terminate_on_nan_ends_with_good_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("NAN_AT", "3")
    settings = config(tmp_path, max_epochs=4, terminate_on_nan=True, save_every_n_steps=1)
    with pytest.raises(ValueError, match="terminate_on_nan: the loss is NaN or infinite at optimizer step 3, epoch 1"):
        fit(settings)
    record = record_of(settings.folder())
    assert (record["status"], record["step"]) == ("failed", 3)
    content = torch.load(settings.folder() / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(weight.isfinite().all() for weight in content["state_dict"].values())


def test_a_full_disk_is_in_the_record_and_its_error_names_the_file(tmp_path):
    "On a real filesystem that is full."
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small filesystem cannot be mounted here")
    try:
        code = f"import sys; sys.path.insert(0, {str(HERE.parent)!r}); import test_nothing_lost as t; "
        code += "from dlnb.tracking.metrics import MetricsFile; from pathlib import Path; save = MetricsFile.save\n"
        code += f"filler = Path({str(disk)!r}) / 'filler'\n"
        code += "def full(self):\n    try: filler.open('ab', buffering=0).write(bytes(1 << 20))\n    except OSError: pass\n    save(self)\n"
        code += "MetricsFile.save = full\n"
        code += f"t.fit(t.config({str(disk)!r}, max_epochs=30, log_every_n_steps=1))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        (path,) = disk.rglob("run.json")
        record = json.loads(path.read_text())
        assert done.returncode == 1
        assert record["status"] == "failed" and "No space left on device" in record["error"], record["error"]
        assert "metrics.csv" in record["error"] or ".ckpt" in record["error"], record["error"]
        assert record["ended"] is not None
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_what_is_due_at_the_same_step_is_written_once(tmp_path, monkeypatch):
    from dlnb.checkpoint.model_checkpoint import AtomicCheckpoint

    written = []
    save = AtomicCheckpoint.writer.write
    monkeypatch.setattr(AtomicCheckpoint.writer, "write", lambda work, *rest: (written.append(work.paths), save(work, *rest)))
    fit(config(tmp_path, max_epochs=2, save_every_n_steps=2))  # an epoch's steps
    names = [sorted(path.name for path in paths) for paths in written]
    assert names == [["epoch=0.ckpt", "last.ckpt"], ["last.ckpt"]]


def test_a_run_that_continues_another_resumes_before_its_first_checkpoint(tmp_path, monkeypatch):
    first = fit(config(tmp_path, max_epochs=1))
    settings = config(tmp_path, resume=str(first.folder), max_epochs=3, lr=1e-4)
    folder = stopped(monkeypatch, settings, before_step=2)
    assert record_of(folder)["step"] == 2 and not list(folder.glob("checkpoints/*.ckpt"))
    assert (fit(settings).step, record_of(folder)["attempts"]) == (6, 2)


def test_a_start_that_never_began_leaves_the_record_as_it_was(tmp_path, monkeypatch):
    record = fit(config(tmp_path))
    before = (record.folder / "run.json").read_text()
    shutil.rmtree(record.folder / "checkpoints")
    with pytest.raises(ValueError, match="none of its checkpoints is left"):
        fit(config(tmp_path, max_epochs=4))
    assert (record.folder / "run.json").read_text() == before
    assert fit(config(tmp_path)).status == "finished"


def test_a_run_whose_end_failed_keeps_its_metrics(tmp_path, monkeypatch):
    from dlnb import trainer

    with monkeypatch.context() as broken, pytest.raises(OSError, match="no room"):
        broken.setattr(trainer, "_keep_weights", lambda record: (_ for _ in ()).throw(OSError("no room")))
        fit(config(tmp_path))
    metrics = record_of(config(tmp_path).folder())["metrics"]
    record = fit(config(tmp_path))
    assert metrics and (record.status, record.metrics) == ("finished", metrics)


def test_an_error_after_a_checkpoint_is_complete_says_so(tmp_path, monkeypatch):
    from dlnb.track import RunRecord

    write = RunRecord.write

    def full(record):
        if record.step == 4 and threading.current_thread() is not threading.main_thread():
            raise OSError(28, "No space left on device", str(record.path))
        write(record)

    monkeypatch.setattr(RunRecord, "write", full)
    with pytest.raises(OSError, match=r"last.ckpt is complete, of step 4 .* what comes after it failed.*run.json"):
        fit(config(tmp_path, max_epochs=3))
    assert read_manifest(config(tmp_path, max_epochs=3).folder() / "checkpoints" / "last.ckpt").step == 4


class TwoSteps(Scripted):
    "Two optimizer steps a batch, as a GAN has."

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            loss = self._step(batch, "train")
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=rate) for rate in (0.01, 0.02)]


def test_metrics_of_manual_optimization_are_neither_lost_nor_doubled(tmp_path, monkeypatch):
    def settings(name):
        return config(tmp_path / name, model=f"{HERE}:TwoSteps", optimizer="auto", max_epochs=4, log_every_n_steps=1)

    stopped(monkeypatch, settings("killed"), before_step=12)
    killed, whole = fit(settings("killed")).folder, fit(settings("whole")).folder
    assert sorted((killed / "metrics.csv").read_text().split()) == sorted((whole / "metrics.csv").read_text().split())


def test_a_place_where_no_folder_can_be_made_is_an_error():
    from dlnb.system.lock import hold

    with pytest.raises(OSError), hold("/proc/no/such/run"):
        pass
