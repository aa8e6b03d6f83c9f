"""A model and data that write down which samples they are trained on, and a script that trains them: `traced.py SETTINGS`.

`TRACE` names a folder for the samples' numbers. `STOP_AT`, an optimizer step, ends the training there with an error, where `STOP_ONCE`
names a file only once. `SAVE_START` names a checkpoint to save before the first step."""

import json
import os
import sys
import time
from pathlib import Path

import torch

from dlnb.examples import Digits, DigitsNet


class TracedDigits(Digits):
    "With the number of each sample."

    def __getitem__(self, index):
        return (*super().__getitem__(index), index)


class TracedNet(DigitsNet):
    "Notes each batch: the time, the epoch, the optimizer step that it belongs to, and the samples."

    def on_train_start(self):
        if "SAVE_START" in os.environ:
            self.trainer.save_checkpoint(os.environ["SAVE_START"])

    def on_train_batch_start(self, batch, batch_idx):
        stopped = Path(os.environ.get("STOP_ONCE", "nowhere"))
        if self.trainer.global_step == int(os.environ.get("STOP_AT", -1)) and not stopped.exists():
            if stopped.name != "nowhere" and self.global_rank == 0:
                stopped.touch()
            raise RuntimeError("STOP_AT")

    def training_step(self, batch, batch_idx):
        line = [time.time(), self.current_epoch, self.trainer.global_step, batch[2].tolist()]
        with (Path(os.environ["TRACE"]) / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return self._step(batch[:2], "train")

    def validation_step(self, batch, batch_idx):
        self._step(batch[:2], "val")


class SteppedBySGD(TracedNet):
    "The same model with another optimizer."

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


if __name__ == "__main__":
    from dlnb.config import RunConfig
    from dlnb.trainer import fit

    print(fit(RunConfig(**json.loads(sys.argv[1]))).folder)
