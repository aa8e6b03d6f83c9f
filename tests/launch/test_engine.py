"""The engine on broken notebooks: whatever fails, the notebook tells it, papermill ends, and nothing is left running."""

import asyncio
import json
import os
import signal
import time
from functools import partial

import nbformat
import pytest
from conftest import REPOSITORY, TRAIN, write_notebook
from jupyter_core.utils import ensure_event_loop
from papermill.exceptions import PapermillExecutionError
from warm import warm_python

from dlnb.engine import launch

pytestmark = pytest.mark.timeout(500)

# One rank a process through Lightning's launcher, joined in a process group: the real thing, 15 seconds on two cores.
FABRIC = """
import os, signal, sys, time, torch
from lightning.fabric import Fabric
fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp")
fabric.launch()
rank = fabric.global_rank
meet = torch.distributed.barrier
"""
# Started as Lightning starts them, without torch: for failures that have nothing to do with the process group.
RANKS = """
import os, pathlib, signal, subprocess, sys, time
from dlnb.launch.kernel import announce_ranks
rank = int(os.environ.get("LOCAL_RANK", 0))
start = lambda other: subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "LOCAL_RANK": str(other)})
if rank == 0:
    announce_ranks(pathlib.Path(sys.argv[0]).parent, [start(other) for other in range(1, devices)])
meet = lambda: time.sleep(600)
"""
FAILS = f"{REPOSITORY}/tests/failing.py:Fails"
TORCHRUN = ("-m", "torch.distributed.run")
STARTS = [pytest.param(FABRIC, id="lightning", marks=pytest.mark.soak), pytest.param(RANKS, id="plain")]


def run_on_ranks(papermill, folder, *cells: str, devices: int = 2, start: str = RANKS):
    path = write_notebook(folder / "in.ipynb", "devices = 1", start, *cells, "print('never reached')")
    job = papermill(path, devices=devices)
    job.wait()
    return job


@pytest.fixture
def run(papermill, tmp_path):
    "Run cells on two ranks; the process, ended."
    return partial(run_on_ranks, papermill, tmp_path)


@pytest.fixture
def cold_run(cold_papermill, tmp_path):
    "The same where a rank's process is known by its parent."
    return partial(run_on_ranks, cold_papermill, tmp_path)


def assert_failed(job, cell: int, *told: str) -> None:
    "papermill failed; the cell holds the failure first; what comes after it has not run; nothing is left."
    assert job.process.returncode == 1, job.log.read_text()[-2000:]
    assert job.errors(), job.printed()
    index, error, traceback = job.errors()[0]
    assert index == cell
    for word in told:
        assert word in f"{error}\n{traceback}"
    assert job.statuses()[cell] == "failed"
    assert "completed" not in job.statuses()[cell + 1 :]
    assert "never reached" not in job.printed()
    assert len(job.family) >= 2
    assert job.leftover(within=15) == []


@pytest.mark.parametrize("start", STARTS)
def test_a_rank_that_raises_is_shown_with_its_traceback(run, start):
    job = run("if rank == 1:\n    raise ValueError('only on rank one')\nmeet()", start=start)
    # The parameters that papermill injects are a cell of their own: 0 parameters, 1 injected, 2 ranks, 3 this one.
    assert_failed(job, 3, "[rank 1] only on rank one", "raise ValueError")


def test_rank_zero_raising_is_shown_with_its_traceback(run):
    assert_failed(run("if rank == 0:\n    raise ValueError('only on rank zero')\nmeet()"), 3, "only on rank zero")


def test_all_ranks_raising_is_one_failure(run):
    assert_failed(run("raise ValueError('on all ranks')"), 3, "on all ranks")


def test_an_error_in_an_earlier_cell_than_rank_zero_is_in_stays_in_that_cell(run):
    job = run("if rank == 1:\n    time.sleep(1)\n    raise ValueError('late')", "meet()")
    assert_failed(job, 3, "[rank 1] late")


def test_an_error_after_rank_zero_has_finished_fails_the_notebook(cold_papermill, tmp_path):
    last = "if rank == 1:\n    time.sleep(1)\n    raise ValueError('at the very end')"
    job = cold_papermill(write_notebook(tmp_path / "in.ipynb", "devices = 1", RANKS, last), devices=2)
    job.wait()
    assert_failed(job, 3, "[rank 1] at the very end")


@pytest.mark.parametrize(
    "number, start",
    [
        *(
            pytest.param(number, start, marks=pytest.mark.soak)
            for number, start in (("SIGKILL", FABRIC), ("SIGSEGV", RANKS), ("SIGTERM", RANKS))
        ),
        ("SIGKILL", RANKS),
    ],
)
def test_a_killed_rank_is_told_by_its_signal(cold_run, number, start):
    job = cold_run(f"if rank == 1:\n    os.kill(os.getpid(), signal.{number})\nmeet()", start=start)
    assert_failed(job, 3, "[rank 1]", number)


@pytest.mark.parametrize("start", STARTS)
def test_a_killed_kernel_is_told_by_its_signal(run, start):
    job = run("if rank == 0:\n    os.kill(os.getpid(), signal.SIGKILL)\nmeet()", start=start)
    assert_failed(job, 3, "kernel", "SIGKILL")


def test_a_rank_that_runs_out_of_memory_is_told(run):
    hog = """if rank == 1:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
    bytearray(2**34)
meet()"""
    assert_failed(run(hog), 3, "[rank 1]", "MemoryError")


def test_a_rank_that_leaves_ends_the_others(run):
    assert_failed(run("if rank == 1:\n    os._exit(3)\nmeet()"), 3, "[rank 1]", "exited with code 3")


def test_three_ranks_of_which_the_last_fails(run):
    job = run("if rank == 2:\n    raise ValueError('third')\nmeet()", devices=3)
    assert_failed(job, 3, "[rank 2] third")


def test_a_failed_rank_leaves_no_task_that_looks_for_the_kernel(launch, tmp_path):
    "One that did would fail later, in the midst of other work: even of a parse, which CPython before 3.12 does not bear."
    notebook = write_notebook(tmp_path / "in.ipynb", "devices = 1", RANKS, "if rank == 1:\n    1 / 0\nmeet()")
    with pytest.raises(PapermillExecutionError, match="ZeroDivisionError"):
        launch(notebook, None, devices=2)
    assert not asyncio.all_tasks(ensure_event_loop())


def test_failure_is_known_within_15_seconds(run):
    job = run("print('at', time.time())\nif rank == 1:\n    raise ValueError('now')\nmeet()")
    told = float(job.printed().split("at ")[1].split()[0])
    assert os.path.getmtime(job.out) - told < 15


@pytest.fixture
def sleeping(cold_papermill, tmp_path):
    "A notebook of two ranks that sleep, with a process of their own each."
    sleep = "import subprocess\nsubprocess.Popen(['sleep', '600'])\nprint('asleep', rank, flush=True)\ntime.sleep(600)"
    job = cold_papermill(write_notebook(tmp_path / "in.ipynb", "devices = 1", RANKS, sleep, "print('never reached')"), devices=2)
    job.wait_for_output("asleep 0")
    job.wait_for_output("[rank 1] asleep 1")
    return job


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_a_signal_ends_all_ranks_and_leaves_a_readable_notebook(sleeping, number, code):
    sleeping.process.send_signal(number)
    before = time.monotonic()
    assert sleeping.wait() == code
    assert time.monotonic() - before < 15
    assert sleeping.errors()[0][0] == 3
    assert signal.Signals(number).name in str(sleeping.errors())
    assert sleeping.statuses()[3:] == ["failed", "pending"]
    assert sleeping.leftover() == []


def test_a_signal_between_two_cells_stops_before_the_next_code(cold_papermill, tmp_path):
    signalled = (
        "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(1)"
    )
    path = write_notebook(tmp_path / "in.ipynb", "unused = 1", signalled, "print('never reached')")
    notebook = nbformat.read(path, 4)
    notebook.cells.insert(-1, nbformat.v4.new_markdown_cell("Text, which has no outputs."))
    nbformat.write(notebook, path)
    job = cold_papermill(path)
    assert job.wait() == 143
    assert "SIGTERM" in str(job.errors())
    assert job.statuses()[-1] == "failed" and "never reached" not in job.printed()


def test_nothing_is_left_when_papermill_itself_is_killed(sleeping):
    sleeping.process.kill()
    sleeping.wait()
    assert sleeping.leftover() == []
    assert sleeping.statuses()[3:] == ["running", "pending"]
    assert "asleep 0" in sleeping.printed()


def test_nothing_is_left_when_the_kernel_is_killed_from_outside(sleeping):
    kernel = next(process for process in sleeping.family.values() if "ipykernel" in " ".join(process.cmdline()))
    kernel.kill()
    assert sleeping.wait() == 1
    assert_failed(sleeping, 3, "kernel", "SIGKILL")


def test_output_is_in_the_notebook_as_it_happens_and_stays_small(papermill, tmp_path):
    bar = """import sys, time
from tqdm import tqdm
print('a line', flush=True)
for step in tqdm(range(1_000), mininterval=0):
    pass
print('\\nbars done', flush=True)
time.sleep(10)"""
    job = papermill(write_notebook(tmp_path / "in.ipynb", "unused = 1", bar))
    job.wait_for_output("bars done")
    assert job.process.poll() is None, "the cell had ended already"
    assert job.wait() == 0
    assert "a line" in job.printed() and "1000/1000" in job.printed()
    assert job.out.stat().st_size < 20_000


def test_widgets_that_are_closed_are_not_kept(papermill, tmp_path):
    bars = "from tqdm.notebook import tqdm\nfor epoch in range(30):\n    for step in tqdm(range(3), leave=False):\n        pass"
    job = papermill(write_notebook(tmp_path / "in.ipynb", "unused = 1", bars))
    assert job.wait() == 0
    assert job.out.stat().st_size < 50_000


@pytest.mark.parametrize(
    "parameters, told",
    [
        ({"devics": 2}, "Did you mean 'devices'?"),
        ({"devices": 2, "zzz": 1}, "Choices: devices, strategy."),
    ],
)
def test_unknown_parameters_are_refused_before_anything_runs(papermill, tmp_path, parameters, told):
    path = write_notebook(tmp_path / "in.ipynb", "devices = 1\nstrategy = 'ddp'", "open('ran', 'w').close()")
    job = papermill(path, **parameters)
    assert job.wait() == 1
    assert told in job.log.read_text() and "Traceback" not in job.log.read_text()
    assert not job.out.exists() and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("tagged", [0, 2])
def test_a_missing_or_doubled_parameters_tag_is_refused(papermill, tmp_path, tagged):
    path = write_notebook(tmp_path / "in.ipynb", "devices = 1", "devices = 2", "open('ran', 'w').close()")
    notebook = nbformat.read(path, 4)
    for index, cell in enumerate(notebook.cells):
        cell.metadata["tags"] = ["parameters"] if index < tagged else []
    nbformat.write(notebook, path)
    job = papermill(path, devices=1)
    assert job.wait() == 1
    assert f"{tagged} cells tagged 'parameters'" in job.log.read_text()
    assert not job.out.exists() and not (tmp_path / "ran").exists()


def test_an_exception_that_the_notebook_expects_is_no_failure(cold_papermill, tmp_path):
    path = write_notebook(tmp_path / "in.ipynb", "devices = 1", RANKS, "1 / 0", "print('after it', rank)")
    notebook = nbformat.read(path, 4)
    notebook.cells[2].metadata["tags"] = ["raises-exception"]
    nbformat.write(notebook, path)
    job = cold_papermill(path, devices=2)
    job.wait()
    assert "after it 0" in job.printed() and "[rank 1] after it 1" in job.printed()
    assert job.leftover() == []


def test_magics_and_display_work_on_every_rank(cold_papermill, tmp_path):
    cell = "%precision 2\nfrom IPython.display import display\ndisplay('shown once')\n!echo from-a-shell-$LOCAL_RANK"
    job = cold_papermill(write_notebook(tmp_path / "in.ipynb", "devices = 1", RANKS, cell), devices=2)
    assert job.wait() == 0, job.log.read_text()[-2000:]
    assert "[rank 1] from-a-shell-1" in job.printed()
    assert job.out.read_text().count("shown once") == 2  # the source and rank 0's display


@pytest.mark.soak
def test_torchrun_starts_the_ranks_and_one_notebook_is_written(papermill, tmp_path):
    launcher = (warm_python(), *TORCHRUN, "--nproc-per-node", "2", "--master-port", "29517")
    job = papermill(
        write_notebook(tmp_path / "in.ipynb", "devices = 1", FABRIC, "print('rank', rank)"),
        launcher=launcher,
        devices=2,
    )
    assert job.wait() == 0, job.log.read_text()[-3000:]
    assert "rank 0" in job.printed() and "[rank 1] rank 1" in job.printed()
    assert job.statuses() == ["completed"] * 4
    assert job.leftover() == []


@pytest.mark.soak
def test_torchrun_with_a_rank_that_raises(papermill, tmp_path):
    launcher = (warm_python(), *TORCHRUN, "--nproc-per-node", "2", "--master-port", "29518")
    fail = "if rank == 1:\n    raise ValueError('under torchrun')\nmeet()"
    job = papermill(write_notebook(tmp_path / "in.ipynb", "devices = 1", FABRIC, fail, "pass"), launcher=launcher, devices=2)
    assert job.wait() != 0
    assert "under torchrun" in str(job.errors())
    assert job.statuses()[3:] == ["failed", "pending"]
    assert job.leftover() == []


def test_launch_returns_the_executed_notebook(tmp_path):
    path = write_notebook(tmp_path / "in.ipynb", "devices = 1", RANKS, "print('rank', rank)")
    executed, folder = launch(path, tmp_path / "out.ipynb", devices=2)
    text = str([cell.get("outputs") for cell in executed.cells])
    assert "rank 0" in text and "[rank 1] rank 1" in text
    assert folder is None
    assert nbformat.read(tmp_path / "out.ipynb", 4).cells[-1].outputs == executed.cells[-1].outputs


def test_rank_0_completes_what_it_writes_where_all_ranks_fail(cold_papermill, tmp_path):
    "Rank 1 has reported the error long before rank 0 has. Lightning's own watch, which a warm kernel has imported, would end rank 0."
    job = cold_papermill(TRAIN, callbacks=json.dumps([FAILS]), strategy="ddp", devices=2, accelerator="cpu", root=str(tmp_path / "runs"))
    assert job.wait() == 1, job.log.read_text()[-2000:]
    assert "ValueError: on all ranks" in str(job.errors()) and "failed" in job.statuses()
    (record,) = (tmp_path / "runs").glob("*/*/*/*/run.json")
    assert record.with_name("completed").exists() and json.loads(record.read_text())["status"] == "failed"
    assert job.leftover() == []


def test_no_job_folder_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    launch(write_notebook(tmp_path / "in.ipynb", "a = 1", "print(a)"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.ipynb"]
