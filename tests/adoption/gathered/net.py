"""predict_step gathers over the ranks and returns nested structures, as the pipeline that dlnb comes from does."""

import torch
from lightning.pytorch import LightningModule
from torch import nn


class Embedder(LightningModule):
    def __init__(self, dim: int = 4):
        super().__init__()
        self.encoder = nn.Linear(6, dim)
        self.head = nn.Linear(dim, 3)

    def forward(self, x):
        return self.encoder(x)

    def step(self, batch, name):
        loss = nn.functional.cross_entropy(self.head(self(batch["x"])), batch["y"])
        self.log(name, loss, sync_dist=True)
        return loss

    def training_step(self, batch, batch_idx):
        return self.step(batch, "train_loss")

    def validation_step(self, batch, batch_idx):
        self.step(batch, "val_loss")

    def test_step(self, batch, batch_idx):
        self.step(batch, "test_loss")

    def predict_step(self, batch, batch_idx):
        embedding = self(batch["x"])
        everything = self.all_gather({"embedding": embedding, "y": batch["y"]})
        return {
            "gathered": everything,
            "embedding": {"first": embedding[:, 0], "all": embedding},
            "top": [sorted(row.tolist(), reverse=True)[:2] for row in embedding],
            "name": batch["name"],
        }


class Items(torch.utils.data.Dataset):
    def __init__(self, split: str, size: int = 42):
        self.x = torch.randn(size, 6, generator=torch.Generator().manual_seed(len(split)))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "y": int(self.x[index].sum() > 0), "name": f"item {index}"}
