"""The project's own rules: which way the library's imports run, and how dense code may be."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "hf_tract"
FILES = sorted(SOURCE.rglob("*.py"))
LEVELS = {
    "config": 0,
    "core": 1,
    "discovery": 2,
    "apply": 3,
    "whitening": 3,
    "metrics": 4,
    "integrations": 4,
    "cli": 4,
}
# Folders whose code may not be dense, and their most characters per line; in the examples much is help and messages.
MAX_CHARACTERS_PER_LINE = {"src/hf_tract": 38, "benchmarks": 39, "examples": 45}
MAX_PER_HUNDRED_LINES = 2.5  # of conditional expressions, and of comprehensions
MAX_FUNCTION_LINES = 40  # without the docstring
MAX_FILE_LINES = 250

FOLDERS = {folder: sorted((ROOT / folder).rglob("*.py")) for folder in MAX_CHARACTERS_PER_LINE}
CHECKED = [file for files in FOLDERS.values() for file in files]
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in CHECKED}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


def path_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imports_of(file: Path) -> set[str]:
    """Modules of the library that `file` imports, wherever in it."""
    modules = {module_of(other) for other in FILES}
    found = set()
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            found.update(names or {node.module})
    return found & modules


def folder_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.parent != SOURCE or file.stem in LEVELS], ids=module_of
)
def test_imports_run_down(file):
    module = module_of(file)
    for imported in imports_of(file):
        if imported == "hf_tract":
            pytest.fail(f"{module} imports the package itself; import the module that it needs")
        if folder_of(imported) != folder_of(module):
            assert LEVELS[folder_of(imported)] < LEVELS[folder_of(module)], f"{module} imports {imported}"


def test_imports_have_no_circle():
    inside = [file for file in FILES if file.name != "__init__.py"]
    graphlib.TopologicalSorter({module_of(file): imports_of(file) for file in inside}).prepare()


def test_core_needs_nothing_but_torch():
    needed = set()
    for file in FILES:
        if file.parent == SOURCE / "core":
            for node in ast.walk(TREES[file]):
                if isinstance(node, ast.Import):
                    needed.update(alias.name.split(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module:
                    needed.add(node.module.split(".")[0])
    assert needed - set(sys.stdlib_module_names) == {"torch", "hf_tract"}


def docstring_lines(tree: ast.AST) -> set[int]:
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def code_lines(file: Path) -> list[str]:
    """Lines of code without indentation: no docstrings, comments or blank lines."""
    skipped = docstring_lines(TREES[file])
    lines = enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
    stripped = [line.strip() for number, line in lines if number not in skipped]
    return [line for line in stripped if line and not line.startswith("#")]


@pytest.mark.parametrize("folder", FOLDERS)
def test_code_is_not_dense(folder):
    lines = [line for file in FOLDERS[folder] for line in code_lines(file)]
    nodes = [node for file in FOLDERS[folder] for node in ast.walk(TREES[file])]
    allowed = MAX_PER_HUNDRED_LINES * len(lines) / 100
    assert sum(map(len, lines)) <= MAX_CHARACTERS_PER_LINE[folder] * len(lines)
    assert sum(isinstance(node, ast.IfExp) for node in nodes) <= allowed
    assert sum(isinstance(node, COMPREHENSIONS) for node in nodes) <= allowed


@pytest.mark.parametrize("file", CHECKED, ids=path_of)
def test_docstrings_of_modules_and_classes_start_with_a_verb(file):
    """Those of functions are ruff's D401."""
    for node in ast.walk(TREES[file]):
        if isinstance(node, (ast.Module, ast.ClassDef)):
            first = (ast.get_docstring(node) or "").split()[:1]
            assert not first or first[0].rstrip(",").endswith("s"), first


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_files_of_the_library_are_short(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("file", CHECKED, ids=path_of)
def test_functions_are_short(file):
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.FunctionDef):
            lines = set(range(node.lineno, node.end_lineno + 1)) - docstring_lines(node)
            assert len(lines) <= MAX_FUNCTION_LINES, node.name


def test_no_test_imports_another():
    for file in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            assert not [name for name in names if name.split(".")[-1].startswith("test_")], file
