"""The training notebook, on two ranks of this machine's CPU."""

from pathlib import Path

from dlnb.engine import launch
from dlnb.track import RunRecord

TRAIN = Path(__file__).parent.parent / "nbs" / "train.ipynb"


def test_two_ranks_train_two_steps(tmp_path):
    few = dict(max_steps=2, accelerator="cpu", devices=2, wandb="disabled", progress_timeout=120)
    _, folder = launch(TRAIN, tmp_path / "out.ipynb", root=str(tmp_path), **few)
    record = RunRecord.read(folder)
    assert (record.status, record.step, record.resolved["world_size"]) == ("finished", 2, 2)
    assert (folder / "model.safetensors").is_file()
