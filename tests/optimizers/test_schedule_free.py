"""Schedule-free AdamW: the package's bytes, the same under every strategy, and a training that resumes exactly from checkpoints that hold the average."""

import pytest
import torch
from safetensors.torch import load_file
from traced import TracedDigits, TracedNet
from trainings import SETTINGS, Training, difference

from dlnb.config import RunConfig
from dlnb.optimizers.groups import parameter_groups
from dlnb.trainer import fit

schedulefree = pytest.importorskip("schedulefree")
pytestmark = pytest.mark.timeout(400)
SCHEDULE_FREE = dict(optimizer="AdamWScheduleFree", max_epochs=2, save_every_n_steps=5)
SEVERAL_PARTS = {"zero_optimization": {"sub_group_size": 500}}  # of a group, which stage 3 steps one after the other
ALIKE = [("ddp", {}), ("deepspeed_stage_3", SEVERAL_PARTS)]
ALIKE += [pytest.param(f"deepspeed_stage_{stage}", {}, marks=pytest.mark.soak) for stage in ("1", "2", "2_offload", "3_offload")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A training, made once for each strategy and number of ranks; with an optimizer step, one that stops there."
    made = {}

    def trained(strategy: str, ranks: int, stop_at: int = -1, **strategy_args) -> Training:
        key = strategy, ranks, stop_at, *strategy_args
        settings = SCHEDULE_FREE | {"strategy_args": strategy_args}
        if key not in made:
            made[key] = Training(tmp_path_factory.mktemp("free"), strategy, ranks, {"STOP_AT": str(stop_at)}, **settings)
            assert made[key].done.returncode == 0 or stop_at > 0, made[key].done.stderr[-3000:]
        return made[key]

    return trained


def last(training: Training) -> dict:
    return torch.load(training.folder / "checkpoints" / "last.ckpt", weights_only=False)


def by_the_package(training: Training) -> tuple[dict, dict]:
    "The weights that are trained and their average, by the package's optimizer in a loop over the same batches."
    torch.manual_seed(0)
    model, data = TracedNet(**SETTINGS["model_args"]), TracedDigits("train")
    groups = parameter_groups(model)
    optimizer = schedulefree.AdamWScheduleFree(groups, lr=SETTINGS["lr"], warmup_steps=round(0.05 * len(training.batches)))
    optimizer.train()
    for *_, samples in training.batches:
        images, labels, _ = zip(*(data[sample] for sample in samples))
        torch.nn.functional.cross_entropy(model(torch.stack(images)), torch.stack(labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
    steps = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.eval()
    return steps, model.state_dict()


def test_one_device_trains_the_packages_bytes_and_saves_its_average(trained):
    found = trained("ddp", 1)
    assert found.record["resolved"]["optimizer"] == "dlnb AdamWScheduleFree" and len(found.batches) == 78
    saved, (steps, average) = last(found), by_the_package(found)
    assert all(torch.equal(saved["state_dict"][name], average[name]) for name in average)
    states = saved["optimizer_states"][0]["state"]
    order = [number for group in saved["optimizer_states"][0]["param_groups"] for number in group["params"]]
    names = [name for dimensions in (True, False) for name in steps if (steps[name].dim() > 1) == dimensions]
    assert all(torch.equal(states[number]["y"], steps[name]) for number, name in zip(order, names))
    assert max((steps[name] - average[name]).abs().max() for name in names) > 1e-3


@pytest.mark.parametrize("strategy, strategy_args", ALIKE)
def test_two_ranks_train_what_one_device_does(trained, strategy, strategy_args):
    found = trained(strategy, 2, **strategy_args)
    assert difference(found, trained("ddp", 1)) < 1e-5
    assert difference(found, trained("ddp", 2)) == 0
    assert found.record["metrics"]["val_acc"] == pytest.approx(trained("ddp", 1).record["metrics"]["val_acc"])


@pytest.mark.parametrize("strategy, strategy_args", ALIKE)
def test_it_resumes_to_the_same_bytes(trained, tmp_path, strategy, strategy_args):
    stopped = trained(strategy, 2, stop_at=48, **strategy_args)
    again = Training(tmp_path, strategy, 2, resume=str(stopped.folder), strategy_args=strategy_args, **SCHEDULE_FREE)
    assert again.record["status"] == "finished" and "step 45" in again.done.stdout, again.done.stderr[-3000:]
    assert difference(again, trained(strategy, 2, **strategy_args)) == 0


def test_how_often_it_is_saved_and_validated_changes_no_bit(trained, tmp_path):
    rare = Training(tmp_path, "ddp", 1, **SCHEDULE_FREE | {"save_every_n_steps": None}, trainer_args={"check_val_every_n_epoch": 2})
    assert difference(rare, trained("ddp", 1)) == 0


CASES = [("ddp", {}, "deepspeed_stage_3", 1), ("deepspeed_stage_3", SEVERAL_PARTS, "ddp", 1)]
MORE = [("deepspeed_stage_2", {}, "deepspeed_stage_3", 4), ("deepspeed_stage_3", SEVERAL_PARTS, "deepspeed_stage_1", 1)]


@pytest.mark.parametrize(
    "strategy, strategy_args, then, ranks_then", [*CASES, *(pytest.param(*case, marks=pytest.mark.soak) for case in MORE)]
)
def test_it_goes_along_to_other_ranks_and_strategies(trained, tmp_path, strategy, strategy_args, then, ranks_then):
    stopped = trained(strategy, 2, stop_at=48, **strategy_args)
    again = Training(tmp_path, then, ranks_then, resume=str(stopped.folder), **SCHEDULE_FREE)
    assert again.record["status"] == "finished" and "starts without its saved state" not in again.done.stderr, again.done.stderr[-3000:]
    assert difference(again, trained("ddp", 2)) < 1e-5


@pytest.mark.parametrize("strategy, strategy_args", ALIKE[:2])
def test_the_weights_for_inference_are_the_average_that_was_validated(trained, strategy, strategy_args):
    found = trained(strategy, 2, **strategy_args)
    model, data = TracedNet(**SETTINGS["model_args"]).eval(), TracedDigits("val")
    model.load_state_dict(load_file(found.folder / "model.safetensors"))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(data.images), data.labels)
    assert loss.item() == pytest.approx(found.record["best_metrics"]["val_loss"], rel=1e-4)


def test_an_end_of_no_schedule_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(ValueError, match="eta_min_ratio=0.1 would change nothing: optimizer='AdamWScheduleFree' keeps its learning rate"):
        fit(RunConfig(**SETTINGS | SCHEDULE_FREE, strategy="ddp", devices=2, eta_min_ratio=0.1, root=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_an_average_of_the_average_is_refused(tmp_path):
    with pytest.raises(ValueError, match="WeightAveraging averages the weights, which optimizer='AdamWScheduleFree' does itself"):
        fit(RunConfig(**SETTINGS | SCHEDULE_FREE, devices=1, root=str(tmp_path), callbacks=["dlnb.callbacks.averaging:WeightAveraging"]))


class Normed(TracedNet):
    def __init__(self):
        super().__init__(width=9, dropout=0.0)
        self.layers[1] = torch.nn.BatchNorm2d(9)


def test_the_statistics_of_a_batch_norm_are_reported(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TRACE", str(tmp_path))
    settings = SETTINGS | SCHEDULE_FREE | {"model": f"{__file__}:Normed", "model_args": {}, "max_epochs": 1}
    fit(RunConfig(**settings, devices=1, root=str(tmp_path)))
    assert "the batch norms of Normed have statistics of the weights that are trained" in caplog.text
