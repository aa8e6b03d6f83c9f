"""Projects that know nothing of dlnb: each is trained, tested, predicted, tuned, killed and resumed as it is."""

import json
import shutil
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import ALL, TRAIN
from projects import HERE, PROJECTS, Project
from safetensors.torch import load_file

INFER, TUNE = TRAIN.with_name("infer.ipynb"), TRAIN.with_name("tune.ipynb")
QUICK = ("notebook", "nested")  # in the default suite
# With SOAK=all each of them; it takes three quarters of an hour. Else those where it could differ.
SEARCHED = ("notebook", "nested", "gan", "lora")
UNDER_DDP = ("gan", "stream")
UNDER_ZERO = ("nested", "lora", "meta", "averaging", "stream", "gan")
LONG = pytest.mark.soak
pytestmark = pytest.mark.timeout(600)


def of(*names: str):
    "The projects of these names, or all."
    return [pytest.param(project, id=project.name) for project in PROJECTS if ALL or project.name in names]


def by_strategy():
    chosen = {"ddp": UNDER_DDP, "deepspeed_stage_3": UNDER_ZERO}
    return [
        pytest.param(project, strategy, id=f"{project.name}-{strategy}")
        for strategy, names in chosen.items()
        for project in PROJECTS
        if ALL or project.name in names
    ]


@pytest.fixture
def here(project: Project, tmp_path, monkeypatch) -> Path:
    "The project's folder, as the user's current one."
    for package in project.needs:
        pytest.importorskip(package)
    folder = shutil.copytree(HERE / project.name, tmp_path / project.name)
    monkeypatch.chdir(folder)
    return folder


def settings(project: Project, **more) -> dict:
    if "strategy" in more:
        more["strategy"] = project.instead.get(more["strategy"], more["strategy"])
    return dict(model=project.model, data=project.data, accelerator="cpu", batch_size=8, max_epochs=2, **project.settings) | more


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def train(launch, project: Project, name: str = "train", **more) -> Path:
    _, folder = launch(TRAIN, f"{name}.ipynb", **settings(project, **more))
    assert record(folder)["status"] == "finished"
    return folder


def infer(launch, folder: Path, project: Project, ranks: int) -> None:
    _, tested = launch(INFER, f"infer-{ranks}.ipynb", run=str(folder), accelerator="cpu", devices=ranks)
    assert json.loads((tested / "metrics.json").read_text())
    assert (tested / "predictions.parquet").is_file() == project.predicts


@pytest.mark.parametrize(
    "project", [pytest.param(project, id=project.name, marks=[] if project.name in QUICK else [LONG]) for project in PROJECTS]
)
def test_it_trains_is_tested_and_predicts(launch, project, here):
    folder = train(launch, project, devices=1)
    assert load_file(folder / "model.safetensors")
    for ranks in (1, 2):
        infer(launch, folder, project, ranks)


@LONG
@pytest.mark.parametrize("project", of(*SEARCHED))
def test_a_search_varies_it(launch, project, here):
    launch(TUNE, "tune.ipynb", **settings(project, search_space=project.space, n_trials=2, max_epochs=1))
    (best,) = (here / "runs").rglob("best_params.json")
    assert set(json.loads(best.read_text())["params"]) == set(project.space)


def kill(job) -> None:
    "End papermill, its kernel and its ranks at once."
    job.look()
    for process in [psutil.Process(job.process.pid), *job.family.values()]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    job.process.wait()


@LONG
@pytest.mark.parametrize("project, strategy", by_strategy())
def test_two_ranks_train_it_and_a_kill_loses_nothing(launch, papermill, project, here, strategy):
    more = dict(strategy=strategy, devices=2, max_epochs=8, save_every_n_steps=1)
    if sentence := project.refused.get(strategy):
        with pytest.raises(Exception, match=sentence):
            train(launch, project, **more)
        assert not list(here.rglob("*.ckpt"))
        return
    undisturbed = train(launch, project, "whole", root="whole", **more)
    infer(launch, undisturbed, project, 1)
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings(project, **more).items()}
    job = papermill(TRAIN, "--cwd", str(here), **texts)
    while not list((here / "runs").glob("*/train/*/*/checkpoints/last.ckpt")) and job.process.poll() is None:
        job.look()
        time.sleep(0.02)
    kill(job)
    resumed = train(launch, project, "again", **more)
    assert record(resumed)["attempts"] == 2, "the kill came too late"
    assert record(resumed)["step"] == record(undisturbed)["step"]
    one, other = (load_file(folder / "model.safetensors") for folder in (undisturbed, resumed))
    assert all((one[name] == other[name]).all() for name in one), "the weights differ from those of an undisturbed training"
