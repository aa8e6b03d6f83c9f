"""The average of the weights is the same under every strategy, and after a kill."""

import json

import pytest
import torch
from conftest import TRAIN
from safetensors.torch import load_file

pytestmark = pytest.mark.timeout(400)
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
