"""The shape of the house: who may import whom, what lies where, nothing idle, nothing private."""

import ast
import dataclasses
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from boxteacher.command_line import parse
from boxteacher.config import Config
from boxteacher.presets import PRESETS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "boxteacher"
DOCS = sorted((ROOT / "docs").glob("*.md"))

# Every file of the package: third-party packages and siblings that it may import.
# "torchvision.ops" admits only it.
ALONE = {"losses", "pseudo_labels", "mask_head", "ema", "backbone", "fcos", "shapes"}
MAY_IMPORT: dict[str, tuple[set[str], set[str]]] = {
    "__init__": (set(), set()),
    # files to copy: they stand alone
    **{name: ({"torch"}, set()) for name in ("losses", "pseudo_labels", "mask_head", "ema")},
    "backbone": ({"torch", "torchvision"}, set()),
    "fcos": ({"torch", "torchvision.ops"}, set()),
    "shapes": ({"numpy", "PIL"}, set()),
    # settings
    "errors": (set(), set()),
    "files": (set(), {"errors"}),
    "config": (set(), {"errors"}),
    "presets": (set(), {"config"}),
    "command_line": (set(), {"config", "presets"}),
    # data
    "distributed": ({"torch"}, {"errors"}),
    "plausible": ({"numpy"}, set()),
    "masks": ({"numpy", "pycocotools"}, set()),
    "coco": ({"numpy", "PIL"}, {"errors", "masks", "plausible"}),
    "transforms": ({"torch", "torchvision", "numpy", "PIL", "pycocotools"}, {"masks"}),
    "data": (
        {"torch", "numpy"},
        {"coco", "config", "masks", "shapes", "transforms"},
    ),
    # the method
    "metrics": ({"torch"}, {"data"}),
    "model": (
        {"torch", "torchvision", "numpy"},
        ALONE | {"coco", "config", "data", "distributed", "masks", "metrics", "transforms"},
    ),
    # around it
    "checkpoint": ({"torch", "numpy"}, {"config", "errors", "files", "model"}),
    "published": (
        {"torch", "torchvision", "numpy"},
        {"checkpoint", "command_line", "config", "errors", "files", "presets"}
        | {"data", "fcos", "mask_head", "model", "pseudo_labels"},
    ),
    "cityscapes_eval": ({"numpy", "pycocotools"}, set()),
    "coco_eval": (
        {"torch", "numpy", "pycocotools", "tqdm"},
        {"cityscapes_eval", "coco", "config", "data", "distributed", "errors", "files", "masks"}
        | {"model"},
    ),
    "guard": ({"torch"}, {"distributed", "errors"}),
    "traps": (set(), {"config"}),
    "visualize": ({"torch", "numpy", "PIL"}, {"errors", "files", "masks"}),
    "reporting": (
        {"torch", "torchvision.ops", "tqdm", "PIL"},
        {"config", "data", "distributed", "errors", "files", "model", "pseudo_labels", "traps"}
        | {"visualize"},
    ),
    "run_folder": (set(), {"checkpoint", "config", "data", "files", "reporting"}),
}
TOP_LEVEL = {
    *("boxteacher", "tests", "docs", "train.py", "evaluate.py"),
    *("requirements.txt", "README.md", "LICENSE"),
}


def tracked_files() -> list[Path]:
    """The files of the working tree that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


# --- layout and imports -------------------------------------------------------


def test_the_package_holds_the_planned_files_and_no_others():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(MAY_IMPORT)
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} <= {"tools", "__pycache__"}


def test_the_top_level_holds_only_what_belongs_there():
    names = {path.relative_to(ROOT).parts[0] for path in tracked_files()}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """(third-party modules with their full dotted names, siblings), wherever in the file."""
    foreign, siblings = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "boxteacher." * bool(node.level) + (node.module or "")
            names = [f"{module.rstrip('.')}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            head, _, rest = name.partition(".")
            if head == "boxteacher":
                siblings.add(rest.partition(".")[0])
            elif head not in sys.stdlib_module_names:
                foreign.add(name)
    return foreign, siblings


def test_files_import_only_files_before_them_so_there_is_no_circle():
    order = list(MAY_IMPORT)
    for position, (_, siblings) in enumerate(MAY_IMPORT.values()):
        assert siblings <= set(order[:position]), order[position]


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_file_imports_only_what_it_may(name):
    foreign, siblings = imports_of(PACKAGE / f"{name}.py")
    modules, allowed_siblings = MAY_IMPORT[name]
    assert siblings <= allowed_siblings
    for imported in foreign:
        assert any(f"{imported}.".startswith(f"{module}.") for module in modules), imported


IMPORT_EACH = """
import importlib, sys, traceback
for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    name = folder.rpartition("/")[2]
    try:
        importlib.import_module(name)
        print(name, "ok")
    except Exception:
        traceback.print_exc()
    del sys.path[0]
    sys.modules.pop(name, None)
"""


@pytest.fixture(scope="module")
def imported_alone(tmp_path_factory) -> subprocess.CompletedProcess:
    """Imports each file of ALONE from a folder of its own, out of reach of the package."""
    folders = []
    for name in sorted(ALONE):
        folder = tmp_path_factory.mktemp("alone") / name
        folder.mkdir()
        shutil.copy(PACKAGE / f"{name}.py", folder)
        folders.append(str(folder))
    empty = tmp_path_factory.mktemp("empty")
    command = [sys.executable, "-I", "-c", IMPORT_EACH, *folders]
    return subprocess.run(command, cwd=empty, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", sorted(ALONE))
def test_a_file_to_copy_stands_alone(imported_alone, name):
    assert f"{name} ok" in imported_alone.stdout.splitlines(), imported_alone.stderr


# --- nothing idle -------------------------------------------------------------


def test_every_config_field_is_read_outside_config():
    sources = [
        p
        for p in PACKAGE.rglob("*.py")
        if p.name not in ("config.py", "presets.py", "command_line.py")
    ]
    text = "\n".join(p.read_text() for p in [*sources, ROOT / "train.py", ROOT / "evaluate.py"])
    read = set(re.findall(r"\b(?:cfg|config)\.(\w+)", text))
    assert {field.name for field in dataclasses.fields(Config)} - read == set()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_carries_evidence(name):
    assert parse([name]).preset == name
    assert re.search(r"here: (not run|.*\d)", PRESETS[name].evidence)


def test_the_readme_names_the_test_command_that_ci_runs():
    command = "python -m pytest -q"
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()
    assert command in (ROOT / "README.md").read_text()


# --- what README says ---------------------------------------------------------


def test_every_function_that_readme_names_exists():
    table = re.search(
        r"(?ms)^## From equation to function$(.*?)^## ", (ROOT / "README.md").read_text()
    )
    names = re.findall(r"`(\w+(?:\.\w+)+)`", table[1])
    assert len(names) > 20
    for name in names:
        module, *path = name.split(".")
        module = "train" if module == "train" else f"boxteacher.{module}"
        found = importlib.import_module(module)
        for part in path:
            found = getattr(found, part)


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{p.name}" for p in DOCS)])
def test_prose_is_written_in_plain_sentences(name):
    """Short ones, for readers whose first language is not English: no code, tables and headings."""
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.DOTALL)
    skipped = ("|", "#", "!", "    ")
    lines = [line for line in text.splitlines() if not line.startswith(skipped)]
    text = re.sub(r"`[^`]*`", "x", re.sub(r"\]\([^)]*\)", "]", "\n".join(lines)))
    text = text.replace("*", "")
    assert ";" not in text
    sentences = [s.split() for s in re.split(r"(?<=[.!?:])\s+|\n\n|\n- ", text)]
    lengths = [len(words) for words in sentences if len(words) > 2]
    assert max(lengths) <= 25
    assert sum(lengths) / len(lengths) < 18


# --- nothing private ----------------------------------------------------------


def test_no_file_names_a_place_on_somebodys_machine():
    places = "|".join(("root", "home", "work", "workspace", "venv", "Users", "mnt"))
    absolute = re.compile(rf"(?<![\w.\-/~$}}])/(?:{places})/\w")
    found = []
    for path in tracked_files():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{path.name}:{n}" for n, line in enumerate(lines, 1) if absolute.search(line)]
    assert found == []
