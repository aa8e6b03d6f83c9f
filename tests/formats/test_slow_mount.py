"""Checkpoints on a filesystem where each read takes milliseconds, as on a network. How long that takes is in `nbs/benchmarks/consolidate.ipynb`."""

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


def test_a_checkpoint_on_a_slow_mount_gives_the_same_bytes(mounted, tmp_path):
    out = tmp_path / "model.safetensors"
    with mounted(0.02):
        consolidate(tmp_path / "mount" / "model.ckpt", out)
    assert out.read_bytes() == (tmp_path / "disk" / "expected.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_source_and_result_on_one_slow_mount(dtype, mounted, tmp_path):
    with mounted(0.002):
        consolidate(tmp_path / "mount" / "model.ckpt", tmp_path / "mount" / "new.safetensors", dtype=dtype)
    found = load_file(tmp_path / "disk" / "new.safetensors")
    assert found.keys() == WEIGHTS.keys()
    for name, weight in WEIGHTS.items():
        assert torch.equal(found[name], weight.to(torch.bfloat16) if dtype else weight)
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"model.ckpt", "expected.safetensors", "new.safetensors"}
