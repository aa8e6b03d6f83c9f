"""A model and data that write down which samples they are trained on, and a script that trains them: `traced.py SETTINGS`.

`TRACE` names a folder for the samples' numbers. `STOP_AT`, an optimizer step, ends the training there with an error, where `STOP_ONCE`
names a file only once. `EAGER` leaves out compilations. `SAVE_START` names a checkpoint to save before the first step. `KILL` says when the process kills itself."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from dlnb.examples import Digits, DigitsNet

if "EAGER" in os.environ:
    torch.compiler.set_stance("force_eager")


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


class KilledNet(TracedNet):
    "Kills its process with SIGKILL: at the `setup`, at the `start`, before its own n-th step, or while a file is `save`d."

    steps = 0

    def setup(self, stage):
        kill_at("setup")

    def on_train_start(self):
        super().on_train_start()
        kill_at("start")
        if os.environ.get("KILL") == "save":
            checkpoints = Path(self.trainer.checkpoint_callback.dirpath)
            threading.Thread(target=kill_while_saving, args=(checkpoints,), daemon=True).start()

    def on_train_batch_start(self, batch, batch_idx):
        kill_at(str(self.steps))
        self.steps += 1
        if os.environ.get("KILL") == "save":
            time.sleep(0.01)  # the thread needs the interpreter


def kill_at(moment: str) -> None:
    if os.environ.get("KILL") == moment:
        os.kill(os.getpid(), signal.SIGKILL)


def kill_while_saving(checkpoints: Path) -> None:
    "At the third unfinished name that is seen."
    for _ in range(3):
        while not list(checkpoints.glob("*.unfinished")):
            time.sleep(0.0002)
    kill_at("save")


class SteppedBySGD(TracedNet):
    "The same model with another optimizer."

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class SteppedByHand(TracedNet):
    "Two optimizers that it steps itself, and a buffer that differs between ranks and weighs the loss."

    def __init__(self, width: int = 9, dropout: float = 0.0):
        super().__init__(width=width, dropout=dropout)
        self.automatic_optimization = False
        self.register_buffer("mean_label", torch.zeros(()))

    def configure_optimizers(self):
        return [torch.optim.AdamW(layer.parameters(), lr=0.01) for layer in (self.layers[:4], self.layers[4:])]

    def training_step(self, batch, batch_idx):
        self.mean_label.lerp_(batch[1].float().mean(), 0.1)
        loss = super().training_step(batch, batch_idx) * (1 + self.mean_label / 10)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


if __name__ == "__main__":
    from dlnb.config import RunConfig
    from dlnb.trainer import fit

    print(fit(RunConfig(**json.loads(sys.argv[1]))).folder)
