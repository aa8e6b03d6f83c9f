"""What the tests share: small notebooks, papermill in its own process, and a look at what it leaves running."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from functools import partial
from glob import glob
from pathlib import Path

import nbformat
import psutil
import pytest
from warm import descendants, is_running, left_of, warm_python

REPOSITORY = Path(__file__).resolve().parent.parent
HELPERS = REPOSITORY / "tests"  # what the tests of several folders use
ANSI = re.compile(r"\x1b\[[0-9;]*m")
# Inherited by every process that a test starts. Two ranks on two cores: more threads only get in each other's way.
os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
# A test file may be the source of a model, and ranks that import it import what it imports.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HELPERS), os.environ.get("PYTHONPATH")]))
ALL = os.environ.get("SOAK") == "all"  # every campaign at its full length, which takes some hours; else what CI has time for
TRAIN = REPOSITORY / "nbs" / "workflows" / "train.ipynb"
INFER = TRAIN.with_name("infer.ipynb")


COMPILE = "import sys; from dlnb.optim import build_problem; build_problem(sys.argv[1])"
OPERATORS = {"cpu_adam": "DeepSpeedCPUAdam", "fused_adam": "FusedAdam"}


def is_compiled(operator: str) -> bool:
    "Whether torch's cache has DeepSpeed's operator, compiled against the torch of this environment."
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions/*")).expanduser()
    for rules in map(Path, glob(f"{cache}/{operator}/build.ninja")):
        library = rules.with_name(f"{operator}.so")
        if sys.prefix in rules.read_text() and library.exists() and library.stat().st_mtime > rules.stat().st_mtime:
            return True
    return False


# Files whose tests take seconds, and need neither a compiler nor many processes: `pytest -m fast`.
FAST = ("bad_records config consolidate data examples foreign_files internals project query resume_errors settings").split()


# Files whose tests share nothing: each goes to whichever worker is free. Those of another file share trained runs and stay together.
SPREAD = ("test_notebooks", "test_hangs", "test_restart", "test_engine")
# Files that share the runs of the fixture `train`.
SHARED = ("test_conformance", "test_infer")


def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class FilesOrTests(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if Path(file).stem in SHARED:
                return "trained"
            return nodeid if Path(file).stem in SPREAD else file

    return FilesOrTests(config, log) if config.getvalue("dist") == "loadfile" else None


def is_fast(path: Path) -> bool:
    return path.stem.removeprefix("test_") in FAST


def pytest_collection_modifyitems(items):
    for item in items:
        if is_fast(item.path) and item.get_closest_marker("soak") is None:
            item.add_marker(pytest.mark.fast)


def pytest_ignore_collect(collection_path, config):
    "What is not fast is not even imported where only that is asked for."
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if is_test and config.option.markexpr == "fast" and not is_fast(collection_path) else None


def pytest_sessionstart(session):
    "DeepSpeed's operators are compiled before the tests begin: beside them it takes longer than a test may."
    options = session.config.option
    idle = hasattr(session.config, "workerinput") or options.collectonly or options.markexpr == "fast"
    missing = [] if idle else [OPERATORS[operator] for operator in OPERATORS if not is_compiled(operator)]
    if missing:
        print("Compiling DeepSpeed's optimizers, once for this environment; it takes a few minutes.", flush=True)
    builds = [subprocess.Popen([sys.executable, "-c", COMPILE, optimizer]) for optimizer in missing]
    for build in builds:
        build.wait(timeout=1200)


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory):
    "The key of this installation is one of the tests' own, and the history of its IPython is not written by other workers' kernels."
    os.environ["DLNB_KEY"] = str(tmp_path_factory.mktemp("installation") / "key")
    os.environ["IPYTHONDIR"] = str(tmp_path_factory.mktemp("ipython"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "The project's files in another place."
    folder = tmp_path_factory.mktemp("copy") / "dlnb"
    leave = shutil.ignore_patterns(".git", "*.egg-info", "__pycache__", "runs", ".ipynb_checkpoints", "build")
    shutil.copytree(REPOSITORY, folder, ignore=leave)
    return folder


@pytest.fixture(scope="session")
def launch(environment):
    "`dlnb.engine.launch` in this process, with kernels and ranks that start at once."
    from dlnb.engine import launch

    def launch_warm(*arguments, **settings):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", warm_python())
            return launch(*arguments, **settings)

    return launch_warm


@pytest.fixture
def place(tmp_path, monkeypatch):
    "An empty working directory; what is started from it starts at once, and no job of its root is left."
    from dlnb.engine import jobs

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", warm_python())
    yield tmp_path
    for job in jobs():
        if job.process.is_running:
            os.kill(job.process.pid, signal.SIGKILL)


def write_notebook(path: Path, *cells: str) -> Path:
    "A notebook of code cells, the first of which is tagged `parameters`."
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, path)
    return path


class Papermill:
    "papermill as a process of its own, from the command line, and everything that it starts."

    def __init__(self, notebook: Path, out: Path, *arguments: str, launcher: tuple[str, ...] = (), **parameters):
        self.out = out
        given = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
        command = [*(launcher or (sys.executable,)), "-m", "papermill", str(notebook), str(out), "--engine", "dlnb"]
        command += ["--no-progress-bar", *given, *arguments]
        self.family: dict[int, psutil.Process] = {}
        self.log = out.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=out.parent, stdout=log, stderr=log, start_new_session=True)
        self.started = time.monotonic()

    def look(self) -> None:
        "Remember the processes that there are now, for `leftover`."
        try:
            for process in descendants(psutil.Process(self.process.pid)):
                self.family[process.pid] = process
        except psutil.NoSuchProcess:
            pass

    def wait(self, timeout: float = 400) -> int:
        "The exit code; the processes are noted meanwhile. Ends everything and fails after `timeout` seconds."
        while self.process.poll() is None:
            self.look()
            if time.monotonic() > self.started + timeout:
                self.end()
                pytest.fail(f"papermill still ran after {timeout} s:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.2)
        return self.process.returncode

    def wait_for_output(self, text: str, timeout: float = 150) -> None:
        "Until a cell of the output notebook has printed `text`."
        while text not in self.printed():
            self.look()
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < self.started + timeout, f"{text!r} did not come in {timeout} s"
            time.sleep(0.2)
        self.look()

    def notebook(self) -> nbformat.NotebookNode:
        "The output notebook as it is on disk."
        return nbformat.read(self.out, as_version=4)

    def printed(self) -> str:
        "All streams of the output notebook so far."
        if not self.out.exists():
            return ""
        outputs = [output for cell in self.notebook().cells for output in cell.get("outputs", [])]
        return "".join(output.text for output in outputs if output.output_type == "stream")

    def errors(self) -> list[tuple[int, str, str]]:
        "(cell, exception and its text, traceback) of every error in the notebook; cells that papermill adds are not counted."
        cells = [cell for cell in self.notebook().cells if cell.cell_type == "code" and "papermill" in cell.metadata]
        return [
            (index, f"{output.ename}: {output.evalue}", ANSI.sub("", "\n".join(output.traceback)))
            for index, cell in enumerate(cells)
            for output in cell.outputs
            if output.output_type == "error"
        ]

    def statuses(self) -> list[str]:
        "papermill's word on every code cell."
        return [cell.metadata.papermill.status for cell in self.notebook().cells if cell.cell_type == "code"]

    def leftover(self, within: float = 15) -> list[str]:
        "The processes that still run `within` seconds from now: the command lines."
        return [" ".join(process.cmdline()) for process in left_of(self.family.values, within)]

    def end(self) -> None:
        "Kill what this test has started."
        self.look()
        for process in (psutil.Process(self.process.pid), *self.family.values()) if self.process.poll() is None else self.family.values():
            if is_running(process):
                process.kill()
        self.process.wait()


@pytest.fixture
def cold_papermill(tmp_path):
    "Start papermill, in new processes as a user's; whatever is left of it is ended after the test."
    started = []

    def start(notebook: Path, *arguments, **options) -> Papermill:
        started.append(Papermill(notebook, tmp_path / f"out-{len(started)}.ipynb", *arguments, **options))
        return started[-1]

    yield start
    for run in started:
        run.end()


@pytest.fixture
def papermill(cold_papermill):
    "The same with a papermill, a kernel and ranks that start at once."
    return partial(cold_papermill, launcher=(warm_python(),))


# Every strategy trains the same notebook once a session, and more than one file looks at what it left.
OPTIMIZERS = {
    "single_device": ("torch.optim.AdamW(fused=True)", 1, 0),
    "ddp": ("torch.optim.AdamW", 2, 0),
    "deepspeed_stage_1": ("torch.optim.AdamW", 2, 1),
    "deepspeed_stage_2": ("torch.optim.AdamW", 2, 2),
    "deepspeed_stage_3": ("torch.optim.AdamW", 2, 3),
    "deepspeed_stage_2_offload": ("deepspeed DeepSpeedCPUAdam", 2, 2),
    "deepspeed_stage_3_offload": ("deepspeed DeepSpeedCPUAdam", 2, 3),
}
SAME = ("ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
Trained = namedtuple("Trained", "strategy notebook folder record config")


@pytest.fixture(scope="session")
def train(tmp_path_factory, launch):
    "Train a strategy once a session, through papermill."
    from dlnb.config import RunConfig

    root, runs = tmp_path_factory.mktemp("conformance"), {}

    def train(strategy: str) -> Trained:
        if strategy not in runs:
            settings = dict(
                strategy=strategy, devices=OPTIMIZERS[strategy][1], accelerator="cpu", max_epochs=3, lr=3e-3, batch_size=64, root=str(root)
            )
            settings["optimizer"] = "AdamW" if strategy in SAME else "auto"
            notebook, folder = launch(TRAIN, root / f"{strategy}.ipynb", **settings)
            record = json.loads((folder / "run.json").read_text())
            runs[strategy] = Trained(strategy, notebook, folder, record, RunConfig(**record["settings"]))
        return runs[strategy]

    return train
