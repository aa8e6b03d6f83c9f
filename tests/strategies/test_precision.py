"""A precision is the same arithmetic under every strategy: mixed is autocast over fp32, true is the model itself."""

import json

import pytest
from conftest import ALL
from processes import run
from warm import warm_python

ZERO = ["deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]
TRAIN = """
import json, sys
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from dlnb.strategy import build_strategy

precision, steps, *strategies = sys.argv[1:]

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(13, 64), torch.nn.LayerNorm(64), torch.nn.GELU(), torch.nn.Linear(64, 7))
        self.losses, self.kinds = [], set()

    def training_step(self, batch, index):
        out = self.net(batch[0])
        loss = torch.nn.functional.cross_entropy(out, batch[1])
        self.losses.append(loss.item())
        self.kinds.add((str(batch[0].dtype), str(out.dtype), str(next(self.parameters()).dtype)))
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

for name in strategies:
    seed_everything(1, verbose=False)
    data = torch.utils.data.TensorDataset(torch.randn(512, 13), torch.randint(0, 7, (512,)))
    trainer = Trainer(strategy=build_strategy(name, "cpu"), accelerator="cpu", devices=2, max_steps=int(steps), max_epochs=-1, logger=False,
                      precision=precision, accumulate_grad_batches=8, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False)
    module = Net()
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    if trainer.is_global_zero:
        with open(f"{name}.json", "w") as file:
            json.dump([module.losses, sorted(module.kinds)], file)
"""


def train(folder, precision: str, steps: int, *strategies: str) -> dict:
    (folder / "train.py").write_text(TRAIN)
    code, output = run(["train.py", precision, steps, *strategies], folder, timeout=1400, python=warm_python())
    assert code == 0, output
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in strategies}


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "steps, strategies", [(20, ZERO), pytest.param(500, ZERO if ALL else ZERO[2:], marks=pytest.mark.soak)], ids=["20", "500"]
)
def test_mixed_precision_trains_as_under_ddp(tmp_path, steps, strategies):
    (expected, kinds), *others = train(tmp_path, "bf16-mixed", steps, "ddp", *strategies).values()
    assert kinds == [["torch.float32", "torch.bfloat16", "torch.float32"]] and len(expected) == 8 * steps
    for losses, others_kinds in others:
        assert others_kinds == kinds
        assert max(abs(one - other) for one, other in zip(losses, expected, strict=True)) < 1e-3


def test_true_precision_is_the_model_itself(tmp_path):
    for losses, kinds in train(tmp_path, "bf16-true", 2, "ddp", ZERO[2]).values():
        assert kinds == [["torch.bfloat16", "torch.bfloat16", "torch.bfloat16"]] and len(losses) == 16
