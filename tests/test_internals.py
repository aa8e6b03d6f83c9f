"""What dlnb uses of other libraries without a public name: listed, and there in the versions that are installed."""

import ast
import sys

import pytest
from conftest import REPOSITORY

from dlnb.system import internals

LISTED = {name for internal in internals.LIGHTNING + internals.OTHERS + internals.DEEPSPEED for name in internal.names}
PUBLIC = {"_replace", "_asdict", "_exit"}  # of named tuples, and of os
MODULES = sorted(path for path in (REPOSITORY / "dlnb").rglob("*.py") if path.stem != "_modidx")
TREES = {path.relative_to(REPOSITORY).as_posix(): ast.parse(path.read_text()) for path in MODULES}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def own_names() -> set[str]:
    "What dlnb defines itself: functions, classes, and attributes that it sets."
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    fields = {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    assigned = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    return defined | fields | assigned | attributes


@pytest.mark.parametrize("name", ["LIGHTNING", "OTHERS", "DEEPSPEED"])
def test_the_installed_libraries_have_what_is_listed(name):
    if name == "DEEPSPEED" and sys.platform != "linux":
        pytest.skip("DeepSpeed is installed on Linux alone")
    missing = internals.missing(getattr(internals, name))
    assert not missing, "\n".join(missing)


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
