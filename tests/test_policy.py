"""Rules of the code itself: who may import whom, what import costs, what is never used."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tlearn

ROOT = Path(tlearn.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def rows_of_the_architecture() -> list[set[str]]:
    """The table of ARCHITECTURE.md, from the bottom up: a module imports from rows below its own."""
    text = (ROOT.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text.partition("## The rows")[2].partition("\n## ")[0]
    cells = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ") and "`" in line]
    rows = [set(re.findall(r"`(\w+)(?:/\*)?`", cell)) for cell in cells]
    return [*reversed(rows), {"__main__"}]


ROWS = rows_of_the_architecture()
WITHIN_A_ROW = {
    ("configfile", "config"),
    ("configfile", "dataconfig"),
    ("configfile", "shrink"),
    ("shrink", "config"),
    ("verdict", "faults"),
    ("faults", "forecast"),
    ("faults", "advice"),
    ("config", "dataconfig"),
    ("config", "modelconfig"),
    ("modelconfig", "dataconfig"),
    ("profile", "dataconfig"),
    ("models", "data"),
    ("features", "stagecache"),
    ("objectives", "trained"),
    ("search", "submit"),
}
"""What a module may import from its own row."""
PACKAGES = {
    "data": (
        "order",
        "decode",
        "transforms",
        "shards",
        "store",
        "room",
        "workers",
        "mixing",
        "loader",
        "scan",
        "folders",
        "listed",
        "tars",
        "idx",
        "vision",
        "origins",
        "plan",
        "prepare",
        "stream",
        "pairs",
        "source",
    ),
    "models": ("weights", "reach", "backbones", "hybrid", "stem", "attention", "heads", "text", "build", "cut"),
}
"""Modules of a package from the bottom up: each imports only those before it."""


def module_name(path: Path) -> str:
    """`data.scan` for tlearn/data/scan.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """(module of tlearn, whether it is imported when the file is) for every import in a file."""
    top = set(TREES[path].body)
    for node in ast.walk(TREES[path]):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "tlearn" and len(parts) > 1:
                inner = parts[1:3] if parts[1] in PACKAGES else parts[1:2]
                yield ".".join(inner), node in top


def row_of(module: str) -> int:
    unit = module.partition(".")[0]
    found = [i for i, row in enumerate(ROWS) if unit in row]
    assert len(found) == 1, f"tlearn/{module}.py stands in {len(found)} rows of ARCHITECTURE.md"
    return found[0]


def test_the_architecture_names_no_module_that_is_not_there() -> None:
    units = {module_name(path).partition(".")[0] for path in FILES} | {"__main__"}
    assert set().union(*ROWS) - units == set()


def test_modules_import_only_from_rows_below() -> None:
    upward = []
    for path in FILES:
        importer = module_name(path)
        if path.name == "__init__.py":
            continue
        for target, _ in imported(path):
            if target in ("__version__",):
                continue
            units = importer.partition(".")[0], target.partition(".")[0]
            if row_of(target) > row_of(importer):
                upward.append(f"{importer} imports {target}, which stands above it")
            elif units[0] != units[1] and row_of(target) == row_of(importer) and units not in WITHIN_A_ROW:
                upward.append(f"{importer} imports {target}, which stands beside it")

    assert upward == []


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_of_a_package_import_only_those_before_them(package: str) -> None:
    order = PACKAGES[package]
    backward = []
    for path in (ROOT / package).glob("*.py"):
        if path.name == "__init__.py":
            continue
        assert path.stem in order, f"{path} stands nowhere in {__name__}.PACKAGES"
        for target, _ in imported(path):
            unit, _, inner = target.partition(".")
            if unit == package and order.index(inner) >= order.index(path.stem):
                backward.append(f"{path.stem} imports {inner}")

    assert backward == []


def test_init_files_below_the_root_are_empty() -> None:
    assert [path for path in FILES if path.name == "__init__.py" and path.parent != ROOT and path.stat().st_size] == []


@pytest.mark.parametrize("name", ["config", "dataconfig"])
def test_config_imports_the_standard_library_and_pydantic_only(name: str) -> None:
    found = set()
    for node in ast.walk(TREES[ROOT / f"{name}.py"]):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])

    assert found - sys.stdlib_module_names - {"tlearn"} == {"pydantic"}


LIGHT = (
    "tlearn",
    "tlearn.config",
    "tlearn.configfile",
    "tlearn.cli",
    "tlearn.compare",
    "tlearn.search",
    "tlearn.stages",
    "tlearn.planner",
    "tlearn.advice",
    "tlearn.verdict",
    "tlearn.forecast",
    "tlearn.data.prepare",
    "tlearn.errors",
)
HEAVY = ("torch", "torchvision", "timm", "accelerate", "wandb", "webdataset")


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_do_not_import_torch(module: str) -> None:
    heavy = f"[m for m in {HEAVY} if m in sys.modules]"
    code = f"import sys, {module}; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_public_names_are_found_and_others_are_not() -> None:
    code = (
        "import sys, tlearn; tlearn.Config; tlearn.load_config; tlearn.TlearnError; tlearn.prepare; "
        "assert 'torch' not in sys.modules; print(sorted(set(tlearn.__all__)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "'load_config'" in done.stdout
    assert all(getattr(tlearn, name) is not None for name in tlearn.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tlearn.nothing


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--help"], "prepare"), (["train", "--help"], "--quick"), (["--version"], tlearn.__version__)],
)
def test_the_command_line_answers_from_any_folder(tmp_path: Path, arguments: list[str], word: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tlearn", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT.parent), "PYTHONWARNINGS": "error"},
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert word in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tlearn", "train", "data.path=x", "epoch=3"]
    env = {"PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)

    assert (done.returncode, done.stdout) == (2, "")
    assert "epoch: no such option; did you mean epochs?" in done.stderr
    assert "Traceback" not in done.stderr


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_can_unpickle() -> None:
    """`pickle` is imported only for the name of its error; torch.load is never without weights_only=True."""
    wrong = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong += [
                f"{path}: {n}"
                for n in names
                if n.split(".")[0] in {"dill", "cloudpickle", "joblib", "shelve", "marshal"}
            ]
            if (
                isinstance(node, ast.Attribute)
                and ast.unparse(node.value) == "pickle"
                and node.attr != "UnpicklingError"
            ):
                wrong.append(f"{path}:{node.lineno}: pickle.{node.attr}")
            if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                wrong.append(f"{path}:{node.lineno}: from pickle")
        for name, call in calls(tree):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if name == "torch.load" and options.get("weights_only") != "True":
                wrong.append(f"{path}:{call.lineno}: torch.load without weights_only=True")
            if name in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
                wrong.append(f"{path}:{call.lineno}: np.load with allow_pickle")
            if name in ("torch.save", "yaml.unsafe_load", "eval", "exec", "os.system"):
                wrong.append(f"{path}:{call.lineno}: {name}")

    assert wrong == []


def test_files_have_a_subject_and_a_readable_length() -> None:
    long = {str(path.relative_to(ROOT)): n for path in FILES if (n := len(path.read_text().splitlines())) > 400}

    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "misc", "common")]
    assert long == {}


def undocumented(body: list[ast.stmt], owner: str, *, protocol: bool = False) -> Iterator[str]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None and not protocol:
            yield f"{owner}.{node.name}"
        if isinstance(node, ast.ClassDef):
            is_protocol = any(ast.unparse(base).startswith("Protocol") for base in node.bases)
            yield from undocumented(node.body, f"{owner}.{node.name}", protocol=is_protocol)


def test_every_module_public_function_and_class_has_a_docstring() -> None:
    missing = [module_name(path) for path, tree in TREES.items() if tree.body and ast.get_docstring(tree) is None]
    for path, tree in TREES.items():
        missing += undocumented(tree.body, module_name(path))

    assert missing == []
