"""What cannot be continued is refused before anything starts, with the reason, and nothing is lost."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from dlnb.checkpoint.manifest import KEY
from dlnb.config import RunConfig
from dlnb.system.lock import LOCK
from dlnb.system.processes import Process, began_at, machine
from dlnb.trainer import fit

TASK = dict(model="dlnb.examples:DigitsNet", data="dlnb.examples:Digits", model_args={"width": 8}, data_args={"num_workers": 0})
TASK |= dict(accelerator="cpu", devices=1, batch_size=64, trainer_args={"enable_progress_bar": False})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A run of two epochs."
    return fit(RunConfig(**TASK, max_epochs=2, root=str(tmp_path_factory.mktemp("trained")))).folder


@pytest.fixture
def run(trained, tmp_path):
    "A copy of it, to spoil."
    return Path(shutil.copytree(trained, tmp_path / "run"))


def content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if os.access(path, os.R_OK)}


def rewrite(checkpoint: Path, change) -> Path:
    "Save a checkpoint once more, changed."
    values = torch.load(checkpoint, weights_only=False)
    change(values)
    torch.save(values, checkpoint)
    return checkpoint


def flip_a_byte(path: Path) -> Path:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def text_file(run: Path) -> Path:
    (run / "notes.txt").write_text("not a checkpoint")
    return run / "notes.txt"


def empty_folder(run: Path) -> Path:
    (run.parent / "empty").mkdir()
    return run.parent / "empty"


def run_without_checkpoint(run: Path) -> Path:
    shutil.rmtree(run / "checkpoints")
    return run


def all_damaged(run: Path) -> Path:
    for path in (run / "checkpoints").iterdir():
        flip_a_byte(path)
    return run


def being_trained(run: Path) -> Path:
    parent = Process(os.uname().nodename, machine(), os.getppid(), began_at(os.getppid()))
    (run / LOCK).write_text(json.dumps(asdict(parent) | {"since": "then", "folder": str(run.resolve())}))
    return run


def of_a_test(run: Path) -> Path:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"mode": "test"}))
    return run


def plain_weights(run: Path) -> Path:
    torch.save(torch.load(run / "checkpoints/last.ckpt", weights_only=False)["state_dict"], run / "weights.pt")
    return run / "weights.pt"


def cut_off(run: Path) -> Path:
    path = run / "checkpoints/last.ckpt"
    path.write_bytes(path.read_bytes()[:-100])
    return path


def fsdp_folder(run: Path) -> Path:
    (run.parent / "fsdp").mkdir()
    (run.parent / "fsdp" / ".metadata").touch()
    return run.parent / "fsdp"


def shards_without_names(run: Path) -> Path:
    (run.parent / "zero" / "checkpoint").mkdir(parents=True)
    torch.save({}, run.parent / "zero" / "checkpoint" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return run.parent / "zero"


def broken_record(run: Path) -> Path:
    (run / "run.json").write_text('{"status": "run')
    return run


def last(run: Path) -> Path:
    return run / "checkpoints/last.ckpt"


BAD = {
    "no such file": (lambda run: run / "nowhere.ckpt", {}, "must be 'auto', 'never', or a run's folder or checkpoint that exists"),
    "nothing": (lambda run: "", {}, "resume=''"),
    "a text file": (text_file, {}, "notes.txt"),
    "an empty folder": (empty_folder, {}, "is not a checkpoint"),
    "a run without a checkpoint": (run_without_checkpoint, {}, "is a run without a checkpoint"),
    "a run that is being trained": (being_trained, {}, "is being trained by process"),
    "a test's folder": (of_a_test, {}, "is the folder of a test"),
    "a run with a broken record": (broken_record, {}, "is damaged"),
    "a run with damaged checkpoints": (all_damaged, {}, "No checkpoint is complete"),
    "safetensors": (lambda run: run / "model.safetensors", {}, "holds weights, but not where a training was"),
    "weights alone": (plain_weights, {}, "holds weights, but not where a training was"),
    "a checkpoint that is truncated": (cut_off, {}, "last.ckpt"),
    "a checkpoint with a flipped byte": (lambda run: flip_a_byte(last(run)), {}, "is damaged"),
    "a checkpoint without loops": (lambda run: rewrite(last(run), lambda values: values.pop("loops")), {}, "not where a training was"),
    "a newer format": (lambda run: rewrite(last(run), lambda values: values[KEY].update(format=9)), {}, "was written by a newer dlnb"),
    "a damaged manifest": (lambda run: rewrite(last(run), lambda values: values[KEY].update(step="x")), {}, "its manifest is damaged"),
    "FSDP's folder": (fsdp_folder, {}, "what FSDP saves"),
    "a part of ZeRO's shards": (shards_without_names, {}, "_model_states.pt is missing"),
    "another width": (last, {"model_args": {"width": 9}}, "of another shape"),
    "another depth": (last, {"model_args": {"width": 8, "depth": 3}}, "missing: layers."),
    "another model": (last, {"model": "dlnb.examples:ByteGPT", "model_args": {}}, "not in the model: layers."),
    "a batch that does not divide": (
        last,
        {"batch_size": 48},
        "these numbers of ranks do: none. With 1 rank(s) these batch sizes do: 1, 2, 4, 8",
    ),
    "no more epochs": (last, {"max_epochs": 2}, "ask for no more. Raise them."),
    "no more steps": (last, {"max_steps": 5}, "ask for no more. Raise them."),
}


@pytest.mark.parametrize("spoil, settings, told", BAD.values(), ids=BAD)
def test_a_bad_resume_is_refused_with_the_reason(run, tmp_path, spoil, settings, told):
    resume = str(spoil(run))
    before = content(tmp_path)
    with pytest.raises((ValueError, OSError)) as error:
        fit(RunConfig(**TASK | {"max_epochs": 3, "lr": 2e-3, "resume": resume, "root": str(tmp_path / "new")} | settings))
    assert told in str(error.value) and len(str(error.value)) < 900
    assert content(tmp_path) == before and not (tmp_path / "new").exists()


def test_a_checkpoint_that_may_not_be_read_is_told(run, tmp_path):
    if os.geteuid() != 0:
        last(run).chmod(0)
    else:  # root may read everything
        last(run).unlink()
        last(run).mkdir()
    with pytest.raises((ValueError, OSError), match="last.ckpt"):
        fit(RunConfig(**TASK, max_epochs=3, lr=2e-3, resume=str(last(run)), root=str(tmp_path / "new")))


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(run, tmp_path, capsys):
    best = next(path for path in (run / "checkpoints").iterdir() if path.name != "last.ckpt")
    copy = best.with_name("copy.ckpt")
    shutil.copy(best, copy)  # they share their bytes
    copy.replace(best)
    flip_a_byte(last(run))
    again = fit(RunConfig(**TASK, max_epochs=3, lr=2e-3, resume=str(run), root=str(tmp_path / "new")))
    out = capsys.readouterr().out
    assert "last.ckpt is damaged" in out and f"Resuming from {best}" in out
    assert again.epoch == 3


def test_a_run_goes_on_when_max_epochs_is_raised_and_is_shown_when_not(trained, capsys):
    config = dict(TASK, root=str(trained.parents[3]))
    assert fit(RunConfig(**config, max_epochs=2)).folder == trained
    assert "This run has finished." in capsys.readouterr().out
    assert fit(RunConfig(**config, max_epochs=2, resume=str(trained))).folder == trained
    assert "This run has finished." in capsys.readouterr().out
    longer = fit(RunConfig(**config, max_epochs=3, resume=str(trained)))
    assert (longer.folder, longer.epoch, longer.resumed_from) == (trained, 3, None)
    anew = fit(RunConfig(**config, max_epochs=1, resume="never"))
    assert anew.folder == trained.with_name(f"{trained.name}-2") and anew.epoch == 1
    other = fit(RunConfig(**config | {"batch_size": 32}, max_epochs=4, resume=str(trained)))
    assert other.folder not in (trained, anew.folder) and (other.epoch, other.resolved["accumulate_grad_batches"]) == (4, 2)


@pytest.mark.parametrize("kept", [1, 2])
def test_exactly_the_best_and_the_last_stand_on_the_disk(tmp_path, kept):
    record = fit(RunConfig(**TASK, max_epochs=4, save_top_k=kept, save_every_n_steps=7, root=str(tmp_path)))
    names = sorted(path.name for path in (record.folder / "checkpoints").iterdir())
    assert len(names) == kept + 1 and "last.ckpt" in names and record.best_checkpoint.split("/")[1] in names
