"""Nothing that another wrote is run: what this installation wrote is unpickled whole, all else by its plain values, and a file of
parameters names parameters."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from test_reshard import Training
from torch.distributed.checkpoint import FileSystemReader

from dlnb.checkpoint.manifest import KEY, Manifest, check_files, is_own, read_manifest
from dlnb.checkpoint.plain_values import plain_values_only
from dlnb.checkpoint.search import examine
from dlnb.checkpoint.writer import Write, Writer
from dlnb.config import RunConfig
from dlnb.system.atomic import UNFINISHED
from dlnb.trainer import fit

pytestmark = pytest.mark.timeout(400)
TASK = dict(model="dlnb.examples:DigitsNet", data="dlnb.examples:Digits", model_args={"width": 8}, data_args={"num_workers": 0})
TASK |= dict(accelerator="cpu", devices=1, batch_size=64, trainer_args={"enable_progress_bar": False})


class Hostile:
    "Makes a folder when it is unpickled."

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Note:
    "An object of a user's own, harmless, that only unpickling whole brings back."


def save(path: Path, kind: str, step: int = 1) -> Path:
    "A checkpoint as a training writes it: one file, or a folder of two shards."
    path.parent.mkdir(parents=True, exist_ok=True)
    staging, manifest = path.with_name(path.name + UNFINISHED), Manifest(step=step, epoch=0)
    content = {"weight": torch.full((1000,), float(step)), KEY: manifest.model_dump(mode="json")}
    files = {staging: content}
    if kind == "folder":
        (staging / "checkpoint").mkdir(parents=True)
        (staging / "latest").write_text("checkpoint")
        files = {staging / "checkpoint" / name: content for name in ("a.pt", "b.pt")}
    writer = Writer()
    writer.write(Write(staging, files, 0, manifest, [path], []), background=False)
    return path


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def flip_file(path: Path, other: Path) -> None:
    flip(path, 2000)


def flip_mark(path: Path, other: Path) -> None:
    flip(path, -1)


def append(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes() + other.read_bytes())


def add_member(path: Path, other: Path) -> None:
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(file.infolist()[0].filename.partition("/")[0] + "/data.pkl", pickle.dumps(Hostile(path)))


def add_member_and_mark(path: Path, other: Path) -> None:
    comment = zipfile.ZipFile(path).comment
    add_member(path, other)
    with zipfile.ZipFile(path, "a") as file:
        file.comment = comment


def flip_shard(path: Path, other: Path) -> None:
    flip(path / "checkpoint" / "a.pt", 2000)


def swap_shard(path: Path, other: Path) -> None:
    shutil.copy(other / "checkpoint" / "a.pt", path / "checkpoint" / "a.pt")


def swap_manifest(path: Path, other: Path) -> None:
    shutil.copy(other / "manifest.json", path / "manifest.json")


def add_file(path: Path, other: Path) -> None:
    torch.save({}, path / "checkpoint" / "c.pt")


def name_another_tag(path: Path, other: Path) -> None:
    (path / "latest").write_text("../elsewhere")


def link_shard(path: Path, other: Path) -> None:
    (path / "checkpoint" / "a.pt").rename(path.with_name("elsewhere.pt"))
    (path / "checkpoint" / "a.pt").symlink_to(path.with_name("elsewhere.pt"))


def change_manifest(path: Path, other: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"step": 7}))


def list_what_was_changed(path: Path, other: Path) -> None:
    flip_shard(path, other)
    relist(path)


def relist(folder: Path) -> None:
    "Make a manifest true to the files that are in its folder now."
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        was_number = isinstance(entry[1], int)
        manifest["files"][name] = [len(content), zlib.crc32(content) if was_number else hashlib.sha256(content).hexdigest()]
    (folder / "manifest.json").write_text(json.dumps(manifest))


TAMPERING = {"file": [flip_file, flip_mark, append, add_member, add_member_and_mark]}
TAMPERING["folder"] = [
    flip_shard,
    swap_shard,
    swap_manifest,
    add_file,
    name_another_tag,
    link_shard,
    change_manifest,
    list_what_was_changed,
]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind, tamper", [(kind, tamper) for kind, ways in TAMPERING.items() for tamper in ways])
def test_a_checkpoint_that_was_changed_is_nobodys_own(tmp_path, kind, tamper):
    path, other = save(tmp_path / "last.ckpt", kind), save(tmp_path / "other.ckpt", kind, step=2)
    assert is_own(path) and is_own(other)
    tamper(path, other)
    assert not is_own(path) and is_own(other)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_moved_or_copied_checkpoint_stays_own_and_one_of_another_key_does_not(tmp_path, monkeypatch, kind):
    path = save(tmp_path / "a" / "last.ckpt", kind)
    copy = shutil.copytree if path.is_dir() else shutil.copy
    (tmp_path / "b").mkdir()
    assert is_own(copy(path, tmp_path / "b" / "epoch=3.ckpt")) and is_own(path.rename(tmp_path / "moved"))
    monkeypatch.setenv("DLNB_KEY", str(tmp_path / "another key"))
    save(tmp_path / "c" / "last.ckpt", kind)
    assert not is_own(tmp_path / "moved") and is_own(tmp_path / "c" / "last.ckpt")
    assert check_files(tmp_path / "moved").step == 1 and not examine(tmp_path / "moved").own


def test_a_checkpoint_of_format_1_is_checked_by_its_sums_and_is_not_own(tmp_path):
    path = save(tmp_path / "last.ckpt", "folder")
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["mark"]
    manifest["format"] = 1
    manifest["files"] = {name: [size, zlib.crc32((path / name).read_bytes())] for name, (size, _) in manifest["files"].items()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert check_files(path) == read_manifest(path) and not is_own(path)
    flip_shard(path, path)
    with pytest.raises(ValueError, match="a.pt is not what was written"):
        check_files(path)


def test_processes_that_begin_at_the_same_time_make_one_key(tmp_path):
    code = "from dlnb.checkpoint.trust import signed; print(signed({'a': 1})['mark'])"
    environment = os.environ | {"DLNB_KEY": str(tmp_path / "deep" / "key")}
    started = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    assert len({process.communicate(timeout=60)[0] for process in started}) == 1
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["key"] and (tmp_path / "deep" / "key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("place", ["/proc/nowhere/key", "readable", "link", "folder", "pipe"])
def test_without_a_key_of_its_own_a_training_ends_well_and_says_so_once(tmp_path, monkeypatch, place):
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    key.chmod(0o644 if place == "readable" else 0o600)
    (tmp_path / "link").symlink_to(key)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe", 0o600)
    monkeypatch.setenv("DLNB_KEY", str(key if place == "readable" else tmp_path / place))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for number in range(3):
            assert not is_own(save(tmp_path / f"{number}.ckpt", "file")) and not is_own(save(tmp_path / f"{number}", "folder"))
    told = [str(warning.message) for warning in told if "cannot be used" in str(warning.message)]
    assert len(told) == 1 and "DLNB_KEY" in told[0]
    assert torch.load(tmp_path / "2.ckpt")["weight"][0] == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A run of one epoch."
    return fit(RunConfig(**TASK, max_epochs=1, root=str(tmp_path_factory.mktemp("trained")))).folder


@pytest.fixture
def run(trained, tmp_path):
    "A copy of it, under a root of its own."
    root = shutil.copytree(trained.parents[3], tmp_path / "runs")
    return Path(root) / trained.relative_to(trained.parents[3])


def go_on(run: Path, **settings):
    return fit(RunConfig(**TASK | {"max_epochs": 2, "root": str(run.parents[3])} | settings))


def put(run: Path, value, names: str = "*.ckpt") -> None:
    "Have the checkpoints of a run hold one more thing, written as anybody can write it."
    for path in (run / "checkpoints").glob(names):
        values = torch.load(path, weights_only=False)
        torch.save(values | {"more": value}, path)


@pytest.mark.parametrize("given", ["its settings", "resume"])
def test_a_foreign_run_of_the_same_settings_runs_nothing(run, tmp_path, given):
    put(run, Hostile(tmp_path / "was run"))
    with pytest.raises(ValueError) as error:
        go_on(run, **{} if given == "its settings" else {"resume": str(run), "root": str(tmp_path / "other")})
    assert not (tmp_path / "was run").exists() and not (tmp_path / "other").exists()
    assert all(word in str(error.value) for word in ("last.ckpt", "posix.mkdir", "DLNB_KEY", os.environ["DLNB_KEY"]))


def test_objects_of_the_users_own_come_back_where_the_key_is_and_are_refused_with_the_remedy_where_it_is_not(run, monkeypatch, capsys):
    from dlnb.checkpoint.trust import sign_archive

    put(run, Note())
    for path in (run / "checkpoints").iterdir():
        sign_archive(path)
    key = os.environ["DLNB_KEY"]
    monkeypatch.setenv("DLNB_KEY", key + " of another container")
    with pytest.raises(ValueError, match="names test_trust.Note. If it is your own, give DLNB_KEY the key file"):
        go_on(run)
    monkeypatch.setenv("DLNB_KEY", key)
    capsys.readouterr()
    assert go_on(run).epoch == 2 and "carries no signature" not in capsys.readouterr().out


def test_without_its_key_a_run_resumes_to_the_same_bytes(run, tmp_path, monkeypatch, capsys):
    other = Path(shutil.copytree(run.parents[3], tmp_path / "other")) / run.relative_to(run.parents[3])
    go_on(run)
    assert "carries no signature" not in capsys.readouterr().out
    monkeypatch.setenv("DLNB_KEY", str(tmp_path / "another key"))
    go_on(other)
    assert "carries no signature" in capsys.readouterr().out
    assert (run / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert is_own(other / "checkpoints" / "last.ckpt")


def test_under_slurm_a_checkpoint_of_lightnings_naming_in_the_folder_is_not_looked_at(run, tmp_path, monkeypatch):
    values = torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)
    torch.save(values | {"more": Hostile(tmp_path / "was run")}, run / "hpc_ckpt_1.ckpt")
    shutil.rmtree(run / "checkpoints")
    (run / "run.json").unlink()
    for name in "NTASKS NPROCS NNODES".split():
        monkeypatch.setenv(f"SLURM_{name}", "1")
    for name in "PROCID LOCALID NODEID".split():
        monkeypatch.setenv(f"SLURM_{name}", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    assert go_on(run).epoch == 2 and not (tmp_path / "was run").exists()


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    "A training of two ranks under ZeRO that failed after its last checkpoint."
    stopped = Training(tmp_path_factory.mktemp("zero"), "deepspeed_stage_1", 2, {"STOP_AT": "33"}, max_epochs=1)
    assert "STOP_AT" in stopped.done.stderr and is_own(stopped.folder / "checkpoints" / "last.ckpt")
    return stopped.folder / "checkpoints" / "last.ckpt"


def test_a_zero_folder_that_claims_to_be_of_this_training_runs_nothing(zero, tmp_path):
    hostile = Path(shutil.copytree(zero, tmp_path / "hostile.ckpt"))
    for name in ("zero_pp_rank_1_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"):
        values = torch.load(hostile / "checkpoint" / name, weights_only=False)
        torch.save(values | {"more": Hostile(tmp_path / name)}, hostile / "checkpoint" / name)
    relist(hostile)
    ended = Training(tmp_path / "again", "deepspeed_stage_1", 2, resume=str(hostile), max_epochs=1).done
    assert not [path for path in tmp_path.iterdir() if path.name.endswith("_states.pt")]
    assert ended.returncode != 0 and f"ValueError: {hostile} was not written by this installation" in ended.stderr


def test_a_zero_folder_resumes_to_the_same_bytes_with_and_without_its_key(zero, tmp_path):
    keys = {"own": os.environ["DLNB_KEY"], "other": str(tmp_path / "another key")}
    ends = {}
    for name, key in keys.items():
        again = Training(tmp_path / name, "deepspeed_stage_1", 2, {"DLNB_KEY": key}, resume=str(zero), max_epochs=1)
        assert again.record["status"] == "finished", again.done.stderr[-3000:]
        assert ("carries no signature" in again.done.stdout) == (
            name == "other"
        ) and "starts without its saved state" not in again.done.stderr
        ends[name] = (again.folder / "model.safetensors").read_bytes()
    assert ends["own"] == ends["other"]


def test_the_description_of_a_distributed_checkpoint_runs_nothing(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "was run")))
    with pytest.raises(ValueError, match="it names posix.mkdir"), plain_values_only(tmp_path):
        FileSystemReader(tmp_path).read_metadata()
    assert not (tmp_path / "was run").exists()


FORBIDDEN = dict(model="theirs.py:Net", data="theirs.py:Data", root="/tmp", resume="theirs.ckpt", name="theirs", best_params="x.json")
FORBIDDEN |= dict(
    tags=["x"], wandb="online", logger="tensorboard", devices=64, num_nodes=2, accelerator="tpu", monitor="x", monitor_mode="max"
)
FORBIDDEN |= dict(model_args={"width": 9}, data_args={}, trainer_args={}, strategy_args={}, save_every_n_steps=1, log_every_n_steps=1)
FORBIDDEN |= {
    "model.x": 1,
    "root.x": 1,
    "resume.": "x",
    "strategy_args.config": "x.json",
    "model_args.": 1,
    "model_args.a.class_path": "theirs.Net",
    "model_args.a.0.class_path": "theirs.Net",
    "model_args.0": 1,
    "": 1,
    ".": 1,
    "lr.x": 1,
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_best_params_name_only_what_a_search_may_vary(tmp_path, name):
    path = tmp_path / "best_params.json"
    path.write_text(json.dumps({"params": {"lr": 1e-3, name: FORBIDDEN[name]}}))
    with pytest.raises(ValueError, match="best_params=.*Choices: .*batch_size.*model_args.NAME"):
        RunConfig(**TASK, best_params=str(path))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b"[]", b'{"params": ["lr"]}', b'{"params": 3}', b"{}", b""])
def test_what_is_no_best_params_is_refused_with_its_name(tmp_path, content):
    path = tmp_path / "best_params.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="best_params.json' is not a best_params.json of a study"):
        RunConfig(**TASK, best_params=str(path))
