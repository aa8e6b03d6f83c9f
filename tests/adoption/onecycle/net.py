"""OneCycle over all steps, parameter groups, gradient clipping of the Trainer."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    def __init__(self, lr: float, weight_decay: float = 0.1, max_epochs: int = 1):
        super().__init__()
        self.save_hyperparameters()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 1)

    def loss(self, batch):
        return nn.functional.mse_loss(self.head(self.body(batch[0]).relu())[:, 0], batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self):
        groups = [{"params": self.body.parameters()}, {"params": self.head.parameters(), "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams.lr, weight_decay=self.hparams.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.hparams.lr, total_steps=steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Module(LightningDataModule):
    def __init__(self, batch_size: int = 8, num_workers: int = 0):
        super().__init__()
        self.batch_size, self.num_workers = batch_size, num_workers

    def setup(self, stage=None):
        x = torch.randn(48, 4, generator=torch.Generator().manual_seed(3))
        self.data = TensorDataset(x, x.sum(1))

    def loader(self, **options):
        return DataLoader(self.data, batch_size=self.batch_size, num_workers=self.num_workers, **options)

    def train_dataloader(self):
        return self.loader(shuffle=True)

    def val_dataloader(self):
        return self.loader()

    def test_dataloader(self):
        return self.loader()
