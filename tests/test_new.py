"""A project that `python -m dlnb.new` lays out: what it holds, what is refused, and that it works as it is, from a wheel too."""

import ast
import configparser
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import psutil
import pytest
from conftest import REPOSITORY, TRAIN
from test_notebooks import EXECUTE
from test_project import run
from warm import warm_python

from dlnb.launch.parameters import parameter_names
from dlnb.new import main, new_project

TEMPLATE = REPOSITORY / "nbs" / "_template"
CHAPTERS = ["00_data", "01_model"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def defaults(path: Path) -> dict:
    "The values that the `parameters` cell of a notebook assigns."
    (cell,) = [cell for cell in nbformat.read(path, 4).cells if "parameters" in cell.metadata.get("tags", [])]
    return {statement.targets[0].id: ast.literal_eval(statement.value) for statement in ast.parse(cell.source).body}


def commands(readme: Path) -> list[str]:
    "The two commands of a README's beginning: install and test, and train."
    return re.findall(r"^    (pip install .*|papermill nbs/train.ipynb .*--engine dlnb)$", readme.read_text(), flags=re.MULTILINE)


def search_path(project: Path) -> str:
    "PYTHONPATH for a project that is not installed."
    return os.pathsep.join([str(project), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture
def project(tmp_path) -> Path:
    return new_project(tmp_path / "my-spirals")


def test_it_has_the_shape_of_a_project(project):
    assert {path.name for path in project.iterdir()} == {
        *("my_spirals", "nbs", "tests", "settings.ini", "setup.py", "README.md", ".gitignore")
    }
    assert {path.stem for path in (project / "nbs").iterdir()} == {*CHAPTERS, "train", "tune", "infer"}
    assert not [name for name, content in files(project).items() if b"my_project" in name.encode() + content]
    assert len(commands(project / "README.md")) == 2


@pytest.mark.parametrize("name", ["train", "tune", "infer"])
def test_a_workflow_is_that_of_dlnb_with_other_defaults(project, name):
    own, made = TRAIN.with_stem(name), project / "nbs" / f"{name}.ipynb"
    assert parameter_names(nbformat.read(made, 4)) == parameter_names(nbformat.read(own, 4))
    before, after = defaults(own), defaults(made)
    changed = {"model", "data", "lr", "monitor", "monitor_mode"} if name != "infer" else set()
    assert {field for field in before if before[field] != after[field]} == changed | ({"search_space"} if name == "tune" else set())
    one, other = (nbformat.read(path, 4).cells for path in (own, made))
    without = [[cell.source for cell in cells[1:] if "parameters" not in cell.metadata.get("tags", [])] for cells in (one, other)]
    assert without[0] == without[1] and len(without[0]) == len(one) - 2
    assert not [cell for cell in other if cell.get("outputs")] and "workflows" not in made.read_text()


@pytest.mark.parametrize("name", ["x", "my_project", "a name that is much longer than that of the template"])
def test_its_package_is_what_its_notebooks_export_and_they_are_clean(tmp_path, name):
    project = new_project(tmp_path / name)
    before = files(project)
    for module in project.glob("*/_modidx.py"):
        package = module.parent
    for module in package.iterdir():
        module.unlink()
    (package / "__init__.py").write_text("")
    for command in ("nbdev_export", "nbdev_clean"):
        done = run(command, cwd=project)
        assert done.returncode == 0, done.stderr
    assert len(before) == 14 and files(project) == before


def test_the_template_requires_what_dlnb_does_for_developing():
    lines = {}
    for folder in (REPOSITORY, TEMPLATE):
        settings = configparser.ConfigParser(delimiters=["="])
        settings.read(folder / "settings.ini")
        lines[folder] = {line for line in settings["DEFAULT"]["dev_requirements"].split("\n") if line and line[0] != "#"}
    assert len(lines[TEMPLATE]) > 3 and lines[TEMPLATE] <= lines[REPOSITORY]


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_of_it_shows_its_outputs_and_runs_from_top_to_bottom(project, name):
    cells = [cell for cell in nbformat.read(TEMPLATE / "nbs" / f"{name}.ipynb", 4).cells if cell.cell_type == "code"]
    shown = [output.output_type for cell in cells for output in cell.outputs]
    assert shown and "error" not in shown
    done = run(warm_python(), "-c", EXECUTE, f"{name}.ipynb", cwd=project / "nbs", PYTHONPATH=search_path(project))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.timeout(300)
def test_two_ranks_train_it_and_its_run_is_tested(project, launch, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", search_path(project))
    monkeypatch.syspath_prepend(project)
    monkeypatch.chdir(project)
    _, folder = launch("nbs/train.ipynb", "out.ipynb", accelerator="cpu", devices=2, max_steps=2)
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["step"], record["settings"]["monitor"]) == ("finished", 2, "val_acc")
    _, tested = launch("nbs/infer.ipynb", "infer.ipynb", run=str(folder), accelerator="cpu", devices=1)
    assert {"test_loss", "test_acc"} <= set(json.loads((tested / "metrics.json").read_text()))


REFUSED = {
    "3d-net": "gives no name for a Python package",
    "class": "gives no name for a Python package",
    "für-alle": "gives no name for a Python package",
    "torch": "which is taken",
    "tests": "which is taken",
    "full": "is not an empty folder",
    "file": "is not an empty folder",
    "link": "is not an empty folder",
    "none/mine": "There is no folder",
    ".": "is the current folder",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_one_sentence_and_writes_nothing(tmp_path, monkeypatch, capsys, name):
    (here := tmp_path / "here").mkdir()
    for folder in ("full", "empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(here if name == "." else tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match="1"):
        main([name])
    sentence = capsys.readouterr().err
    assert REFUSED[name] in sentence and sentence.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "mine").mkdir()
    assert (new_project(tmp_path / "mine") / "mine" / "model.py").is_file()


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()])
def test_of_a_project_that_cannot_be_written_nothing_stays(tmp_path, monkeypatch, error):
    write = Path.write_text

    def fail(path: Path, *arguments, **options):
        if path.name == "train.ipynb":
            raise error
        return write(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(type(error)):
        new_project(tmp_path / "mine")
    assert list(tmp_path.iterdir()) == []


class Installation:
    "A virtual environment with dlnb's wheel. All else it has from the environment of this test, of which it sees everything but dlnb."

    def __init__(self, folder: Path):
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
        self.python, paths = folder / "bin" / "python", sysconfig.get_paths()
        # A .pth file in a folder that another one names is not read, and so neither is the one of an editable installation of dlnb.
        others = dict.fromkeys([paths["purelib"], paths["platlib"]])
        (next(folder.glob("lib/python*/site-packages")) / "others.pth").write_text("\n".join(others))
        for name in ("pip", "papermill", "pytest"):
            script = Path(paths["scripts"], name).read_text().partition("\n")[2]
            (folder / "bin" / name).write_text(f"#!{self.python}\n{script}")
            (folder / "bin" / name).chmod(0o755)
        self.mark = f"DLNB_TEST_PROJECT={folder}"

    def run(self, command: str, cwd: Path, timeout: float) -> str:
        "What a shell's command prints. Fails where it does."
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTEST_ADDOPTS")}
        ours = dict([self.mark.split("=", 1)], PATH=f"{self.folder / 'bin'}:{os.environ['PATH']}")
        offline = dict(PIP_NO_INDEX="1", PIP_NO_BUILD_ISOLATION="0", PIP_DISABLE_PIP_VERSION_CHECK="1")  # pip reads the 0 as "none"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=cwd,
            env=inherited | ours | offline,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        "What it has started and still runs."
        name, _, value = self.mark.partition("=")
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                found += [process] if process.environ().get(name) == value else []
        return found

    def end(self) -> None:
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()


@pytest.fixture
def installation(tmp_path):
    installation = Installation(tmp_path / "environment")
    yield installation
    installation.end()


@pytest.mark.soak
@pytest.mark.timeout(580)
def test_a_wheel_makes_a_project_whose_two_commands_work(copy, installation, tmp_path):
    installation.run(f"pip wheel --no-deps -w {tmp_path} . && pip install --no-deps {tmp_path}/*.whl", copy, 120)
    (tmp_path / "work").mkdir()
    where = installation.run('python -c "import dlnb.new; print(dlnb.__file__)"', tmp_path / "work", 60)
    assert where.startswith(str(installation.folder))
    printed = installation.run("python -m dlnb.new my-spirals", tmp_path / "work", 60)
    project = tmp_path / "work" / "my-spirals"
    assert files(project) == files(new_project(tmp_path / "my-spirals")), "the wheel lacks a part of the template"

    test, train = commands(project / "README.md")
    assert test in printed and train in printed
    assert "1 passed" in installation.run(test, project, 240)
    installation.run(train, project, 120)
    (record,) = (project / "runs").rglob("run.json")
    trained = json.loads(record.read_text())
    assert trained["status"] == "finished" and trained["metrics"]["val_acc"] > 0.9
    deadline = time.monotonic() + 15
    while (left := installation.processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [process.cmdline() for process in left] == []
