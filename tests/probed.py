"""A model with much more memory than arithmetic, for searches of a strategy under a limit; imported by path."""

import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn


class ProbedNet(LightningModule):
    "A wide layer over an image of 64 pixels, and many cheap operations whose results are kept. It may fail, or wait, as it is told."

    def __init__(self, width: int = 4096, depth: int = 1, fails_under: str = "nothing", waits: float = 0.0, plain_sgd: bool = False):
        super().__init__()
        self.hidden, self.head = nn.Linear(64, width), nn.Linear(width, 10)
        self.depth, self.fails_under, self.waits = depth, fails_under, waits
        if plain_sgd:
            self.configure_optimizers = lambda: torch.optim.SGD(self.parameters(), lr=1e-3)

    def on_train_start(self):
        if trace := os.environ.get("TRACE"):
            with Path(trace, "probes.txt").open("a") as file:
                file.write(f"{os.getpid()} {self.global_rank}\n")
        if self.fails_under in type(self.trainer.strategy).__name__:
            raise RuntimeError("the model is at fault")
        time.sleep(self.waits)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        hidden = F.gelu(self.hidden(images.flatten(1)))
        for _ in range(self.depth):
            hidden = torch.tanh(hidden)  # keeps its result: 4 bytes x width per sample
        return F.cross_entropy(self.head(hidden), labels)
