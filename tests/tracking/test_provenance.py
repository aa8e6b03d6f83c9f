"""What changed between a kill and the next attempt is reported or refused; what is passed to `fit` is part of a run's identity."""

import hashlib
import itertools
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_notebook
from lightning.pytorch import LightningDataModule

from dlnb.checkpoint.manifest import read_manifest
from dlnb.config import RunConfig
from dlnb.data import DataModule
from dlnb.examples import Digits
from dlnb.infer import evaluate
from dlnb.track import RunRecord
from dlnb.tracking.environment import package_versions
from dlnb.tracking.sources import changed, source_hashes
from dlnb.trainer import fit
from dlnb.training.build import build_data, build_model

pytestmark = pytest.mark.timeout(500)

NET = """
import os

import torch
from lightning.pytorch import LightningModule

from {helpers} import scale

FACTOR = 2.0


def twice(x):
    return FACTOR * x


class Net(LightningModule):
    def __init__(self, width=4, dropout=0.0):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.Linear(width, 1))
        self.dropout = dropout

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == int(os.environ.get("STOP_AT", -1)):
            raise RuntimeError("STOP_AT")
        return self.layers(scale(twice(batch))).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layers(batch).square().mean())

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.layers(batch).square().mean())
"""
HELPERS = "def scale(x):\n    return 3 * x\n"
DATA = """
import os

import torch


class Points(torch.utils.data.Dataset):
    def __init__(self, split="train"):
        count = int(os.environ.get("POINTS", 40)) if split == "train" else 8
        self.points = torch.arange(2.0 * count).reshape(count, 2) / count

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        return self.points[index]
"""
numbers = itertools.count()


class Project:
    "Files of a user's own, which each training imports as a process of its own would, and the runs of their model."

    def __init__(self, folder: Path):
        self.folder, self.helpers = folder, f"own_helpers_{next(numbers)}"
        self.write("net", NET.format(helpers=self.helpers))
        self.write(self.helpers, HELPERS)
        self.write("points", DATA)

    def write(self, name: str, text: str) -> None:
        (self.folder / f"{name}.py").write_text(text)

    def edit(self, name: str, before: str, after: str) -> None:
        text = (self.folder / f"{name}.py").read_text()
        assert before in text
        self.write(name, text.replace(before, after))

    def config(self, **settings) -> RunConfig:
        for name in [name for name, module in sys.modules.items() if str(self.folder) in (getattr(module, "__file__", "") or "")]:
            del sys.modules[name]
        settings = dict(model=f"{self.folder}/net.py:Net", data=f"{self.folder}/points.py:Points", devices=1) | settings
        settings |= dict(accelerator="cpu", batch_size=4, save_every_n_steps=1, root=str(self.folder / "runs"))
        return RunConfig(**{"max_epochs": 2, "data_args": {"num_workers": 0}, "trainer_args": {"enable_progress_bar": False}} | settings)

    def fit(self, **settings) -> RunRecord:
        return fit(self.config(**settings))

    def content(self) -> dict[str, str]:
        "What lies in the runs, without the record, which notes every attempt."
        files = (path for path in (self.folder / "runs").rglob("*") if path.is_file() and path.name != "run.json")
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a file is edited twice in one second
    return Project(tmp_path)


def stop(project: Project, monkeypatch, step: int, **settings) -> Path:
    "Train until the error at a step; the folder of the run, whose last.ckpt is of that step."
    monkeypatch.setenv("STOP_AT", str(step))
    with pytest.raises(RuntimeError, match="STOP_AT"):
        project.fit(**settings)
    monkeypatch.delenv("STOP_AT")
    return project.config(**settings).folder()


EDITS = {
    "the class": ("net", ".square().mean()\n\n    def val", ".abs().mean()\n\n    def val", ["net.py:Net"]),
    "a constant": ("net", "FACTOR = 2.0", "FACTOR = 4.0", ["net.py:FACTOR"]),
    "a function": ("net", "return FACTOR * x", "return FACTOR * x + 1", ["net.py:twice"]),
    "an imported function": (None, "3 * x", "4 * x", [".py:scale"]),
    "the data": ("points", "/ count", "/ (2 * count)", ["points.py:Points"]),
    "a comment": ("net", "FACTOR = 2.0", "FACTOR = (2.0)  # a comment\n", []),
    "what is not used": (None, HELPERS, HELPERS + "\ndef unused():\n    return 1\n", []),
}


def test_an_edited_source_is_reported_on_resuming_and_refused_as_a_finished_result(project, monkeypatch, capsys):
    folder = stop(project, monkeypatch, step=13)
    runs, kept = project.folder / "runs", project.folder / "kept"
    shutil.copytree(runs, kept)
    for what, (name, before, after, places) in EDITS.items():
        name = name or project.helpers
        text = (project.folder / f"{name}.py").read_text()
        project.edit(name, before, after)
        capsys.readouterr()
        record = project.fit()
        lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("has changed since.")]
        assert len(lines) == len(places) and all(place in line for place, line in zip(places, lines)), what
        assert (record.folder, record.step, record.attempts) == (folder, 20, 2), what
        project.write(name, text)
        before = project.content()
        if places:  # the result that lies there now is of the edited source
            with pytest.raises(ValueError, match=f"has finished, and is of other source: .*{places[0]} changed since") as error:
                project.fit()
            assert "resume='never'" in str(error.value) and project.content() == before, what
        else:
            assert project.fit().attempts == 2, what
        shutil.rmtree(runs)
        shutil.copytree(kept, runs)


def test_an_edited_source_trains_beside_the_old_result_and_infer_reports_it(project, capsys):
    first = project.fit(max_epochs=1)
    project.edit("net", "FACTOR = 2.0", "FACTOR = 4.0")
    beside = project.fit(max_epochs=1, resume="never")
    assert beside.folder.name == f"{first.folder.name}-2" and changed(first.sources, beside.sources) == ["net.py:FACTOR"]
    assert RunRecord.read(first.folder).step == first.step == 10
    capsys.readouterr()
    assert evaluate(first.folder, accelerator="cpu", devices=1).metrics["test_loss"] > 0
    assert "net.py:FACTOR has changed since." in capsys.readouterr().out


def test_a_shape_that_no_longer_fits_is_refused_with_the_names_and_nothing_is_written(project, monkeypatch, capsys):
    stop(project, monkeypatch, step=13)
    before = project.content()
    project.edit("net", "torch.nn.Linear(width, 1)", "torch.nn.Linear(width, 2)")
    with pytest.raises(ValueError, match="does not fit Net: of another shape: layers.1"):
        project.fit()
    assert project.content() == before
    assert "net.py:Net has changed since." in capsys.readouterr().out
    project.edit("net", "torch.nn.Linear(width, 2)", "torch.nn.Linear(width, 1)")
    assert project.fit().step == 20


@pytest.mark.parametrize("count", [60, 24])
def test_data_of_another_length_is_refused_within_an_epoch_and_reported_between_two(project, monkeypatch, capsys, count):
    folder = stop(project, monkeypatch, step=13)
    checkpoints = {path: content for path, content in project.content().items() if "checkpoints" in path}
    monkeypatch.setenv("POINTS", str(count))
    with pytest.raises(ValueError, match=f"The training data has {count} samples, and had 40 .* 3 batches into an epoch"):
        project.fit()
    assert {path: content for path, content in project.content().items() if "checkpoints" in path} == checkpoints
    assert (RunRecord.read(folder).status, read_manifest(folder / "checkpoints/last.ckpt").step) == ("failed", 13)
    monkeypatch.setenv("POINTS", "40")
    assert project.fit().step == 20  # restored, it resumes
    monkeypatch.setenv("POINTS", str(count))
    assert project.fit(max_epochs=3).step == 20 + count // 4
    assert f"The training data has {count} samples, and had 40" in capsys.readouterr().out


def test_other_versions_are_reported_before_the_first_step(project, monkeypatch, capsys):
    versions = package_versions()
    with monkeypatch.context() as patch:
        patch.setattr("dlnb.checkpoint.training_manifest.package_versions", lambda: versions | {"torch": "2.6.0"})
        stop(project, patch, step=3)
    assert project.fit().step == 20
    assert f"torch was 2.6.0 then, and is {versions['torch']} now." in capsys.readouterr().out


def test_a_run_whose_checkpoints_are_gone_is_not_trained_from_zero(project, monkeypatch):
    folder = stop(project, monkeypatch, step=13)
    for path in (folder / "checkpoints").iterdir():
        path.unlink()
    for remove in (lambda: None, lambda: (folder / "checkpoints").rmdir()):
        remove()
        with pytest.raises(ValueError, match="has trained 13 steps, and none of its checkpoints is left .*resume='never'"):
            project.fit()
    assert project.fit(resume="never").folder.name == f"{folder.name}-2"
    (folder / "run.json").unlink()
    assert project.fit().step == 20


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(project, monkeypatch):
    folder = stop(project, monkeypatch, step=0)
    assert not list(folder.rglob("*.ckpt"))
    assert (project.fit().step, RunRecord.read(folder).attempts) == (20, 2)


def test_what_an_older_dlnb_did_not_note_is_not_compared(project, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("dlnb.training.build.source_hashes", lambda *classes: {})
        patch.setattr("dlnb.checkpoint.training_manifest.sample_counts", lambda trainer: {})
        stop(project, patch, step=13)
    project.edit("net", "FACTOR = 2.0", "FACTOR = 4.0")
    monkeypatch.setenv("POINTS", "60")
    assert project.fit().step == 13 - 3 + 15
    assert "has changed since" not in (out := capsys.readouterr().out) and "had 40" not in out


def test_what_is_passed_is_a_part_of_the_identity_and_is_found_again(project, monkeypatch):
    config = project.config()
    described = fit(config, build_model(config), build_data(config))
    assert described.folder == config.folder() == project.fit().folder and described.given == {}
    config = project.config()
    make = config.model_class
    monkeypatch.setenv("STOP_AT", "13")
    with pytest.raises(RuntimeError, match="STOP_AT"):
        fit(config, module := make(width=6))
    monkeypatch.delenv("STOP_AT")
    again = fit(config, make(width=6))  # other weights, all else equal
    assert again.folder != described.folder and (again.attempts, again.step) == (2, 20) and set(again.given) == {"model"}
    assert fit(config, module).folder == again.folder  # the same object, which has trained meanwhile
    module.dropout = 0.5
    folders = {fit(project.config(max_epochs=1), model).folder for model in (module, make(width=6, dropout=0.1))}
    assert len(folders | {again.folder, described.folder}) == 4
    weights = torch.load(again.folder / "checkpoints/last.ckpt", weights_only=False)["state_dict"]
    assert weights["layers.0.weight"].shape == (6, 2)


def test_passed_data_is_a_part_of_the_identity(project):
    config = project.config(max_epochs=1)

    def module(batch_size, workers=0):
        return DataModule(config.data_class, batch_size=batch_size, num_workers=workers)

    own, other = fit(config, data=build_data(config)), fit(config, data=module(8))
    assert own.folder == config.folder() != other.folder and (own.step, other.step) == (10, 5)
    assert fit(config, data=module(8, workers=1)).attempts == 1  # found again: loading processes change nothing


def test_a_passed_object_of_another_class_is_refused_and_nothing_is_written(project):
    config = project.config()
    exec(NET.format(helpers=project.helpers).replace("class Net", "class Other"), namespace := {"__name__": "elsewhere"})
    passed = [("model", namespace["Other"](), "Other of elsewhere"), ("model", torch.nn.Linear(1, 1), "Linear of torch")]
    passed += [("data", DataModule(Digits), "Digits of dlnb.examples"), ("data", LightningDataModule(), "LightningDataModule of lightning")]
    for part, value, name in passed:
        with pytest.raises(ValueError, match=f"is not the class of the {part} that was passed, {name}.*'__main__:"):
            fit(config, **{part: value})
    earlier = config.model_class()
    project.edit("net", "self.layers(batch)", "2 * self.layers(batch)")
    with pytest.raises(ValueError, match="is of an earlier version of Net. Run the cell that makes it again"):
        fit(project.config(), earlier)
    assert not (project.folder / "runs").exists()


@pytest.mark.timeout(400)
@pytest.mark.soak
def test_a_model_in_a_notebooks_cells_is_compared_as_one_in_a_file(project, papermill):
    "On two ranks, with a module that is passed: a model of an edited cell is another run, which keeps its source and resumes."
    cells = [
        "\n".join(["root = 'runs'", "max_epochs = 1"]),
        NET.format(helpers=project.helpers) + DATA,
        "from dlnb.config import RunConfig\nfrom dlnb.trainer import fit\n"
        "config = RunConfig(model='__main__:Net', data='__main__:Points', accelerator='cpu', devices=2, batch_size=4, max_epochs=max_epochs,\n"
        "    save_every_n_steps=1, data_args={'num_workers': 0}, trainer_args={'enable_progress_bar': False}, root=root)\n"
        "record = fit(config, Net(width=5))\nprint('TRAINED', record.attempts, record.step)",
    ]
    notebook = project.folder / "own.ipynb"

    def run(**parameters):
        job = papermill(write_notebook(notebook, *cells), root=project.folder / "runs", **parameters)
        return job, job.wait()

    job, code = run()
    assert code == 0 and "TRAINED 1 5" in job.printed(), job.log.read_text()[-2000:]
    cells[1] = cells[1].replace("return FACTOR * x", "return -FACTOR * x  # a comment")
    job, code = run()
    assert code == 0 and "TRAINED 1 5" in job.printed(), job.log.read_text()[-2000:]
    job, code = run(max_epochs=2)
    assert code == 0 and "TRAINED 2 10" in job.printed()
    sources = sorted(path.read_text().count("return -FACTOR * x") for path in (project.folder / "runs").rglob("source.py"))
    assert sources == [0, 1]
    assert job.leftover() == []


def test_a_record_names_the_source_of_the_class_and_of_all_that_it_uses(project):
    config = project.config()
    hashes = source_hashes(config.model_class, config.data_class)
    own = {place for place in hashes if "import" not in place}
    assert {"net.py:Net", "net.py:twice", "net.py:FACTOR", f"{project.helpers}.py:scale", "points.py:Points"} <= own
