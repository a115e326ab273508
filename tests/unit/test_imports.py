"""Facts about who imports whom: arrows point down, and the quick commands stay free of torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tdpo_cli

PACKAGE = Path(tdpo_cli.__file__).parent

# Rooms from the door down. An import may point to the same or a lower level, wherever in a file it stands.
LEVELS = {
    "command line": ["cli", "__main__"],
    "commands": ["train", "cross_eval", "score", "export", "doctor"],
    "what commands share": ["report", "sampling"],
    "what is learnt from": ["overoptimisation", "algorithms", "models", "rewards"],
    "ground": ["machine", "storage", "config"],
    "tables": ["tables"],
    "worlds": ["sandbox"],
    "words": ["types", "randomness", "console", "errors", "__init__"],
}  # fmt: skip
SIBLINGS_APART = ["commands", "what is learnt from"]
WITHOUT_TORCH = [
    "cli", "config", "errors", "console", "machine/memory.py", "machine/footprint.py", "machine/networks.py", "machine/counting.py",
    "machine/published.py", "machine/launch.py", "machine/signals.py", "storage",
    "rewards/__init__.py", "sampling/request.py", "cross_eval/request.py", "export/request.py",
]  # fmt: skip
# their __init__.py is a table of what the room holds: it may be read from anywhere above, and imports what it names only on demand
TABLES = ["algorithms", "models", "rewards"]
DEVELOPERS_ONLY = ["sandbox/build.py", "sandbox/training"]  # not in the wheel: they build the sandbox with all the rest

RANK = {room: rank for rank, rooms in enumerate(reversed(LEVELS.values())) for room in rooms}
LEVEL_OF = {room: level for level, rooms in LEVELS.items() for room in rooms}


def files_in(place):
    """The Python files of a room, or the one file."""
    path = PACKAGE / place
    return [path] if path.is_file() else sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def rooms():
    """Room of the table -> its files: a folder counts as one."""
    apart = {file for place in DEVELOPERS_ONLY for file in files_in(place)}
    found = {}
    for file in sorted(set(PACKAGE.rglob("*.py")) - apart):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        found.setdefault("tables" if file in {PACKAGE / table / "__init__.py" for table in TABLES} else room, []).append(file)
    return found


def imports(file, top_level_only=False):
    """Dotted names of everything a file imports."""
    tree = ast.parse(file.read_text())
    for node in _executed_on_import(tree) if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _executed_on_import(node):
    """Every statement but those inside functions and `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _executed_on_import(child)


def own(names):
    """Those of our rooms, as the table calls them."""
    for name in names:
        package, _, rest = name.partition(".")
        if package != "tdpo_cli":
            continue
        room, inside = [*rest.split("."), "", ""][:2]
        place = PACKAGE / room
        if room in TABLES and not ((place / inside).is_dir() and inside or (place / f"{inside}.py").is_file()):
            yield "tables"
        else:
            yield room if place.is_dir() or place.with_suffix(".py").is_file() else "__init__"


ARROWS = sorted({
    (room, target)
    for room, files in rooms().items() for file in files for target in own(imports(file, top_level_only=room == "tables"))
    if target != room and {room, target} <= set(RANK)
})  # fmt: skip


def test_every_room_has_its_place_in_the_table():
    assert set(rooms()) - {"presets"} <= set(RANK), "a new room: put it on a level of LEVELS"


def test_there_are_arrows_to_check():
    assert {("cli", "config"), ("train", "models"), ("rewards", "sandbox"), ("train", "__init__")} <= set(ARROWS)


def test_imports_point_down():
    assert [f"{room} -> {target}" for room, target in ARROWS if RANK[target] > RANK[room]] == []


@pytest.mark.parametrize("level", SIBLINGS_APART)
def test_siblings_never_import_each_other(level):
    assert [f"{room} -> {target}" for room, target in ARROWS if LEVEL_OF[room] == LEVEL_OF[target] == level] == []


def circles(arrows):
    """What can be reached from itself."""
    reached = {}
    for source, target in arrows:
        reached.setdefault(source, set()).add(target)
    for _ in list(reached):
        reached = {source: targets.union(*(reached.get(target, set()) for target in targets)) for source, targets in reached.items()}
    return sorted(source for source, targets in reached.items() if source in targets)


def test_there_are_no_circles_among_rooms():
    assert circles(ARROWS) == []


def test_there_are_no_circles_among_files():
    """Imports at the top of a file; those inside functions wait until they are needed."""
    name = lambda file: ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    known = {name(file) for files in rooms().values() for file in files}
    arrows = set()
    for files in rooms().values():
        for file in files:
            for imported in imports(file, top_level_only=True):
                target = imported if imported in known else imported.rpartition(".")[0]
                if target in known and target != name(file):
                    arrows.add((name(file), target))
    assert len(arrows) > 100
    assert circles(arrows) == []


def test_only_world_and_the_trackers_know_accelerate():
    users = [file.name for files in rooms().values() for file in files if any(name.split(".")[0] == "accelerate" for name in imports(file))]
    assert set(users) <= {"world.py", "launch.py", "trackers.py"}


def test_only_the_command_line_knows_typer():
    users = [room for room, files in rooms().items() for file in files if any(name.split(".")[0] == "typer" for name in imports(file))]
    assert set(users) == {"cli"}


@pytest.mark.parametrize("place", WITHOUT_TORCH)
def test_no_torch_at_module_level(place):
    names = {name.split(".")[0] for file in files_in(place) for name in imports(file, top_level_only=True)}
    assert not names & {"torch", "diffusers", "transformers", "accelerate", "peft", "numpy"}


def test_importing_the_quick_modules_does_not_load_torch():
    quick = [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for place in WITHOUT_TORCH for file in files_in(place)]
    program = (
        f"import sys, {', '.join(name.removesuffix('.__init__') for name in quick)}; print(sorted({{'torch', 'numpy', 'PIL'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_help_loads_nothing_that_it_does_not_show():
    unneeded = {"tdpo_cli.config.preset", "tdpo_cli.storage.run_dir", "tdpo_cli.models", "rich.progress", "importlib.metadata", "torch", "numpy"}
    program = f"import sys, tdpo_cli.cli; print(sorted({unneeded!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
