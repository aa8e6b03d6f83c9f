"""Projects that know nothing of dlnb: each is trained, tested, predicted, tuned, killed and resumed as it is."""

import json
import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest
from conftest import TRAIN
from projects import HERE, PROJECTS, Project
from safetensors.torch import load_file

INFER, TUNE = TRAIN.with_name("infer.ipynb"), TRAIN.with_name("tune.ipynb")
QUICK = ("notebook", "nested", "detector", "gathered")
pytestmark = pytest.mark.timeout(400)
ALL = [pytest.param(project, id=project.name, marks=[] if project.name in QUICK else [pytest.mark.soak]) for project in PROJECTS]
EACH = pytest.mark.parametrize("project", ALL)
LONG = pytest.mark.soak


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


@EACH
@pytest.mark.parametrize(
    "strategy, devices", [("auto", 1), pytest.param("ddp", 2, marks=LONG), pytest.param("deepspeed_stage_3", 2, marks=LONG)]
)
def test_it_trains_is_tested_and_predicts(launch, project, here, strategy, devices):
    if sentence := project.refused.get(strategy):
        with pytest.raises(Exception, match=sentence):
            train(launch, project, strategy=strategy, devices=devices)
        assert not list(here.rglob("*.ckpt"))
        return
    folder = train(launch, project, strategy=strategy, devices=devices)
    assert load_file(folder / "model.safetensors")
    for ranks in (1, 2) if devices == 1 else (1,):
        _, tested = launch(INFER, f"infer-{ranks}.ipynb", run=str(folder), accelerator="cpu", devices=ranks)
        assert json.loads((tested / "metrics.json").read_text())
        assert (tested / "predictions.parquet").is_file() == project.predicts


@LONG
@EACH
def test_a_search_varies_it(launch, project, here):
    launch(TUNE, "tune.ipynb", **settings(project, search_space=project.space, n_trials=2, max_epochs=1))
    (best,) = (here / "runs").rglob("best_params.json")
    assert set(json.loads(best.read_text())["params"]) == set(project.space)


@LONG
@EACH
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_3"])
def test_a_kill_loses_nothing(launch, papermill, project, here, strategy):
    if strategy in project.refused:
        pytest.skip(project.refused[strategy])
    more = dict(strategy=strategy, devices=2, max_epochs=4, save_every_n_steps=1)
    undisturbed = train(launch, project, "whole", root="whole", **more)
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings(project, **more).items()}
    job = papermill(TRAIN, "--cwd", str(here), **texts)
    while not list((here / "runs").rglob("last.ckpt")) and job.process.poll() is None:
        job.look()
    for process in [psutil.Process(job.process.pid), *job.family.values()]:
        if process.is_running():
            os.kill(process.pid, signal.SIGKILL)
    job.process.wait()
    resumed = train(launch, project, "again", **more)
    assert record(resumed)["step"] == record(undisturbed)["step"]
    one, other = (load_file(folder / "model.safetensors") for folder in (undisturbed, resumed))
    assert all((one[name] == other[name]).all() for name in one), "the weights differ from those of an undisturbed training"
