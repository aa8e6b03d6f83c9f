"""Wrong settings: each is refused with the sentence that its user needs, before anything is written."""

import json
import os
import subprocess
import sys

import pytest
from conftest import TRAIN
from lightning.pytorch.strategies import StrategyRegistry

from dlnb.config import RunConfig
from dlnb.strategy import build_strategy
from dlnb.trainer import fit

DIGITS = {"model": "dlnb.examples:DigitsNet", "data": "dlnb.examples:Digits", "accelerator": "cpu"}

WRONG = [
    ({"model": "dlnb.examples:DigitNet"}, "Did you mean 'DigitsNet'?"),
    ({"model": "dlnb.examples.DigitsNet"}, "must be 'package.module:Class', 'path/to/file.py:Class'"),
    ({"model": "dlnb.exampels:DigitsNet"}, "there is no module 'dlnb.exampels'"),
    ({"model": "models/net.py:Net"}, "there is no file 'models/net.py'"),
    ({"model": "dlnb.examples:Digits"}, "is not a LightningModule"),
    ({"data": "dlnb.examples:DigitsNet"}, "is neither a LightningDataModule nor a dataset class that takes split="),
    ({"model_args": {"widht": 8}}, "Did you mean 'width'?"),
    ({"model_args": "{width: 8"}, "neither JSON nor YAML"),
    ({"model_args": "8"}, "must be a dictionary"),
    ({"model_args": {"width": object}}, "so that run.json can hold it"),
    ({"data_args": {"batch_size": 8}}, "set batch_size itself"),
    ({"accelerator": "gpus"}, "Did you mean 'gpu'?"),
    ({"devices": 0}, "devices=0 must be a number from 1 on"),
    ({"devices": "two"}, "devices='two' must be"),
    ({"devices": [0, 0]}, "devices=[0, 0] must be"),
    ({"num_nodes": 0}, "num_nodes"),
    ({"strategy": "deepspeed_stage2"}, "Did you mean 'deepspeed_stage_2'?"),
    ({"strategy": "deepspeed_stage_2", "strategy_args": {"reduce_bucket": 1}}, "Did you mean 'reduce_bucket_size'?"),
    ({"strategy": "deepspeed_stage_3", "strategy_args": {"zero_optimization": {"overlap_com": True}}}, "Did you mean 'overlap_comm'?"),
    ({"strategy": "deepspeed_stage_3", "strategy_args": {"comunication_data_type": "bf16"}}, "Did you mean 'communication_data_type'?"),
    ({"strategy": "deepspeed_stage_3", "strategy_args": {"gradient_clipping": 1.0}}, "Set gradient_clip_val."),
    ({"strategy": "ddp", "strategy_args": {"zero_optimization": {"stage": 2}}}, "strategy_args of ddp='zero_optimization' is not known"),
    ({"precision": "bf16-mixd"}, "Did you mean 'bf16-mixed'?"),
    ({"optimizer": "adamw"}, "Did you mean 'AdamW'?"),
    ({"lr": 0}, "greater than 0"),
    ({"lr": "fast"}, "valid number"),
    ({"lr": float("nan")}, "finite number"),
    ({"weight_decay": -0.1}, "weight_decay"),
    ({"warmup_ratio": 1.0}, "less than 1"),
    ({"eta_min_ratio": 2}, "eta_min_ratio"),
    ({"batch_size": 0}, "batch_size"),
    ({"accumulate_grad_batches": 0}, "accumulate_grad_batches"),
    ({"gradient_clip_algorithm": "l2"}, "'norm' or 'value'"),
    ({"gradient_clip_algorithm": "value", "gradient_clip_val": 1, "strategy": "deepspeed_stage_3"}, "clips by norm"),
    ({"max_epochs": -1}, "would never end"),
    ({"monitor_mode": "maximum"}, "'min' or 'max'"),
    ({"monitor": None, "patience": 3}, "patience=3 needs a metric"),
    ({"monitor": None, "save_top_k": 3}, "save_top_k=3 needs a metric"),
    ({"patience": -1}, "patience"),
    ({"min_delta": 0.1}, "would change nothing without patience. Give patience, or leave min_delta out"),
    ({"gradient_clip_algorithm": "value"}, "would change nothing without gradient_clip_val"),
    ({"monitor_mode": "max", "monitor": None}, "would change nothing without monitor"),
    ({"seed": -1}, "seed"),
    ({"name": "a/b"}, "must be of letters"),
    ({"resume": "lost.ckpt"}, "folder or checkpoint that exists"),
    ({"best_params": "lost.json"}, "is not a best_params.json"),
    ({"wandb": "of"}, "'auto', 'online', 'offline' or 'disabled'"),
    ({"trainer_args": {"max_epoch": 3}}, "trainer_args='max_epoch' is not known"),
    ({"trainer_args": {"devices": 3}}, "'devices' is set by dlnb"),
    ({"trainer_args": {"profiler": {"class_path": "lightning.pytorch.profilers.SimpelProfiler"}}}, "has no attribute 'SimpelProfiler'"),
    ({"trainer_args": {"profiler": {"class_path": "lightning.pytorch.profilers.SimpleProfiler", "init_args": {"file": 1}}}}, "file"),
    ({"trainer_args": {"plugins": [{"class_path": "lightning.pytorch.plugins.io.AsyncCheckpointIO"}]}}, "Leave it out"),
    ({"batchsize": 8}, "Did you mean 'batch_size'?"),
]


@pytest.mark.parametrize("settings, told", WRONG, ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_a_wrong_setting_is_refused_and_nothing_is_written(settings, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        RunConfig(**DIGITS | settings)
    assert told in str(caught.value)
    assert next(iter(settings)) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"accelerator": "gpu"}, "cuda"),
        ({"strategy": "single_device", "devices": 2}, "runs on one device, not on 2"),
    ],
)
def test_what_this_machine_cannot_do_is_refused_and_nothing_is_written(settings, told, tmp_path, monkeypatch):
    import torch

    if torch.cuda.is_available() and settings.get("accelerator") == "gpu":
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=told):
        fit(RunConfig(**DIGITS | settings))
    assert list(tmp_path.iterdir()) == []


REFUSED = {"fsdp": "over GPUs", "xla": "on TPUs", "single_xla": "on TPUs", "single_tpu": "on TPUs"}
REFUSED |= dict.fromkeys(("ddp_spawn", "ddp_fork", "ddp_notebook"), "from a process that cannot be copied")
REFUSED |= {"deepspeed_stage_3_offload_nvme": "Use 'deepspeed_stage_3_offload'", "single_device": "Use 'ddp'"}


@pytest.mark.parametrize("strategy", StrategyRegistry.available_strategies())
def test_every_registered_strategy_can_be_built_for_two_cpu_ranks_or_is_refused_with_the_remedy(strategy):
    reasons = [reason for name, reason in REFUSED.items() if strategy.startswith(name)]
    try:
        config = RunConfig(**DIGITS, devices=2, strategy=strategy)
        config.folder()
    except ValueError as error:
        assert reasons and reasons[0] in str(error) and "use " in str(error).lower()
    else:
        assert not reasons and build_strategy(strategy, "cpu")


def test_a_misspelt_setting_is_refused_before_torch_is_imported():
    code = "import sys; from dlnb.config import RunConfig\n"
    code += f"try: RunConfig(**{DIGITS!r}, learning_rate=1)\nexcept ValueError as error: print('torch' in sys.modules, error)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True).stdout
    assert printed.startswith("False") and "setting='learning_rate' is not known" in printed


@pytest.mark.timeout(300)
@pytest.mark.parametrize("settings, told", [({"strategy": "ddpp"}, "Did you mean 'ddp'?"), ({"learning_rate": 1}, "Choices: ")])
def test_a_wrong_setting_on_the_command_line_makes_no_run(settings, told, papermill, tmp_path):
    job = papermill(TRAIN, root=tmp_path / "runs", **settings)
    assert job.wait() == 1
    assert told in job.log.read_text()
    assert not (tmp_path / "runs").exists()
    assert job.leftover() == []


@pytest.mark.timeout(300)
def test_a_misspelt_monitor_is_refused_before_the_first_step(tmp_path):
    config = RunConfig(**DIGITS, devices=1, monitor="val_los", max_epochs=1, root=str(tmp_path))
    with pytest.raises(ValueError, match="Did you mean 'val_loss'?"):
        fit(config)
    record = json.loads((config.folder() / "run.json").read_text())
    assert record["status"] == "failed" and record["step"] == 0 and "val_los" in record["error"]


def test_dictionaries_come_as_json_and_as_yaml():
    for text in ('{"width": 8, "dropout": 5e-1}', "{width: 8, dropout: 5e-1}", "width: 8\ndropout: 5e-1"):
        assert RunConfig(**DIGITS, model_args=text).model_args == {"width": 8, "dropout": 0.5}


def test_a_model_in_a_file_of_ones_own(tmp_path):
    file = tmp_path / "net.py"
    file.write_text("from dlnb.examples import DigitsNet\nclass Mine(DigitsNet):\n    pass\n")
    config = RunConfig(**DIGITS | {"model": f"{file}:Mine"})
    assert config.task == "Digits-Mine"
    assert config.model_class is RunConfig(**DIGITS | {"model": f"{file}:Mine"}).model_class


def test_a_file_that_fails_tells_its_own_error(tmp_path):
    file = tmp_path / "net.py"
    file.write_text("import no_such_package_of_anybody\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_of_anybody"):
        RunConfig(**DIGITS | {"model": f"{file}:Mine"})


def test_the_folder_is_the_same_in_another_process_and_another_order(tmp_path):
    import subprocess
    import sys

    settings = DIGITS | {"model_args": {"width": 8, "depth": 1}, "batch_size": 16, "devices": 2, "tags": ["a"]}
    code = f"from dlnb.config import RunConfig; print(RunConfig(**{dict(reversed(settings.items()))!r}).folder())"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert printed.stdout.strip() == str(RunConfig(**settings).folder())


@pytest.mark.timeout(300)
def test_a_run_whose_folder_was_named_without_its_models_rates_is_resumed_there(tmp_path):
    settings = DIGITS | dict(devices=1, data_args={"num_workers": 0}, model_args={"dropout": 0.25}, batch_size=256, root=str(tmp_path))
    named = fit(RunConfig(**settings, max_epochs=1)).folder
    assert named.name.startswith("dropout=0.25-lr=")
    before = named.rename(named.with_name(named.name.removeprefix("dropout=0.25-")))  # as earlier versions named it
    for resume, epochs in (("auto", 2), (str(before), 3)):
        record = fit(RunConfig(**settings, max_epochs=epochs, resume=resume))
        assert (record.folder, record.epoch, record.attempts, record.resumed_from) == (before, epochs, epochs, None)
    assert list(before.parent.iterdir()) == [before]


@pytest.mark.timeout(300)
def test_a_profiler_is_described_as_a_callback_is(tmp_path):
    profiler = {"class_path": "lightning.pytorch.profilers.SimpleProfiler", "init_args": {"dirpath": str(tmp_path), "filename": "times"}}
    settings = DIGITS | dict(devices=1, data_args={"num_workers": 0}, max_epochs=1, batch_size=256, root=str(tmp_path / "runs"))
    assert fit(RunConfig(**settings, trainer_args={"profiler": profiler})).status == "finished"
    assert "optimizer_step" in (tmp_path / "fit-times.txt").read_text()
