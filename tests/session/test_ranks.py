"""Cells on ranks, and trainings that a kernel starts: real kernels, real ranks, real interrupts."""

import json
import os
import random
import re
import signal
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
from conftest import write_notebook
from kernels import FamilyKernel
from safetensors.torch import load_file
from warm import warm_python

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def warm(environment):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm_python())
        yield


@pytest.fixture(scope="module")
def kernel(warm, tmp_path_factory):
    "One kernel for all tests of this file that leave it as it is."
    kernel = FamilyKernel(tmp_path_factory.mktemp("kernel"))
    kernel.run("%load_ext dlnb\n%ranks 2 --accelerator cpu")
    yield kernel
    assert kernel.end() == []


GROUP = """%%ranks
import torch
from torch import distributed
distributed.init_process_group("gloo", rank=rank, world_size=world_size)
"""


@pytest.fixture
def group(kernel):
    "The ranks have a process group."
    assert kernel.run(GROUP).error == ""
    yield kernel
    kernel.run("%%ranks\nif distributed.is_initialized(): distributed.destroy_process_group()")


def test_a_cell_runs_on_all_ranks_and_shows_what_each_prints(kernel):
    shown = kernel.run("%%ranks\nprint('rank', rank, 'of', world_size)\n10 + rank")
    assert shown.error == "" and shown.value == "10"
    assert sorted(shown.text.split("\n")) == ["", "[rank 1] 11", "[rank 1] rank 1 of 2", "rank 0 of 2"]


def test_a_cell_runs_on_one_rank(kernel):
    assert kernel.run("%%ranks 1\nprint(rank)").text == "[rank 1] 1\n"


def test_values_come_back_one_per_rank_and_go_there(kernel):
    kernel.run("ranks['scale'] = 3")
    kernel.run("%%ranks\nimport torch\npart = torch.full((2,), scale * (rank + 1.0), dtype=torch.bfloat16)")
    assert kernel.run("ranks['part']").value.count("dtype=torch.bfloat16") == 2
    assert kernel.run("[part.tolist() for part in ranks['part']]").value == "[[3.0, 3.0], [6.0, 6.0]]"


def test_a_class_of_the_notebook_goes_to_the_ranks_and_back(kernel):
    kernel.run("class Point:\n    def __init__(self, x): self.x = x")
    kernel.run("ranks['point'] = Point(7)")
    assert kernel.run("ranks['point.x']").value == "[7, 7]"


def test_figures_and_widgets_of_rank_0_show(kernel):
    shown = kernel.run("%%ranks\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()")
    assert [sorted(display) for display in shown.displays] == [["image/png", "text/plain"]]
    shown = kernel.run("%%ranks 0\nimport ipywidgets\nslider = ipywidgets.IntSlider(3)\nslider")
    assert "application/vnd.jupyter.widget-view+json" in shown.displays[-1]


def test_what_is_printed_and_displayed_keeps_its_order(kernel):
    cell = "%%ranks 0\nfor number in range(50):\n    print('before', number)\n    display(number)\n    print('after', number)"
    shown = [
        content["text"] if kind == "stream" else content["data"]["text/plain"] + "\n"
        for kind, content in kernel.messages(kernel.start(cell))
        if kind in ("stream", "display_data")
    ]
    assert "".join(shown) == "".join(f"before {number}\n{number}\nafter {number}\n" for number in range(50))


def test_clearing_the_output_leaves_what_is_printed_afterwards(kernel):
    cell = "%%ranks 0\nfrom IPython.display import clear_output\nfor number in range(50):\n    clear_output()\n    print(number)"
    shown = ""
    for kind, content in kernel.messages(kernel.start(cell)):
        shown = "" if kind == "clear_output" else shown + content["text"] if kind == "stream" else shown
    assert shown == "49\n"


def test_a_widget_that_is_moved_in_the_page_moves_on_the_rank(kernel):
    shown = kernel.run("%%ranks 0\nimport ipywidgets\nslider = ipywidgets.IntSlider(3)\nslider")
    comm_id = shown.displays[-1]["application/vnd.jupyter.widget-view+json"]["model_id"]
    update = {"method": "update", "state": {"value": 8}, "buffer_paths": []}
    kernel.client.shell_channel.send(kernel.client.session.msg("comm_msg", {"comm_id": comm_id, "data": update}))
    assert kernel.run("%%ranks 0\nslider.value").value == "8"


def test_the_failing_ranks_traceback_is_the_cells_and_the_other_one_does_not_wait(group):
    shown = group.run("%%ranks\nif rank == 1:\n    lr = 1 / 0\ndistributed.barrier()")
    assert shown.error.startswith("ZeroDivisionError: division by zero") and "[rank 1]" in shown.error
    assert "lr = 1 / 0" in shown.error and "session.py" not in shown.error
    assert group.run("ranks['rank']").value == "[0, 1]"


def test_a_rank_that_comes_to_wait_long_after_the_failure_keeps_its_variables_too(kernel):
    began = time.monotonic()
    meet = "distributed.init_process_group('gloo', rank=rank, world_size=world_size)"
    shown = kernel.run(
        f"%%ranks\nimport time\nfrom torch import distributed\nkept = rank\ntime.sleep(2 - 2 * rank)\n1 / (1 - rank)\n{meet}"
    )
    assert shown.error.startswith("ZeroDivisionError") and time.monotonic() - began < 15
    assert kernel.run("ranks['kept']").value == "[0, 1]"


LARGE = """
import os, signal, threading
class Large:
    "It takes a while to send, in which Stop is pressed."
    def __reduce__(self):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        return len, (bytes(400_000_000),)
ranks['large'] = Large()
"""


def test_an_interrupt_while_a_value_is_sent_leaves_the_ranks_able_to_hear(kernel):
    assert kernel.run(LARGE).error.split(":")[0] in ("", "KeyboardInterrupt")
    assert kernel.run("ranks['rank']").value == "[0, 1]"


def test_an_interrupt_that_comes_when_all_have_answered_ends_the_cell(kernel):
    "It would otherwise be lost between the many short requests of a loop."
    cell = """
import os, signal
from dlnb.session.session import WatchedExchange
finish = WatchedExchange.finish
def interrupted(self):
    os.kill(os.getpid(), signal.SIGINT)
    finish(self)
WatchedExchange.finish = interrupted
try:
    ranks['rank']
finally:
    WatchedExchange.finish = finish
"""
    assert kernel.run(cell).error.startswith("KeyboardInterrupt")
    assert kernel.run("ranks['rank']").value == "[0, 1]"


def test_what_rank_0_prints_is_shown_although_its_log_was_removed(kernel):
    find = "import os\nos.remove(os.readlink('/proc/self/fd/1'))\nprint('begun', flush=True)\nimport time\ntime.sleep(600)"
    shown = kernel.run(f"%%ranks 0\n{find}", interrupt_after="begun")
    assert "begun" in shown.text and shown.error.startswith("KeyboardInterrupt")


def test_an_interrupt_reaches_ranks_that_wait_for_each_other_and_leaves_them_alive(group):
    cell = "%%ranks\nprint('begun', flush=True)\nwhile True:\n    distributed.all_reduce(torch.ones(1))"
    shown = group.run(cell, interrupt_after="begun")
    assert shown.error.startswith("KeyboardInterrupt")
    assert group.run("ranks['rank']").value == "[0, 1]"
    meet = "if not distributed.is_initialized():\n    distributed.init_process_group('gloo', rank=rank, world_size=world_size)"
    shown = group.run(f"%%ranks 0,1\n{meet}\ntotal = torch.ones(1)\ndistributed.all_reduce(total)")
    assert shown.error == "" and group.run("ranks['total.item()']").value == "[2.0, 2.0]"


def test_an_interrupt_reaches_a_rank_that_waits_for_one_which_does_nothing(group):
    began = time.monotonic()
    shown = group.run("%%ranks 0\nprint('begun', flush=True)\ndistributed.barrier()", interrupt_after="begun")
    assert shown.error and time.monotonic() - began < 20
    meet = "if not distributed.is_initialized():\n    distributed.init_process_group('gloo')"
    assert group.run(f"%%ranks\n{meet}\ntotal = torch.ones(1)\ndistributed.all_reduce(total)").error == ""
    assert group.run("ranks['total.item()']").value == "[2.0, 2.0]"


@pytest.mark.parametrize(
    "cell",
    [
        "distributed.recv(torch.zeros(1), src=1 - rank)",
        "distributed.all_reduce(torch.ones(1)) if rank else distributed.broadcast(torch.ones(3), 0)\ndistributed.barrier()",
        "if rank == 0: distributed.init_process_group('gloo')",
        "input('the answer') if rank == 0 else distributed.barrier()",
    ],
    ids=["recv", "different collectives", "process group", "input"],
)
def test_an_interrupt_reaches_ranks_that_nothing_else_frees(group, cell):
    if "init_process_group" in cell:
        group.run("%%ranks\ndistributed.destroy_process_group()")
    pids = group.run("ranks['__import__(\"os\").getpid()']").value
    began = time.monotonic()
    shown = group.run(f"%%ranks\nkept = rank\nprint('begun', flush=True)\n{cell}", interrupt_after="begun")
    assert shown.error.startswith("KeyboardInterrupt") and time.monotonic() - began < 15
    meet = "if not distributed.is_initialized():\n    distributed.init_process_group('gloo')"
    assert group.run(f"%%ranks\n{meet}\ntotal = torch.ones(1)\ndistributed.all_reduce(total)").error == ""
    assert group.run("ranks['kept, total.item()']").value == "[(0, 2.0), (1, 2.0)]"
    assert group.run("ranks['__import__(\"os\").getpid()']").value == pids


def test_an_interrupt_between_two_collectives_leaves_no_ranks_that_are_out_of_step(group):
    wait = "%%ranks\nimport time\ndistributed.barrier()\n{}\nif rank == 0: print('begun', flush=True)\ntime.sleep(60)"
    assert group.run(wait.format(""), interrupt_after="begun").error.startswith("KeyboardInterrupt")
    assert group.run("ranks['distributed.is_initialized()']").value == "[True, True]"
    begin = "if rank == 0: work = distributed.all_reduce(torch.ones(1), async_op=True)"
    assert group.run(wait.format(begin), interrupt_after="begun").error.startswith("KeyboardInterrupt")
    assert group.run("ranks['distributed.is_initialized()']").value == "[False, False]"
    assert group.run("%%ranks\ndistributed.init_process_group('gloo')\ntotal = torch.ones(1)\ndistributed.all_reduce(total)").error == ""
    assert group.run("ranks['total.item()']").value == "[2.0, 2.0]"


def test_a_model_of_the_ranks_that_holds_the_process_group_does_not_keep_the_others_waiting(group):
    group.run("%%ranks\nddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))")
    shown = group.run("%%ranks\nif rank == 0:\n    raise KeyError('gone')\nddp(torch.ones(1, 2)).sum().backward()")
    assert shown.error.startswith("KeyError") and "[rank 0]" in shown.error
    assert group.run("ranks['rank']").value == "[0, 1]"


def test_a_process_group_that_one_cell_ends_is_made_again_by_the_next(kernel):
    kernel.run("%%ranks\nimport torch\nfrom torch import distributed")
    make = "%%ranks\ndistributed.init_process_group('gloo')\ntotal = torch.ones(1)\ndistributed.all_reduce(total)"
    for turn in range(20):
        assert kernel.run(make).error == "", turn
        assert kernel.run("ranks['total.item()']").value == "[2.0, 2.0]"
        for ranks in (" 1", " 0") if turn % 2 else ("",):  # each by a cell of its own, or by one
            assert kernel.run(f"%%ranks{ranks}\ndistributed.destroy_process_group()").error == ""


def test_the_debugger_of_a_failed_rank_is_asked_in_the_cell(kernel):
    kernel.run("%%ranks 1\nsecret = 41\nsecret / 0")
    kernel.run("import builtins\nasked, given = [], iter(['p secret + 1', 'q'])")
    kernel.run("get_ipython().kernel.raw_input = lambda prompt='': asked.append(prompt) or next(given)")
    kernel.run("builtins.input, before = get_ipython().kernel.raw_input, builtins.input")
    shown = kernel.run("%ranks --debug 1")
    kernel.run("builtins.input = before")
    assert "42" in shown.text and kernel.run("asked[0]").value == "'[rank 1] ipdb> '"


def test_every_cell_goes_to_the_ranks_once_that_is_asked_for(kernel):
    kernel.run("%ranks --auto")
    assert "[rank 1] 1" in kernel.run("here = rank\nhere").text
    kernel.run("%ranks --manual")
    assert kernel.run("here").error.startswith("NameError")


def test_cells_about_the_ranks_stay_in_the_kernel_however_they_begin(kernel):
    kernel.run("%ranks --auto")
    before = kernel.run("# the same ranks\n%ranks").text
    kernel.run("# the first cell of the notebook, once more\n%load_ext dlnb\n%ranks 2 --accelerator cpu")
    assert "[rank 1] 1" in kernel.run("rank").text, before
    assert "of 2 already" in kernel.run("from dlnb.ranks import Ranks\nRanks(2)").error
    kernel.run("# back\n%ranks --manual")
    assert kernel.run("rank").error.startswith("NameError")


@pytest.mark.parametrize(
    "line, told",
    [
        ("%ranks 0", "devices=0 must be a number from 1 on"),
        ("%ranks 2 --strategy dpp", "Did you mean 'ddp'?"),
        ("%ranks two", "devices='two'"),
        ("%ranks --debug 7", "%ranks --debug='7' is not known. Choices: 0, 1."),
        ("%ranks 2 --fast", "unrecognized arguments: --fast"),
        ("%%ranks 2\n1", "%%ranks='2' is not known. Choices: 0, 1."),
    ],
)
def test_what_is_not_known_is_said_and_the_ranks_are_still_there(kernel, line, told):
    before = kernel.run("len(ranks)").value
    assert told in kernel.run(line).error
    assert kernel.run("len(ranks)").value == before == "2"
    assert kernel.run("ranks['rank']").value == "[0, 1]"


FIT = """
from dlnb.config import RunConfig
from dlnb.examples import DigitsNet
from dlnb.infer import evaluate
from dlnb.trainer import fit

class Net(DigitsNet):
    pass

task = dict(model="__main__:Net", data="dlnb.examples:Digits", accelerator="cpu", devices=2, max_epochs=2, wandb="disabled", optimizer="AdamW")
task |= dict(root="runs")
"""


@pytest.fixture(scope="module")
def trainer(warm, tmp_path_factory):
    kernel = FamilyKernel(folder := tmp_path_factory.mktemp("trainer"))
    assert kernel.run(FIT).error == ""
    kernel.folder = folder
    yield kernel
    assert kernel.end() == []


def weights(kernel, expression: str) -> dict:
    return load_file(kernel.folder / Path(kernel.run(f"print({expression}.folder)").text.strip()) / "model.safetensors")


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("deepspeed_stage_3", marks=pytest.mark.soak)])
def test_fit_in_a_kernel_trains_on_ranks_as_a_batch_job_does(trainer, strategy, launch, tmp_path):
    shown = trainer.run(f"record = fit(RunConfig(**task, strategy={strategy!r}))\nrecord.resolved['world_size'], record.status")
    assert shown.error == "" and shown.value == "(2, 'finished')"
    assert any("epoch 2/2" in display.get("text/plain", "") for display in shown.displays)
    cells = [FIT, f"devices = 2\nrecord = fit(RunConfig(**task | dict(root={str(tmp_path / 'batch')!r}), strategy={strategy!r}))"]
    _, folder = launch(write_notebook(tmp_path / "in.ipynb", "unused = 1", *cells))
    batch, live = load_file(folder / "model.safetensors"), weights(trainer, "record")
    assert batch.keys() == live.keys() and all(batch[name].numpy().tobytes() == live[name].numpy().tobytes() for name in batch)
    assert folder.name == Path(trainer.run("print(record.folder)").text.strip()).name  # the same run, by its name and hash
    trainer.run("%load_ext dlnb\n%ranks 2 --accelerator cpu\n%ranks --auto")
    for cell in [FIT, cells[1].replace(str(tmp_path / "batch"), str(tmp_path / "session"))]:
        assert trainer.run(cell).error == ""
    trainer.run("# the ranks are done\n%ranks --manual\n%ranks --stop")
    (session,) = (tmp_path / "session").rglob("model.safetensors")
    assert session.read_bytes() == (folder / "model.safetensors").read_bytes()


OF_A_FILE = """
from dlnb.settings.import_path import load_class
Net = load_class("nets/net.py:Net")
settings = dict(model="nets/net.py:Net", data="nets/net.py:Digits", accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, root="runs")
"""


def test_a_model_of_a_file_goes_to_the_ranks_by_its_path(trainer):
    (trainer.folder / "nets").mkdir()
    (trainer.folder / "nets" / "net.py").write_text("from dlnb.examples import Digits, DigitsNet\n\nclass Net(DigitsNet):\n    pass\n")
    for given in ("RunConfig(**settings)", "RunConfig(**settings, seed=1), Net()"):
        shown = trainer.run(OF_A_FILE + f"record = fit({given})\nrecord.status, record.resolved['world_size']")
        assert (shown.error, shown.value) == ("", "('finished', 2)")
    shown = trainer.run("evaluate(record.folder, accelerator='cpu', devices=2, strategy='ddp', root='runs').status")
    assert (shown.error, shown.value) == ("", "'finished'")


def test_a_training_on_other_ranks_than_the_sessions_is_refused_on_them(kernel):
    kernel.run("%%ranks\nfrom dlnb.config import RunConfig\nfrom dlnb.trainer import fit")
    settings = "model='dlnb.examples:DigitsNet', data='dlnb.examples:Digits', accelerator='cpu', strategy='ddp'"
    shown = kernel.run(f"%%ranks\nfit(RunConfig({settings}, devices=3))")
    assert "devices=3: this cell runs on each of 2 ranks" in shown.error


def test_evaluate_in_a_kernel_works_on_ranks(trainer):
    trainer.run("record = fit(RunConfig(**task, strategy='ddp'))")
    shown = trainer.run(
        "evaluate(record.folder, predictions=True, accelerator='cpu', devices=2, strategy='ddp', root='runs').metrics['samples']"
    )
    assert (shown.error, shown.value) == ("", "269")


def test_the_stop_button_saves_and_the_same_cell_resumes_to_the_same_bytes(trainer):
    fit = "record = fit(RunConfig(**task | dict(max_epochs=6), strategy='ddp', name={!r}))"
    first, *_, last = [
        display["text/html"] for display in trainer.run(fit.format("whole")).displays if "<TrainingCard>" in display.values()
    ]
    assert "rank 0" in first and "rank 1" in first
    assert "finished" in last and "6 of 6" in last and "samples/s" in last and "data:image/png" in last
    stopped = trainer.run(fit.format("stopped"), interrupt_after="epoch 2/6")
    assert stopped.error.startswith("KeyboardInterrupt: The interrupt stopped all ranks after") and "it is saved" in stopped.error
    expected = weights(trainer, "record")
    trainer.run("before = record")
    assert trainer.run(fit.format("stopped")).error == ""
    assert trainer.run("record.attempts, record.epoch").value == "(2, 6)"
    found = weights(trainer, "record")
    assert all(found[name].numpy().tobytes() == expected[name].numpy().tobytes() for name in expected)


def test_an_exception_of_a_rank_is_raised_in_the_kernel_whose_variables_survive(trainer):
    trainer.run(
        "class Broken(DigitsNet):\n    def training_step(self, batch, index):\n        raise ValueError(f'rank {self.global_rank} is out of luck')"
    )
    shown = trainer.run(
        "kept = 5\ntry:\n    fit(RunConfig(**task | dict(model='__main__:Broken')))\nexcept ValueError as error:\n    print(kept, error)"
    )
    assert shown.error == "" and "5 rank" in shown.text and "is out of luck" in shown.text


COMPLETES = """%%ranks
import os, signal, time
from dlnb.system.progress import announce_ending
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
announce_ending()
time.sleep(6)
open('completed', 'w').close()
raise RuntimeError('Connection closed by peer')
"""


def test_rank_0_completes_what_it_writes_where_another_rank_has_died(warm, tmp_path):
    kernel = FamilyKernel(tmp_path)
    try:
        kernel.run("%load_ext dlnb\n%ranks 2 --accelerator cpu")
        assert "SIGKILL" in kernel.run(COMPLETES, timeout=60).error
        assert (tmp_path / "completed").exists()
    finally:
        assert kernel.end() == []


DEAF = """
import os, signal, threading
pid = ranks['__import__("os").getpid()'][1]
os.kill(pid, signal.SIGSTOP)
for seconds in (1, 2, 3):
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
ranks['large'] = bytes(100_000_000)
"""


def test_three_interrupts_end_what_is_sent_to_a_rank_that_does_not_read(warm, tmp_path):
    kernel = FamilyKernel(tmp_path)
    try:
        kernel.run("%load_ext dlnb\n%ranks 2 --accelerator cpu")
        assert "SIGKILL" in kernel.run(DEAF, timeout=60).error
        assert kernel.run("1 + 1").value == "2"
    finally:
        assert kernel.end() == []


def test_a_killed_rank_is_told_by_its_signal_and_the_kernel_goes_on(warm, tmp_path):
    kernel = FamilyKernel(tmp_path)
    kernel.run("%load_ext dlnb\n%ranks 2 --accelerator cpu")
    shown = kernel.run("%%ranks\nimport os, signal, time\nif rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)", timeout=30)
    assert "RankDied" in shown.error and "killed by SIGKILL" in shown.error
    assert "have ended" in kernel.run("%%ranks\n1").error
    kernel.run("%ranks 2 --accelerator cpu")
    assert kernel.run("ranks['rank']").value == "[0, 1]"
    assert kernel.end() == []


@pytest.mark.soak
def test_the_ranks_end_with_their_kernel(warm, tmp_path):
    kernel = FamilyKernel(tmp_path)
    kernel.run("%load_ext dlnb\n%ranks 2 --accelerator cpu")
    kernel.run("%%ranks\nimport os\npid = os.getpid()")
    pids = json.loads(kernel.run("ranks['pid']").value)
    os.kill(kernel.process.pid, signal.SIGKILL)
    assert kernel.end() == [] and len(pids) == 2


ANNOUNCED = """
class Net(DigitsNet):
    def on_train_start(self):
        import os
        print("process", os.getpid(), "of rank", self.global_rank, flush=True)
"""
KILLED = "record = fit(RunConfig(**task | dict(max_epochs=8, save_every_n_steps=3), strategy='ddp', name={!r}))\nprint(record.status)"


def closed_within(kernel: FamilyKernel, name: str, seconds: float) -> str:
    "Train, and close the page so long after the cell has started; what the cell has come to, asked by a page that is opened then."
    kernel.start("record = None\n" + KILLED.format(name))
    time.sleep(seconds * 3)
    kernel.client.stop_channels()
    kernel.connect()
    return kernel.run("print(record and record.status)").text


def killed_within(kernel: FamilyKernel, name: str, victim: str, seconds: float) -> str:
    "Train, and kill a rank so long after the first step, or the kernel after the cell has begun; what the cell has shown."
    shown, rank = "", victim.removeprefix("rank ")
    if victim == "page":
        return closed_within(kernel, name, seconds)
    cell = kernel.start(KILLED.format(name))
    if victim == "kernel":
        time.sleep(seconds * 3)
        os.kill(kernel.process.pid, signal.SIGKILL)
        return shown
    for kind, content in kernel.messages(cell):
        kernel.look()
        shown += content.get("text", "") + content.get("evalue", "")
        if found := re.search(rf"process (\d+) of rank {rank}\n", shown):
            time.sleep(seconds)
            with suppress(ProcessLookupError):  # it has finished before
                os.kill(int(found[1]), signal.SIGKILL)
            rank = "that is killed"
    return shown


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1])
def test_fifty_kills_of_kernels_ranks_and_pages_lose_nothing_and_leave_nothing(warm, tmp_path, seed):
    draw, kills, runs, kernel = random.Random(seed), 0, ["undisturbed"], None
    while kills < 50:
        if kernel is None:
            kernel = FamilyKernel(tmp_path)
            assert kernel.run(FIT + ANNOUNCED).error == ""
        if len(runs) == 1:
            assert "finished" in kernel.run(KILLED.format(runs[0])).text
            runs.append("killed-1")
        victim = draw.choice(["rank 0", "rank 1", "kernel", "page"])
        shown = killed_within(kernel, runs[-1], victim, draw.uniform(0, 1))
        kills += victim == "page" or "finished" not in shown
        if "finished" in shown:
            runs.append(f"killed-{len(runs)}")
        elif victim == "kernel":
            assert kernel.end(within=90) == []  # the server of ranks sees it after its imports
            kernel = None
        else:
            assert "killed by SIGKILL" in shown and kernel.run("task['devices']").value == "2", shown
    kernel = kernel or FamilyKernel(tmp_path)
    assert kernel.run(FIT + ANNOUNCED).error == "" and "finished" in kernel.run(KILLED.format(runs[-1])).text
    assert kernel.end() == []
    expected, *found = [load_file(*tmp_path.glob(f"runs/*/train/ddp/{name}-*/model.safetensors")) for name in runs]
    assert all(weights[name].numpy().tobytes() == expected[name].numpy().tobytes() for weights in found for name in expected)


@pytest.mark.parametrize("working, interrupted", [(7, True), (0, False)], ids=["a message", "an answer"])
def test_an_interrupt_within_a_message_is_raised_after_it_and_is_not_left_to_the_next_request(working, interrupted):
    from dlnb.session.serve import Channel

    class Interrupted:
        "A connection, in the middle of whose messages a signal comes."

        def __init__(self):
            self.sent = []

        def send(self, message):
            signal.raise_signal(signal.SIGUSR1)
            self.sent.append(message)

    channel = Channel(Interrupted())
    before = signal.signal(signal.SIGUSR1, channel.interrupts.handle)
    try:
        channel.interrupts.working = working
        with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
            channel.send(("text",))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert channel.connection.sent == [("text",)]
    assert not channel.interrupts.is_pending
