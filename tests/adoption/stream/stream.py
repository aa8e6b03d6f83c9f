"""A stream without a length that can tell where it is, and a small regression on it."""

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import IterableDataset


class Events(IterableDataset):
    def __init__(self, split: str = "train", size: int = 64):
        self.seed, self.size, self.position = ["train", "val", "test", "predict"].index(split), size, 0

    def __iter__(self):
        start, self.position = self.position, 0
        for index in range(start, self.size):
            self.position = index + 1
            x = torch.randn(4, generator=torch.Generator().manual_seed(1000 * self.seed + index))
            yield x, x.sum()
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[1]), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[1]), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])[:, 0]
