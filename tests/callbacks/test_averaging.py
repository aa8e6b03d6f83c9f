"""The average of the weights is the same under every strategy, and after a kill."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import TRAIN
from safetensors.torch import load_file

pytestmark = pytest.mark.timeout(400)
LIGHTNINGS = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.9}}
STOCHASTIC = {"class_path": "lightning.pytorch.callbacks.StochasticWeightAveraging", "init_args": {"swa_lrs": 0.01, "swa_epoch_start": 1}}
EMA = {"class_path": "dlnb.callbacks.averaging:WeightAveraging", "init_args": {"decay": 0.9}}


@pytest.fixture(scope="module")
def averaged(launch, tmp_path_factory):
    root, trained = tmp_path_factory.mktemp("averaged"), {}

    def train(strategy: str, callbacks=(EMA,), **more):
        name = f"{strategy}-{len(callbacks)}-{len(more)}"
        if name not in trained:
            settings = dict(strategy=strategy, devices=2, accelerator="cpu", max_epochs=2, optimizer="AdamW", root=str(root / name))
            settings |= dict(trainer_args={"limit_train_batches": 6}, callbacks=list(callbacks)) | more
            _, folder = launch(TRAIN, root / f"{name}.ipynb", **settings)
            trained[name] = folder, load_file(folder / "model.safetensors"), json.loads((folder / "run.json").read_text())
        return trained[name]

    return train


@pytest.mark.parametrize("strategy", [pytest.param("deepspeed_stage_2", marks=pytest.mark.soak), "deepspeed_stage_3"])
def test_zero_averages_as_ddp_does(averaged, strategy):
    (_, one, record), (_, other, other_record) = averaged("ddp"), averaged(strategy)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert record["metrics"]["val_loss"] == pytest.approx(other_record["metrics"]["val_loss"], rel=1e-6)


def test_what_is_kept_and_monitored_is_the_average(averaged):
    (_, average, record), (_, last, plain) = averaged("ddp"), averaged("ddp", ())
    assert not any(torch.equal(average[name], last[name]) for name in average)
    assert (
        record["metrics"]["val_loss"] != plain["metrics"]["val_loss"] and record["metrics"]["train_loss"] == plain["metrics"]["train_loss"]
    )


def test_a_callback_that_copies_a_sharded_model_is_refused(tmp_path):
    from dlnb.config import RunConfig
    from dlnb.trainer import fit

    config = RunConfig(
        model="dlnb.examples:DigitsNet", data="dlnb.examples:Digits", strategy="deepspeed_stage_3", accelerator="cpu", devices=2,
        callbacks="lightning.pytorch.callbacks.EMAWeightAveraging", root=str(tmp_path),
    )  # fmt: skip
    with pytest.raises(ValueError, match="dlnb.callbacks.averaging.WeightAveraging"):
        fit(config)


KILLED = """
import json, os, signal, sys
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from dlnb.config import RunConfig
from dlnb.trainer import fit

class Own(CSVLogger):
    pass

class Dies(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 7 and "dies" in sys.argv:
            os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    fit(RunConfig(**json.loads(sys.argv[1])), callbacks=[Dies()])
"""


@pytest.mark.soak
@pytest.mark.parametrize("average", [EMA, LIGHTNINGS, STOCHASTIC], ids=["dlnb's", "Lightning's", "stochastic"])
def test_an_average_and_a_logger_of_ones_own_go_on_after_a_kill_to_the_same_bytes(tmp_path, average):
    (script := tmp_path / "killed.py").write_text(KILLED)
    settings = dict(model="dlnb.examples:DigitsNet", data="dlnb.examples:Digits", data_args={"num_workers": 0}, callbacks=[average])
    settings |= dict(accelerator="cpu", devices=2, strategy="ddp", batch_size=128, max_epochs=3, save_every_n_steps=1, optimizer="AdamW")

    def train(root, *words: str) -> int:
        logger = {"class_path": f"{script}:Own", "init_args": {"save_dir": str(root), "name": "own"}}
        given = json.dumps(settings | {"root": str(root), "logger": logger})
        environment = {**os.environ, "PYTHONPATH": str(TRAIN.parents[2])}
        return subprocess.run([sys.executable, script, given, *words], env=environment, timeout=150).returncode

    assert train(tmp_path / "whole") == 0
    assert train(tmp_path / "cut", "dies") == -signal.SIGKILL and train(tmp_path / "cut") == 0
    whole, cut = (next((tmp_path / name).rglob("model.safetensors")).read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    assert len(list((tmp_path / "cut" / "own").glob("version_*/metrics.csv"))) == 2, "the logger has written in each attempt"
