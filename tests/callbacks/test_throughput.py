"""How fast a training was: the record's numbers beside what the model and the data measure by hand, on real ranks."""

import csv
import json
import math
import os
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import TRAIN
from lightning.pytorch import Trainer

from dlnb.callbacks.throughput import MeasureThroughput
from dlnb.config import RunConfig
from dlnb.examples import ByteGPT, Digits, DigitsNet
from dlnb.search.results import trials_table
from dlnb.search.study import StudyConfig
from dlnb.track import RunRecord, runs
from dlnb.trainer import fit
from dlnb.tuner import tune

pytestmark = pytest.mark.timeout(300)
LATE, LONGER = 0.02, 0.06  # seconds per batch that the data takes, and that rank 1 computes longer
BATCH, EPOCHS = 32, 2
DIGITS = dict(data=f"{__file__}:LateDigits", data_args={"num_workers": 0}, accelerator="cpu", batch_size=BATCH, max_epochs=EPOCHS)
COUNTING = {"class_path": "dlnb.callbacks.throughput:MeasureThroughput", "init_args": {"count_flops": True}}


class LateDigits(Digits):
    "Every item takes its time, also where there are no workers to hide it."

    def __getitem__(self, index):
        time.sleep(LATE / BATCH)
        return super().__getitem__(index)


class Watched(DigitsNet):
    "It measures the training loop by its own hooks, and leaves what it found beside the checkpoints. Rank 1 computes longer."

    def on_fit_start(self):
        self.before = time.perf_counter()

    def on_train_start(self):
        self.batches, self.began = 0, time.perf_counter()

    def training_step(self, batch, batch_idx):
        self.batches += 1
        if self.global_rank == 1:
            time.sleep(LONGER)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self):
        self.ended = time.perf_counter()

    def on_train_end(self):
        # Seconds that are within the loop, and seconds that the loop is within.
        least, most = self.ended - self.began, time.perf_counter() - self.before
        found = {"least": least, "most": most, "batches": self.batches, "memory": psutil.Process().memory_info().rss / 1e9}
        Path(self.trainer.default_root_dir, f"by-hand-{self.global_rank}.json").write_text(json.dumps(found))


def trained(launch, root: Path, **settings) -> tuple[RunRecord, list[dict]]:
    "A run of two ranks, and what each has measured by hand."
    _, folder = launch(TRAIN, root / "out.ipynb", root=str(root / "runs"), devices=2, log_every_n_steps=10, **settings)
    return RunRecord.read(folder), [json.loads((folder / f"by-hand-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def two_ranks(launch, tmp_path_factory):
    return trained(launch, tmp_path_factory.mktemp("two"), model=f"{__file__}:Watched", strategy="ddp", **DIGITS)


def check_sums(record: RunRecord, by_hand: list[dict]) -> None:
    "What holds under every strategy."
    found = record.throughput
    assert found.steps == record.step == by_hand[0]["batches"]
    assert found.samples == found.steps * BATCH * 2
    least, most = (sum(rank[bound] for rank in by_hand) / 2 for bound in ("least", "most"))
    assert math.isclose(sum(found.phases.values()), found.seconds, rel_tol=1e-3)
    assert least <= found.seconds <= most
    apart = found.phases["validation"] + found.phases["checkpoint"]
    assert math.isclose(found.samples_per_second, found.samples / (found.seconds - apart), rel_tol=1e-3)
    assert found.phases["validation"] > 0 and found.phases["checkpoint"] > 0
    assert all(seconds >= found.steps * LATE for seconds in found.ranks["data"])
    assert all(peak > 0.95 * rank["memory"] for peak, rank in zip(found.ranks["host_memory"], by_hand, strict=True))
    assert found.tokens_per_second is None and found.mfu is None  # images, on a CPU


def test_the_record_agrees_with_what_is_measured_by_hand(two_ranks):
    check_sums(*two_ranks)


def test_the_rank_that_computes_longer_is_named_and_the_other_one_waits_for_it(two_ranks):
    found = two_ranks[0].throughput
    assert found.slowest_rank == 1
    assert found.ranks["communication"][0] > found.ranks["communication"][1]
    assert found.phases["communication"] > 0


def test_it_is_found_in_the_catalogue_beside_records_that_have_none(two_ranks, tmp_path):
    written = json.loads((two_ranks[0].folder / "run.json").read_text())
    for name, content in {"new": written, "old": {name: value for name, value in written.items() if name != "throughput"}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(content))
    new, old = str(tmp_path / "new"), str(tmp_path / "old")
    assert RunRecord.read(old).throughput is None
    assert "samples/s" in RunRecord.read(new).summary()["speed"] and "speed" not in RunRecord.read(old).summary()
    assert runs(tmp_path, where=f"samples_per_second > {written['throughput']['samples_per_second'] / 2}")["run"].tolist() == [new]
    assert runs(tmp_path, sort="-samples_per_second")["run"].tolist() == [new, old]
    assert runs(tmp_path, where="samples_per_second == None")["run"].tolist() == [old]


def test_its_curves_are_in_a_file_of_their_own(two_ranks):
    folder = two_ranks[0].folder
    with (folder / "throughput.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(9, two_ranks[0].step, 10))
    assert all(float(row["samples_per_second"]) > 0 and float(row["seconds/data"]) >= LATE for row in rows)
    assert "per_second" not in (folder / "metrics.csv").read_text()


def test_nothing_of_it_is_a_metric_or_in_a_checkpoint(two_ranks):
    record = two_ranks[0]
    assert record.metrics and not [name for name in record.metrics if "second" in name or "memory" in name]
    checkpoint = torch.load(record.folder / record.last_checkpoint, weights_only=False)
    assert checkpoint["callbacks"] and not [name for name in checkpoint["callbacks"] if "Throughput" in name]


def test_the_flops_of_a_transformer_are_those_counted_by_hand(launch, tmp_path):
    size = dict(num_layers=3, embed_dim=64, context_length=64)
    settings = dict(model="dlnb.examples:ByteGPT", model_args={**size, "num_heads": 4}, strategy="ddp", callbacks=[COUNTING])
    settings |= dict(data="dlnb.examples:PythonSource", data_args={"context_length": 64}, accelerator="cpu", devices=2)
    _, folder = launch(TRAIN, tmp_path / "out.ipynb", root=str(tmp_path), batch_size=4, max_steps=4, monitor=None, **settings)
    found = RunRecord.read(folder).throughput
    model = ByteGPT(**size, num_heads=4)
    weights = sum(parameter.numel() for parameter in model.parameters()) - model.position.weight.numel()
    by_hand = 64 * (6 * weights + 12 * 3 * 64 * 64)  # of a sample: its tokens, each with its weights and its attention
    assert math.isclose(found.flops_per_sample, by_hand, rel_tol=0.02)
    assert (found.samples, found.tokens) == (4 * 4 * 2, 4 * 4 * 2 * 64)
    assert math.isclose(found.tokens_per_second, 64 * found.samples_per_second, rel_tol=1e-3)


def test_counting_changes_no_byte_of_the_weights(tmp_path):
    shared = dict(model="dlnb.examples:ByteGPT", model_args={"num_layers": 1, "embed_dim": 32, "num_heads": 2, "dropout": 0.1})
    shared |= dict(data="dlnb.examples:PythonSource", data_args={"num_workers": 0}, accelerator="cpu", devices=1, max_steps=5, batch_size=4)
    records = [fit(RunConfig(**shared, monitor=None, callbacks=given, root=str(tmp_path))) for given in ([], [COUNTING])]
    assert [record.throughput.flops_per_sample is not None for record in records] == [False, True]
    one, other = ((record.folder / "model.safetensors").read_bytes() for record in records)
    assert one == other


def test_steps_are_those_of_the_optimizer_and_a_resumed_training_measures_what_it_trains(tmp_path):
    settings = dict(
        model="dlnb.examples:DigitsNet", data="dlnb.examples:Digits", data_args={"num_workers": 0}, accelerator="cpu", devices=1
    )
    settings |= dict(batch_size=64, accumulate_grad_batches=2, root=str(tmp_path))
    first = fit(RunConfig(**settings, max_epochs=2))
    assert first.throughput.steps == first.step and first.throughput.samples == 2 * 2 * 64 * (first.step // 2)
    again = fit(RunConfig(**settings, max_epochs=3))
    assert again.folder == first.folder and again.throughput.steps == again.step - first.step == first.step // 2


def test_a_trainer_of_ones_own_measures_without_a_record(tmp_path):
    measure = MeasureThroughput()
    options = dict(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer = Trainer(max_steps=3, callbacks=[measure], default_root_dir=tmp_path, enable_model_summary=False, **options)
    model = DigitsNet(width=4)
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.1)
    trainer.fit(model, torch.utils.data.DataLoader(Digits(), batch_size=16))
    assert (measure.result.steps, measure.result.samples) == (3, 48)
    assert not [name for name in trainer.callback_metrics if "second" in name] and not os.listdir(tmp_path)


def test_a_trial_has_its_speed_in_its_row(tmp_path):
    settings = DIGITS | dict(model="dlnb.examples:DigitsNet", devices=1, max_epochs=1)
    search = StudyConfig(search_space={"lr": {"low": 1e-3, "high": 1e-2}}, n_trials=2)
    table = trials_table(tune(RunConfig(**settings, root=str(tmp_path)), search)).sort_values("number")
    (folder,) = tmp_path.rglob("trials")
    records = [RunRecord.read(path).throughput for path in sorted(folder.iterdir())]
    assert table["samples_per_second"].tolist() == [record.samples_per_second for record in records]
    assert all(table["peak_memory"] == [max(record.ranks["host_memory"]) for record in records])


@pytest.mark.soak
def test_it_agrees_under_zero_3_where_nobody_knows_the_slowest_rank(launch, tmp_path):
    record, by_hand = trained(launch, tmp_path, model=f"{__file__}:Watched", strategy="deepspeed_stage_3", callbacks=[COUNTING], **DIGITS)
    check_sums(record, by_hand)
    assert record.throughput.slowest_rank is None and "communication" not in record.throughput.ranks
    assert record.throughput.flops_per_sample > 0
