"""A training goes on with other ranks and under another strategy: every sample once, the moments kept, the weights those of one that
nobody disturbed."""

from collections import Counter
from pathlib import Path

import pytest
from conftest import ALL
from trainings import TRACED, Training, difference

from dlnb.formats.elements import read_elements
from dlnb.formats.optimizer_states import read_optimizer_states

STOPPED_AT = 55  # the last checkpoint before step 58, in the middle of the second of three epochs of 39 steps

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A training that nobody disturbs."
    return Training(tmp_path_factory.mktemp("whole"), "ddp", 2)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    "A training that fails after its last checkpoint, made once for each strategy and number of ranks."
    made = {}

    def stopped(strategy: str, ranks: int) -> Training:
        if (strategy, ranks) not in made:
            made[strategy, ranks] = Training(tmp_path_factory.mktemp("stopped"), strategy, ranks, {"STOP_AT": "58"})
            assert "STOP_AT" in made[strategy, ranks].done.stderr
        return made[strategy, ranks]

    return stopped


def moments(checkpoint: Path) -> Counter:
    "The bytes of every moment of every parameter."
    states = read_optimizer_states(checkpoint)
    assert states.keys() == {"step", "exp_avg", "exp_avg_sq"} and set(states["step"].values()) == {STOPPED_AT}
    return Counter(bytes(read_elements(weight).numpy()) for name in ("exp_avg", "exp_avg_sq") for weight in states[name].values())


SOME = [("ddp", 2, "ddp", 1), ("ddp", 2, "deepspeed_stage_3", 2)]
ZERO = ["deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]
MORE = [("deepspeed_stage_1", 2, "deepspeed_stage_1", 4), ("deepspeed_stage_2", 2, "deepspeed_stage_2", 1)]
MORE += [("deepspeed_stage_3", 2, "deepspeed_stage_3", ranks) for ranks in (1, 4)] + [("ddp", 1, "deepspeed_stage_3", 2)]
MORE += [("ddp", 2, of, 2) for of in (*ZERO[:2], "deepspeed_stage_3_offload")] + [(of, 2, "ddp", 1) for of in ZERO]
EVERY = [(of, before, of, after) for of in ("ddp", *ZERO) for before, after in ((2, 1), (1, 2), (2, 4))]
EVERY += [("deepspeed_stage_3", 2, "ddp", 2), ("deepspeed_stage_2", 2, "deepspeed_stage_3", 1)]
SOAK = [case for case in dict.fromkeys(MORE + (EVERY if ALL else [])) if case not in SOME]


@pytest.mark.parametrize("strategy, ranks, then, ranks_then", [*SOME, *(pytest.param(*case, marks=pytest.mark.soak) for case in SOAK)])
def test_a_training_goes_on_with_other_ranks_and_under_another_strategy(whole, stopped, tmp_path, strategy, ranks, then, ranks_then):
    origin, saved = stopped(strategy, ranks), tmp_path / "start.ckpt"
    again = Training(tmp_path / "again", then, ranks_then, {"SAVE_START": str(saved)}, resume=str(origin.folder))
    assert again.done.returncode == 0, again.done.stderr[-3000:]
    assert f"step {STOPPED_AT} (1 epochs" in again.done.stdout and "starts without its saved state" not in again.done.stderr
    assert (again.record["status"], again.record["step"]) == ("finished", whole.record["step"])
    assert Path(again.record["resumed_from"]).is_relative_to(origin.folder)
    assert moments(saved) == moments(origin.folder / "checkpoints" / "last.ckpt")
    assert origin.samples(1, STOPPED_AT) + again.samples(1) == whole.samples(1) and max(whole.samples(1).values()) == 1
    assert again.samples(2) == whole.samples(2)
    assert difference(again, whole) < 1e-5


def test_the_global_batch_is_kept_by_accumulation(stopped, whole, tmp_path):
    origin = stopped("ddp", 2)
    again = Training(tmp_path, "deepspeed_stage_1", 1, resume=str(origin.folder), batch_size=8)
    assert again.record["resolved"]["accumulate_grad_batches"] == 4 and again.record["resolved"]["global_batch_size"] == 32
    assert difference(again, whole) < 1e-5


DEFAULT = {"optimizer": "auto", "lr": 1e-3}  # a module with its own optimizer reads neither


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_1"])
def test_another_optimizer_begins_anew_and_says_so(stopped, tmp_path, strategy):
    origin = stopped("ddp", 2)
    again = Training(tmp_path, strategy, 1, resume=str(origin.folder), model=f"{TRACED}:SteppedBySGD", max_epochs=2, **DEFAULT)
    assert again.record["status"] == "finished"
    assert "torch.optim.SGD starts without its saved state" in again.done.stderr
