"""`build_strategy` on two real CPU ranks under every stage, and what it refuses before any rank starts."""

import pytest
from processes import records_of_both_ranks, run
from warm import warm_python

STRATEGIES = ["ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3", "deepspeed_stage_2_offload",
              "deepspeed_stage_3_offload"]  # fmt: skip

# Odd sizes that the ranks do not divide; two groups, of which one does not decay.
TRAIN = """
import json, sys
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from dlnb.strategy import build_strategy

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(13, 31), torch.nn.LayerNorm(31), torch.nn.Linear(31, 7))
        self.losses = []

    def forward(self, inputs):
        return self.net(inputs)

    def loss(self, batch):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch, index):
        loss = self.loss(batch)
        self.losses.append(loss.item().hex())
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self):
        decayed = [p for p in self.parameters() if p.ndim > 1 or len(getattr(p, "ds_shape", ())) > 1]
        plain = [p for p in self.parameters() if not any(p is d for d in decayed)]
        return torch.optim.AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0.0}], lr=0.01)

def train(name):
    seed_everything(1, verbose=False)
    data = torch.utils.data.TensorDataset(torch.randn(96, 13), torch.randint(0, 7, (96,)))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    # Small weights stay gathered, unless they may not: then they are gathered ahead.
    options = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if name == "deepspeed_stage_3_offload" else {}
    trainer = Trainer(strategy=build_strategy(name, "cpu", **options), accelerator="cpu", devices=2, max_epochs=2, logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    module = Net()
    trainer.fit(module, loader, loader)
    record = {"losses": module.losses, "val_loss": trainer.callback_metrics["val_loss"].item().hex(),
              "device": str(trainer.strategy.root_device)}
    if "stage_3" in name:
        record["is_recorded"] = trainer.strategy.model.optimizer.parameter_offload.get_param_coordinator().is_complete_trace()
    with open(f"{name}-{trainer.global_rank}.json", "w") as file:
        json.dump(record, file)

for name in sys.argv[1:]:
    train(name)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One pair of processes trains under one strategy after another: what both ranks recorded and what they printed."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "train.py").write_text(TRAIN)
    code, output = run(["train.py", *STRATEGIES], folder, timeout=280, python=warm_python())
    assert code == 0, output
    return records_of_both_ranks(folder, STRATEGIES), output


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", STRATEGIES)
def test_two_ranks_train_exactly_as_under_ddp(name, trained):
    records, _ = trained
    assert [len(record["losses"]) for record in records[name]] == [12, 12]
    assert records[name][0]["losses"] != records[name][1]["losses"]  # each rank had its own samples
    for record, reference in zip(records[name], records["ddp"]):
        assert record["losses"] == reference["losses"]
        assert record["val_loss"] == reference["val_loss"]
    assert [record["device"] for record in records[name]] == (["cpu", "cpu"] if name == "ddp" else ["cpu:0", "cpu:1"])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [name for name in STRATEGIES if "stage_3" in name])
def test_stage_3_knows_the_order_of_modules_where_a_step_calls_the_module_itself(name, trained):
    records, _ = trained
    assert [record["is_recorded"] for record in records[name]] == [True, True]


@pytest.mark.timeout(300)
def test_no_extension_is_compiled_and_nothing_deprecated_is_shown(trained):
    _, output = trained
    assert "built successfully" not in output
    assert "FutureWarning" not in output
    assert "Error" not in output


BLOCK = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "deepspeed":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
"""
BUILD = "from dlnb.strategy import build_strategy; build_strategy('deepspeed_stage_2', accelerator='cpu')"


@pytest.mark.parametrize(
    "blocker",
    [pytest.param(BLOCK, id="absent"), pytest.param("import sys; sys.modules['deepspeed'] = None\n", id="halted", marks=pytest.mark.soak)],
)
def test_without_deepspeed_the_error_says_what_to_install_and_other_strategies_work(blocker, tmp_path):
    others = BUILD.replace("deepspeed_stage_2", "ddp") + "; print('built', flush=True)\n"
    code, output = run(["-c", blocker + others + BUILD], tmp_path)
    assert code == 1 and output.startswith("built\n"), output
    error = output.strip().splitlines()[-1]
    assert error.startswith("ModuleNotFoundError: ")
    assert "pip install 'deepspeed>=0.19,<0.20'" in error and "Linux" in error


@pytest.mark.soak
def test_deepspeed_bound_to_another_accelerator_is_refused_with_the_remedy(tmp_path):
    script = "import os; os.environ['DS_ACCELERATOR'] = 'cuda'; import deepspeed\n" + BUILD
    code, output = run(["-c", script], tmp_path)
    assert code == 1, output
    error = output.strip().splitlines()[-1]
    assert error.startswith("RuntimeError: ") and "DS_ACCELERATOR=cpu" in error


@pytest.mark.soak
def test_an_accelerator_from_the_environment_gives_way_to_the_argument(tmp_path):
    code, output = run(["-c", BUILD], tmp_path, DS_ACCELERATOR="cuda")
    assert code == 0, output


def test_building_a_strategy_imports_deepspeed_only_where_it_is_used(tmp_path):
    script = BUILD.replace("deepspeed_stage_2", "ddp") + "; import sys; assert 'deepspeed' not in sys.modules"
    code, output = run(["-c", script], tmp_path)
    assert code == 0, output


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["deepspeed_stage3", "cpu"], {}, "Did you mean 'deepspeed_stage_3'"),
        (["DDP", "cpu"], {}, "Did you mean 'ddp'"),
        (["", "cpu"], {}, "strategy='' is not known"),
        (["ddp", "gpus"], {}, "Did you mean 'gpu'"),
        (["ddp", "cpu"], {"find_unused": True}, "Did you mean 'find_unused_parameters'"),
        (["deepspeed_stage_2", "cpu"], {"stages": 3}, "Did you mean 'stage'"),
        (["fsdp", "cpu"], {"stage": 3}, "strategy_args of fsdp='stage' is not known"),
        (["auto", "cpu"], {"stage": 3}, "Choices: none"),
        (["deepspeed_stage_3", "mps"], {}, "not on 'mps'"),
        (["deepspeed_stage_3_offload_nvme", "cpu"], {}, "use 'deepspeed_stage_3_offload'"),
        (["deepspeed", "cpu"], {"config": {}, "stage": 3}, "would ignore stage"),
        (["deepspeed_stage_1", "cpu"], {"config": {}}, "would ignore stage"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, options, message):
    from dlnb.strategy import build_strategy

    with pytest.raises(ValueError) as error:
        build_strategy(*arguments, **options)
    assert message in str(error.value)


def test_a_cpu_strategy_in_a_trainer_for_another_accelerator_is_refused():
    from lightning.pytorch.accelerators import CUDAAccelerator

    from dlnb.strategy import build_strategy

    strategy = build_strategy("deepspeed_stage_3", "cpu")
    strategy.accelerator = CUDAAccelerator()
    with pytest.raises(ValueError, match="built for accelerator='cpu', but the Trainer runs on 'cuda'"):
        strategy.setup_environment()


def test_every_registered_name_goes_into_a_trainer_or_says_why_not():
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import StrategyRegistry

    from dlnb.strategy import build_strategy, strategy_names

    elsewhere = {"deepspeed_stage_3_offload_nvme": "NVMe", "single_tpu": "device"}
    elsewhere |= dict.fromkeys(("fsdp", "fsdp_cpu_offload"), "requires a GPU")
    elsewhere |= dict.fromkeys(("xla", "xla_debug", "single_xla"), "torch_xla")
    for name in strategy_names():
        arguments = dict(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        if name in elsewhere:
            with pytest.raises((ValueError, TypeError, ModuleNotFoundError), match=elsewhere[name]):
                Trainer(strategy=build_strategy(name, "cpu"), **arguments)
        else:
            strategy = Trainer(strategy=build_strategy(name, "cpu"), **arguments).strategy
            assert name == "auto" or isinstance(strategy, StrategyRegistry[name]["strategy"])


def test_a_user_configuration_is_neither_changed_nor_shared():
    from dlnb.strategy import build_strategy

    own = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    first, second = (build_strategy("deepspeed", "cpu", config=own) for _ in range(2))
    first.config["gradient_accumulation_steps"] = 2  # as Lightning does when a Trainer starts
    assert second.config == own == {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
