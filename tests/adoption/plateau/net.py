"""SGD, a scheduler that follows the validation loss, and hyperparameters with a module among them."""

import torch
from lightning.pytorch import LightningModule
from torch import nn


class Net(LightningModule):
    def __init__(self, learning_rate: float = 0.05, loss=nn.SmoothL1Loss(), activation=lambda: nn.Tanh()):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, 8), activation(), nn.Linear(8, 1))

    def step(self, batch):
        return self.hparams.loss(self.net(batch[0])[:, 0], batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.step(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.step(batch), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.step(batch), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])[:, 0]

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class Sums(torch.utils.data.Dataset):
    def __init__(self, split, batch_size, seed):
        self.x = torch.randn(6 * batch_size, 4, generator=torch.Generator().manual_seed(seed + len(split)))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.x[index].sum()
