"""Blocks that are compiled train under every strategy, as the same blocks do uncompiled but for rounding, and resume exactly."""

import json
from pathlib import Path

import pytest
from conftest import ALL, HELPERS, TRAIN
from safetensors.torch import load_file
from torch.testing import assert_close

from dlnb.config import RunConfig

pytestmark = pytest.mark.timeout(600)
FINETUNED = HELPERS / "finetuned.py"
SHARED = dict(
    model=f"{FINETUNED}:Causal",
    data=f"{FINETUNED}:Tokens",
    accelerator="cpu",
    devices=2,
    max_steps=6,
    batch_size=4,
    optimizer="AdamW",
    monitor=None,
)
BLOCKS = ["GPT2Block"]


def weights(launch, root: Path, **settings) -> Path:
    _, folder = launch(TRAIN, None, root=str(root), **SHARED | settings)
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    return folder / "model.safetensors"


@pytest.mark.soak
@pytest.mark.parametrize("strategy", ["deepspeed_stage_3", *(["ddp"] if ALL else [])])
def test_compiled_blocks_train_and_resume_exactly(launch, tmp_path, monkeypatch, strategy):
    monkeypatch.chdir(tmp_path)
    more = dict(strategy=strategy, torch_compile=BLOCKS, save_every_n_steps=1)
    plain = weights(launch, tmp_path / "plain", strategy=strategy)
    whole = weights(launch, tmp_path / "whole", **more)
    assert_close(load_file(whole), load_file(plain), rtol=1e-3, atol=1e-5)
    Path("break").touch()
    with pytest.raises(Exception, match="interrupted on purpose"):
        weights(launch, tmp_path / "parts", **more)
    Path("break").unlink()
    assert weights(launch, tmp_path / "parts", **more).read_bytes() == whole.read_bytes() != plain.read_bytes()


def test_it_is_part_of_the_identity_where_it_is_given():
    plain, compiled = (RunConfig(**SHARED, torch_compile=names) for names in ([], "GPT2Block"))
    assert "torch_compile" not in plain.identity and compiled.identity["torch_compile"] == BLOCKS
    assert plain.hash != compiled.hash


def test_a_block_that_the_model_does_not_have_is_refused_before_the_first_step(launch, tmp_path):
    with pytest.raises(Exception, match="Did you mean 'GPT2Block'"):
        weights(launch, tmp_path, strategy="ddp", torch_compile=["GPTBlock"])
    assert not list(tmp_path.rglob("*.ckpt"))
