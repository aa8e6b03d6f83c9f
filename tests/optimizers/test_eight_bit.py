"""AdamW with states of 8 bits: torchao's bytes, on two ranks too, and a training that resumes exactly from a checkpoint of plain tensors."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from traced import TracedDigits, TracedNet
from trainings import SETTINGS, Training, difference

from dlnb.config import RunConfig
from dlnb.optimizers.groups import parameter_groups
from dlnb.optimizers.schedule import warmup_cosine
from dlnb.trainer import fit

pytest.importorskip("torchao")
pytestmark = pytest.mark.timeout(400)
EIGHT_BIT = dict(optimizer="AdamW8bit", model_args={"dropout": 0.0, "width": 32}, max_epochs=1, save_every_n_steps=5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A training, made once for each number of ranks; with an optimizer step, one that stops there."
    made = {}

    def trained(ranks: int, stop_at: int = -1) -> Training:
        key = ranks, stop_at
        if key not in made:
            made[key] = Training(tmp_path_factory.mktemp("eight"), "ddp", ranks, {"STOP_AT": str(stop_at), "EAGER": "1"}, **EIGHT_BIT)
            assert made[key].done.returncode == 0 or stop_at > 0, made[key].done.stderr[-3000:]
        return made[key]

    return trained


def by_torchao(training: Training) -> dict:
    "The weights by torchao's optimizer in a loop over the same batches."
    from torchao.optim import AdamW8bit

    torch.manual_seed(0)
    model, data = TracedNet(**EIGHT_BIT["model_args"]), TracedDigits("train")
    optimizer, total = AdamW8bit(parameter_groups(model), lr=SETTINGS["lr"]), len(training.batches)
    schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, total, round(0.05 * total)))
    with torch.compiler.set_stance("force_eager"):
        for *_, samples in training.batches:
            images, labels, _ = zip(*(data[sample] for sample in samples))
            torch.nn.functional.cross_entropy(model(torch.stack(images)), torch.stack(labels)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.state_dict()


def last(training: Training) -> dict:
    return torch.load(training.folder / "checkpoints" / "last.ckpt", weights_only=True)  # which names no class


def test_one_device_trains_torchaos_bytes(trained):
    found = trained(1)
    saved, expected = last(found), by_torchao(found)
    assert found.record["resolved"]["optimizer"] == "dlnb AdamW8bit"
    assert all(torch.equal(saved["state_dict"][name], expected[name]) for name in expected)
    (codes,) = [state["exp_avg.codes"] for state in saved["optimizer_states"][0]["state"].values() if "exp_avg.codes" in state]
    assert (codes.dtype, codes.numel()) == (torch.uint8, 32 * 32 * 9)


def test_two_ranks_train_what_one_device_does(trained):
    """Within the roundings of 8 bits, by which gradients that were summed in another order may part."""
    assert difference(trained(2), trained(1)) < 1e-3


def test_it_resumes_to_the_same_bytes(trained, tmp_path):
    again = Training(tmp_path, "ddp", 2, {"EAGER": "1"}, resume=str(trained(2, stop_at=28).folder), **EIGHT_BIT)
    assert again.record["status"] == "finished" and "step 25" in again.done.stdout, again.done.stderr[-3000:]
    assert difference(again, trained(2)) == 0


def test_the_states_of_adamw_are_taken_along(tmp_path):
    settings = EIGHT_BIT | {"optimizer": "AdamW"}
    stopped = Training(tmp_path / "AdamW", "ddp", 1, {"STOP_AT": "28"}, **settings)
    again = Training(tmp_path / "AdamW8bit", "ddp", 1, {"EAGER": "1"}, resume=str(stopped.folder), **EIGHT_BIT)
    assert again.record["status"] == "finished" and "starts without its saved state" not in again.done.stderr, again.done.stderr[-3000:]
    assert any("exp_avg.codes" in state for state in last(again)["optimizer_states"][0]["state"].values())


@pytest.mark.soak
def test_compiled_it_trains_the_same_within_rounding(trained, tmp_path):
    compiled = Training(tmp_path, "ddp", 2, **EIGHT_BIT)
    assert compiled.done.returncode == 0, compiled.done.stderr[-3000:]
    assert difference(compiled, trained(2)) < 1e-3


@pytest.mark.parametrize("strategy", ["deepspeed_stage_1", "deepspeed_stage_3_offload"])
def test_it_is_refused_under_zero_before_anything_starts(tmp_path, strategy):
    with pytest.raises(ValueError, match=f"quantizes blocks of a whole weight.*{strategy}.*Use strategy 'ddp'"):
        fit(RunConfig(**SETTINGS | EIGHT_BIT, strategy=strategy, devices=2, root=str(tmp_path)))
    assert not list(tmp_path.iterdir())
