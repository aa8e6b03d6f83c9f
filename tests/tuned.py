"""A model that misbehaves where it is told to, and a search space that tells it so; both are imported by path."""

import hashlib
import json
import os
import resource
import time
from pathlib import Path

import psutil

from dlnb.examples import DigitsNet


class TunedNet(DigitsNet):
    "Writes down its process, its rank, its settings and its cores, and fails as `fault` says, on the rank that it names or on all."

    def __init__(self, width: int = 8, fault: str = ""):
        super().__init__(width=width, depth=1)
        self.fault, _, self.rank = fault.partition("@")

    def on_train_start(self):
        config = json.dumps([dict(self.hparams), self.trainer.optimizers[0].param_groups[0]["lr"]], sort_keys=True, default=str)
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        line = f"{os.getpid()} {self.global_rank} {hashlib.sha256(config.encode()).hexdigest()[:12]} {cores}\n"
        with Path(os.environ["TRACE"], "trials.txt").open("a") as file:
            file.write(line)

    def on_train_epoch_end(self):
        if self.fault not in ("", "nan") and self.rank in ("", str(self.global_rank)):
            getattr(self, self.fault)()

    def raises(self):
        raise RuntimeError("the model is at fault")

    def eats(self):
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**30, resource.RLIM_INFINITY))
        self.eaten = [bytearray(2**28) for _ in range(100)]

    def hangs(self):
        time.sleep(1000)

    def dies(self):
        os.kill(os.getpid(), 9)

    def validation_step(self, batch, batch_idx):
        if self.fault != "nan":
            return super().validation_step(batch, batch_idx)
        self.log("val_loss", float("nan"))


def one_at_fault(trial) -> dict:
    "The second trial has the fault that the environment names."
    lr = trial.suggest_float("lr", 1e-3, 1e-2, log=True)
    return {"lr": lr, "model_args.fault": os.environ.get("FAULT", "") if trial.number == 1 else ""}


def all_at_fault(trial) -> dict:
    return {"lr": trial.suggest_float("lr", 1e-3, 1e-2), "model_args.fault": "raises"}


def slow(trial) -> dict:
    return {"lr": trial.suggest_float("lr", 1e-3, 1e-2, log=True), "max_epochs": 12}
