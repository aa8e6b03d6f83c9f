"""Trainings in processes of their own, whose samples are noted by `traced.py`."""

import json
import os
import subprocess
from collections import Counter
from pathlib import Path

from conftest import REPOSITORY
from safetensors.torch import load_file
from warm import warm_python

TRACED = REPOSITORY / "tests" / "traced.py"
SETTINGS = dict(model=f"{TRACED}:TracedNet", data=f"{TRACED}:TracedDigits", data_args={"num_workers": 0}, accelerator="cpu")
SETTINGS |= dict(model_args={"dropout": 0.0, "width": 9}, max_epochs=3, lr=3e-3, optimizer="AdamW", save_every_n_steps=5)


class Training:
    "A training in processes of its own: its folder, and the batches of samples that it was trained on."

    def __init__(self, root: Path, strategy: str, ranks: int, environment: dict = {}, **settings):
        (root / "trace").mkdir(parents=True)
        batch = {1: 32, 2: 16, 4: 8}[ranks]  # 32 samples a step
        strategy = "auto" if strategy == "ddp" and ranks == 1 else strategy
        settings = SETTINGS | dict(strategy=strategy, devices=ranks, batch_size=batch, root=str(root)) | settings
        environment = os.environ | {"TRACE": str(root / "trace")} | environment
        command = [warm_python(), TRACED, json.dumps(settings)]
        self.done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        for record in root.rglob("run.json"):  # none where it was refused before it began
            self.folder, self.record = record.parent, json.loads(record.read_text())
        lines = [line for path in (root / "trace").iterdir() for line in path.read_text().splitlines()]
        self.batches = [json.loads(line)[1:] for line in lines]  # epoch, step, samples

    def samples(self, epoch: int, before: float = float("inf")) -> Counter:
        "How often each sample came in an epoch, up to a step."
        return Counter(sample for of, step, ids in self.batches if of == epoch and step < before for sample in ids)


def difference(one: Training, other: Training) -> float:
    weights = [load_file(training.folder / "model.safetensors") for training in (one, other)]
    return max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])
