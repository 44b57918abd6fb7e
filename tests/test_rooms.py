"""common/ as a house: rooms import only lower ones, libraries stay in their rooms, files and functions stay short."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMON = ROOT / "common"
FILES = sorted(path for path in COMMON.rglob("*.py"))
# lower floors first; those of one set do not import each other
FLOORS = [
    {"launch", "garbage", "device", "cores", "versions", "peft_names"},
    {"errors"},
    {"opened"},
    {"inputs", "elsewhere"},
    {"config", "files", "workers"},
    {"knobs"},
    {"knob_files"},
    {"cli", "distributed", "conversation"},
    {"data"},
    {"model"},
    {"runs"},
    {"inference"},
    {"evaluation", "engine"},
    {"training", "serving", "export"},
    {"checking"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ROOMS = [path.name for path in COMMON.iterdir() if path.is_dir() and path.name != "__pycache__"]
WITHOUT_TORCH = set(
    "launch errors opened inputs config files workers knobs knob_files cli data conversation serving".split()
)
KEPT_IN = {  # library: where it may be imported
    "flask": {"serving"},
    "waitress": {"serving"},
    "werkzeug": {"serving"},
    "peft": {"peft_names"},
    "gguf": {"export"},
    "nltk": {"evaluation"},
    "rouge": {"evaluation"},
    "sacrebleu": {"evaluation"},
    "jieba": {"evaluation"},
    "torch": set(FLOOR)
    - {
        "serving",
        "data",
        "config",
        "knobs",
        "knob_files",
        "cli",
        "errors",
        "launch",
        "files",
        "workers",
        "conversation",
        "opened",
        "inputs",
    },
}
MOST_LINES, MOST_IN_FUNCTION, MOST_MODULES = 320, 50, 12


def room_of(path):
    return path.relative_to(COMMON).with_suffix("").parts[0]


def imports(path):
    """Names of the modules a file imports, wherever in it; those that only type checkers see are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hints = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    only_hints = {id(node) for hint in hints for node in ast.walk(hint)}
    for node in ast.walk(tree):
        if id(node) in only_hints:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "common":
            yield from (f"common.{name.name}" for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(COMMON)))
def test_a_room_imports_only_lower_ones(path):
    here = room_of(path)
    if here == "__init__":
        return
    for name in imports(path):
        if name.startswith("common."):
            room = name.split(".")[1]
            assert room == here or FLOOR[room] < FLOOR[here], f"{here} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(COMMON)))
def test_a_library_is_used_in_its_rooms_alone(path):
    here = room_of(path)
    for name in imports(path):
        library = name.split(".")[0]
        assert here in KEPT_IN.get(library, {here}), f"{library} in {here}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(COMMON)))
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= MOST_IN_FUNCTION, node.name


def test_a_room_holds_few_modules_and_says_how_to_read_them():
    assert len(ROOMS) >= 7
    for room in ROOMS:
        modules = {path.stem for path in (COMMON / room).glob("*.py")} - {"__init__"}
        assert len(modules) <= MOST_MODULES, room
        tour = ast.get_docstring(ast.parse((COMMON / room / "__init__.py").read_text(encoding="utf-8")))
        listed = [line.split()[0] for line in tour.splitlines() if len(line.split("  ")) > 1]
        assert modules == {name for name in listed if not name.endswith("/")}, room


def test_the_two_ways_through_the_house_are_short_and_true():
    """CONTRIBUTING.md: each step's file defines what the step names; 9 steps for a row, 11 for a request."""
    parts = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("\n## One ")[1:]
    assert len(parts) == 2
    for way, most in zip((part.split("\n## ")[0] for part in parts), (9, 11), strict=True):
        steps = re.findall(r"^\d+\. `(.+?\.py)` (`.+?`): ", way, re.M)
        assert len(re.findall(r"^\d+\. ", way, re.M)) == len(steps) == len({file for file, _ in steps}) <= most
        for file, names in steps:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            assert set(re.findall(r"\w+", names)) <= defined, file


def test_rooms_re_export_nothing():
    for room in ROOMS:
        tree = ast.parse((COMMON / room / "__init__.py").read_text(encoding="utf-8"))
        assert len(tree.body) == 1, room


def test_recipes_import_common_and_common_no_recipe():
    families = {path.parent.name for path in ROOT.glob("*_sft/prompt.py")}
    for path in FILES:
        assert not families & {name.split(".")[0] for name in imports(path)}


def test_tests_import_no_private_name():
    for path in sorted((ROOT / "tests").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "common":
                assert not [name.name for name in node.names if name.name.startswith("_")], path.name
                modules |= {name.asname or name.name for name in node.names}
        private = [
            ast.unparse(node)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in modules
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
        ]
        assert not private, f"{path.name}: {private}"
