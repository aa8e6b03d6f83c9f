"""A checkpoint is complete or invisible: a save that is killed, or runs into a full disk, at every one of its system calls."""

import errno
import os
import resource
import signal
import sys
import time
import traceback
from types import SimpleNamespace

import pytest
import torch
from slow_mount import slow_mount

from dlnb.checkpoint.collector import save_checkpoint
from dlnb.checkpoint.manifest import KEY, Manifest
from dlnb.checkpoint.search import find_checkpoint, tidy
from dlnb.checkpoint.writer import Write, Writer
from dlnb.system.atomic import UNFINISHED

EVENTS = ("open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.copytree", "shutil.rmtree")
SIZE = 50_000  # elements of the tensor in a checkpoint


def save(folder, kind: str, step: int, background: bool = False) -> None:
    "Save a step under the names of the best and the last, in the place of the step before."
    staging, manifest = folder / f"last.ckpt{UNFINISHED}", Manifest(step=step, epoch=0)
    content = {"weight": torch.full((SIZE,), float(step)), KEY: manifest.model_dump(mode="json")}
    files = {staging: content}
    if kind == "folder":
        (staging / "checkpoint").mkdir(parents=True)
        files = {staging / "checkpoint" / name: content for name in ("a.pt", "b.pt")}
    names = [folder / f"step={step}.ckpt", folder / "last.ckpt"]
    writer = Writer()
    writer.write(Write(staging, files, 0, manifest, names, [folder / f"step={step - 1}.ckpt"]), background)
    writer.finish()


class Folder:
    "A strategy that writes a folder itself, as FSDP does a sharded state."

    checkpoint_io = None

    def save_checkpoint(self) -> None: ...


def test_a_folder_that_the_strategy_writes_itself_is_complete_when_all_ranks_have_written(tmp_path):
    def write_part(path):
        path.mkdir(exist_ok=True)
        (path / "part.distcp").write_bytes(b"part")

    writers, manifest = [Writer(), Writer()], Manifest(step=1, epoch=0, world_size=2)
    for rank, writer in enumerate(writers):
        trainer = SimpleNamespace(is_global_zero=rank == 0, global_rank=rank, num_devices=2, strategy=Folder(), save_checkpoint=write_part)
        save_checkpoint(trainer, writer, manifest, tmp_path / "last.ckpt")
    for writer in writers:
        writer.finish()
    assert find_checkpoint(tmp_path).path == tmp_path / "last.ckpt" and not list(tmp_path.glob(f"*{UNFINISHED}"))


class Fault:
    "Does something at the n-th system call on a folder that Python makes from now on."

    def __init__(self, folder, at: int, act):
        self.folder, self.at, self.act, self.seen = str(folder), at, act, 0
        fsync = os.fsync
        os.fsync = lambda descriptor: (self.count(), fsync(descriptor))
        sys.addaudithook(self.hook)  # for the rest of this process

    def hook(self, event, arguments):
        if event in EVENTS and arguments and self.folder in str(arguments[0]):
            self.count()

    def count(self):
        self.seen += 1
        if self.seen == self.at:
            self.act()


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fill_the_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_a_child(act) -> int:
    "The exit code of a process that does something, negative for a signal: 0 where it went well, 3 after an error."
    if (child := os.fork()) == 0:
        try:
            os._exit(act() or 0)
        except (OSError, RuntimeError):
            os._exit(3)
        except BaseException:
            traceback.print_exc()
            os._exit(4)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check(folder, kind: str, least: int = 1) -> int:
    "The step of the checkpoint that a training would resume from; every name in the folder is of a complete one."
    tidy(folder)
    found = find_checkpoint(folder)
    assert found.damaged == [] and found.manifest.step >= least
    paths = [found.path] if kind == "file" else [found.path / "checkpoint" / name for name in ("a.pt", "b.pt")]
    for path in paths:
        assert torch.load(path)["weight"].unique().tolist() == [found.manifest.step]
    assert all(path.suffix == ".ckpt" for path in folder.iterdir())
    return found.manifest.step


def number_of_calls(folder, kind: str) -> int:
    def act():
        fault = Fault(folder, 0, kill)
        save(folder, kind, 2)
        (folder.parent / "calls").write_text(str(fault.seen))

    assert in_a_child(act) == 0
    return int((folder.parent / "calls").read_text())


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a child of a process with a pool of threads must not use it
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "background", [pytest.param(False, id="at once", marks=pytest.mark.soak), pytest.param(True, id="in the background")]
)
@pytest.mark.parametrize("act, code", [(kill, -signal.SIGKILL), (fill_the_disk, 3)], ids=["kill", "ENOSPC"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_at_every_system_call_a_complete_checkpoint_remains(tmp_path, kind, act, code, background):
    (counted := tmp_path / "counted" / "checkpoints").mkdir(parents=True)
    save(counted, kind, 1)
    calls, steps = number_of_calls(counted, kind), []
    assert calls > 8
    for at in range(1, calls + 1):
        (folder := tmp_path / str(at)).mkdir()
        save(folder, kind, 1)

        def attempt():
            Fault(folder, at, act)
            save(folder, kind, 2, background)

        ended = in_a_child(attempt)
        steps.append(check(folder, kind))
        assert ended == code or (act is fill_the_disk and ended == 0 and steps[-1] == 2)  # a link that fails is a copy
        save(folder, kind, 3)  # and the training goes on
        assert check(folder, kind, least=3) == 3
    assert {1, 2} == set(steps) and (act is fill_the_disk or steps == sorted(steps))


@pytest.mark.parametrize("dies", [True, False], ids=["kill", "short write"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_at_every_size_of_a_written_file_the_checkpoint_before_remains(tmp_path, kind, dies):
    save(tmp_path, kind, 1)
    size = max(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    for limit in (0, 1, 100, 4096, size // 2, size - 100, size - 1):

        def attempt():
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if dies else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            save(tmp_path, kind, 2)

        assert in_a_child(attempt) == (-signal.SIGXFSZ if dies else 3)
        assert check(tmp_path, kind) == 1


def longest_wait(folder) -> float:
    "Seconds between two moments of this thread, while a checkpoint is written in the background."
    manifest, staging, writer = Manifest(step=1, epoch=0), folder / f"last.ckpt{UNFINISHED}", Writer()
    writer.write(
        Write(staging, {staging: {"weight": torch.zeros(SIZE), KEY: manifest.model_dump()}}, 0, manifest, [folder / "last.ckpt"], [])
    )
    moments = [time.perf_counter()]
    while writer.thread.is_alive():
        time.sleep(0.001)
        moments.append(time.perf_counter())
    writer.finish()
    return max(later - earlier for earlier, later in zip(moments, moments[1:]))


def test_a_training_does_not_wait_for_a_file_that_is_slow_to_close(tmp_path):
    "As on a network's filesystem, which sends a file's end when it is closed. Another process may hold this one up in one of three tries."
    disk, mount = tmp_path / "disk", tmp_path / "mount"
    disk.mkdir(), mount.mkdir()
    try:
        with slow_mount(disk, mount, 0.3):
            waits = [longest_wait(mount) for _ in range(3)]
    except OSError as error:
        pytest.skip(f"FUSE cannot be mounted here: {error}")
    assert min(waits) < 0.2, waits
    assert find_checkpoint(disk).manifest.step == 1


class Unpicklable:
    "It pickles only when it is not asked for the first time: what cannot be copied is saved as it is."

    def __init__(self):
        self.asked = 0

    def __getstate__(self):
        self.asked += 1
        if self.asked == 1:
            raise RuntimeError("not now")
        return {"value": 5}


def test_an_object_that_cannot_be_copied_is_saved_as_it_is_at_each_of_its_places(tmp_path):
    one, writer = Unpicklable(), Writer()
    staging = tmp_path / f"last.ckpt{UNFINISHED}"
    content = {"one": one, "holds it": [one], KEY: Manifest(step=1, epoch=0).model_dump(mode="json")}
    writer.write(Write(staging, {staging: content}, 0, Manifest(step=1, epoch=0), [tmp_path / "last.ckpt"], []))
    writer.finish()
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert saved["one"].value == 5 and saved["holds it"][0] is saved["one"]


def written_by(ranks_here: int, folder) -> bool:
    "Whether a tensor of 400 KB is written in the background; all files that it leaves are complete."
    staging, manifest, writer = folder / f"last.ckpt{UNFINISHED}", Manifest(step=1, epoch=0), Writer()
    files = {staging: {"weight": torch.zeros(100_000), KEY: manifest.model_dump(mode="json")}}
    writer.write(Write(staging, files, 0, manifest, [folder / "last.ckpt"], [], ranks_here=ranks_here))
    is_background = writer.thread is not None
    writer.finish()
    assert find_checkpoint(folder).manifest.step == 1
    return is_background


def test_ranks_of_a_container_that_has_room_for_some_of_their_copies_write_before_they_go_on(tmp_path, monkeypatch, capsys):
    "The control group is another one, with 2 MB of memory that are free; a copy needs 0.6 MB."
    for name, content in {"memory.max": "9000000", "memory.current": "8000000", "memory.stat": "inactive_file 1000000\n"}.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr("dlnb.system.processes.CONTROL_GROUP", tmp_path)
    assert written_by(3, tmp_path) and capsys.readouterr().out == ""
    assert not written_by(4, tmp_path) and "the training waits while a checkpoint is written" in capsys.readouterr().out


def test_a_checkpoint_that_fails_is_reported_where_the_training_has_failed_first(tmp_path, capsys):
    manifest, writer = Manifest(step=1, epoch=0), Writer()
    missing = tmp_path / "missing" / f"last.ckpt{UNFINISHED}"
    writer.write(Write(missing, {missing: {}}, 0, manifest, [tmp_path / "last.ckpt"], []))
    writer.abandon()
    reported = capsys.readouterr().out
    assert reported.count("could not be written at step 1") == 1 and "The previous checkpoint is kept" in reported
