"""What anybody may have written is read right or refused in a sentence, in bounded memory and time; nothing else is removed."""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from foreign_files import BAD, good_header, index, make, safetensors, tensor
from safetensors.torch import load_file, save_file

from dlnb.consolidate import consolidate
from dlnb.formats.reader import read_layout

pytestmark = pytest.mark.timeout(300)


def test_the_table_is_of_different_cases():
    assert len({name for name, *_ in BAD}) == len(BAD) >= 100


@pytest.mark.parametrize("name", [name for name, *_ in BAD])
def test_a_bad_file_is_named_and_nothing_is_written(name, tmp_path):
    path, words = make(name, tmp_path / "in")
    (tmp_path / "out").mkdir()
    with pytest.raises((ValueError, OSError)) as raised:
        consolidate(path, tmp_path / "out")
    assert words in str(raised.value) and str(tmp_path / "in") in str(raised.value)
    assert len(str(raised.value)) < 1000 and list((tmp_path / "out").iterdir()) == []


PEAK = """
import sys
from dlnb.consolidate import consolidate
for path in sys.argv[2:]:
    try:
        consolidate(path, sys.argv[1])
    except (ValueError, OSError):
        pass
(peak,) = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(peak // 1024)
"""


def test_no_bad_file_takes_much_memory(tmp_path):
    paths = []
    for number, (name, *_) in enumerate(BAD):
        if "description" not in name:  # that imports torch, which is large
            paths.append(make(name, tmp_path / str(number))[0])
    (tmp_path / "out").mkdir()
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31))
    command = [sys.executable, "-c", PEAK, tmp_path / "out", *paths]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=100, preexec_fn=limit)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 300, "MB"


@pytest.fixture
def folder(tmp_path):
    "A model in two shards and their index, as Hugging Face has it, and a file outside."
    (tmp_path / "model").mkdir()
    state = {"a": torch.arange(6.0), "b": torch.arange(8.0)}
    torch.save(state, tmp_path / "model.pt")
    consolidate(tmp_path / "model.pt", tmp_path / "model", max_shard_size="30B")
    save_file(state, tmp_path / "precious.safetensors")
    return tmp_path / "model"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


INDICES = {
    "of a file outside": lambda f: {"a": "../precious.safetensors"},
    "of an absolute path": lambda f: {"a": str(f.parent / "precious.safetensors")},
    "of a neighbour": lambda f: {"a": "notes.txt"},
    "of another's shards": lambda f: {"a": "other-00001-of-00001.safetensors"},
    "of a wrong number": lambda f: {"a": "model-00001-of-00003.safetensors"},
    "of a shard and more": lambda f: {"a": "model-00001-of-00002.safetensors", "b": "../precious.safetensors"},
    "of itself": lambda f: {"a": "model.safetensors.index.json"},
    "of a list": lambda f: ["model-00001-of-00002.safetensors"],
    "of numbers": lambda f: {"a": 1},
    "of nothing": lambda f: {},
}


@pytest.mark.parametrize("kind", INDICES)
def test_an_index_beside_the_output_removes_no_file_that_it_names(folder, kind):
    for name in ("notes.txt", "other-00001-of-00001.safetensors", "model-00001-of-00003.safetensors"):
        (folder / name).write_text("mine")
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": INDICES[kind](folder)}))
    before = files(folder.parent)
    consolidate(folder.parent / "model.pt", folder, overwrite=True)
    after = files(folder.parent)
    assert before.keys() - after.keys() == {"model/model.safetensors.index.json"}
    assert all(after[name] == before[name] for name in before.keys() & after.keys())


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"weight_map": {"a": NaN}}', "\x00" * 100])
def test_a_damaged_index_beside_the_output_goes_and_nothing_with_it(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    consolidate(folder.parent / "model.pt", folder, overwrite=True)
    assert sorted(files(folder)) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors"]


def test_shards_that_are_links_stay(folder):
    first = folder / "model-00001-of-00002.safetensors"
    first.rename(folder.parent / "elsewhere.safetensors")
    first.symlink_to(folder.parent / "elsewhere.safetensors")
    consolidate(folder.parent / "model.pt", folder, overwrite=True)
    assert first.is_symlink() and first.exists()
    assert not (folder / "model-00002-of-00002.safetensors").exists()


def test_other_numbers_of_shards_replace_each_other(folder):
    consolidate(folder.parent / "model.pt", folder, max_shard_size="1MB", overwrite=True)
    assert sorted(files(folder)) == ["model.safetensors"]
    consolidate(folder.parent / "model.pt", folder, max_shard_size="30B", overwrite=True)
    torch.save({name: torch.ones(8) for name in "abc"}, folder.parent / "three.pt")
    consolidate(folder.parent / "three.pt", folder, max_shard_size="30B", overwrite=True)
    shards = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert sorted(files(folder)) == [*shards, "model.safetensors.index.json"]


IN_PLACE = {
    "its index": lambda f: (f / "model.safetensors.index.json", f, None),
    "its index, into shards": lambda f: (f / "model.safetensors.index.json", f, "30B"),
    "through a link to its folder": lambda f: (f / "model.safetensors.index.json", f.parent / "link", None),
    "its own file": lambda f: (f.parent / "precious.safetensors", f.parent / "precious.safetensors", None),
    "its own file by a link": lambda f: (f.parent / "precious.safetensors", f.parent / "soft.safetensors", None),
    "its own file by a hard link": lambda f: (f.parent / "precious.safetensors", f.parent / "hard.safetensors", None),
    "its own file in other words": lambda f: (f.parent / "precious.safetensors", f / ".." / "precious.safetensors", None),
    "into the name of its shard": lambda f: (f / "model.safetensors.index.json", f / "model-00001-of-00002.safetensors", None),
    "by a link to its index": lambda f: (f.parent / "linked.index.json", f, None),
}


@pytest.mark.parametrize("how", IN_PLACE)
def test_a_cast_in_place_is_refused_and_its_source_stays(folder, how):
    (folder.parent / "link").symlink_to(folder)
    (folder.parent / "soft.safetensors").symlink_to(folder.parent / "precious.safetensors")
    os.link(folder.parent / "precious.safetensors", folder.parent / "hard.safetensors")
    if how == "by a link to its index":
        for path in folder.iterdir():
            (folder.parent / path.name).symlink_to(path)
        (folder.parent / "model.safetensors.index.json").rename(folder.parent / "linked.index.json")
    source, out, limit = IN_PLACE[how](folder)
    before = files(folder.parent)
    with pytest.raises(ValueError, match="is a file of the checkpoint itself"):
        consolidate(source, out, dtype="bf16", max_shard_size=limit, overwrite=True)
    assert files(folder.parent) == before


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json"])
def test_a_shard_that_is_there_is_not_replaced_unasked(folder, name):
    for path in folder.iterdir():
        if path.name != name:
            path.unlink()
    before = files(folder)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        consolidate(folder.parent / "model.pt", folder, max_shard_size="30B")
    assert files(folder) == before


def in_the_way(folder: Path, kind: str) -> Path:
    way = folder / {"of the output": "model.safetensors", "of its index": "model.safetensors.index.json"}[kind]
    way.unlink(missing_ok=True)
    return way


@pytest.mark.parametrize("kind", ["of the output", "of its index"])
@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("/dev/null"), lambda path: (path / "a").mkdir(parents=True)])
def test_what_is_no_file_is_not_replaced(folder, kind, put):
    put(in_the_way(folder, kind))
    out = folder / "model.safetensors" if kind == "of its index" or not (folder / "model.safetensors").is_dir() else folder
    if out == folder:
        pytest.skip("a folder called model.safetensors is a folder to write into")
    with pytest.raises(FileExistsError, match="not a file that could be replaced"):
        consolidate(folder.parent / "model.pt", out, overwrite=True)


def test_a_link_to_nothing_is_there(folder):
    (folder.parent / "new.safetensors").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        consolidate(folder.parent / "model.pt", folder.parent / "new.safetensors")


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_what_was_put_in_the_way_of_the_half_file_is_not_written_through(folder, link):
    link(folder.parent / "precious.safetensors", folder / ".model.safetensors.new")
    before = (folder.parent / "precious.safetensors").read_bytes()
    with pytest.raises(OSError, match=r"\.model\.safetensors\.new"):
        consolidate(folder.parent / "model.pt", folder, overwrite=True)
    assert (folder.parent / "precious.safetensors").read_bytes() == before


def test_an_output_that_is_a_link_leaves_what_it_leads_to(folder):
    (folder / "model.safetensors").symlink_to(folder.parent / "precious.safetensors")
    before = (folder.parent / "precious.safetensors").read_bytes()
    consolidate(folder.parent / "model.pt", folder, dtype="bf16", overwrite=True)
    assert (folder.parent / "precious.safetensors").read_bytes() == before
    assert load_file(folder / "model.safetensors")["a"].dtype == torch.bfloat16


def test_shards_that_are_links_are_read_as_in_a_cache(folder):
    (blobs := folder.parent / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    out = consolidate(folder / "model.safetensors.index.json", folder.parent / "joined.safetensors")
    assert torch.equal(load_file(out)["b"], torch.arange(8.0))


@pytest.mark.parametrize("shape", [(3, 700_000), (700_000, 3), (2, 3, 400_000), (1, 1_000_000)])
def test_a_tensor_in_another_order_is_read_in_small_parts(shape, tmp_path):
    turned = torch.randn(*shape).transpose(0, -1)
    torch.save({"turned": turned.transpose(0, -1)[..., ::2]}, tmp_path / "a.pt")
    out = consolidate(tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert torch.equal(load_file(out)["turned"], turned.transpose(0, -1)[..., ::2])


VALID = {
    "header": safetensors(good_header()),
    "index": index({"a": "a.safetensors", "b": "a.safetensors"}),
    "zip": tensor(),
}


def mutated(content: bytes, chance: random.Random) -> bytes:
    "Some bytes changed, taken out, doubled or set to a limit."
    content = bytearray(content)
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        at, length = chance.randrange(len(content)), chance.choice([1, 1, 2, 4, 8])
        kind = chance.randrange(5)
        if kind == 0:
            content[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            content[at : at + length] = chance.choice([b"\xff", b"\x00", b"\x80"]) * length
        elif kind == 2:
            del content[at : at + length]
        elif kind == 3:
            content[at:at] = content[at : at + length]
        else:
            content[at : at + length] = bytes(chance.choice(b'0123456789-"[]{},:e.') for _ in range(length))
        content = content or bytearray(b"\0")
    return bytes(content)


def fuzz(folder: Path, seeds: range) -> None:
    for kind, build in VALID.items():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = build(folder)
        whole, right = path.read_bytes(), {name: weight.shape for name, weight in read_layout(path).weights.items()}
        for seed in seeds:
            path.write_bytes(mutated(whole, random.Random(f"{kind} {seed}")))
            try:
                weights = read_layout(path).weights
                consolidate(path, folder / "out.safetensors", overwrite=True)
                assert len(weights) <= len(right) and all(w.size <= 48 for w in weights.values()), (kind, seed)
            except (ValueError, OSError) as error:
                assert str(folder) in str(error), (kind, seed, error)
            except Exception as error:
                raise AssertionError((kind, seed)) from error


def test_hundreds_of_changed_files_are_read_right_or_refused(tmp_path):
    fuzz(tmp_path / "in", range(200))


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_thousands_of_changed_files_are_read_right_or_refused(tmp_path):
    fuzz(tmp_path / "in", range(200, 3000))
