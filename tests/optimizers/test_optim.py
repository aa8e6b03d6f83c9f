"""Every optimizer against torch's AdamW, the groups of drawn modules, one learning-rate curve for every strategy."""

import functools
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import records_of_both_ranks, run
from torch import nn
from warm import warm_python

from dlnb import optim
from dlnb.optimizers import compiled

# ---- every optimizer of the factory takes AdamW's steps


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(13, 31), nn.LayerNorm(31), nn.Tanh(), nn.Linear(31, 7))


def ten_steps(optimizer, module):
    """Gradients of very different sizes, a new learning rate at every step and another one for each group."""
    generator = torch.Generator().manual_seed(1)
    for step in range(10):
        for index, group in enumerate(optimizer.param_groups):
            group["lr"] = 1e-2 * (step + 1) / 10 / (index + 1)
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (step % 4 - 2)
        optimizer.step()
    return [[parameter.detach().clone() for parameter in group["params"]] for group in optimizer.param_groups]


HYPERPARAMETERS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6}


def build(name, module):
    return optim.build_optimizer(module, "ddp", "cpu", weight_decay=0.1, optimizer=name, **HYPERPARAMETERS)


@pytest.mark.timeout(400)  # the first run compiles
@pytest.mark.parametrize("name", optim.ADAMW)
def test_ten_steps_are_those_of_adamw_group_by_group(name):
    reference = Net()
    groups = [{"params": [reference.layers[0].weight, reference.layers[3].weight], "weight_decay": 0.1},
              {"params": [p for p in reference.parameters() if p.ndim == 1], "weight_decay": 0.0}]  # fmt: skip
    expected = ten_steps(torch.optim.AdamW(groups, **HYPERPARAMETERS), reference)
    module = Net()
    found = ten_steps(build(name, module), module)
    assert [len(group) for group in found] == [len(group) for group in expected] == [2, 4]
    for found_group, expected_group in zip(found, expected):
        for parameter, wanted in zip(found_group, expected_group):
            if name == "AdamW":
                assert torch.equal(parameter, wanted)
            torch.testing.assert_close(parameter, wanted, rtol=2e-6, atol=2e-7)


def test_the_tolerance_tells_coupled_decay_from_decoupled():
    module, coupled = Net(), Net()
    found = ten_steps(build("AdamW", module), module)
    groups = optim.parameter_groups(coupled, 0.1)
    wrong = ten_steps(torch.optim.Adam(groups, **HYPERPARAMETERS), coupled)
    assert (found[0][0] - wrong[0][0]).abs().max() > 1e-3


# ---- a machine that lacks something

BUILD = """
from torch import nn
from dlnb.optim import build_optimizer, describe_optimizer

for name in {}:
    try:
        optimizer = build_optimizer(nn.Linear(3, 2), "deepspeed_stage_3_offload", "cpu", optimizer=name)
        print(name, describe_optimizer(optimizer))
    except RuntimeError as error:
        print(name, error)
"""


@pytest.fixture
def without_compiler(tmp_path):
    """A PATH with python and ninja and nothing that compiles, and an empty cache."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ninja").symlink_to(shutil.which("ninja", path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"))
    return {"PATH": str(folder), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}


@pytest.mark.timeout(500)
def test_without_a_compiler_auto_takes_torchs_optimizer_and_a_name_is_an_error(without_compiler, tmp_path):
    code, output = run(["-c", BUILD.format(["FusedAdam", "DeepSpeedCPUAdam", "auto"])], tmp_path, **without_compiler)
    assert code == 0, output
    *_, fused, cpu, auto = [line for line in output.splitlines() if line.split(" ")[0] in optim.OPTIMIZERS]
    assert fused.startswith("FusedAdam FusedAdam has to be compiled, and c++ cannot be found")
    assert cpu.startswith("DeepSpeedCPUAdam DeepSpeedCPUAdam has to be compiled, and c++ cannot be found")
    assert auto == "auto torch.optim.AdamW(fused=True)"
    assert "c++ cannot be found; torch's fused AdamW is used instead" in output


@pytest.mark.timeout(500)
def test_a_compiler_that_fails_is_a_missing_one(tmp_path):
    code, output = run(["-c", BUILD.format(["auto"])], tmp_path, CXX="false", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert code == 0, output
    assert "cannot be compiled here" in output
    assert output.splitlines()[-1] == "auto torch.optim.AdamW(fused=True)"


@pytest.mark.timeout(500)
@pytest.mark.skipif(compiled.CUDA_HOME is not None, reason="a CUDA toolkit is installed")
@pytest.mark.soak
def test_zero_on_cuda_without_nvcc_takes_torchs_fused_optimizer(tmp_path):
    script = BUILD.format(["auto"]).replace("deepspeed_stage_3_offload", "deepspeed_stage_2").replace('"cpu"', '"cuda"')
    code, output = run(["-c", script], tmp_path, TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert code == 0, output
    assert "FusedAdam has to be compiled, and nvcc cannot be found; torch's fused AdamW is used instead" in output
    assert output.splitlines()[-1] == "auto torch.optim.AdamW(fused=True)"


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_what_is_compiled_needs_no_compiler_again(without_compiler, tmp_path):
    assert optim.build_problem("DeepSpeedCPUAdam", "cpu") == ""
    code, output = run(["-c", BUILD.format(["auto"])], tmp_path, PATH=without_compiler["PATH"])
    assert code == 0, output
    assert output.splitlines()[-1] == "auto deepspeed DeepSpeedCPUAdam"


def test_ninja_is_found_beside_python_in_an_environment_that_is_not_activated(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    beside = tmp_path / "env" / "bin"
    beside.mkdir(parents=True)
    (beside / "ninja").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(beside / "python"))
    compiled._put_ninja_on_path()
    assert shutil.which("ninja") == str(beside / "ninja")


HOLDER = """
import os, sys, time
lock = sys.argv[1]
os.open(lock, os.O_CREAT | os.O_EXCL)  # as torch.utils.file_baton.FileBaton does
[os.utime(path, (time.time() - 1000,) * 2) for path in (lock, os.path.dirname(lock))]
print("held", flush=True)
time.sleep(2)
os.unlink(lock) if sys.argv[2] == "ends" else os._exit(9)
"""


@pytest.mark.parametrize("what", ["ends", "is killed"])
def test_the_lock_of_a_killed_build_is_broken_and_that_of_a_live_one_is_not_however_long_it_takes(tmp_path, what):
    lock = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(lock), what], stdout=subprocess.PIPE, text=True) as builder:
        assert builder.stdout.readline() == "held\n"
        with warnings.catch_warnings(record=True) as warned:
            compiled._wait_for_builder(tmp_path)
    assert builder.returncode == (0 if what == "ends" else 9), "a live one removes its own lock"
    assert ["no longer runs" in str(warning.message) for warning in warned] == ([] if what == "ends" else [True])
    assert not lock.exists()


# ---- parameter groups

PARTS = st.sampled_from(["linear", "no bias", "norm", "batch norm", "frozen", "tied", "embedding", "scalar"])


def part(kind, previous):
    if kind == "tied" and previous:
        return previous[-1]
    if kind == "scalar":
        module = nn.Module()
        module.scale = nn.Parameter(torch.tensor(1.0))
        return module
    return {
        "linear": lambda: nn.Linear(3, 2),
        "no bias": lambda: nn.Linear(3, 2, bias=False),
        "norm": lambda: nn.LayerNorm((2, 2)),
        "batch norm": lambda: nn.BatchNorm2d(3),
        "frozen": lambda: nn.Linear(2, 2).requires_grad_(False),
        "embedding": lambda: nn.Embedding(4, 2),
        "tied": lambda: nn.Conv2d(1, 2, 3),  # with nothing before it
    }[kind]()


@given(st.lists(PARTS, max_size=8))
@settings(deadline=None, max_examples=200)
def test_groups_hold_each_trainable_parameter_once_and_decay_matrices_alone(kinds):
    parts = functools.reduce(lambda previous, kind: [*previous, part(kind, previous)], kinds, [])
    module = nn.ModuleList(parts)
    trainable = {id(p): p for p in module.parameters() if p.requires_grad}
    if not trainable:
        with pytest.raises(ValueError, match="nothing to optimize"):
            optim.parameter_groups(module)
        return
    groups = optim.parameter_groups(module, 0.5)
    grouped = [(id(p), group["weight_decay"]) for group in groups for p in group["params"]]
    assert all(group["params"] for group in groups)
    assert sorted(key for key, _ in grouped) == sorted(trainable)
    matrices = {id(m.weight) for m in module.modules() if isinstance(m, (nn.Linear, nn.Embedding, nn.Conv2d))}
    assert {key for key, decay in grouped if decay} == matrices & set(trainable)
    assert all(decay in (0.0, 0.5) for _, decay in grouped)


ZERO_INIT = """
import os
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
import torch
from dlnb.optim import parameter_groups
from dlnb.strategy import CPUDeepSpeedStrategy
CPUDeepSpeedStrategy(stage=3)
import deepspeed
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
deepspeed.init_distributed("gloo")
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
with deepspeed.zero.Init(config_dict_or_path=config):
    module = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.LayerNorm(3))
assert all(parameter.shape == (0,) for parameter in module.parameters())
print([[tuple(parameter.ds_shape) for parameter in group["params"]] for group in parameter_groups(module)])
"""


@pytest.mark.timeout(500)
def test_matrices_decay_that_zero_3_has_cut_up_already(tmp_path):
    code, output = run(["-c", ZERO_INIT], tmp_path, python=warm_python())
    assert code == 0, output
    assert output.splitlines()[-1] == "[[(3, 5)], [(3,), (3,), (3,)]]"


# ---- two real ranks

CURVES = '''
import json, sys
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from dlnb.optim import describe_optimizer, provide_optimizers
from dlnb.strategy import build_strategy

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(13, 31), torch.nn.LayerNorm(31), torch.nn.Linear(31, 7))

    def training_step(self, batch, index):
        return self.net(batch).square().mean()

class Rates(Callback):
    """Every learning rate in use when the innermost optimizer steps; DeepSpeed lets it step once for each group."""
    def on_train_start(self, trainer, module):
        self.rates, self.name = {}, describe_optimizer(trainer.optimizers[0])
        optimizer = trainer.optimizers[0]
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        optimizer.register_step_pre_hook(self.note)

    def on_train_batch_start(self, trainer, module, batch, index):
        self.when = f"epoch {trainer.current_epoch} batch {index}"

    def note(self, optimizer, *_):
        used = {group["lr"] for group in optimizer.param_groups}
        self.rates[self.when] = sorted(used.union(self.rates.get(self.when, [])))

for name in sys.argv[1:]:
    seed_everything(1, verbose=False)
    module, rates = provide_optimizers(Net(), lr=0.5, warmup_ratio=0.25, eta_min_ratio=0.1), Rates()
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(strategy=build_strategy(name, "cpu"), accelerator="cpu", devices=2, max_epochs=2,
                      accumulate_grad_batches=2, callbacks=rates, **off)
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(192, 13), batch_size=8))
    with open(f"{name}-{trainer.global_rank}.json", "w") as file:
        json.dump({"optimizer": rates.name, "rates": rates.rates, "steps": trainer.global_step}, file)
'''
STRATEGIES = ["ddp", "deepspeed_stage_2", "deepspeed_stage_3", "deepspeed_stage_2_offload"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    assert optim.build_problem("DeepSpeedCPUAdam", "cpu") == ""  # compiled before the clock runs
    folder = tmp_path_factory.mktemp("curves")
    (folder / "train.py").write_text(CURVES)
    code, output = run(["train.py", *STRATEGIES], folder, timeout=280, python=warm_python())
    assert code == 0, output
    return records_of_both_ranks(folder, STRATEGIES)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.soak
def test_the_learning_rate_curve_is_the_same_under_every_strategy(name, trained):
    for record in trained[name]:
        assert record["steps"] == 12  # 12 batches a rank an epoch, two batches a step, two epochs
        expected = [0.5 * optim.warmup_cosine(step, 12, warmup_steps=3, eta_min_ratio=0.1) for step in range(12)]
        ends = [f"epoch {epoch} batch {index}" for epoch in range(2) for index in range(1, 12, 2)]
        assert record["rates"] == {end: [rate] for end, rate in zip(ends, expected)}


@pytest.mark.timeout(400)
def test_the_optimizer_is_chosen_from_the_trainers_strategy(trained):
    chosen = {name: {record["optimizer"] for record in records} for name, records in trained.items()}
    fused = {"torch.optim.AdamW(fused=True)"}
    assert chosen == {**dict.fromkeys(STRATEGIES, fused), "deepspeed_stage_2_offload": {"deepspeed DeepSpeedCPUAdam"}}
