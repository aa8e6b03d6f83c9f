"""Segmentation: a frozen backbone, a trained head, images as predictions."""

import torch
from lightning.pytorch import LightningModule
from torch import nn


class Segmenter(LightningModule):
    def __init__(self, width: int = 4, lr: float = 1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU())
        self.backbone.requires_grad_(False)
        self.head = nn.Conv2d(width, 1, 1)

    def loss(self, batch):
        return nn.functional.binary_cross_entropy_with_logits(self.head(self.backbone(batch["image"])), batch["mask"])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        logits = self.head(self.backbone(batch["image"]))
        return {"mask": (logits > 0)[:, 0], "image": batch["image"].half(), "area": (logits > 0).float().mean((1, 2, 3))}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.head.parameters(), lr=self.hparams.lr)


class Discs(torch.utils.data.Dataset):
    def __init__(self, split: str, size: int = 32):
        self.images = torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(len(split)))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "mask": (self.images[index] > 0).float()}
