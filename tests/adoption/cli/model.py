"""For Lightning's CLI: callables that make the optimizer and the scheduler, and a LightningDataModule."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Regressor(LightningModule):
    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable = torch.optim.lr_scheduler.ConstantLR,
    ):
        super().__init__()
        self.backbone, self.optimizer, self.scheduler = backbone, optimizer, scheduler

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.backbone(batch[0])[:, 0], batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self.backbone(batch[0])[:, 0], batch[1]), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.mse_loss(self.backbone(batch[0])[:, 0], batch[1]), sync_dist=True)

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}


class Points(LightningDataModule):
    def __init__(self, batch_size: int = 8, size: int = 48):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        x = torch.randn(self.hparams.size, 4, generator=torch.Generator().manual_seed(1))
        self.data = TensorDataset(x, x.sum(1))

    def train_dataloader(self):
        return DataLoader(self.data, self.hparams.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return DataLoader(self.data, self.hparams.batch_size)

    def test_dataloader(self):
        return DataLoader(self.data, self.hparams.batch_size)
