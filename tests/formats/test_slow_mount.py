"""A checkpoint on a filesystem where each read takes 20 ms, as on a network, is consolidated as fast as `cp` copies its weights."""

import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file
from slow_mount import slow_mount

from dlnb.consolidate import consolidate

pytestmark = pytest.mark.timeout(120)
WEIGHTS = {f"layer{number}.weight": torch.randn(1 << 18, generator=torch.Generator().manual_seed(number)) for number in range(64)}


@pytest.fixture
def mounted(tmp_path):
    "Mounts a folder with a checkpoint of 64 MiB of weights, and as much again that is not needed."
    for name in ("disk", "mount"):
        (tmp_path / name).mkdir()
    others = {name: weight + 1 for name, weight in WEIGHTS.items()}
    torch.save({"state_dict": WEIGHTS, "optimizer_states": others}, tmp_path / "disk" / "model.ckpt")
    consolidate(tmp_path / "disk" / "model.ckpt", tmp_path / "disk" / "expected.safetensors")

    def mounted(seconds: float):
        return slow_mount(tmp_path / "disk", tmp_path / "mount", seconds)

    try:
        with mounted(0):
            pass
    except OSError as error:
        pytest.skip(f"FUSE cannot be mounted here: {error}")
    return mounted


def seconds_of(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def test_a_slow_mount_takes_no_longer_than_cp(mounted, tmp_path):
    mount, out = tmp_path / "mount", tmp_path / "model.safetensors"
    with mounted(0.02):
        copying = seconds_of(lambda: subprocess.run(["cp", mount / "expected.safetensors", tmp_path / "copy"], check=True))
        taken = seconds_of(lambda: consolidate(mount / "model.ckpt", out))
    assert out.read_bytes() == (tmp_path / "copy").read_bytes()
    assert taken < 1.3 * copying, f"{taken:.2f} s; cp took {copying:.2f} s"


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_source_and_result_on_one_slow_mount(dtype, mounted, tmp_path):
    with mounted(0.002):
        consolidate(tmp_path / "mount" / "model.ckpt", tmp_path / "mount" / "new.safetensors", dtype=dtype)
    found = load_file(tmp_path / "disk" / "new.safetensors")
    assert found.keys() == WEIGHTS.keys()
    for name, weight in WEIGHTS.items():
        assert torch.equal(found[name], weight.to(torch.bfloat16) if dtype else weight)
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"model.ckpt", "expected.safetensors", "new.safetensors"}
