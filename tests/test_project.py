"""Notebooks and package in step: checks that cannot pass by accident."""

import ast
import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import REPOSITORY, TRAIN

from dlnb.checkpoint.weights import INFERENCE_SETTINGS
from dlnb.config import RunConfig
from dlnb.launch.parameters import parameter_names
from dlnb.probing.candidates import ProbingConfig
from dlnb.search.study import StudyConfig

# As nbdev, without folders whose name begins with a dot or `_`, such as the template of new projects, which has tests of its own.
NOTEBOOKS = sorted(
    path for path in (REPOSITORY / "nbs").rglob("*.ipynb") if not re.search(r"/[_.]", path.relative_to(REPOSITORY).as_posix())
)
CHAPTERS = [path for path in NOTEBOOKS if path.name[0].isdigit()]
MODULES = sorted(path for path in (REPOSITORY / "dlnb").rglob("*.py") if path.stem not in ("__init__", "_modidx"))
INDEX = REPOSITORY / "nbs" / "index.ipynb"
# A module imports from what stands before its own place here; within a package, from chapters of a lower number.
ORDER = (
    "errors system formats consolidate loading data optimizers optim strategies strategy settings config tracking track checkpoint callbacks predictions launch session "
    "views training trainer infer engine search tuner probing find_strategy ranks widgets examples new"
).split()
WORKFLOWS = sorted((REPOSITORY / "nbs" / "workflows").glob("*.ipynb"))


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name != "IN_TEST"}  # nbdev then exports nothing
    return subprocess.run(command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=580)


def name_of(path: Path) -> str:
    "A module's or a chapter's full name without `dlnb.`: its place in the package."
    root = "dlnb" if path.suffix == ".py" else "nbs"
    *folders, last = path.relative_to(REPOSITORY / root).with_suffix("").parts
    return ".".join([*folders, last if path.suffix == ".py" else last[3:]])


def imports(path: Path) -> set[str]:
    "The modules of dlnb that one imports, at its top or inside a function, by whatever form, or names as text."
    package, found = ["dlnb", *name_of(path).split(".")[:-1]], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)  # for somebody else to import
    return {name.removeprefix("dlnb.") for name in found if name.startswith("dlnb.")} & {name_of(other) for other in MODULES}


def test_the_tests_of_a_package_are_in_the_folder_of_its_name():
    folders = {path.parent.name for path in (REPOSITORY / "tests").glob("*/test_*.py")}
    packages = {path.parent.name for path in (REPOSITORY / "dlnb").glob("*/__init__.py")}
    assert folders - {"adoption"} <= packages  # whole projects of others


def test_there_is_something_to_check():
    assert len(CHAPTERS) >= 60 and len(MODULES) == len(CHAPTERS) and len(WORKFLOWS) >= 1
    assert sum(bool(imports(module)) for module in MODULES) > 40
    assert {name_of(module).partition(".")[0] for module in MODULES} == set(ORDER)


def test_what_is_reported_goes_through_the_log():
    prints = {
        name_of(module)
        for module in MODULES
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert prints == {"system.log", "consolidate", "new", "callbacks.progress_bar"}  # the handler, results of commands, a terminal's line


def test_the_package_is_what_the_notebooks_export(copy):
    for module in (copy / "dlnb").rglob("*.py"):
        module.unlink()
    (copy / "dlnb" / "__init__.py").write_text("")
    done = run("nbdev_export", cwd=copy)
    assert done.returncode == 0, done.stderr
    for module in sorted((REPOSITORY / "dlnb").rglob("*.py")):
        name = module.relative_to(REPOSITORY)
        assert (copy / name).read_bytes() == module.read_bytes(), f"{name} is not exported"


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_every_module_names_a_notebook_that_exists(module):
    named = re.search(r"File to edit: (?:\.\./)+(nbs/\S+\.ipynb)\.", module.read_text())
    assert named and (REPOSITORY / named[1]).is_file()
    assert name_of(REPOSITORY / named[1]) == name_of(module)


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_a_module_imports_only_what_stands_before_it(module):
    numbers = {name_of(path): int(path.stem[:2]) for path in CHAPTERS}

    def place(name: str) -> tuple[int, int]:
        package, _, inner = name.partition(".")
        return ORDER.index(package), numbers[name] if inner else 0

    assert [name for name in imports(module) if place(name) >= place(name_of(module))] == []


def test_every_package_that_is_imported_is_required():
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(REPOSITORY / "settings.ini")
    lines = [line for part in ("requirements", "optimizers_requirements") for line in settings["DEFAULT"][part].split("\n")]
    required = {re.split(r"[<>=;\[ ]", line)[0].replace("-", "_").lower() for line in lines if line.strip()}
    names = (
        {"sklearn": "scikit_learn", "yaml": "pyyaml", "IPython": "ipython"}
        | dict.fromkeys(["traitlets", "jupyter_core", "nbformat", "zmq"], "nbclient")
        | {"click": "papermill", "comm": "ipykernel"}
    )
    imported = set()
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
    foreign = {names.get(name, name) for name in imported - sys.stdlib_module_names - {"dlnb"}}
    assert len(foreign) > 8 and foreign <= required, foreign - required


def test_notebooks_and_tests_are_linted_and_formatted():
    for command in ("check", "format --check"):
        done = run("ruff", *command.split(), "--no-cache", cwd=REPOSITORY)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_the_types_of_what_is_exported_fit(tmp_path):
    done = run("mypy", "--cache-dir", str(tmp_path), cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_notebooks_are_clean(copy):
    before = {(path := copy / notebook.relative_to(REPOSITORY)): path.read_bytes() for notebook in NOTEBOOKS}
    done = run("nbdev_clean", cwd=copy)
    assert done.returncode == 0, done.stderr
    assert [path.name for path, content in before.items() if path.read_bytes() != content] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.relative_to(REPOSITORY / "nbs").as_posix())
def test_a_notebook_shows_its_outputs_and_no_error(path):
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    examples = [cell for cell in cells if not cell.source.startswith("#|")]
    assert outputs or not examples, "an example whose output is not stored"
    if path in WORKFLOWS:
        without = [cell.source for cell in examples if not cell.outputs and "parameters" not in cell.metadata.get("tags", [])]
        assert not without and len(examples) > 3
    assert not [output for output in outputs if output.output_type == "error"]
    assert all(len(output.get("text", "")) < 6000 for output in outputs), "a wall of log"
    assert not [output for output in outputs if "site-packages" in output.get("text", "")], "a warning of some library"
    assert str(REPOSITORY) not in path.read_text()


@pytest.mark.parametrize("path", CHAPTERS, ids=name_of)
def test_a_chapter_shows_an_example(path):
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert [cell for cell in cells if cell.outputs and not cell.source.startswith("#|")]


@pytest.mark.parametrize("path", CHAPTERS, ids=name_of)
def test_a_chapter_opens_as_all_do(path):
    cells = nbformat.read(path, 4).cells
    assert cells[0].source == f"#| default_exp {name_of(path)}"
    assert re.match(rf"# {name_of(path)}\n\n> \S", cells[1].source)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_short_and_takes_every_setting(path):
    notebook = nbformat.read(path, 4)
    search = {*RunConfig.model_fields, *StudyConfig.model_fields} - {"resume", "best_params"}
    probing = {*RunConfig.model_fields, *ProbingConfig.model_fields}
    settings = {"infer": {"run", "split", *INFERENCE_SETTINGS}, "tune": search, "find_strategy": probing}.get(
        path.stem, set(RunConfig.model_fields)
    )
    assert len(notebook.cells) <= 12
    assert settings <= set(parameter_names(notebook))


@pytest.mark.parametrize("name", ["train", "tune", "find_strategy"])
def test_the_defaults_of_a_workflow_are_those_of_the_settings(name):
    cells = nbformat.read(TRAIN.with_stem(name), 4).cells
    (cell,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    exec(cell.source, defaults := {})
    chosen = {"model", "data", "max_epochs", "search_space"}  # by the example
    more = {"tune": StudyConfig, "find_strategy": ProbingConfig}
    fields = RunConfig.model_fields | (more[name].model_fields if name in more else {})
    assert len(fields) > 20
    for name, field in fields.items():
        assert name in chosen or defaults.get(name, field.default) == field.default, name


LIGHT = {"dlnb": ("torch", "lightning", "papermill"), "dlnb.engine": ("torch", "lightning"), "dlnb.new": ("torch", "papermill", "click")}


@pytest.mark.parametrize("module, heavy", LIGHT.items())
def test_importing_is_light(module, heavy, tmp_path):
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    assert run(sys.executable, "-c", code, cwd=tmp_path).stdout.strip() == "[]"


@pytest.mark.parametrize("path", CHAPTERS, ids=name_of)
def test_a_reason_is_before_each_exported_cell(path):
    cells = nbformat.read(path, as_version=4).cells
    for before, cell in zip(cells, cells[1:]):
        is_exported = cell.cell_type == "code" and re.match(r"#\| exporti?\n", cell.source)
        defined = ast.parse(cell.source).body if is_exported else []
        if any(not isinstance(statement, (ast.Import, ast.ImportFrom, ast.If)) for statement in defined):
            assert before.cell_type == "markdown", cell.source[:200]


def test_the_tests_that_a_notebook_runs_exist():
    text = (REPOSITORY / "nbs/benchmarks/reliability.ipynb").read_text()
    named = re.findall(r"[\w/]*test_\w+\.py(?=[:\\\"])", text)
    assert len(named) > 9 and all((REPOSITORY / "tests" / name.removeprefix("tests/")).is_file() for name in named)


def test_the_readme_maps_every_notebook():
    readme = (REPOSITORY / "README.md").read_text()
    assert not (REPOSITORY / "nbs" / "readme.ipynb").exists()  # of which nbdev would make README.md
    chapters = [path for path in CHAPTERS if path.parent.name != "nbs"]
    for path in set(NOTEBOOKS) - set(chapters):
        assert path.relative_to(REPOSITORY).as_posix() in readme, path
    for path in chapters:
        assert f"({path.name})" in path.with_name("index.ipynb").read_text(), path
