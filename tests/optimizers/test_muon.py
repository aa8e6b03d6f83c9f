"""Muon trains the same model under every strategy, resumes to the same bytes, and goes along to other ranks and strategies."""

import pytest
import torch
from safetensors.torch import load_file
from trainings import Training, difference

from dlnb.formats.optimizer_states import read_optimizer_states

pytestmark = [pytest.mark.timeout(400), pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 and newer have Muon")]
MUON = dict(optimizer="Muon", max_epochs=2, save_every_n_steps=5)
SHARDED = ["deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A training by Muon, made once for each strategy and number of ranks; with an optimizer step, one that stops there."
    made = {}

    def trained(strategy: str, ranks: int, stop_at: int = -1) -> Training:
        key = strategy, ranks, stop_at
        if key not in made:
            made[key] = Training(tmp_path_factory.mktemp("muon"), strategy, ranks, {"STOP_AT": str(stop_at)}, **MUON)
            assert made[key].done.returncode == 0 or stop_at > 0, made[key].done.stderr[-3000:]
        return made[key]

    return trained


@pytest.mark.parametrize("strategy", SHARDED)
def test_zero_trains_what_ddp_does(trained, strategy):
    found = trained(strategy, 2)
    assert difference(found, trained("ddp", 2)) < 1e-5
    assert found.record["resolved"]["optimizer"] == "dlnb MuonAdamW(fused=True)"


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_3"])
def test_the_first_updates_are_those_of_a_single_device(tmp_path, strategy):
    """Later ones may part: a gradient that was summed in another order is rounded to another bfloat16."""
    single, sharded = (Training(tmp_path / str(ranks), strategy if ranks == 2 else "ddp", ranks, **MUON, max_steps=6) for ranks in (1, 2))
    assert difference(single, sharded) < 1e-5


def test_under_offload_the_rest_is_stepped_by_deepspeeds_adam(trained):
    found = trained("deepspeed_stage_3_offload", 2)
    assert found.record["resolved"]["optimizer"] == "dlnb MuonDeepSpeedCPUAdam"
    assert difference(found, trained("ddp", 2)) < 1e-2


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_it_resumes_to_the_same_bytes(trained, tmp_path, strategy):
    stopped = trained(strategy, 2, stop_at=48)
    again = Training(tmp_path, strategy, 2, resume=str(stopped.folder), **MUON)
    assert again.record["status"] == "finished" and "step 45" in again.done.stdout, again.done.stderr[-3000:]
    found, expected = (load_file(training.folder / "model.safetensors") for training in (again, trained(strategy, 2)))
    assert all(found[name].numpy().tobytes() == expected[name].numpy().tobytes() for name in expected)


CASES = [("ddp", 2, "deepspeed_stage_3", 1), ("deepspeed_stage_3", 2, "deepspeed_stage_1", 2)]
MORE = [
    ("deepspeed_stage_2", 2, "ddp", 1),
    ("deepspeed_stage_3", 2, "deepspeed_stage_3", 4),
    ("deepspeed_stage_1", 2, "deepspeed_stage_2", 1),
]


@pytest.mark.parametrize("strategy, ranks, then, ranks_then", [*CASES, *(pytest.param(*case, marks=pytest.mark.soak) for case in MORE)])
def test_its_momentum_goes_along_to_other_ranks_and_strategies(trained, tmp_path, strategy, ranks, then, ranks_then):
    stopped = trained(strategy, ranks, stop_at=48)
    states = read_optimizer_states(stopped.folder / "checkpoints" / "last.ckpt")
    assert len(states["momentum_buffer"]) == 2 and len(states["exp_avg"]) == 8
    again = Training(tmp_path, then, ranks_then, resume=str(stopped.folder), **MUON)
    assert again.record["status"] == "finished" and "starts without its saved state" not in again.done.stderr, again.done.stderr[-3000:]
    assert difference(again, trained("ddp", 2)) < 1e-2  # as far as roundings part over 33 steps


LINEAR = """
from torch import nn
from dlnb.examples import DigitsNet

class Linear(DigitsNet):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""


def test_a_model_without_hidden_matrices_is_refused_before_a_rank_is_started(tmp_path):
    (tmp_path / "net.py").write_text(LINEAR)
    found = Training(tmp_path / "run", "ddp", 2, model=f"{tmp_path}/net.py:Linear", model_args={}, **MUON)
    assert "Linear has no hidden weight matrix" in found.done.stderr and "rank1" not in found.done.stderr
