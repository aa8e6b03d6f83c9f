"""Callbacks of one's own, and weight averaging."""

import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn


class CountSteps(Callback):
    def __init__(self, every: int = 1):
        self.every, self.steps = every, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps += 1
        if self.steps % self.every == 0:
            pl_module.log("counted", float(self.steps))

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


class Net(LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 1))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[1]), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[1]), sync_dist=True)


class Sums(torch.utils.data.Dataset):
    def __init__(self, split):
        self.x = torch.randn(48, 4, generator=torch.Generator().manual_seed(len(split)))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.x[index].sum()
