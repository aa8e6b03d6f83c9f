"""A kill may come between a training's last checkpoint and the record's note of it: the best checkpoint is not lost."""

import shutil

from safetensors.torch import load_file

from dlnb.config import RunConfig
from dlnb.tracking.record import RunRecord
from dlnb.trainer import fit


def test_a_record_that_is_behind_the_last_checkpoint_catches_up(tmp_path):
    settings = dict(model="dlnb.examples:DigitsNet", model_args={"width": 4}, data="dlnb.examples:Digits", data_args={"num_workers": 0})
    config = RunConfig(**settings, accelerator="cpu", devices=1, max_epochs=3, lr=3e-3, root=str(tmp_path))
    run = fit(config)
    best, score, weights = run.best_checkpoint, run.best_score, load_file(run.folder / "model.safetensors")
    assert best == "checkpoints/epoch=2.ckpt"
    record = RunRecord.read(run.folder)
    record.status, record.best_checkpoint, record.best_score, record.pid = "running", "checkpoints/epoch=1.ckpt", score + 1, 2**22
    shutil.copy(run.folder / best, run.folder / record.best_checkpoint)
    record.write()
    (run.folder / "model.safetensors").unlink()
    again = fit(config)
    assert (again.best_checkpoint, again.best_score, again.status) == (best, score, "finished")
    found = load_file(run.folder / "model.safetensors")
    assert all(found[name].equal(weights[name]) for name in weights)
