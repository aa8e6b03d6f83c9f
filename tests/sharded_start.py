"""A rank's memory while a model is made: `python sharded_start.py STRATEGY`, on two ranks, each of which leaves rank-N.json."""

import ctypes
import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from start_memory import LAYERS, WIDTH, Wide, memory

from dlnb.strategy import build_strategy


class MeasuredWide(Wide):
    "In bytes, what the process grows by at most while the layers are made; and what they are made of."

    def configure_model(self):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before must not be taken again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
        before = memory("VmRSS")
        super().configure_model()
        parts = [getattr(parameter, "ds_tensor", parameter).detach().flatten() for parameter in self.parameters()]
        found = {
            "grown": memory("VmHWM") - before,
            "whole": LAYERS * WIDTH * WIDTH * 4,
            "sum": sum(part.double().sum().item() for part in parts),
        }
        Path(f"rank-{self.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    seed_everything(1)
    trainer = Trainer(accelerator="cpu", devices=2, max_steps=1, strategy=build_strategy(sys.argv[1], "cpu"), **quiet)
    trainer.fit(MeasuredWide(), torch.utils.data.DataLoader(torch.ones(4, WIDTH), batch_size=2))
