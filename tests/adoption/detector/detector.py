"""Images with any number of boxes: a collate function, ragged targets and ragged predictions."""

import torch
from lightning.pytorch import LightningModule
from torch import nn


class Boxes(torch.utils.data.Dataset):
    def __init__(self, split: str = "train", size: int = 40):
        self.generator, self.size = torch.Generator().manual_seed(len(split)), size
        self.images = torch.randn(size, 3, 8, 8, generator=self.generator)
        self.counts = [1 + index % 3 for index in range(size)]

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        count = self.counts[index]
        boxes = self.images[index, 0, :count, :4].abs()
        return self.images[index], {"boxes": boxes, "labels": torch.arange(count), "file": f"image-{index}.png"}

    @staticmethod
    def collate_fn(batch):
        images, targets = zip(*batch)
        return torch.stack(images), list(targets)


class Detector(LightningModule):
    def __init__(self, lr: float = 1e-3):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 12))
        self.lr = lr

    def loss(self, batch):
        images, targets = batch
        boxes = self.net(images).view(len(images), 3, 4)
        return sum(nn.functional.l1_loss(out[: len(target["boxes"])], target["boxes"]) for out, target in zip(boxes, targets)) / len(
            targets
        )

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch), batch_size=len(batch[0]), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        images, targets = batch
        boxes = self.net(images).view(len(images), 3, 4)
        return [
            {"boxes": out[: len(target["boxes"])], "scores": out[: len(target["boxes"]), 0].sigmoid(), "file": target["file"]}
            for out, target in zip(boxes, targets)
        ]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)
