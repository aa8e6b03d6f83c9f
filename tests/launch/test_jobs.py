"""Jobs in the background: they outlive their kernel, are found again, stopped, resumed, and leave nothing running."""

import json
import os
import re
import signal
import time
from dataclasses import asdict, replace

import psutil
import pytest
from conftest import TRAIN, write_notebook
from kernels import Kernel
from papermill.exceptions import PapermillExecutionError
from warm import descendants, is_running

from dlnb.engine import jobs, launch
from dlnb.errors import ParameterError, RankError
from dlnb.launch.background import Job
from dlnb.system.atomic import write_json
from dlnb.system.processes import Process

pytestmark = [pytest.mark.timeout(500), pytest.mark.usefixtures("place")]

COUNT = "import time\nfor i in range(n):\n    print('at', i, flush=True)\n    time.sleep(0.05)"
RANKS = """
import os, pathlib, subprocess, sys, time
from dlnb.launch.kernel import announce_ranks
rank = int(os.environ.get("LOCAL_RANK", 0))
if rank == 0:
    other = subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "LOCAL_RANK": "1"})
    announce_ranks(pathlib.Path(sys.argv[0]).parent, [other])
"""


@pytest.fixture
def kernel(place):
    "Start kernels; they are ended after the test."
    started = []

    def start() -> Kernel:
        started.append(Kernel(place))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def until(condition, timeout: float = 60):
    "Wait for a condition, and return what it became."
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)
    return found


def family(job: Job) -> list[psutil.Process]:
    return [psutil.Process(job.process.pid), *descendants(psutil.Process(job.process.pid))]


def test_a_job_is_left_by_the_stop_button_outlives_its_kernel_and_is_found_again(kernel, place):
    write_notebook(place / "count.ipynb", "n = 1", COUNT, "print('done', n)")
    console, shown = kernel(), []
    assert "running" in console.run("from dlnb.engine import launch\njob = launch('count.ipynb', wait=False, n=300)\nprint(job.status)")
    for _, content in console.messages(console.start("job.show()")):
        shown.append(content.get("text") or content.get("data", {}).get("text/plain", ""))
        if "at " in shown[-1] and "count.ipynb · running · cell 3 of 4" in shown[-1]:
            console.interrupt()
    (job,) = jobs()
    assert "continues" in shown[-1] and job.status == "running"
    console.kill()
    assert job.status == "running"
    notebook, run = job.result(timeout=100)
    assert notebook.cells[-1].outputs[0].text == "done 300\n" and run is None


def test_papermill_with_the_engine_shows_what_launch_shows(kernel, place):
    write_notebook(place / "count.ipynb", "n = 1", COUNT)
    console, shown = kernel(), {}
    for name, call in {
        "launch": "from dlnb.engine import launch\nlaunch('count.ipynb', n=3);",
        "papermill": "import papermill\npapermill.execute_notebook('count.ipynb', None, {'n': 3}, engine_name='dlnb');",
    }.items():
        texts = [content.get("data", {}).get("text/plain", "") for _, content in console.messages(console.start(call))]
        shown[name] = [text for text in texts if text]
    for texts in shown.values():
        assert texts and all(text.startswith("count.ipynb · ") for text in texts), shown


def test_launch_shows_its_progress_in_the_cell_and_ends_with_it(kernel, place):
    write_notebook(place / "count.ipynb", "n = 1", COUNT)
    console, interrupted, error, displays = kernel(), False, "", set()
    for kind, content in console.messages(console.start("from dlnb.engine import launch\nlaunch('count.ipynb', n=1000)")):
        if kind in ("display_data", "update_display_data"):
            displays.add(content["transient"]["display_id"])
            if "at " in content["data"]["text/plain"] and not interrupted:
                console.interrupt()
                interrupted = True
        error = content.get("ename", error)
    assert interrupted and error == "KeyboardInterrupt" and len(displays) == 1
    assert jobs() == []


@pytest.mark.soak
def test_fifty_restarts_and_reloads_find_the_job_again(kernel, place):
    write_notebook(place / "count.ipynb", "n = 1", COUNT)
    console, counts = kernel(), []
    console.run("from dlnb.engine import launch\njob = launch('count.ipynb', wait=False, n=100_000)")
    for number in range(50):
        if number % 2:  # the kernel is restarted
            console.kill()
            console = kernel()
        else:  # the page is closed and opened again
            console.connect()
        said = console.run("from dlnb.launch import jobs\n(job,) = jobs()\nprint(job.describe())")
        assert "count.ipynb · running" in said, said
        counts += [int(found) for found in re.findall(r"at (\d+)", said)[-1:]]
    assert len(counts) > 40 and counts == sorted(counts)
    (job,) = jobs()
    processes = family(job)
    assert job.stop() == "stopped"
    until(lambda: not any(map(is_running, processes)))


def test_a_stopped_job_is_resumed_with_the_same_command(place):
    write_notebook(place / "count.ipynb", "n = 1", COUNT, "n")
    job = launch("count.ipynb", "out.ipynb", wait=False, n=1000)
    assert job.command == "papermill count.ipynb out.ipynb --engine dlnb -p n 1000"
    until(lambda: "at " in job.describe())
    with pytest.raises(ValueError, match="running"):
        job.resume()
    processes = family(job)
    assert job.stop() == job.stop() == "stopped"
    until(lambda: not any(map(is_running, processes)))
    with pytest.raises(PapermillExecutionError, match="SIGTERM ended all ranks"):
        job.result()
    record = job.record
    write_json(job.folder / "job.json", asdict(replace(record, arguments=["-p", "n", "2"])))
    assert job.resume().status == "running", "the output notebook is still the one before"
    assert job.result().notebook.cells[-1].outputs[0].data["text/plain"] == "2" and job.record.attempts == 2


def test_a_rank_that_fails_is_told_with_its_traceback(place):
    write_notebook(place / "in.ipynb", "devices = 1", RANKS, "if rank == 1:\n    raise ValueError('only here')\ntime.sleep(60)")
    job = launch("in.ipynb", wait=False, devices=2)
    with pytest.raises(PapermillExecutionError, match="(?s)Rank 1 failed here.*raise ValueError.*only here"):
        job.result(timeout=100)
    assert job.status == "failed" and "ValueError: [rank 1] only here" in job.describe()
    assert job.notebook.parent == job.folder


def test_a_killed_job_is_interrupted_and_leaves_nothing(place):
    write_notebook(place / "in.ipynb", "devices = 1", RANKS, "print('asleep', rank, flush=True)\ntime.sleep(600)")
    job = launch("in.ipynb", wait=False, devices=2)
    until(lambda: "[rank 1] asleep" in job.describe())
    processes = family(job)
    assert len(processes) >= 3
    os.kill(job.process.pid, signal.SIGKILL)
    until(lambda: not any(map(is_running, processes)))
    assert job.status == "interrupted"
    with pytest.raises(RankError, match="interrupted"):
        job.result()


def test_another_process_of_the_same_id_is_not_the_job(place):
    write_notebook(place / "in.ipynb", "n = 1")
    job = launch("in.ipynb", wait=False, n=2)
    job.result(timeout=60)
    mistaken = asdict(replace(Process.this(), began=Process.this().began - 1))
    write_json(job.folder / "job.json", asdict(replace(job.record, process=mistaken)))
    assert job.status == "finished" and job.stop() == "finished", "and this process lives"
    for name, content in [("a", "{"), ("b", "[]"), ("c", '{"notebook": 1}'), ("d", json.dumps(asdict(job.record) | {"more": 1}))]:
        (job.folder.parent / name).mkdir()
        (job.folder.parent / name / "job.json").write_text(content)
    assert [found.id for found in jobs()] == [job.id], "and a damaged one hides no other"


def test_a_job_that_cannot_begin_has_failed_and_says_why(place):
    path = write_notebook(place / "in.ipynb", "n = 1")
    path.write_text(path.read_text().replace('"language": "python"', '"language": "R"'))
    job = launch("in.ipynb", wait=False, n=2)
    with pytest.raises(RankError, match="runs notebooks in Python, not in 'R'"):
        job.result(timeout=60)
    assert job.status == "failed" and "not in 'R'" in job.describe()


def test_what_is_wrong_is_refused_before_anything_starts(place):
    write_notebook(place / "in.ipynb", "devices = 1")
    for given, message in [
        ({"device": 2}, "Did you mean 'devices'"),
        ({"devices": (1, 2)}, "cannot be passed"),
        ({"devices": print}, "cannot"),
    ]:
        with pytest.raises(ParameterError, match=message):
            launch("in.ipynb", wait=False, **given)
    with pytest.raises(FileNotFoundError):
        launch("none.ipynb", wait=False)
    assert jobs() == [] and not (place / "runs").exists()


SETTINGS = dict(accelerator="cpu", devices=2, strategy="ddp", max_epochs=400, batch_size=64)


@pytest.mark.soak
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_3"])
def test_a_stopped_training_has_saved_and_resumes(place, strategy):
    job = launch(TRAIN, wait=False, **SETTINGS | {"strategy": strategy, "max_epochs": 40}, data_args={}, root="runs")
    until(lambda: "epoch 3" in job.describe(), timeout=150)
    assert job.run.is_dir() and job.status == "running"
    assert job.stop() == "preempted"
    stopped = json.loads((job.run / "run.json").read_text())
    assert stopped["status"] == "preempted" and stopped["step"] > 0
    _, run = job.resume().result(timeout=200)
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished" and record["attempts"] == 2 and record["epoch"] == 40


@pytest.mark.soak
def test_a_kernel_restarted_many_times_finds_its_job(kernel, place):
    write_notebook(place / "count.ipynb", "n = 1", COUNT, "print('done')")
    kernel().run("from dlnb.engine import launch\njob = launch('count.ipynb', wait=False, n=10**6)")
    for _ in range(20):
        one = kernel()
        assert "running" in one.run("from dlnb.engine import jobs\n(job,) = jobs()\nprint(job.status)")
        one.start("job.show()")
        time.sleep(0.3)
        one.kill()
    (job,) = jobs()
    processes = family(job)
    assert job.stop() == "stopped"
    until(lambda: not any(map(is_running, processes)))


@pytest.mark.soak
def test_a_kernel_killed_while_it_starts_a_job_leaves_one_that_is_known(kernel, place):
    write_notebook(place / "count.ipynb", "n = 1", COUNT)
    for delay in range(12):
        one = kernel()
        one.run("from dlnb.engine import launch")
        one.start("launch('count.ipynb', wait=False, n=10**6)")
        time.sleep(delay * 0.02)
        one.kill()
    time.sleep(3)
    known = {job.process.pid for job in jobs() if job.is_running}
    running = {
        p.pid for p in psutil.process_iter(["cmdline", "cwd"]) if p.info["cwd"] == str(place) and "papermill" in (p.info["cmdline"] or [])
    }
    assert running <= known | {child.pid for pid in known for child in descendants(psutil.Process(pid))}
    for job in jobs():
        job.stop()
