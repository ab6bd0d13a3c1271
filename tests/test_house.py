"""The house: rooms import one way, no signature is long, and what a method or a family is called stands in one file."""

import ast
from collections import defaultdict
from pathlib import Path

import mlx_slm
from mlx_slm.methods import METHODS

PACKAGE = Path(mlx_slm.__file__).parent
MODULES = {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def imports() -> dict[str, set[str]]:
    """The rooms (folders, or modules beside them) that each room imports."""
    found = defaultdict(set)
    for path, tree in MODULES.items():
        found[path.parts[0].removesuffix(".py")]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx_slm."):
                found[path.parts[0].removesuffix(".py")].add(node.module.split(".")[1])
    return found


def test_rooms_import_one_way():
    found, done = imports(), []
    del found["__init__"], found["__main__"]  # names of the API; the command line
    while found:
        free = sorted(room for room, others in found.items() if not (others - {room}) & set(found))
        assert free, f"these import each other: {sorted(found)}"
        done += free
        for room in free:
            del found[room]
    assert (
        done[0] == "errors" and done[-1] == "cli" and done.index("models") < done.index("config") < done.index("text")
    )


def test_no_signature_is_longer_than_six():
    for path, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                assert len([name for name in names if name not in ("self", "cls")]) <= 6, f"{path}: {node.name}"


def test_methods_are_known_by_name_in_their_own_files_alone():
    names, found = {method.name for method in METHODS}, []
    for path, tree in MODULES.items():
        if path.parts[0] != "methods":
            constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
            found += [f"{path}: {node.value}" for node in constants if node.value in names]
    assert len(found) < 20, found


def test_nobody_asks_for_a_family():
    for path, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                sides = (node.left, *node.comparators)
                asked = any(ast.unparse(side).split(".")[-1] in ("family", "model_type") for side in sides)
                assert not (asked and any(isinstance(side, ast.Constant) and side.value for side in sides)), path


def test_files_fit_in_a_head():
    long = {str(path): len((PACKAGE / path).read_text().splitlines()) for path in MODULES}
    assert {path for path, lines in long.items() if lines > 350} <= {"config/schema.py"}, "the schema alone"
    assert len([path for path in MODULES if len(path.parts) == 1]) <= 12
