"""What asserts in nbs/01_data cannot show: properties over many sizes, and real runs on two ranks."""

import json
import math
import os
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from warm import warm_python

from dlnb.data import DataModule, EpochSampler, EvaluationSampler, epoch_order, evaluation_batch_size

RANKS = st.integers(1, 8)
BATCH = st.integers(1, 12)


def shares(length: int, ranks: int, batch_size: int, accumulate: int = 1, epoch: int = 0) -> list[list[int]]:
    samplers = [EpochSampler(range(length), batch_size, ranks, rank, 3, accumulate) for rank in range(ranks)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in samplers]


@settings(deadline=None)
@given(steps=st.integers(1, 5), rest=st.floats(0, 0.99), ranks=RANKS, batch=BATCH, accumulate=st.integers(1, 4))
def test_training_epoch_is_whole_steps_and_each_sample_at_most_once(steps, rest, ranks, batch, accumulate):
    step_samples = ranks * batch * accumulate
    parts = shares(int((steps + rest) * step_samples), ranks, batch, accumulate)
    assert {len(part) for part in parts} == {steps * batch * accumulate}
    seen = [sample for part in parts for sample in part]
    assert len(seen) == len(set(seen))


@settings(deadline=None)
@given(length=st.integers(24, 400), epoch=st.integers(0, 5))
def test_a_step_holds_the_same_samples_for_any_number_of_ranks(length, epoch):
    def steps(ranks, batch, accumulate):
        parts = shares(length, ranks, batch, accumulate, epoch)
        width = batch * accumulate
        return [sorted(sum((part[i : i + width] for part in parts), [])) for i in range(0, len(parts[0]), width)]

    order = epoch_order(length, 3, epoch).tolist()
    expected = [sorted(order[i : i + 24]) for i in range(0, length // 24 * 24, 24)]
    for ranks, batch, accumulate in [(1, 24, 1), (2, 12, 1), (1, 8, 3), (3, 4, 2), (8, 3, 1), (4, 1, 6)]:
        assert steps(ranks, batch, accumulate) == expected


@settings(deadline=None)
@given(length=st.integers(1, 500), ranks=RANKS, batch=st.integers(1, 64))
def test_evaluation_sees_each_sample_once_in_equally_many_batches(length, ranks, batch):
    if length < ranks:
        with pytest.raises(ValueError, match=f"at most {length} devices"):
            evaluation_batch_size(length, ranks, batch)
        return
    parts = [EvaluationSampler(range(length), ranks, rank) for rank in range(ranks)]
    assert sorted(sample for part in parts for sample in part) == list(range(length))
    assert [len(part) for part in parts] == [len(list(part)) for part in parts]
    chosen = evaluation_batch_size(length, ranks, batch)
    assert len({math.ceil(len(part) / chosen) for part in parts}) == 1
    if len({math.ceil(len(part) / batch) for part in parts}) == 1:
        assert chosen == batch  # never changed without need


def test_loaders_in_worker_processes_give_the_same_batches():
    batches = [
        [batch.tolist() for batch in DataModule(_numbers, batch_size=4, num_workers=workers).train_dataloader()] for workers in (0, 2)
    ]
    assert batches[0] == batches[1]


def _numbers(split):
    return range(21)


SCRIPT = """
import json, sys, warnings
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch.utils.data import Dataset
from dlnb.data import DataModule
from dlnb.strategy import build_strategy

strategy, devices, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
seen, predicted = [], {}

class Line(Dataset):
    def __init__(self, split): self.length = dict(train=70, val=33, test=19, predict=19)[split]
    def __len__(self): return self.length
    def __getitem__(self, index): return torch.tensor([index / 10]), torch.tensor([index / 5 + 1]), index

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        # ZeRO-3 keeps parameters of less than 100,000 numbers on every rank: a larger one is needed to gather at all
        self.layers = torch.nn.Sequential(torch.nn.Linear(1, 400), torch.nn.Linear(400, 400), torch.nn.Linear(400, 1))
    def step(self, batch): return torch.nn.functional.mse_loss(self.layers(batch[0]), batch[1])
    def training_step(self, batch, batch_idx):
        seen.append([self.current_epoch, batch[2].tolist()])
        return self.step(batch)
    def evaluate(self, batch, name):
        self.log(f"{name}_loss", self.step(batch), sync_dist=True)
        self.log(f"{name}_mean", batch[2].float().mean(), sync_dist=True)
        self.log(f"{name}_one", torch.tensor(1.), sync_dist=True, batch_size=len(batch[2]))
    def validation_step(self, batch, batch_idx): self.evaluate(batch, "val")
    def test_step(self, batch, batch_idx): self.evaluate(batch, "test")
    def predict_step(self, batch, batch_idx): return batch[2]
    def configure_optimizers(self): return torch.optim.AdamW(self.parameters(), lr=1e-4)

class Writer(BasePredictionWriter):
    def write_on_epoch_end(self, trainer, model, predictions, batch_indices):
        predicted.update(values=[p.tolist() for p in predictions], indices=batch_indices[0])

pl.seed_everything(0)
model, data = Model(), DataModule(Line, batch_size=8 // devices, num_workers=0)
trainer = pl.Trainer(accelerator="cpu", devices=devices, strategy=build_strategy(strategy, accelerator="cpu"),
                     max_epochs=2, callbacks=Writer("epoch"), logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False)
trainer.fit(model, data)
metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
metrics |= trainer.test(model, data, verbose=False)[0]
trainer.predict(model, data)
with open(f"{folder}/{trainer.global_rank}.json", "w") as file:
    json.dump(dict(metrics=metrics, seen=seen, predicted=predicted, steps=trainer.global_step), file)
"""


def run_ranks(folder: Path, strategy: str, devices: int) -> list[dict]:
    "Run SCRIPT as Lightning runs any script on many ranks; the record of each rank."
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [warm_python(), script, strategy, str(devices), folder],
        env=environment,
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a rank that hangs outlives the one that started it
        raise
    assert process.returncode == 0, output
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(devices)]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("one"), "auto", 1)[0]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_3"])
def test_two_ranks_train_and_measure_as_one_where_two_do_not_divide_the_splits(tmp_path, one_rank, strategy):
    two_ranks = run_ranks(tmp_path, strategy, 2)
    for record in two_ranks:
        assert record["steps"] == one_rank["steps"] == 2 * (70 // 8)
        assert record["metrics"] == pytest.approx(one_rank["metrics"], rel=1e-5)
        assert record["metrics"]["val_one"] == record["metrics"]["test_one"] == 1
        assert record["metrics"]["val_mean"] == pytest.approx(16) and record["metrics"]["test_mean"] == pytest.approx(9)
    together = [[epoch, sorted(first + second)] for (epoch, first), (_, second) in zip(*(record["seen"] for record in two_ranks))]
    assert together == [[epoch, sorted(batch)] for epoch, batch in one_rank["seen"]]
    predictions = [batch for record in two_ranks for batch in record["predicted"]["values"]]
    assert sorted(sum(predictions, [])) == list(range(19))
    assert predictions == [batch for record in two_ranks for batch in record["predicted"]["indices"]]


class Lines:
    "Texts of known lengths."

    def __init__(self, split):
        self.lengths = [1 + index % 9 for index in range(90)]

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        return self.lengths[index]


def test_the_sampler_that_the_workflow_names_groups_by_length():
    from dlnb.config import RunConfig
    from dlnb.training.build import build_data

    settings = dict(model="dlnb.examples:DigitsNet", data=f"{__file__}:Lines", batch_size=10, data_args={"num_workers": 0})
    grouped = build_data(RunConfig(**settings, data_sampler="dlnb.data:LengthGroupedSampler")).train_dataloader()
    plain = build_data(RunConfig(**settings)).train_dataloader()
    spread = [sum(int(batch.max() - batch.min()) for batch in loader) for loader in (grouped, plain)]
    assert spread[0] <= 9 < 40 < spread[1]
