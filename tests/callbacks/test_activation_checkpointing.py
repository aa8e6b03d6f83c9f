"""Activations that are computed again change nothing but the memory: the same bytes under every strategy, of models of other authors too."""

import json
from pathlib import Path

import pytest
from conftest import HELPERS, TRAIN

pytestmark = pytest.mark.timeout(400)
GPT = dict(
    model="dlnb.examples:ByteGPT", model_args={"num_layers": 3, "embed_dim": 32, "num_heads": 2, "context_length": 32, "dropout": 0.1}
)
GPT |= dict(data="dlnb.examples:PythonSource", data_args={"context_length": 32})
HUGGING_FACE = dict(model=f"{HELPERS / 'finetuned.py'}:Causal", data=f"{HELPERS / 'finetuned.py'}:Tokens")
SHARED = dict(accelerator="cpu", devices=2, max_steps=4, batch_size=4, optimizer="AdamW", monitor=None)


def weights(launch, root: Path, **settings) -> bytes:
    _, folder = launch(TRAIN, root / "out.ipynb", root=str(root / "runs"), **SHARED | settings)
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "strategy", ["deepspeed_stage_3", *(pytest.param(name, marks=pytest.mark.soak) for name in ("ddp", "deepspeed_stage_2"))]
)
@pytest.mark.parametrize("project", [GPT, HUGGING_FACE], ids=["blocks", "Hugging Face"])
def test_the_bytes_are_those_of_a_training_that_keeps_all(launch, tmp_path, strategy, project):
    found = []
    for names in ([], ["block"]):
        (root := tmp_path / str(names)).mkdir()
        found.append(weights(launch, root, strategy=strategy, activation_checkpointing=names, **project))
    assert found[0] == found[1]


def test_a_block_that_the_model_does_not_have_is_refused_before_the_first_step(launch, tmp_path):
    with pytest.raises(Exception, match="Did you mean 'TransformerBlock'"):
        weights(launch, tmp_path, strategy="ddp", activation_checkpointing=["Transformer_Block"], **GPT)
    assert not list(tmp_path.rglob("*.ckpt"))
