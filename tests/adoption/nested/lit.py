"""As the lightning-hydra-template writes it: the net, the optimizer and the scheduler are arguments."""

import torch
from lightning import LightningModule
from torch import nn
from torchmetrics import MeanMetric, MinMetric


class DenseNet(nn.Module):
    def __init__(self, width: int = 16, depth: int = 1, activation: nn.Module | None = None):
        super().__init__()
        layers = [nn.Linear(8, width), activation or nn.ReLU()]
        for _ in range(depth):
            layers += [nn.Linear(width, width), nn.ReLU()]
        self.model = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, x):
        return self.model(x)


class RegressionLitModule(LightningModule):
    def __init__(self, net: nn.Module, optimizer, scheduler=None):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = net
        self.criterion = nn.MSELoss()
        self.train_loss, self.val_loss, self.val_loss_best = MeanMetric(), MeanMetric(), MinMetric()

    def model_step(self, batch):
        x, y = batch
        return self.criterion(self.net(x).squeeze(-1), y)

    def training_step(self, batch, batch_idx):
        loss = self.model_step(batch)
        self.train_loss(loss)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.val_loss(self.model_step(batch))
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True)

    def on_validation_epoch_end(self):
        self.val_loss_best(self.val_loss.compute())
        self.log("val/loss_best", self.val_loss_best.compute(), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.model_step(batch), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0]).squeeze(-1)

    def configure_optimizers(self):
        optimizer = self.hparams.optimizer(params=self.trainer.model.parameters())
        if self.hparams.scheduler is None:
            return {"optimizer": optimizer}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.hparams.scheduler(optimizer=optimizer), "monitor": "val/loss"}}


class Scale:
    def __init__(self, factor: float = 1.0):
        self.factor = factor

    def __call__(self, x):
        return self.factor * x


class Numbers(torch.utils.data.Dataset):
    def __init__(self, split: str, transform=None, size: int = 48):
        seed = ["train", "val", "test", "predict"].index(split)
        self.x = torch.randn(size, 8, generator=torch.Generator().manual_seed(seed))
        self.y = self.x.sum(1)
        self.transform = transform

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index]
        return (self.transform(x) if self.transform else x), self.y[index]
