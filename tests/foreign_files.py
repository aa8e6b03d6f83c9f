"""Files that nobody should trust: each with what makes it, and the words that its error has. Importable, for whoever counts them."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import torch


def good_header() -> dict:
    return {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }


def safetensors(header, body: bytes = bytes(range(32)), length: int | None = None):
    "A file of such a header, as an object or as it stands."

    def make(folder: Path) -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = folder / "bad.safetensors"
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
        return path

    return make


def entry(name: str, **changed):
    "The good file, with one tensor's entry changed."
    header = good_header()
    header[name] = {key: value for key, value in (header[name] | changed).items() if value is not None}
    return safetensors(header)


def archive(program: bytes, storages: dict[str, bytes] | None = None, compression=zipfile.ZIP_STORED, **members: bytes):
    "A zip as torch.save writes it, with this pickle."

    def make(folder: Path) -> Path:
        path = folder / "bad.ckpt"
        with zipfile.ZipFile(path, "w", compression) as file:
            file.writestr("archive/data.pkl", program)
            file.writestr("archive/byteorder", members.get("byteorder", b"little"))
            for key, content in (storages or {"0": bytes(48)}).items():
                file.writestr(f"archive/data/{key}", content)
        return path

    return make


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.identity if isinstance(value, Storage) else None


class Storage:
    def __init__(self, *identity):
        self.identity = identity


class Call:
    "Is pickled as a call of a function by name."

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def pickled(value) -> bytes:
    Pickler(file := io.BytesIO(), protocol=2).dump(value)
    return file.getvalue()


def tensor(offset=0, shape=(2, 3), strides=(3, 1), key="0", kind="storage", storage=torch.FloatStorage):
    "A Lightning checkpoint of one tensor that torch would rebuild with these numbers."
    identity = Storage(kind, storage, key, "cpu", 12)
    rebuilt = Call(torch._utils._rebuild_tensor_v2, identity, offset, shape, strides, False, {})
    return archive(pickled({"state_dict": {"w": rebuilt}}))


def index(weight_map, shards=("a.safetensors",)):
    "An index beside shards that each hold the good file's tensors."

    def make(folder: Path) -> Path:
        for name in shards:
            safetensors(good_header())(folder).rename(folder / name)
        path = folder / "model.safetensors.index.json"
        path.write_bytes(weight_map if isinstance(weight_map, bytes) else json.dumps({"weight_map": weight_map}).encode())
        return path

    return make


def placed(name: str, put):
    "Something that `put` makes, in the place of a file."

    def make(folder: Path) -> Path:
        put(folder / name)
        return folder / name

    return make


def in_folder(name: str, put):
    "A folder in which `put` makes something."

    def make(folder: Path) -> Path:
        (folder / "in").mkdir()
        put(folder / "in" / name)
        return folder / "in"

    return make


def cut_zip(folder: Path) -> Path:
    path = tensor()(folder)
    os.truncate(path, path.stat().st_size - 30)
    return path


def twice(folder: Path) -> Path:
    import warnings

    path = tensor()(folder)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as file:
        warnings.simplefilter("ignore")
        file.writestr("archive/data.pkl", pickled({}))
    return path


def patched(before: bytes, after: bytes, make):
    "The first of some bytes in a file replaced."

    def changed(folder: Path) -> Path:
        path = make(folder)
        content = path.read_bytes()
        assert before in content and len(before) == len(after)
        path.write_bytes(content.replace(before, after, 1))
        return path

    return changed


def zero(**changed):
    "A checkpoint of ZeRO 2 by two ranks, with something of it changed."

    def make(folder: Path) -> Path:
        (shards := folder / "zero" / "checkpoint").mkdir(parents=True)
        model = {"module": {}, "param_shapes": [{"w": torch.Size([7])}], "global_steps": 1}
        optimizer = {"partition_count": [2], "single_partition_of_fp32_groups": [torch.ones(4)]}
        model |= {key: value for key, value in changed.items() if key in ("module", "param_shapes", "buffer_names", "shared_params")}
        optimizer |= {key: value for key, value in changed.items() if key not in model}
        torch.save(model, shards / "mp_rank_00_model_states.pt")
        for rank in range(2):
            path = shards / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            torch.save({"optimizer_state_dict": optimizer | changed.get(f"rank_{rank}", {})}, path)
        return folder / "zero"

    return make


def zero_with(name: str, put):
    "Such a checkpoint, with something else in a file's place."

    def make(folder: Path) -> Path:
        place = zero()(folder) / name
        place.unlink(missing_ok=True)
        put(place)
        return folder / "zero"

    return make


DEEP_LIST = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
DEEP_KEY = b"\x80\x02}" + b")" + b"\x85" * 1_000_000 + b"K\x01s."
SHARED_KEY = b"\x80\x02})q\x00" + b"h\x00\x86q\x00" * 60 + b"K\x01s."
HEADER = good_header()
F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}

BAD = [
    # headers of safetensors
    ("a header that begins before the bytes", entry("a", data_offsets=[-24, 0]), "not at a place"),
    ("a header that ends before it begins", entry("a", data_offsets=[24, 0]), "not at a place"),
    ("tensors that overlap", entry("b", data_offsets=[20, 28]), "overlap others, or leave a gap"),
    ("tensors of the same bytes", entry("b", shape=[12], data_offsets=[0, 24]), "overlap others, or leave a gap"),
    ("a gap between tensors", entry("b", shape=[2], data_offsets=[28, 32]), "overlap others, or leave a gap"),
    ("bytes behind the last tensor", safetensors(HEADER, bytes(40)), "its tensors have 32 bytes, and 40 are there"),
    ("bytes that are not there", safetensors(HEADER, bytes(31)), "the bytes of 'b' are not all there"),
    ("no bytes at all", safetensors(HEADER, b""), "the bytes of 'a' are not all there"),
    ("a shape of another size", entry("a", shape=[2, 4]), "its shape has another size"),
    ("a shape below zero", entry("a", shape=[-2, -3]), "a size below zero"),
    ("a shape beyond 64 bits", entry("a", shape=[1 << 63, 0]), "beyond 64 bits"),
    ("a shape whose size is beyond 64 bits", entry("a", shape=[1 << 40, 1 << 40, 0]), "beyond 64 bits"),
    ("a shape of fractions", entry("a", shape=[2.0, 3]), "must be up to 32 integers"),
    ("a shape of truth", entry("a", shape=[True, 6]), "must be up to 32 integers"),
    ("a shape of text", entry("a", shape="23"), "must be up to 32 integers"),
    ("a shape of a thousand axes", entry("a", shape=[1] * 1000 + [6]), "must be up to 32 integers"),
    ("an unknown dtype", entry("a", dtype="F128"), "dtype 'F128', which is not known"),
    ("a dtype that is a list", entry("a", dtype=["F32"]), "which is not known"),
    ("no dtype", entry("a", dtype=None), "'dtype'"),
    ("no shape", entry("a", shape=None), "'shape'"),
    ("no offsets", entry("a", data_offsets=None), "'data_offsets'"),
    ("three offsets", entry("a", data_offsets=[0, 12, 24]), "too many values"),
    ("offsets of text", entry("a", data_offsets=["0", "24"]), "not at a place"),
    ("offsets of fractions", entry("a", data_offsets=[0.0, 24.0]), "not at a place"),
    ("offsets of infinity", safetensors(json.dumps(HEADER).replace("24]", "1e999]", 1).encode()), "not at a place"),
    ("offsets beyond 64 bits", entry("a", data_offsets=[0, 1 << 70]), "its shape has another size"),
    ("offsets of 5,000 digits", safetensors(json.dumps(HEADER).replace("24]", "9" * 5000 + "]", 1).encode()), "Exceeds the limit"),
    ("an entry that is a list", safetensors({"a": [1]}, b""), "list indices"),
    ("an entry that is null", safetensors({"a": None}, b""), "NoneType"),
    ("metadata that is a list", safetensors({"__metadata__": ["pt"], "a": F32}, bytes(4)), "'items'"),
    ("metadata that ties to a list", safetensors({"__metadata__": {"b": ["a"]}, "a": F32}, bytes(4)), "unhashable"),
    ("a header that is a list", safetensors([1, 2], b""), "damaged"),
    ("a header that is a number", safetensors(b"7", b""), "damaged"),
    ("a tensor twice", safetensors(b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2), bytes(4)), "it has 'a' twice"),
    ("a dtype twice", safetensors(b'{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}', bytes(4)), "it has 'dtype' twice"),
    ("a name that is no text", safetensors(b'{"\\ud800":%b}' % json.dumps(F32).encode(), bytes(4)), "surrogates not allowed"),
    ("NaN in a header", safetensors(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)), "NaN is not a number"),
    ("a header that is not UTF-8", safetensors(b'{"\xff":1}', b""), "utf-8"),
    ("a header of UTF-16", safetensors(json.dumps(HEADER).encode("utf-16")), "utf-8"),
    ("a header that is nested deep", safetensors(b"[" * 1_000_000, b""), "nested too deep"),
    ("a header of nested objects", safetensors(b'{"a":' * 1_000_000, b""), "nested too deep"),
    ("a header of empty lists", safetensors(b"[" + b"[]," * 3_000_000 + b"[]]", b""), "more than 2,000,000 values"),
    ("a header of empty texts", safetensors(b"[" + b'"",' * 3_000_000 + b'""]', b""), "more than 2,000,000 values"),
    ("a header of 34 MB", safetensors(b'{"' + b"a" * 34_000_000 + b'":1}', b""), "header has more than 33,554,432 bytes"),
    ("a header longer than the file", safetensors(HEADER, length=10_000), "its header is not all there"),
    ("a header longer than any file", safetensors(HEADER, length=(1 << 64) - 1), "its header is not all there"),
    ("a header of nothing", safetensors(b"", b""), "damaged"),
    ("a header that ends early", safetensors(HEADER, length=40), "damaged"),
    ("a file of seven bytes", placed("bad.safetensors", lambda path: path.write_bytes(bytes(7))), "its header is not all there"),
    ("a sparse file of a terabyte", placed("bad.safetensors", lambda path: (path.write_bytes(struct.pack("<Q", 1 << 39)), os.truncate(path, 1 << 40))), "header has more than"),
    # in a file's place
    ("a pipe", placed("bad.safetensors", os.mkfifo), "not a regular file"),
    ("a pipe for a checkpoint", placed("bad.ckpt", os.mkfifo), "not a regular file"),
    ("a pipe for an index", placed("bad.safetensors.index.json", os.mkfifo), "not a regular file"),
    ("a link to a device", placed("bad.safetensors", lambda path: path.symlink_to("/dev/zero")), "not a regular file"),
    ("a checkpoint that is a device", placed("bad.ckpt", lambda path: path.symlink_to("/dev/zero")), "not a regular file"),
    ("a link to itself", placed("bad.safetensors", lambda path: path.symlink_to(path)), "bad.safetensors"),
    ("a folder called safetensors", placed("bad.safetensors", Path.mkdir), "is not a checkpoint"),
    ("a run's record that is a pipe", in_folder("run.json", os.mkfifo), "not a regular file"),
    ("a run's record that is nested deep", in_folder("run.json", lambda path: path.write_text("[" * 100_000)), "nested too deep"),
    ("a run's record that names a list", in_folder("run.json", lambda path: path.write_text('{"best_checkpoint": [1]}')), "run.json is damaged"),
    ("a description that is a pipe", in_folder(".metadata", os.mkfifo), "not a regular file"),
    ("a description that remembers 32 GB", in_folder(".metadata", lambda path: path.write_bytes(b"\x80\x02Nr\xff\xff\xff\x7f.")), "does not describe"),
    ("a description whose key never ends", in_folder(".metadata", lambda path: path.write_bytes(SHARED_KEY)), "is a key"),
    # indices
    ("an index of another folder's file", index({"a": "../../etc/passwd.safetensors"}), "not a safetensors file beside it"),
    ("an index of an absolute path", index({"a": "/etc/passwd.safetensors"}), "not a safetensors file beside it"),
    ("an index of any file", index({"a": "a.txt"}), "not a safetensors file beside it"),
    ("an index of a folder", index({"a": ".."}), "not a safetensors file beside it"),
    ("an index of a path of Windows", index({"a": "..\\a.safetensors"}), "not a safetensors file beside it"),
    ("an index with a zero byte", index({"a": "a\0.safetensors"}), "not a safetensors file beside it"),
    ("an index of a number", index({"a": 7}), "no weight_map"),
    ("an index of lists", index({"a": ["a.safetensors"]}), "no weight_map"),
    ("an index of a missing shard", index({"a": "a.safetensors", "c": "b.safetensors"}), "b.safetensors, which is missing"),
    ("an index of a missing weight", index({"c": "a.safetensors"}), "has 'c' in a.safetensors, and it is not there"),
    ("an index of one weight in two shards", index({"a": "a.safetensors", "b": "b.safetensors"}, ("a.safetensors", "b.safetensors")), "'a' is both in"),
    ("an index that names a weight twice", index(b'{"weight_map":{"a":"a.safetensors","a":"b.safetensors"}}'), "it has 'a' twice"),
    ("an index that is a list", index(b"[1]"), "no weight_map"),
    ("an index without a map", index(b"{}"), "no weight_map"),
    ("an index that is not UTF-8", index(b"\xff\xfe{}"), "utf-8"),
    ("an index that is nested deep", index(b'{"weight_map":' * 200_000), "nested too deep"),
    ("an index of NaN", index(b'{"weight_map":{"a":NaN}}'), "NaN is not a number"),
    ("an index of three million shards", index(b'{"weight_map":{' + b'"a":"b",' * 3_000_000 + b'"a":"b"}}'), "more than 2,000,000 values"),
    ("an index whose shard is a pipe", lambda folder: (os.mkfifo(folder / "a.safetensors"), index({"a": "a.safetensors"}, ())(folder))[1], "not a regular file"),
    # zips
    ("a zip that was cut", cut_zip, "is truncated"),
    ("a zip of compressed members", archive(pickled({}), compression=zipfile.ZIP_DEFLATED), "compressed or encrypted"),
    ("a zip bomb for a pickle", archive(b"\x80\x02]" + b"N" * 100_000_000, compression=zipfile.ZIP_DEFLATED), "compressed or encrypted"),
    ("a zip bomb for a storage", archive(b"\x80\x02}.", {"0": bytes(100_000_000)}, zipfile.ZIP_DEFLATED), "compressed or encrypted"),
    ("a zip with two pickles", twice, "it has 'data.pkl' twice"),
    ("a zip of big-endian machines", archive(pickled({}), byteorder=b"big"), "little-endian"),
    ("a pickle of 34 MB", archive(b"\x80\x02" + b"N" * 34_000_000), "at most 33,554,432 are read"),
    ("a zip whose pickle was changed", patched(b"state_dict", b"state_dikt", tensor()), "not what was written"),
    ("a zip whose storage has no header", patched(b"PK\x03\x04\x14\x00\x00\x00\x00\x00", b"PK\x03\x05\x14\x00\x00\x00\x00\x00", tensor()), "has no header"),
    # tensors in pickles
    ("a tensor before its storage", tensor(offset=-1), "a size below zero"),
    ("a tensor behind its storage", tensor(offset=1000), "are needed, and it is 48 bytes long"),
    ("a tensor larger than its storage", tensor(shape=(5, 3)), "are needed, and it is 48 bytes long"),
    ("a tensor of another universe", tensor(shape=(1 << 62, 1), strides=(1, 1)), "are needed"),
    ("strides out of the storage", tensor(strides=(1 << 40, 1)), "are needed"),
    ("strides below zero", tensor(offset=6, strides=(-3, 1)), "a size below zero"),
    ("strides for other axes", tensor(strides=(3,)), "not one stride per axis"),
    ("a shape below zero in a pickle", tensor(shape=(-2, -3)), "a size below zero"),
    ("a shape of a million axes", tensor(shape=(1,) * 1_000_000), "must be up to 32 integers"),
    ("a shape that is a number", tensor(shape=6), "must be up to 32 integers"),
    ("an offset that is a text", tensor(offset="0"), "must be up to 32 integers"),
    ("a tensor of a storage that is missing", tensor(key="7"), "'data/7' is not there"),
    ("a storage whose key is a list", tensor(key=["0"]), "is not a storage"),
    ("a storage of another kind", tensor(kind="module"), "is not a storage"),
    ("a tensor whose name is a number", archive(pickled({"state_dict": {7: Call(torch._utils._rebuild_tensor_v2, Storage("storage", torch.FloatStorage, "0", "cpu", 12), 0, (2,), (1,), False, {})}})), "7 cannot be a tensor's name"),
    # pickles
    ("a pickle that remembers 32 GB", archive(b"\x80\x02Nr\xff\xff\xff\x7f0."), "data.pkl cannot be read"),
    ("a pickle nested a hundred thousand times", archive(DEEP_LIST), "nested too deep"),
    ("a key nested a million times", archive(DEEP_KEY), "is a key"),
    ("a key without end", archive(SHARED_KEY), "is a key"),
    ("lists without end", archive(b"\x80\x02]q\x00" + b"h\x00\x86q\x00" * 60 + b"."), "endless when"),
    ("a list of itself", archive(b"\x80\x02]q\x00h\x00a."), "contains itself"),
    ("keys whose hashes are one", archive(b"\x80\x02}(" + b"".join(b"\x8a\x0a" + (n * ((1 << 61) - 1)).to_bytes(10, "little") + b"N" for n in range(2000)) + b"u."), "is a key"),
    ("a pickle of three million lists", archive(b"\x80\x02]" + b"]" * 3_000_000 + b"."), "more than 2,000,"),
    ("a pickle of three million sets", archive(b"\x80\x04]" + b"\x8f" * 3_000_000 + b"."), "more than 2,000,"),
    ("a pickle of thousands of classes", archive(b"\x80\x02]" + b"".join(b"ca\nC%d\n" % n for n in range(5000)) + b"."), "more than a thousand classes"),
    ("a list copied a million times", archive(b"\x80\x02](" + b"N" * 500_000 + b"eq\x00ctorch\nSize\nq\x01" + b"h\x01h\x00\x85R" * 100_000 + b"."), "more than 2,000,"),
    ("bytes of an exabyte", archive(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"N."), "ends in the middle"),
    ("a bytearray of an exabyte", archive(b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b"N."), "ends in the middle"),
    ("a text of four gigabytes", archive(b"\x80\x02X\xff\xff\xff\xffN."), "ends in the middle"),
    ("a text that is not UTF-8", archive(b"\x80\x02X\x01\x00\x00\x00\xff."), "UnicodeDecodeError"),
    ("an integer of two gigabytes", archive(b"\x80\x02\x8b\xff\xff\xff\x7fN."), "ends in the middle"),
    ("an instruction that is none", archive(b"\x80\x02\xff."), "KeyError"),
    ("an instruction of another age", archive(b"\x80\x02(i__main__\nC\n."), "KeyError"),
    ("a pickle that ends too early", archive(b"\x80\x02]"), "IndexError"),
    ("a pickle of nothing", archive(b""), "IndexError"),
    ("a pickle that leaves something", archive(b"\x80\x02NN."), "ValueError"),
    ("a pickle of an empty stack", archive(b"\x80\x02."), "ValueError"),
    ("a memory that is not there", archive(b"\x80\x02h\x07."), "KeyError"),
    ("a call of a number", archive(b"\x80\x02K\x01)R."), "it calls a int"),
    ("a dictionary with half an item", archive(b"\x80\x02}(K\x01u."), "ValueError"),
    ("a state for a text", archive(b"\x80\x02ctorch\nfloat32\n}b."), "sets the state of a str"),
    ("a state for a function", archive(b"\x80\x02ctorch._utils\n_rebuild_parameter\n}b."), "sets the state of a function"),
    ("an extension's code", archive(b"\x80\x02\x82\x01."), "KeyError"),
    ("weights that are a list", archive(pickled([1, 2])), "not a checkpoint of weights"),
    # ZeRO
    ("a trillion ranks", zero(partition_count=10**12), "is missing; 1000000000000 ranks saved"),
    ("ranks below zero", zero(partition_count=-1), "which cannot be"),
    ("ranks that are a text", zero(partition_count="2"), "which cannot be"),
    ("a parameter larger than the shards", zero(param_shapes=[{"w": (9,)}]), "the shards hold 8 elements"),
    ("a parameter beyond 64 bits", zero(param_shapes=[{"w": (1 << 40, 1 << 40)}]), "beyond 64 bits"),
    ("a parameter below zero", zero(param_shapes=[{"w": (-7,), "v": (14,)}]), "a size below zero"),
    ("a parameter of text", zero(param_shapes=[{"w": "7"}]), "must be up to 32 integers"),
    ("padding below zero", zero(param_shapes=[{"w": (4,), "v": (7,)}], param_alignment_paddings=[[-4, 0]]), "a size below zero"),
    ("padding for other parameters", zero(param_alignment_paddings=[[0, 0, 0]]), "paddings for other parameters"),
    ("shards of several dtypes", zero(rank_1={"single_partition_of_fp32_groups": [torch.ones(4, dtype=torch.float64)]}), "of several dtypes"),
    ("a shard that is a text", zero(single_partition_of_fp32_groups=["weights"]), "of a version that is not known"),
    ("a group too many", zero(param_shapes=[{"w": (7,)}, {"v": (7,)}]), "of a version that is not known"),
    ("a shard that is a pipe", zero_with("checkpoint/zero_pp_rank_1_mp_rank_00_optim_states.pt", os.mkfifo), "not a regular file"),
    ("a shard that is a folder", zero_with("checkpoint/zero_pp_rank_1_mp_rank_00_optim_states.pt", Path.mkdir), "Is a directory"),
    ("a shard that is a link to nothing", zero_with("checkpoint/zero_pp_rank_1_mp_rank_00_optim_states.pt", lambda path: path.symlink_to("nowhere")), "No such file"),
    ("a latest that leads elsewhere", zero_with("latest", lambda path: path.write_text("../../etc")), "not a folder beside it"),
    ("a latest that is a pipe", zero_with("latest", os.mkfifo), "not a regular file"),
    ("a latest of a megabyte", zero_with("latest", lambda path: path.write_text("a" * 1_000_000)), "not a folder beside it"),
]  # fmt: skip


def make(name: str, folder: Path) -> tuple[Path, str]:
    "Make the file of that name in a folder; returns its path, and the words that its error must have."
    build, words = {name: rest for name, *rest in BAD}[name]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return build(folder), words
