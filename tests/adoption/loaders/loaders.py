"""A LightningDataModule with several validation, test and prediction loaders."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Domains(LightningDataModule):
    def __init__(self, batch_size: int = 8):
        super().__init__()
        self.batch_size = batch_size

    def domain(self, seed, size):
        x = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))
        return TensorDataset(x, x.sum(1) * (1 + seed))

    def train_dataloader(self):
        return DataLoader(self.domain(0, 48), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return [DataLoader(self.domain(seed, 24), batch_size=self.batch_size) for seed in (0, 1)]

    def test_dataloader(self):
        return [DataLoader(self.domain(seed, 24), batch_size=self.batch_size) for seed in (0, 1)]

    def predict_dataloader(self):
        return [DataLoader(self.domain(seed, 12), batch_size=self.batch_size) for seed in (0, 1)]


class Net(LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 1))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[1]), sync_dist=True)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("test_loss", nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[1]), sync_dist=True)

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self.net(batch[0])[:, 0]
