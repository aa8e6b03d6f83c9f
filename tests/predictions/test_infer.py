"""What was trained under any strategy is tested and predicted by a fresh process, on any number of ranks."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from conftest import INFER, OPTIMIZERS
from safetensors.torch import load_file
from warm import warm_python

from dlnb.checkpoint.weights import find_weights, inference_config
from dlnb.config import RunConfig
from dlnb.infer import evaluate, predict
from dlnb.training.build import build_data, build_model

pytestmark = pytest.mark.timeout(600)
QUIET = {"enable_progress_bar": False}


def by_hand(folder: Path) -> tuple[dict[str, float], np.ndarray]:
    "Metrics and class probabilities of the run's own weights on its test split, without a Trainer."
    config = RunConfig(**json.loads((folder / "run.json").read_text())["settings"])
    model, dataset = build_model(config).eval(), build_data(config).dataset("test")
    model.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        logits = model(dataset.images)
    loss = torch.nn.functional.cross_entropy(logits, dataset.labels).item()
    accuracy = (logits.argmax(1) == dataset.labels).float().mean().item()
    return {"test_loss": loss, "test_acc": accuracy}, logits.softmax(1).numpy()


@pytest.mark.parametrize("strategy", OPTIMIZERS)
def test_a_run_of_any_strategy_is_tested_as_its_weights_are(train, strategy, tmp_path):
    "This process has trained none: papermill's ranks did."
    trained = train(strategy)
    record = evaluate(trained.folder, True, accelerator="cpu", devices=1, root=str(tmp_path), trainer_args=QUIET)
    metrics, probabilities = by_hand(trained.folder)
    assert {name: record.metrics[name] for name in metrics} == pytest.approx(metrics, abs=1e-6)
    assert record.metrics["accuracy"] == pytest.approx(metrics["test_acc"], abs=1e-6)
    table = pandas.read_parquet(record.folder / "predictions.parquet")
    assert table["sample"].tolist() == list(range(269))
    np.testing.assert_allclose(np.stack(table["prediction"]), probabilities, atol=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_3"])
def test_the_checkpoint_itself_is_tested_to_the_same_numbers(train, strategy, tmp_path):
    trained = train(strategy)
    checkpoint = trained.folder / trained.record["best_checkpoint"]
    record = evaluate(checkpoint, accelerator="cpu", devices=1, root=str(tmp_path), trainer_args=QUIET)
    metrics, _ = by_hand(trained.folder)
    assert record.metrics == pytest.approx(metrics, abs=1e-6)
    assert record.run == str(checkpoint)
    assert sorted(path.name for path in record.folder.iterdir()) == ["metrics.json", "run.json"]


@pytest.fixture(scope="module")
def inferred(train, launch, tmp_path_factory):
    "The infer notebook on one rank, two and three, none of which but one divides the 269 samples."
    folder = tmp_path_factory.mktemp("inferred")
    run = train("deepspeed_stage_3").folder
    settings = dict(run=str(run), accelerator="cpu", root=str(folder))
    return {ranks: launch(INFER, folder / f"{ranks}.ipynb", devices=ranks, **settings) for ranks in (1, 2, 3)}


def test_one_rank_and_many_give_the_same_metrics_and_each_prediction_once_and_in_order(train, inferred):
    expected, probabilities = by_hand(train("deepspeed_stage_3").folder)
    for ranks, (_, folder) in inferred.items():
        record = json.loads((folder / "run.json").read_text())
        assert (record["status"], record["mode"], record["resolved"]["world_size"]) == ("finished", "test", ranks)
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics == record["metrics"]
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)
        table = pandas.read_parquet(folder / "predictions.parquet")
        assert table["sample"].tolist() == list(range(269))
        np.testing.assert_allclose(np.stack(table["prediction"]), probabilities, atol=1e-5)


def test_the_notebook_shows_a_table_and_a_confusion_matrix_and_lies_in_the_results_folder(train, inferred):
    notebook, folder = inferred[2]
    assert {path.name for path in folder.iterdir()} == {
        "run.json",
        "metrics.json",
        "predictions.parquet",
        "infer.ipynb",
    }
    assert folder.parts[-4:-1] == ("Digits-DigitsNet", "test", "ddp")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output.text for output in outputs if output.output_type == "stream"] == [], "a wall of log"
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"image/png", "text/html"} <= kinds
    assert json.loads((folder / "run.json").read_text())["run"] == str(train("deepspeed_stage_3").folder)


def test_predicting_alone_has_a_folder_of_its_own_and_replaces_what_was_there(train, tmp_path):
    run, settings = train("ddp").folder, dict(accelerator="cpu", devices=1, root=str(tmp_path), trainer_args=QUIET)
    first = predict(run, **settings)
    assert first.folder.parts[-3] == "predict"
    assert json.loads((first.folder / "metrics.json").read_text()) == first.metrics
    assert first.metrics["samples"] == 269 and first.metrics["accuracy"] > 0.6
    before = (first.folder / "predictions.parquet").read_bytes()
    assert predict(run, **settings).folder == first.folder
    assert (first.folder / "predictions.parquet").read_bytes() == before


def test_a_batch_size_and_16_bits_change_little(train, tmp_path):
    run = train("ddp").folder
    settings = dict(accelerator="cpu", devices=1, root=str(tmp_path), trainer_args=QUIET)
    half = evaluate(run, batch_size=7, precision="bf16-true", **settings)
    assert half.metrics["test_loss"] == pytest.approx(by_hand(run)[0]["test_loss"], rel=0.02)


def test_a_training_that_was_killed_is_tested_with_its_best_checkpoint(train, tmp_path):
    killed = Path(shutil.copytree(train("deepspeed_stage_2").folder, tmp_path / "killed"))
    record = json.loads((killed / "run.json").read_text())
    (killed / "run.json").write_text(json.dumps(record | {"status": "running", "weights": None}))
    (killed / "model.safetensors").unlink()
    assert find_weights(killed).weights == killed / record["best_checkpoint"]
    tested = evaluate(killed, accelerator="cpu", devices=1, root=str(tmp_path), trainer_args=QUIET)
    assert tested.metrics == pytest.approx(by_hand(train("deepspeed_stage_2").folder)[0], abs=1e-6)


OWN = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader

class Numbers(LightningDataModule):
    "Sets up for the stage it is asked for, and for no other."
    def setup(self, stage):
        self.samples = {stage: torch.arange(11.0)}
    def test_dataloader(self):
        return DataLoader(self.samples["test"], batch_size=4)
    def predict_dataloader(self):
        return DataLoader(self.samples["predict"], batch_size=4)

class Mean(LightningModule):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
    def test_step(self, batch):
        self.log("mean", (self.scale * batch).mean(), sync_dist=True, batch_size=len(batch))
    def predict_step(self, batch):
        return self.scale * batch
"""


def test_a_data_module_of_ones_own_gives_each_sample_once_on_two_ranks(launch, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    torch.save({"state_dict": {"scale": torch.tensor([2.0])}}, tmp_path / "mean.ckpt")
    task = dict(model=f"{tmp_path / 'own.py'}:Mean", data=f"{tmp_path / 'own.py'}:Numbers", run=str(tmp_path / "mean.ckpt"))
    for split in ("test", "predict"):
        _, folder = launch(INFER, None, **task, accelerator="cpu", devices=2, split=split, root=str(tmp_path))
        assert pandas.read_parquet(folder / "predictions.parquet")["prediction"].tolist() == [2.0 * n for n in range(11)]
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics == ({"mean": 10.0, "samples": 11} if split == "test" else {"samples": 11})


ODD = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader

class OnlyTest(LightningDataModule):
    def test_dataloader(self):
        return DataLoader(torch.arange(11.0), batch_size=4)

class Splits(torch.utils.data.Dataset):
    def __init__(self, split):
        self.samples = {"train": torch.arange(40.0), "test": torch.arange(11.0)}[split]
    def __len__(self): return len(self.samples)
    def __getitem__(self, index): return self.samples[index]

class Mean(LightningModule):
    def __init__(self, fails=None):
        super().__init__()
        self.fails, self.scale = fails, torch.nn.Parameter(torch.ones(1))
    def training_step(self, batch): ...
    def test_step(self, batch):
        self.log("mean", (self.scale * batch).mean(), sync_dist=True, batch_size=len(batch))
    def predict_step(self, batch, batch_idx):
        if self.fails == "raises" and batch_idx == 1:
            raise KeyError("no such thing")
        return {"whole": batch.mean()} if self.fails == "a mean" else {"all": self.all_gather({"x": self.scale * batch})}
"""


@pytest.fixture
def odd(tmp_path) -> dict:
    "Settings of a model and data that lack something, but for the names of the classes."
    (tmp_path / "odd.py").write_text(ODD)
    torch.save({"state_dict": {"scale": torch.tensor([2.0])}}, tmp_path / "mean.ckpt")
    return dict(run=str(tmp_path / "mean.ckpt"), model=f"{tmp_path / 'odd.py'}:Mean", accelerator="cpu", root=str(tmp_path))


@pytest.mark.parametrize("data", ["OnlyTest", pytest.param("Splits", marks=pytest.mark.soak)])
def test_data_that_can_only_be_tested_is_predicted_with_its_test(odd, data, launch, tmp_path):
    odd |= dict(data=f"{tmp_path / 'odd.py'}:{data}")
    tables = set()
    for ranks in (1, 2):
        _, folder = launch(INFER, None, **odd, devices=ranks)
        tables.add((folder / "predictions.parquet").read_bytes())
        assert pandas.read_parquet(folder / "predictions.parquet")["all.x"].tolist() == [2.0 * n for n in range(11)]
        assert json.loads((folder / "metrics.json").read_text()) == {"mean": 10.0, "samples": 11}
    assert len(tables) == 1
    with pytest.raises(ValueError, match="split='predict'.* Set split='test': with predictions=True it predicts"):
        predict(odd.pop("run"), devices=1, **odd)
    assert not list(tmp_path.rglob("predict"))


@pytest.mark.parametrize("data", ["OnlyTest", "Splits"])
def test_an_unknown_split_of_the_test_names_the_other_one(odd, data, tmp_path):
    text = ODD.replace("def test_dataloader", "def predict_dataloader").replace('"test":', '"predict":')
    (tmp_path / "odd.py").write_text(text)
    with pytest.raises(ValueError, match="split='test'.* Set split='predict' to predict without a test"):
        evaluate(odd.pop("run"), True, data=f"{tmp_path / 'odd.py'}:{data}", devices=1, **odd)


@pytest.mark.parametrize(
    "fails, reason, ranks",
    [
        ("a mean", "returned one value as 'whole' for a batch of 4", 1),
        ("raises", "KeyError: 'no such thing'", 2),
        pytest.param("a mean", "returned one value as 'whole' for a batch of 4", 2, marks=pytest.mark.soak),
        pytest.param("raises", "KeyError: 'no such thing'", 1, marks=pytest.mark.soak),
    ],
)
def test_what_cannot_be_predicted_leaves_the_tests_metrics(odd, fails, reason, ranks, launch, tmp_path):
    odd |= dict(data=f"{tmp_path / 'odd.py'}:OnlyTest", model_args={"fails": fails}, devices=ranks)
    with pytest.raises(Exception, match="Set predictions=False to leave the predictions out") as raised:
        launch(INFER, None, **odd)
    assert reason in str(raised.value)
    (path,) = tmp_path.rglob("run.json")
    record = json.loads(path.read_text())
    assert json.loads(path.with_name("metrics.json").read_text()) == record["metrics"] == {"mean": 10.0}
    assert record["status"] == "failed" and reason in record["error"] and record["predictions"] is None
    assert not path.with_name("predictions.parquet").exists()
    _, folder = launch(INFER, None, **odd, predictions=False)
    assert json.loads((folder / "metrics.json").read_text()) == {"mean": 10.0}


AGAIN = """
import sys
from dlnb.config import RunConfig
from dlnb.infer import evaluate
from dlnb.trainer import fit

task = dict(model="dlnb.examples:DigitsNet", data="dlnb.examples:Digits", accelerator="cpu", devices=2, max_epochs=1)
for strategy in ("deepspeed_stage_3", "ddp"):
    record = fit(RunConfig(**task, strategy=strategy, trainer_args={"enable_progress_bar": False}))
    evaluate(record.folder, accelerator="cpu", devices=2, trainer_args={"enable_progress_bar": False})
"""


TORCHRUN = pytest.param(["-m", "torch.distributed.run", "--nproc-per-node=2"], id="torchrun", marks=pytest.mark.soak)


@pytest.mark.soak
@pytest.mark.parametrize("launcher", [pytest.param([], id="Lightning"), TORCHRUN])
def test_ranks_train_and_test_again_and_again_though_the_group_ends_with_each_training(launcher, tmp_path):
    (tmp_path / "again.py").write_text(AGAIN)
    done = subprocess.run([warm_python(), *launcher, "again.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(path.read_text()) for path in tmp_path.rglob("run.json")]
    assert sorted((record["mode"], record["status"]) for record in records) == [("test", "finished")] * 2 + [("train", "finished")] * 2


WRONG = {
    "nothing": ({"run": ""}, "run='': there is no such file or folder"),
    "nowhere": ({"run": "nowhere"}, "run='nowhere': there is no such file"),
    "another split": ({"split": "val"}, "split='val' is not known"),
    "DeepSpeed": ({"strategy": "deepspeed_stage_3"}, "give 'ddp', or 'auto'"),
    "no such strategy": ({"strategy": "dpp"}, "strategy='dpp' is not known. Did you mean 'ddp'"),
    "one device for two": ({"strategy": "single_device", "devices": 2}, "single_device"),
    "another shape": ({"model_args": {"width": 8}}, "of another shape: layers.0.bias (32,) for (8,)"),
    "another model": ({"model": "dlnb.examples:ByteGPT"}, "does not fit ByteGPT: missing: embedding.weight"),
    "an unknown argument": ({"model_args": {"widht": 8}}, "widht"),
    "no such model": ({"model": "dlnb.examples:DigitNet"}, "Did you mean 'DigitsNet'"),
    "a text": ({"run": "notes.ckpt"}, "has no run.json to tell its model"),
    "a text with a model": ({"run": "notes.ckpt", "model": "dlnb.examples:DigitsNet", "data": "dlnb.examples:Digits"}, "notes.ckpt is truncated, damaged"),
    "an unknown precision": ({"precision": "fp8"}, "precision"),
    "no batch": ({"batch_size": 0}, "batch_size"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_told_before_any_process_starts_or_file_is_written(train, mistake, tmp_path, monkeypatch):
    settings, message = WRONG[mistake]
    monkeypatch.chdir(tmp_path)
    Path("notes.ckpt").write_text("weights")
    settings = dict(run=str(train("ddp").folder), accelerator="cpu", devices=1, root="results") | settings
    with pytest.raises(ValueError) as raised:
        predict(settings.pop("run"), settings.pop("split", "predict"), **settings)
    assert message in str(raised.value)
    assert os.listdir() == ["notes.ckpt"]


def test_a_results_folder_is_no_run_and_says_whose_it_is(train, inferred):
    _, folder = inferred[1]
    with pytest.raises(
        ValueError,
        match=f"is the folder of a test, not of a training. Give its run: {train('deepspeed_stage_3').folder}",
    ):
        inference_config(folder)


def test_a_lightning_checkpoint_made_of_shards_opens_with_load_from_checkpoint(train, tmp_path):
    from dlnb.consolidate import consolidate
    from dlnb.examples import DigitsNet

    trained = train("deepspeed_stage_3")
    path = consolidate(trained.folder / trained.record["best_checkpoint"], tmp_path / "model.ckpt", ckpt=True)
    model, expected = DigitsNet.load_from_checkpoint(path), load_file(trained.folder / "model.safetensors")
    assert model.hparams.width == 32 and model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
