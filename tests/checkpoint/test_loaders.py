"Several training loaders at once resume exactly, and all ranks rank checkpoints by one score."

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from dlnb.checkpoint.boundaries import add_boundaries
from dlnb.checkpoint.exact_resume import ExactResume
from dlnb.checkpoint.model_checkpoint import DeferredCheckpoints


class Several(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), []

    def training_step(self, batch, batch_idx):
        parts = {name: part for name, part in batch.items() if part is not None}
        self.seen.append({name: part.flatten().tolist() for name, part in parts.items()} | {"random": torch.rand(1).item()})
        return sum(self.layer(part).sum() for part in parts.values())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


class Save(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def setup(self, trainer, pl_module, stage):
        add_boundaries(trainer)

    def on_boundary(self, trainer, pl_module):
        if trainer.global_step == self.step:
            trainer.callbacks[0].collect(trainer)
            trainer.save_checkpoint(self.path)


def train(mode, seed, *callbacks, checkpoint=None):
    torch.manual_seed(seed)
    numbers = {"short": torch.arange(6.0)[:, None], "long": torch.arange(14.0)[:, None]}
    loaders = CombinedLoader({name: DataLoader(part, 2, shuffle=True) for name, part in numbers.items()}, mode)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, accelerator="cpu")
    trainer = Trainer(max_epochs=3, callbacks=[ExactResume(), *callbacks], **quiet)
    trainer.fit(model := Several(), loaders, ckpt_path=checkpoint, weights_only=False)
    return model.seen


@pytest.mark.parametrize("mode, step", [("max_size_cycle", step) for step in (1, 3, 4, 6, 10)] + [("max_size", 5), ("min_size", 4)])
def test_several_loaders_go_on_where_each_was(tmp_path, mode, step):
    path = tmp_path / "at.ckpt"
    whole = train(mode, 0, Save(step, path))
    assert train(mode, 1, checkpoint=path) == whole[step:]


def test_all_ranks_rank_by_the_score_of_rank_0(tmp_path):
    callback = DeferredCheckpoints(dirpath=tmp_path, monitor="val_loss")
    strategy = SimpleNamespace(broadcast=lambda value: 1.0, reduce_boolean_decision=lambda value, all=True: value)
    trainer = SimpleNamespace(strategy=strategy, global_step=1, is_global_zero=False)
    scores = {"val_loss": torch.tensor(5.0), "epoch": torch.tensor(0), "step": torch.tensor(1)}
    callback._save_monitor_checkpoint(trainer, scores)
    assert callback.best_model_score == 1.0 and scores["val_loss"] == 5.0
