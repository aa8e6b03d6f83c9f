"""Real DeepSpeed checkpoints, many a minute: ranks that stay, and train what they are told."""

import multiprocessing
import os
import socket
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class Spec:
    "What to train. Parameter i of `shapes` is called p<i>."

    stage: int = 3
    precision: str = "fp32"  # fp32, bf16 or fp16
    shapes: list[tuple[int, ...]] = field(default_factory=lambda: [(3, 5), (7,)])
    groups: list[list[int]] | None = None  # the optimizer's, by number of parameter; None: one group
    frozen: list[int] = field(default_factory=list)
    tied: bool = False  # the first trained parameter is registered again, as "again" and in another module
    buffers: bool = False  # a float, an integer and a boolean one
    offload: bool = False  # of the optimizer
    exclude_frozen: bool = False
    steps: int = 1
    seed: int = 0
    tag: str = "step"

    def names(self) -> set[str]:
        "The keys of the model's `state_dict`, without what is left out."
        parameters = {f"p{i}" for i in range(len(self.shapes)) if not (self.exclude_frozen and i in self.frozen)}
        return parameters | ({"again", "other.again"} if self.tied else set()) | ({"running", "count", "mask"} if self.buffers else set())


class Net(torch.nn.Module):
    "Parameters of any shape, drawn to zero."

    def __init__(self, spec: Spec):
        super().__init__()
        generator = torch.Generator().manual_seed(spec.seed)
        for number, shape in enumerate(spec.shapes):
            values = torch.randn(shape, generator=generator)
            self.register_parameter(f"p{number}", torch.nn.Parameter(values, requires_grad=number not in spec.frozen))
        if spec.tied:
            self.again = getattr(self, f"p{min(set(range(len(spec.shapes))) - set(spec.frozen))}")
            self.other = torch.nn.Module()
            self.other.again = self.again
        if spec.buffers:
            self.register_buffer("running", torch.randn(3, generator=generator))
            self.register_buffer("count", torch.tensor(2**24 + 1))
            self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, scale: torch.Tensor) -> torch.Tensor:
        return sum((parameter * scale).square().sum() for parameter in self.parameters())


def configuration(spec: Spec) -> dict:
    zero = {"stage": spec.stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 40}
    if spec.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    config |= {"zero_force_ds_cpu_optimizer": False}
    if spec.precision != "fp32":
        config[spec.precision] = {"enabled": True}
    return config


def train(spec: Spec, folder: str) -> None:
    import deepspeed

    net = Net(spec)
    groups = spec.groups or [[i for i in range(len(spec.shapes)) if i not in spec.frozen]]
    parameters = [
        {"params": [getattr(net, f"p{i}") for i in group], "lr": 0.1 / (n + 1)} for n, group in enumerate(groups)
    ]
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=torch.optim.AdamW(parameters), config=configuration(spec), dist_init_required=False
    )
    for step in range(spec.steps):
        scale = torch.tensor(1.0 + step + torch.distributed.get_rank(), dtype=next(net.parameters()).dtype)
        engine.backward(engine(scale))
        engine.step()
    engine.save_checkpoint(folder, tag=spec.tag, exclude_frozen_parameters=spec.exclude_frozen)
    engine.destroy()


def serve(rank: int, world_size: int, port: int, pipe) -> None:
    "A rank's life: a spec comes in, None or an error's traceback goes out."
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_SIZE": str(world_size)}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    from dlnb.strategy import CPUDeepSpeedStrategy

    CPUDeepSpeedStrategy(stage=3)  # binds DeepSpeed to the CPU, without a compiled operation
    import deepspeed

    deepspeed.get_accelerator().is_fp16_supported = lambda: True  # torch can compute in it, if slowly
    deepspeed.init_distributed("gloo", verbose=False)
    while (job := pipe.recv()) is not None:
        try:
            train(*job)
            pipe.send(None)
        except Exception:
            pipe.send(traceback.format_exc())
    torch.distributed.destroy_process_group()


class DeepSpeedRanks:
    "Processes that are ranks of one group."

    def __init__(self, world_size: int):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "deepspeed", "dlnb.strategy"])
        os.environ["DS_ACCELERATOR"] = "cpu"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            here, there = context.Pipe()
            self.pipes.append(here)
            self.processes.append(context.Process(target=serve, args=(rank, world_size, port, there), daemon=True))
            self.processes[-1].start()
            there.close()

    def train(self, spec: Spec, folder: Path, timeout: float = 90) -> Path:
        "Have the ranks train and save; raises `RuntimeError` with the traceback of one that fails."
        for pipe in self.pipes:
            pipe.send((spec, str(folder)))
        for rank, pipe in enumerate(self.pipes):
            answer = pipe.recv() if pipe.poll(timeout) else f"no answer in {timeout} s"
            if answer:
                self.close()
                raise RuntimeError(f"rank {rank} of {len(self.pipes)}, {spec}: {answer}")
        return Path(folder)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join(10)
            assert not process.is_alive()
