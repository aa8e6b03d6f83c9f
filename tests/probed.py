"""A model with much more memory than arithmetic, for searches of a strategy under a limit; imported by path."""

import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn


class ProbedNet(LightningModule):
    "One wide hidden layer over an image of 64 pixels; it may fail, or wait, under the strategies that it is told."

    def __init__(self, width: int = 65_536, fails_under: str = "", waits: float = 0.0):
        super().__init__()
        self.hidden, self.head = nn.Linear(64, width), nn.Linear(width, 10)
        self.fails_under, self.waits = fails_under, waits

    def on_train_start(self):
        if trace := os.environ.get("TRACE"):
            with Path(trace, "probes.txt").open("a") as file:
                file.write(f"{os.getpid()} {self.global_rank}\n")
        if self.fails_under and self.fails_under in type(self.trainer.strategy).__name__:
            raise RuntimeError("the model is at fault")
        time.sleep(self.waits)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        hidden = F.gelu(self.hidden(images.flatten(1)))
        return F.cross_entropy(self.head(torch.tanh(hidden)), labels)
