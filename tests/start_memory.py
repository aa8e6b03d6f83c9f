"""A rank's memory while it takes a file's weights under ZeRO 3: `python start_memory.py FILE`, on two ranks, each of which leaves rank-N.json."""

import ctypes
import json
import re
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer

from dlnb.callbacks.start_from import StartFrom
from dlnb.strategy import build_strategy

LAYERS, WIDTH = 12, 2048  # 4 MB x 4 bytes a layer: 201 MB


class Wide(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = None

    def configure_model(self):
        if self.layers is None:  # made by ZeRO as parts of it
            self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def training_step(self, batch):
        for layer in self.layers:
            batch = layer(batch)
        return batch.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def memory(name: str) -> int:
    "Bytes of this process: VmRSS now, VmHWM at the most since the peak was cleared."
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def _sum(trainer: Trainer) -> float:
    "Of this rank's parts of all weights."
    return sum(parameter.ds_tensor.double().sum().item() for parameter in trainer.lightning_module.parameters())


class Measured(StartFrom):
    def load(self, trainer: Trainer) -> None:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before must not be taken again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
        before = memory("VmRSS")
        super().load(trainer)
        Path(f"rank-{trainer.global_rank}.json").write_text(json.dumps({"before": before, "peak": memory("VmHWM"), "sum": _sum(trainer)}))


if __name__ == "__main__":
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        max_steps=1,
        strategy=build_strategy("deepspeed_stage_3", "cpu"),
        callbacks=Measured(sys.argv[1]),
        **quiet,
    )
    trainer.fit(Wide(), torch.utils.data.DataLoader(torch.ones(4, WIDTH), batch_size=2))
