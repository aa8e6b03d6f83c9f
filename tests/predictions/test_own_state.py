"""What a model saves beside its weights is there again at inference."""

import pytest

from dlnb.config import RunConfig
from dlnb.infer import evaluate
from dlnb.trainer import fit

MODEL = """
from torch import nn
from dlnb.examples import DigitsNet


class Scale(nn.Module):
    factor = 1.0

    def forward(self, x):
        return x * self.factor

    def get_extra_state(self):
        return {"factor": self.factor}

    def set_extra_state(self, state):
        self.factor = state["factor"]


class Net(DigitsNet):
    threshold = 0.5

    def __init__(self):
        super().__init__(width=4)
        self.scale = Scale()

    def on_train_start(self):
        self.threshold, self.scale.factor = 0.25, 2.0

    def on_save_checkpoint(self, checkpoint):
        checkpoint["threshold"] = self.threshold

    def on_load_checkpoint(self, checkpoint):
        self.threshold = checkpoint["threshold"]

    def test_step(self, batch, batch_idx):
        super().test_step(batch, batch_idx)
        self.log_dict({"threshold": self.threshold, "factor": self.scale.factor})
"""


@pytest.mark.parametrize("given", ["", "checkpoints/last.ckpt"])
def test_inference_restores_what_the_model_has_saved_itself(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(MODEL)
    settings = dict(
        model="net.py:Net", data="dlnb.examples:Digits", data_args={"num_workers": 0}, accelerator="cpu", devices=1, max_epochs=1
    )
    run = fit(RunConfig(**settings, root="runs")).folder
    found = evaluate(run / given, accelerator="cpu", devices=1, data_args={"num_workers": 0}).metrics
    assert (found["threshold"], found["factor"]) == (0.25, 2.0)
