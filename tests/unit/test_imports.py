"""Facts about who imports whom: arrows point down, and the quick commands stay free of torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tdpo_cli

PACKAGE = Path(tdpo_cli.__file__).parent

# An import may point to the same or a lower level, wherever in a file it stands; the commands never import each other.
LEVELS = {
    "command line": ["cli", "__main__"],
    "commands": ["train", "sample", "score", "cross_eval", "report", "export", "doctor", "launch"],
    "a run": ["record", "job", "score_work", "trackers", "model_card", "comparison", "figures", "run_page"],
    "parts of an epoch": ["algorithms", "rollout", "update", "verdict", "scoring", "checkpoints"],
    "pieces": [
        "models", "rewards", "critic", "moments", "reset", "kl", "prompts", "run_dir", "memory", "footprint", "sandbox", "grid", "image_folder",
        "pages",
    ],
    "ground": ["types", "world", "disk", "preset", "settings", "errors", "randomness", "console", "stopping", "placement", "__init__"],
}  # fmt: skip
SIBLINGS_APART = ["commands", "parts of an epoch"]
WITHOUT_TORCH = ["cli", "preset", "settings", "memory", "footprint", "prompts", "errors", "console"]

RANK = {module: rank for rank, modules in enumerate(reversed(LEVELS.values())) for module in modules}
LEVEL_OF = {module: level for level, modules in LEVELS.items() for module in modules}


def modules():
    """Module of the table -> its files: a subpackage counts as one."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        found.setdefault(file.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(file)
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
    """Those of our modules, as the table calls them."""
    for name in names:
        package, _, rest = name.partition(".")
        if package == "tdpo_cli":
            part = rest.partition(".")[0]
            yield part if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file() else "__init__"


ARROWS = sorted({
    (module, target)
    for module, files in modules().items() for file in files for target in own(imports(file))
    if target != module and {module, target} <= set(RANK)
})  # fmt: skip


def test_every_module_has_its_place_in_the_table():
    assert set(modules()) - {"presets"} <= set(RANK), "a new module: put it on a level of LEVELS"


def test_there_are_arrows_to_check():
    assert {("cli", "preset"), ("train", "update"), ("rewards", "sandbox"), ("train", "__init__")} <= set(ARROWS)


def test_imports_point_down():
    assert [f"{module} -> {target}" for module, target in ARROWS if RANK[target] > RANK[module]] == []


@pytest.mark.parametrize("level", SIBLINGS_APART)
def test_siblings_never_import_each_other(level):
    assert [f"{module} -> {target}" for module, target in ARROWS if LEVEL_OF[module] == LEVEL_OF[target] == level] == []


def test_there_are_no_circles():
    reached = {module: {target for source, target in ARROWS if source == module} for module in RANK}
    for _ in RANK:
        reached = {module: targets.union(*(reached[target] for target in targets)) for module, targets in reached.items()}
    assert [module for module, targets in reached.items() if module in targets] == []


def test_only_world_and_the_trackers_know_accelerate():
    users = [module for module, files in modules().items() for file in files if any(name.split(".")[0] == "accelerate" for name in imports(file))]
    assert set(users) <= {"world", "launch", "trackers"}


def test_only_the_command_line_knows_typer():
    users = [module for module, files in modules().items() for file in files if any(name.split(".")[0] == "typer" for name in imports(file))]
    assert set(users) == {"cli"}


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_no_torch_at_module_level(module):
    names = {name.split(".")[0] for file in modules()[module] for name in imports(file, top_level_only=True)}
    assert not names & {"torch", "diffusers", "transformers", "accelerate", "peft", "numpy"}


def test_importing_the_quick_modules_does_not_load_torch():
    program = (
        f"import sys, {', '.join(f'tdpo_cli.{module}' for module in WITHOUT_TORCH)}; print(sorted({{'torch', 'numpy', 'PIL'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
