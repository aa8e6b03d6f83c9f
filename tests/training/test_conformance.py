"""Every strategy trains the same notebook on two real CPU ranks, leaves the same folder, and tells what it did."""

import csv
import json
from pathlib import Path

import pytest
from conftest import OPTIMIZERS, SAME, TRAIN
from safetensors.torch import load_file
from wandb_files import wandb_runs

from dlnb.training.build import build_model

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(params=OPTIMIZERS)
def trained(request, train):
    return train(request.param)


def test_the_run_is_recorded_with_what_was_resolved(trained):
    optimizer, ranks, stage = OPTIMIZERS[trained.strategy]
    resolved = trained.record["resolved"]
    assert trained.record["status"] == "finished" and trained.record["epoch"] == 3
    assert (resolved["optimizer"], resolved["world_size"], resolved["zero_stage"]) == (optimizer, ranks, stage)
    assert [resolved[name] for name in ("parameter_dtype", "compute_dtype", "master_dtype")] == ["float32"] * 3
    assert resolved["parameters"] == sum(parameter.numel() for parameter in build_model(trained.config).parameters())
    assert {"torch", "lightning", "dlnb", "python"} <= set(trained.record["versions"])


def test_the_folder_is_named_by_the_settings_and_holds_everything(trained):
    assert trained.folder == trained.config.folder().resolve()
    assert trained.folder.parts[-4:-1] == ("Digits-DigitsNet", "train", trained.strategy)
    names = {path.name for path in trained.folder.iterdir()}
    assert names == {"run.json", "checkpoints", "model.safetensors", "metrics.csv", "train.ipynb", "throughput.csv"}
    assert {path.name for path in (trained.folder / "checkpoints").iterdir()} == {"epoch=2.ckpt", "last.ckpt"}


def test_it_learns(trained):
    assert trained.record["metrics"]["val_acc"] > 0.6
    with (trained.folder / "metrics.csv").open() as file:
        losses = [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]]
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)


def test_the_weights_load_into_a_fresh_model(trained):
    model = build_model(trained.config)
    model.load_state_dict(load_file(trained.folder / "model.safetensors"))


def test_the_notebook_is_complete_and_clean(trained):
    cells = [cell for cell in trained.notebook.cells if cell.cell_type == "code"]
    assert {cell.metadata.papermill.status for cell in cells} == {"completed"}
    streams = [output.text for cell in cells for output in cell.outputs if output.output_type == "stream"]
    assert streams == [], "a wall of log"
    kinds = [kind for cell in cells for output in cell.outputs for kind in output.get("data", {})]
    assert "image/png" in kinds and "text/html" in kinds


@pytest.mark.parametrize("strategy", SAME[1:])
def test_with_one_optimizer_every_strategy_ends_with_the_same_bytes(train, strategy):
    expected, weights = (load_file(train(name).folder / "model.safetensors") for name in ("ddp", strategy))
    assert weights.keys() == expected.keys() and len(weights) > 5
    for name, tensor in weights.items():
        assert tensor.numpy().tobytes() == expected[name].numpy().tobytes(), name


@pytest.mark.parametrize("strategy", ["deepspeed_stage_2_offload", "deepspeed_stage_3_offload"])
def test_offloaded_training_is_the_same_within_rounding(train, strategy):
    expected, weights = (load_file(train(name).folder / "model.safetensors") for name in ("ddp", strategy))
    for name, tensor in weights.items():
        assert tensor.sub(expected[name]).abs().max() < 1e-3, name


def test_a_finished_run_is_shown_and_not_trained_again(train, launch):
    trained = train("ddp")
    before = (trained.folder / "run.json").read_bytes()
    given = ("strategy", "devices", "accelerator", "max_epochs", "lr", "batch_size", "root", "optimizer")
    notebook, _ = launch(TRAIN, None, **{name: trained.record["settings"][name] for name in given})
    assert "This run has finished" in str(notebook.cells)
    assert (trained.folder / "run.json").read_bytes() == before


@pytest.mark.soak
def test_byte_gpt_learns_under_zero_3(launch, tmp_path):
    from dlnb.examples import PythonSource

    size = dict(num_layers=1, num_heads=4, embed_dim=64, context_length=64)
    task = dict(model="dlnb.examples:ByteGPT", model_args=size, data="dlnb.examples:PythonSource")
    task |= dict(data_args={"context_length": 64}, batch_size=16, lr=1e-2, gradient_clip_val=1.0, max_epochs=1)
    limits = {"limit_train_batches": 220, "limit_val_batches": 20}
    ranks = dict(accelerator="cpu", devices=2, strategy="deepspeed_stage_3", root=str(tmp_path))
    _, folder = launch(TRAIN, None, **task, **ranks, trainer_args=limits)
    record = json.loads((folder / "run.json").read_text())
    assert record["resolved"]["zero_stage"] == 3
    assert record["metrics"]["val_bpb"] < 0.8 * PythonSource("val", context_length=64).byte_entropy()


RANKS = dict(accelerator="cpu", devices=2, strategy="ddp")


def start_training(papermill, root):
    "A training on two ranks that would go on for a long time, after its first checkpoint."
    job = papermill(TRAIN, **RANKS, max_epochs=2000, root=root)
    while not list(root.rglob("last.ckpt")):
        job.look()
        assert job.process.poll() is None, job.log.read_text()[-2000:]
    return job


def read_record(root):
    (path,) = root.rglob("run.json")
    return path.parent, json.loads(path.read_text())


def test_sigterm_stops_a_training_and_its_record_says_so(papermill, tmp_path):
    job = start_training(papermill, tmp_path / "runs")
    job.process.terminate()
    assert job.wait() == 75
    assert job.leftover() == []
    assert "SIGTERM stopped all ranks after step" in str(job.errors())
    folder, record = read_record(tmp_path / "runs")
    assert record["status"] == "preempted" and record["step"] > 0
    assert (folder / "train.ipynb").is_file()


@pytest.mark.soak
def test_a_killed_training_goes_on_with_the_same_command_and_no_other_disturbs_it(papermill, tmp_path):
    root = tmp_path / "runs"
    job = start_training(papermill, root)
    other = papermill(TRAIN, **RANKS, root=root)
    assert other.wait() == 1
    assert "is being trained by process" in other.log.read_text()
    assert job.process.poll() is None
    job.look()
    job.process.kill()
    job.wait()
    assert job.leftover() == []
    _, killed = read_record(root)
    assert killed["status"] == "running"
    again = papermill(TRAIN, **RANKS, max_epochs=killed["epoch"] + 3, root=root)
    assert again.wait() == 0, again.log.read_text()[-2000:]
    folder, record = read_record(root)
    assert (record["status"], record["attempts"], record["epoch"]) == ("finished", 2, killed["epoch"] + 3)
    with (folder / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["val_loss"]]
    assert len(steps) == len(set(steps)) == record["epoch"]


@pytest.mark.soak
def test_two_ranks_are_one_run_of_wandb_that_leads_to_the_executed_notebook(launch, tmp_path):
    folders = [launch(TRAIN, None, **RANKS, lr=lr, max_epochs=1, root=str(tmp_path), wandb="offline")[1] for lr in (1e-3, 2e-3)]
    runs = {one["run"].run_id: one for one in wandb_runs(tmp_path)}
    assert len(runs) == len(wandb_runs(tmp_path)) == 2
    for folder in folders:
        record = json.loads((folder / "run.json").read_text())
        run = runs[record["wandb"]["id"]]
        assert run["exits"] == [0] and run["run"].project == record["wandb"]["project"] == "Digits-DigitsNet-train"
        assert {Path(ref).name for ref in run["files"]} == {"model.safetensors", "train.ipynb"}
        assert "completed" in (folder / "train.ipynb").read_text()
