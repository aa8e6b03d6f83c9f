"""What dlnb uses of other libraries without a public name: listed, and there in the versions that are installed."""

import ast
import sys

import pytest
import torch
from conftest import REPOSITORY

from dlnb.system import internals

LISTED = {name for internal in internals.LIGHTNING + internals.OTHERS + internals.NCCL + internals.DEEPSPEED for name in internal.names}
PUBLIC = {"_replace", "_asdict", "_exit", "_render_traceback_"}  # of named tuples, of os, and of IPython
COMMON = set("resume_start partition all_gather param_groups optimizer create save commit".split())  # names of other things too
MODULES = sorted(path for path in (REPOSITORY / "dlnb").rglob("*.py") if path.stem != "_modidx")
TREES = {path.relative_to(REPOSITORY).as_posix(): ast.parse(path.read_text()) for path in MODULES}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined_in(nodes: list[ast.AST]) -> set[str]:
    return {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def own_names() -> set[str]:
    "What dlnb defines itself: functions, classes, and attributes of its own objects."
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    defined = defined_in(nodes)
    fields = {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    assigned = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    attributes = {
        node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value)
    }
    return defined | fields | assigned | attributes


@pytest.mark.parametrize("name", ["LIGHTNING", "OTHERS", "NCCL", "DEEPSPEED"])
def test_the_installed_libraries_have_what_is_listed(name):
    if name == "DEEPSPEED" and sys.platform != "linux":
        pytest.skip("DeepSpeed is installed on Linux alone")
    if name == "NCCL" and not torch.distributed.is_nccl_available():
        pytest.skip("this torch is a build without NCCL")
    listed = [internal for internal in getattr(internals, name) if internal.module != "optimizers.muon" or hasattr(torch.optim, "Muon")]
    missing = internals.missing(tuple(listed))
    assert not missing, "\n".join(missing)


def test_a_name_that_a_parameter_no_longer_gets_is_reported(tmp_path, monkeypatch):
    (tmp_path / "sharding.py").write_text("class Init:\n    def convert(self, param):\n        param.ds_size = param.ds_old\n")
    monkeypatch.syspath_prepend(tmp_path)
    listed = internals.Internal("sharding:Init", ("ds_size", "ds_old"), "data", "shard")
    assert internals.missing((listed,)) == ["sharding:Init has no ds_old: dlnb needs it to shard."]


def names_in(path: str) -> set[str]:
    "Attributes, also as text, what is imported, and the methods of classes: all by which a name of another library can be used."
    nodes = list(ast.walk(TREES[path]))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    no_names = path.startswith("dlnb/formats/") or path.endswith("system/internals.py")  # keys of files there; the list itself
    imported = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0 for alias in node.names}
    return imported | {node.attr for node in nodes if isinstance(node, ast.Attribute)} | defined_in(nodes) | (set() if no_names else texts)


def test_each_of_them_is_used_where_the_list_says():
    rooms = {}
    for internal in internals.LIGHTNING + internals.OTHERS + internals.NCCL + internals.DEEPSPEED:
        for name in internal.names:
            rooms.setdefault(name, set()).add(f"dlnb/{internal.module.replace('.', '/')}.py")
    names = {path: names_in(path) for path in TREES}
    used = {name: {path for path in names if name in names[path]} for name in rooms}
    assert {name: places for name, places in used.items() if places != rooms[name] and name not in COMMON} == {}
    assert all(rooms[name] <= used[name] for name in COMMON)


def test_every_private_name_of_another_library_is_listed():
    used = {}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                used.setdefault(node.attr, f"{path}:{node.lineno}")
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and not node.module.startswith("dlnb"):
                private = [alias.name for alias in node.names if is_private(alias.name) or "._" in node.module]
                used |= {name: f"{path}:{node.lineno}" for name in private}
    known = LISTED | PUBLIC | own_names()
    assert len(used) > 20
    assert {name: place for name, place in used.items() if name not in known} == {}


def test_nothing_is_listed_that_is_not_used():
    text = "\n".join((REPOSITORY / path).read_text() for path in TREES if not path.endswith("system/internals.py"))
    assert [name for name in LISTED if name not in text] == []
