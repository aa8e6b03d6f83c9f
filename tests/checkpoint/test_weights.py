"""A training that starts from weights from elsewhere, under any strategy, and checkpoints that hold what is trained alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ALL, HELPERS, TRAIN
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")

from finetuned import Adapted, Bottleneck, Causal, Later, gpt2
from start_memory import LAYERS, WIDTH

from dlnb.checkpoint.manifest import partial_of, read_manifest
from dlnb.checkpoint.pretrained import fill_model, find_pretrained
from dlnb.config import RunConfig
from dlnb.formats.reader import read_layout
from dlnb.infer import evaluate
from dlnb.trainer import fit

pytestmark = pytest.mark.timeout(400)
HERE = HELPERS / "finetuned.py"
TWO = {"ddp": dict(strategy="ddp", devices=2), "zero_3": dict(strategy="deepspeed_stage_3", devices=2)}
TWO["zero_2"] = dict(strategy="deepspeed_stage_2", devices=2)
LONG = pytest.mark.soak
LATER = [("zero_2", None), ("zero_3", "base"), *([("ddp", "base"), ("zero_2", "base"), ("zero_3", None)] if ALL else [])]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    "A folder with the model's source and its pretrained weights, as the current one."
    shutil.copy(HERE, tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(7)
    gpt2().save_pretrained("base")
    return tmp_path


def settings(model: str = "Causal", **more) -> dict:
    shared = dict(data="finetuned.py:Tokens", accelerator="cpu", devices=1, batch_size=4, max_epochs=2, optimizer="AdamW")
    return dict(model=f"finetuned.py:{model}", **shared) | more


def one(model: str = "Causal", **more) -> Path:
    "Train on one device, in this process."
    return fit(RunConfig(**settings(model, trainer_args={"enable_progress_bar": False}) | more)).folder


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def metrics_of(run: Path, **more) -> dict:
    return evaluate(run, accelerator="cpu", devices=1, trainer_args={"enable_progress_bar": False}, **more).metrics


def base_weights() -> dict[str, torch.Tensor]:
    return {f"model.{name}": tensor for name, tensor in load_file("base/model.safetensors").items()}


# What a training starts from


def test_ddp_and_zero_3_start_from_a_folder_of_hugging_face_and_train_to_the_same_bytes(launch, here):
    still = dict(weights="base", lr=1e-12, weight_decay=0.0)
    runs = [launch(TRAIN, f"{name}.ipynb", **settings(**still, **TWO[name]))[1] for name in ("ddp", "zero_3")]
    assert_same(*map(weights_of, runs))
    for name, tensor in weights_of(runs[0]).items():  # a step of this learning rate moves nothing far
        torch.testing.assert_close(tensor, base_weights()[name], atol=1e-9, rtol=0)


@LONG
@pytest.mark.parametrize("model", ["Causal", "Later"])
@pytest.mark.parametrize("source", ["run", "checkpoint", "zero_3"])
def test_ddp_and_zero_3_train_to_the_same_bytes_from_a_run_a_checkpoint_and_shards(launch, here, source, model):
    if source == "zero_3":
        trained = launch(TRAIN, "first.ipynb", **settings(weights="base", max_epochs=1, **TWO["zero_3"]))[1]
    else:
        trained = one(max_epochs=1)
    weights = str(trained if source == "run" else trained / "checkpoints" / "last.ckpt")
    runs = [launch(TRAIN, f"{name}.ipynb", **settings(model, weights=weights, **TWO[name]))[1] for name in ("ddp", "zero_3")]
    assert_same(*map(weights_of, runs))
    assert weights_of(runs[0]).keys() == weights_of(trained).keys()


def stored_otherwise(kind: str) -> str:
    "The same weights in another kind of file."
    model = gpt2()
    state = model.state_dict()
    if kind == "lightning":
        torch.save({"state_dict": {f"model._orig_mod.{name}": tensor for name, tensor in state.items()}}, "lightning.ckpt")
        return "lightning.ckpt"
    if kind == "data parallel":
        torch.save({f"module.{name}": tensor for name, tensor in state.items()}, "parallel.pt")
        return "parallel.pt"
    if kind == "sharded":
        model.save_pretrained("sharded", max_shard_size="5KB")
        return "sharded"
    Path("old").mkdir()
    where = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(state)}
    for file in {*where.values()}:
        torch.save({name: state[name] for name in where if where[name] == file}, f"old/{file}")
    Path("old/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    return "old"


@pytest.mark.parametrize("kind", ["lightning", "data parallel", "sharded", "old index"])
def test_names_are_matched_by_rule_in_files_of_every_kind(here, kind):
    torch.manual_seed(3)
    path = stored_otherwise(kind)
    torch.manual_seed(3)
    expected = gpt2().state_dict()
    for model in (Causal(), Adapted(), Bottleneck()):
        found = find_pretrained(model, path)
        fill_model(model, found.match.weights)
        new = {name for name, tensor in model.named_parameters() if "lora" in name or "adapter" in name}
        assert {*found.match.new} == new and not found.match.unused and not found.match.reshaped
        for name, tensor in model.state_dict().items():
            if name not in new:
                plain = name.replace("base_layer.", "").removeprefix("model.").removeprefix("base_model.model.")
                assert torch.equal(tensor, expected[plain]), name


def test_a_head_of_another_size_is_left_new_and_named(here, capsys):
    run = one(weights="base", model_args={"vocabulary": 100}, max_epochs=1, lr=1e-12, weight_decay=0.0)
    assert "Of another shape: model.transformer.wte.weight (4096, 16) for (100, 16)" in capsys.readouterr().out
    trained, base = weights_of(run), base_weights()
    assert [name for name in base if trained[name].shape == base[name].shape and not torch.allclose(trained[name], base[name])] == []


def test_a_resume_ignores_the_weights_and_another_place_of_them_is_another_run(here):
    run = one(weights="base", max_epochs=1)
    before = json.loads((run / "run.json").read_text())["step"]
    shutil.rmtree("base")
    assert one(weights="base", max_epochs=2) == run
    assert json.loads((run / "run.json").read_text())["step"] == 2 * before
    with pytest.raises(ValueError, match="weights='other': there is no such file or folder"):
        one(weights="other")


def test_what_fits_nothing_is_refused_before_anything_is_written(here):
    save_file({"somebody.elses": torch.zeros(3)}, "other.safetensors")
    with pytest.raises(ValueError, match="has nothing for Causal: the file has somebody.elses; the model model.transformer"):
        one(weights="other.safetensors")
    gpt2(n_embd=8).save_pretrained("narrow")
    with pytest.raises(ValueError, match="of another shape: model.transformer.wte.weight"):
        one(weights="narrow")
    assert not list(here.rglob("*.ckpt"))


# Checkpoints of what is trained


def check_partial(run: Path, weights: str | None, trained: set[str]) -> None:
    assert {*weights_of(run)} == trained
    for path in (run / "model.safetensors", *sorted((run / "checkpoints").glob("*.ckpt"))):
        partial = partial_of(read_layout(path))
        assert partial.left_out and all(partial.left_out.values()) and {*read_layout(path).weights} == trained
        assert partial.weights == (str(Path(weights).resolve()) if weights else None)
    size = (
        sum(path.stat().st_size for path in (run / "checkpoints" / "last.ckpt").rglob("*"))
        or (run / "checkpoints/last.ckpt").stat().st_size
    )
    assert size < 200_000, "the embeddings alone are 262,144 bytes"


LORA = {f"model.base_model.model.transformer.h.{n}.attn.c_attn.lora_{part}.default.weight" for n in (0, 1) for part in "AB"}


@pytest.mark.parametrize("model, trained", [("Adapted", LORA), ("Bottleneck", {"adapter.weight", "adapter.bias"})])
@pytest.mark.parametrize("weights", [pytest.param("base", marks=LONG), None])
def test_an_adapter_alone_is_saved_and_tested_over_its_base(here, model, trained, weights):
    partial = one(model, weights=weights, exclude_frozen_parameters=True)
    full = one(model, weights=weights, resume="never")
    check_partial(partial, weights, trained)
    for name, tensor in weights_of(partial).items():
        assert torch.equal(tensor, weights_of(full)[name])
    assert metrics_of(partial) == metrics_of(full)
    assert metrics_of(partial / "checkpoints" / "last.ckpt") == metrics_of(full / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("strategy, weights", [("ddp", None), *(pytest.param(*case, marks=LONG) for case in LATER)])
def test_an_interrupted_training_of_an_adapter_resumes_to_the_same_bytes(launch, here, strategy, weights):
    excluding = {"exclude_frozen_parameters": True}
    excluding = {"strategy_args": excluding} if strategy == "zero_3" else excluding  # by Lightning's own option
    more = settings("Adapted", weights=weights, save_every_n_steps=1, **TWO[strategy], **excluding)
    whole = launch(TRAIN, "whole.ipynb", **more, root="whole")[1]
    (here / "break").touch()
    with pytest.raises(Exception, match="interrupted on purpose"):
        launch(TRAIN, "broken.ipynb", **more)
    (here / "break").unlink()
    resumed = launch(TRAIN, "again.ipynb", **more)[1]
    record = json.loads((resumed / "run.json").read_text())
    assert record["attempts"] == 2 and record["earlier"][0]["step"] >= 2
    check_partial(resumed, weights, LORA)
    assert_same(weights_of(whole), weights_of(resumed))
    assert metrics_of(resumed) == metrics_of(whole)


@LONG
@pytest.mark.parametrize("weights", ["base", None])
def test_an_adapter_of_ddp_is_resumed_under_zero_3_and_the_other_way_round(launch, here, weights):
    first = {
        name: launch(
            TRAIN, f"{name}.ipynb", **settings("Adapted", weights=weights, max_epochs=1, exclude_frozen_parameters=True, **TWO[name])
        )[1]
        for name in ("ddp", "zero_3")
    }
    for name, other in (("ddp", "zero_3"), ("zero_3", "ddp")):
        more = dict(max_epochs=2, exclude_frozen_parameters=True, resume=str(first[name]), **TWO[other])
        resumed = launch(TRAIN, f"{other}-{name}.ipynb", **settings("Adapted", **more))[1]
        check_partial(resumed, weights, LORA)
        assert json.loads((resumed / "run.json").read_text())["step"] == 4
        assert metrics_of(resumed)["test_loss"] == pytest.approx(metrics_of(first[name])["test_loss"], abs=0.1)


def test_a_base_that_is_gone_or_has_changed_is_refused(here):
    run = one("Adapted", weights="base", exclude_frozen_parameters=True, max_epochs=1)
    shutil.move("base", "aside")
    for again in (lambda: metrics_of(run), lambda: one("Adapted", weights="base", exclude_frozen_parameters=True)):
        with pytest.raises(ValueError, match="29 frozen parameters, and weights='base', which has them, is not there"):
            again()
    assert metrics_of(run, weights="aside")
    gpt2().save_pretrained("base")
    for again in (lambda: metrics_of(run), lambda: one("Adapted", weights="base", exclude_frozen_parameters=True)):
        with pytest.raises(ValueError, match="come from weights='base', and .* of them have changed since"):
            again()


def test_values_of_the_constructor_that_are_others_now_are_refused(here):
    run = one("Bottleneck", exclude_frozen_parameters=True, max_epochs=1)
    with pytest.raises(ValueError, match="come from the constructor of Bottleneck with the run's seed, and .* of them have changed since"):
        metrics_of(run, seed=1)


def test_nothing_is_left_out_after_a_checkpoint_that_holds_all(here):
    one("Bottleneck", max_epochs=1)
    with pytest.raises(ValueError, match="what is frozen now may have been trained before"):
        one("Bottleneck", exclude_frozen_parameters=True)


def test_a_training_starts_from_an_adapter_and_its_base(here):
    first = one("Adapted", weights="base", exclude_frozen_parameters=True, max_epochs=1)
    second = one("Adapted", weights=str(first), exclude_frozen_parameters=True, max_epochs=1, lr=1e-12, weight_decay=0.0)
    assert metrics_of(second)["test_loss"] == pytest.approx(metrics_of(first)["test_loss"], abs=1e-5)
    assert partial_of(read_layout(second)).weights == str(first.resolve())


def test_a_stock_checkpoint_without_its_base_is_tested_over_the_weights_that_are_given(here):
    run = one("Adapted", weights="base", max_epochs=1)
    save_file({name: tensor for name, tensor in weights_of(run).items() if name in LORA}, "adapter.safetensors")
    more = dict(model="finetuned.py:Adapted", data="finetuned.py:Tokens", batch_size=4)
    with pytest.raises(ValueError, match="missing: model.base_model.model.transformer.wte.weight"):
        metrics_of(Path("adapter.safetensors"), **more)
    assert metrics_of(Path("adapter.safetensors"), **more, weights="base") == metrics_of(run)
    assert read_manifest(run / "checkpoints" / "last.ckpt").partial is None


def test_a_model_that_is_built_later_takes_weights_and_leaves_none_out_unseen(here):
    run = one("Later", weights="base", lr=1e-12, weight_decay=0.0, max_epochs=1)
    for name, tensor in weights_of(run).items():
        torch.testing.assert_close(tensor, base_weights()[name], atol=1e-9, rtol=0)
    assert Later().state_dict() == {}


@LONG
def test_two_ranks_of_zero_3_need_an_eighth_of_the_file_beside_the_parts_of_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = {f"layers.{number}.weight": torch.randn(WIDTH, WIDTH) for number in range(LAYERS)}
    save_file(weights, "wide.safetensors")
    command = [sys.executable, str(HERE.with_name("start_memory.py")), "wide.safetensors"]
    size, needed = Path("wide.safetensors").stat().st_size, []
    for _ in range(3):  # what else a process holds at its peak varies by some megabytes
        subprocess.run(command, check=True, timeout=300, capture_output=True)
        ranks = [json.loads(Path(f"rank-{rank}.json").read_text()) for rank in (0, 1)]
        assert sum(rank["sum"] for rank in ranks) == pytest.approx(sum(weight.double().sum().item() for weight in weights.values()))
        needed.append(sum(rank["peak"] - rank["before"] for rank in ranks))
    assert size > 200e6 and min(needed) < 0.2 * size
