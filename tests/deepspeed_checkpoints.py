"""Real DeepSpeed checkpoints, many a second: CPU ranks that stay, and train and save what they are told.

In a test:

    with DeepSpeedRanks(world_size=2) as ranks:
        checkpoint = ranks.train(Spec(stage=3, shapes=[(3, 5), (7,)]), tmp_path / "checkpoint")
    expected = reference(checkpoint)
"""

import gc
import importlib
import io
import logging
import math
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
import warnings
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import torch

PRELOADED = ["deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.module_inject.auto_ep_layer"]


@dataclass
class Spec:
    "What to train and save. Parameter i of `shapes` is called p<i>."

    stage: int = 3  # of ZeRO; 0: DeepSpeed without ZeRO
    precision: str = "fp32"  # fp32, bf16 or fp16
    shapes: list[tuple[int, ...]] = field(default_factory=lambda: [(3, 5), (7,)])
    groups: list[list[int]] | int | None = None  # the optimizer's, by number of parameter; so many; None: one
    frozen: list[int] = field(default_factory=list)  # parameters without a gradient
    tied: bool = False  # the first trained parameter is there again, as "again" and in a module "other"
    buffers: bool = False  # a float32, a bfloat16, an integer and a boolean one, and one that is not saved
    offload: bool = False  # the optimizer, to the CPU's memory
    exclude_frozen: bool = False  # `save_checkpoint(exclude_frozen_parameters=True)`
    steps: int = 1  # of the optimizer
    seed: int = 0  # of weights and data
    lr: float = 0.1
    tag: str = "step"  # the folder in the checkpoint
    sub_group_size: int = 8  # stage 3: elements of a rank; a parameter that reaches it ends a sub-group
    persistence_threshold: int = 0  # stage 3: parameters of fewer elements are kept whole while training
    round_robin: bool = False  # stage 1 and 2: `round_robin_gradients`, which orders the parameters anew
    alignment: bool = False  # stage 1 and 2: `parameter_alignment`, with padding between parameters
    zero_init: bool = False  # stage 3: the model is built inside `deepspeed.zero.Init`
    fp32_gradients: bool = False  # bf16: `grad_accum_dtype`; stage 1 then has another optimizer, BF16_Optimizer

    def trained(self) -> list[int]:
        "The numbers of the parameters with a gradient."
        return [number for number in range(len(self.shapes)) if number not in self.frozen]

    def group_numbers(self) -> list[list[int]]:
        "The parameters of each of the optimizer's groups."
        if isinstance(self.groups, int):
            return [self.trained()[start :: self.groups] for start in range(self.groups)]
        return [self.trained()] if self.groups is None else self.groups

    def optimized(self) -> list[int]:
        "The numbers of the parameters that the optimizer changes; DeepSpeed leaves out those without elements."
        grouped = {number for group in self.group_numbers() for number in group}
        return [number for number in self.trained() if number in grouped and math.prod(self.shapes[number])]

    def names(self) -> set[str]:
        "The keys of the model's `state_dict`, without what is left out."
        parameters = {f"p{i}" for i in range(len(self.shapes)) if not (self.exclude_frozen and i in self.frozen)}
        tied = {"again", "other.again"} if self.tied else set()
        return parameters | tied | ({"running", "narrow", "count", "mask"} if self.buffers else set())


class Net(torch.nn.Module):
    "Parameters of any shapes, and the distance to random targets as their loss."

    def __init__(self, spec: Spec):
        super().__init__()
        generator = torch.Generator().manual_seed(spec.seed)
        for number, shape in enumerate(spec.shapes):
            values = torch.randn(shape, generator=generator)
            parameter = torch.nn.Parameter(values, requires_grad=number not in spec.frozen)
            if not shape:
                # DeepSpeed 0.19.8 fails to send a parameter without axes to the other ranks; one with this attribute it
                # does not send, and the ranks draw the same. In stage 3, and in fp32 without ZeRO, it still fails.
                parameter.ds_optim_param = True
            self.register_parameter(f"p{number}", parameter)
        if spec.tied:
            self.again = getattr(self, f"p{spec.trained()[0]}")
            self.other = torch.nn.Module()
            self.other.again = self.again
        if spec.buffers:
            self.register_buffer("running", torch.randn(3, generator=generator))
            self.register_buffer("narrow", torch.randn(2, 2, generator=generator).bfloat16())
            self.register_buffer("count", torch.tensor(2**24 + 1))  # the first integer that float32 does not have
            self.register_buffer("mask", torch.tensor([True, False]))
            self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        targets = [torch.randn(parameter.shape, generator=generator).to(parameter.dtype) for parameter in trained]
        return sum((parameter - target).float().square().sum() for parameter, target in zip(trained, targets))


def configuration(spec: Spec) -> dict:
    "DeepSpeed's, with nothing in it that has to be compiled."
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = {
        "stage": spec.stage,
        "sub_group_size": spec.sub_group_size,
        "stage3_param_persistence_threshold": spec.persistence_threshold,
        "round_robin_gradients": spec.round_robin,
    }
    if "parameter_alignment" in DeepSpeedZeroConfig.model_fields:  # since 0.19.7
        zero["parameter_alignment"] = spec.alignment
    if spec.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    config["zero_force_ds_cpu_optimizer"] = False
    if spec.precision != "fp32":
        config[spec.precision] = {"enabled": True}
    if spec.precision == "fp16":
        config["fp16"]["loss_scale"] = 16  # the dynamic one starts so high that it skips the first steps
    if spec.fp32_gradients:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def build_engine(spec: Spec):
    "A DeepSpeed engine of a fresh model."
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=configuration(spec), enabled=spec.zero_init and spec.stage == 3):
        net = Net(spec)
    groups = [
        {"params": [getattr(net, f"p{number}") for number in numbers], "lr": spec.lr / (position + 1)}
        for position, numbers in enumerate(spec.group_numbers())
    ]
    optimizer = torch.optim.AdamW(groups, foreach=False)
    return deepspeed.initialize(model=net, optimizer=optimizer, config=configuration(spec), dist_init_required=False)[0]


def train_steps(engine, spec: Spec) -> None:
    "Raises `RuntimeError` where a loss is not finite or a step was not done: such a checkpoint would test less."
    for step in range(spec.steps):
        loss = engine(spec.seed * 1000 + step * 10 + torch.distributed.get_rank())
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss of step {step} is {loss.item()}")
        engine.backward(loss)
        engine.step()
    if engine.global_steps != spec.steps or engine.skipped_steps:
        raise RuntimeError(f"{engine.global_steps} steps, {engine.skipped_steps} of them skipped, and not {spec.steps}")


def in_compute_type(parameter: torch.nn.Parameter) -> torch.Tensor:
    "A parameter as the model computes with it, gathered from the ranks in stage 3."
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().clone()


def flat_masters(optimizer) -> dict[torch.nn.Parameter, torch.Tensor]:
    """The float32 weights of stage 1 and 2, from all ranks.

    DeepSpeed's own `safe_get_full_fp32_param` takes them from wrong places under `round_robin_gradients`.
    """
    found, groups = {}, zip(optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets)
    for (parameters, offsets), part in zip(groups, optimizer.single_partition_of_fp32_groups):
        parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, part.detach())
        flat = torch.cat(parts)
        for parameter, offset in zip(parameters, offsets):
            found[parameter] = flat[offset : offset + parameter.numel()].view(parameter.shape)
    return found


def masters(engine, spec: Spec) -> dict[torch.nn.Parameter, torch.Tensor]:
    "The float32 weights that ZeRO's optimizer keeps of the parameters that it trains."
    import deepspeed

    if spec.stage == 0:
        return {}
    if hasattr(engine.optimizer, "round_robin_bit16_groups"):
        return flat_masters(engine.optimizer)
    trained = [getattr(engine.module, f"p{number}") for number in spec.optimized()]
    whole = {parameter: deepspeed.utils.safe_get_full_fp32_param(parameter).detach() for parameter in trained}
    return {parameter: value.reshape(getattr(parameter, "ds_shape", parameter.shape)) for parameter, value in whole.items()}


def live_state(engine, spec: Spec) -> dict[str, torch.Tensor]:
    """What a consolidated checkpoint should hold, tied names among it, asked of the live engine and not of its files.

    Raises `RuntimeError` where the float32 weights are not those that the model computes with.
    """
    values = {parameter: in_compute_type(parameter) for parameter in engine.module.parameters()}
    for parameter, master in masters(engine, spec).items():
        if not torch.equal(master.to(parameter.dtype), values[parameter]):
            raise RuntimeError("the optimizer's weights are not the model's")
        values[parameter] = master.clone()
    state = {name: values[weight] for name, weight in engine.module.named_parameters(remove_duplicate=False)}
    for name, buffer in engine.module.named_buffers():
        state[name] = buffer.float() if buffer.is_floating_point() and spec.stage else buffer
    return {name: value for name, value in state.items() if name in spec.names()}


def train(spec: Spec, folder: str) -> None:
    "What each rank does."
    engine = build_engine(spec)
    train_steps(engine, spec)
    engine.save_checkpoint(folder, tag=spec.tag, exclude_frozen_parameters=spec.exclude_frozen)
    state = live_state(engine, spec)
    if torch.distributed.get_rank() == 0:
        torch.save(state, Path(folder) / "reference.pt")
    engine.destroy()


def reference(checkpoint: Path) -> dict[str, torch.Tensor]:
    "The weights that the ranks had when they saved `checkpoint`: in float32 where ZeRO trained them."
    return torch.load(checkpoint / "reference.pt")


def join(rank: int, world_size: int, store: str, timeout: float) -> None:
    "Become a rank of a gloo group, with a DeepSpeed that compiles nothing and is quiet."
    os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_SIZE": str(world_size)}
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    # It says no where the processor has no instructions for it; torch then computes the same in software.
    deepspeed.get_accelerator().is_fp16_supported = lambda: True
    limits = {"timeout": timedelta(seconds=timeout), "init_method": f"file://{store}"}
    deepspeed.init_distributed("gloo", False, verbose=False, rank=rank, world_size=world_size, **limits)


def serve(rank: int, world_size: int, store: str, timeout: float, pipe) -> None:
    "A rank's life: what to do comes in, None or an error's traceback goes out. Ends with the test's process."
    try:
        join(rank, world_size, store, timeout)
        pipe.send(None)
        gc.freeze()
        while job := pipe.recv():
            with redirect_stdout(io.StringIO()):  # DeepSpeed prints how much memory there is
                train(*job)
            gc.collect()
            gc.freeze()  # DeepSpeed's stage 3 keeps its engines, 0.1 MB each: let no later collection go through them
            pipe.send(None)
    except (EOFError, ConnectionError):
        pass
    except Exception:
        pipe.send(traceback.format_exc())


class DeepSpeedRanks:
    "Processes that are the ranks of one group, until `close`."

    def __init__(
        self,
        world_size: int,
        timeout: float = 60.0,  # seconds that a start, or one checkpoint, may take
    ):
        self.world_size, self.timeout = world_size, timeout
        self.pipes, self.processes = [], []
        self._start()

    def _start(self) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when the server of processes imports deepspeed
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.folder = tempfile.mkdtemp()
        for rank in range(self.world_size):
            here, there = context.Pipe()
            arguments = (rank, self.world_size, f"{self.folder}/store", self.timeout, there)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)
        self._wait_for_all(self.timeout, "the start")

    def train(self, spec: Spec, folder: Path, timeout: float | None = None) -> Path:
        """Have the ranks train and save. Returns `folder`.

        Raises `RuntimeError` with the traceback of the rank that failed, or with the exit code of one that died, and
        `TimeoutError` where they are not done in time. No rank is left then; the next call starts new ones.
        """
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            with suppress(OSError):  # of a rank that died meanwhile: the wait says so
                pipe.send((spec, str(folder)))
        self._wait_for_all(timeout or self.timeout, repr(spec))
        return Path(folder)

    def _wait_for_all(self, timeout: float, doing: str) -> None:
        "Until every rank has answered None. Otherwise, an interrupt among it, ends all of them and raises."
        try:
            failed, silent = self._answers(timeout)
            told = "\n".join(f"rank {rank}: {answer}" for rank, answer in sorted(failed.items()))
            if failed:
                raise RuntimeError(f"{doing}: {len(failed)} of {self.world_size} ranks failed.\n{told}")
            if silent:
                raise TimeoutError(f"{doing}: no answer from ranks {silent} in {timeout} s; all were ended")
        except BaseException:
            self.close()
            raise

    def _answers(self, timeout: float) -> tuple[dict[int, str], list[int]]:
        "What the ranks that failed say, and the ranks that say nothing."
        end, failed = time.monotonic() + timeout, {}
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        while waiting and (ready := wait(list(waiting), max(0, end - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                if answer := self._answer(rank):
                    failed[rank] = answer
                    end = min(end, time.monotonic() + 0.5)  # the first to fail need not be the first to say so
        return failed, sorted(waiting.values())

    def _answer(self, rank: int) -> str | None:
        try:
            return self.pipes[rank].recv()
        except (EOFError, OSError):
            self.processes[rank].join(5)
            return f"died with exit code {self.processes[rank].exitcode}"

    def close(self) -> None:
        "End all ranks. Raises `RuntimeError` where one is left."
        for process in self.processes:
            process.kill()
            process.join(10)
        for pipe in self.pipes:
            pipe.close()
        left = [process.pid for process in self.processes if process.exitcode is None]
        self.pipes, self.processes = [], []
        shutil.rmtree(self.folder, ignore_errors=True)
        if left:
            raise RuntimeError(f"ranks {left} could not be ended")

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()
