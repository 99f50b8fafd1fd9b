"""Imports point one way, names of single encoders stay in their layer, and importing does nothing."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, Run

SRC = ROOT / "src"
MODULES = sorted(SRC.rglob("*.py"))
OUTSIDE = [ROOT / name for name in ("train.py", "eval.py", "export.py", "mindspore_hub_conf.py")] + [
    path for folder in ("scripts", "tests", "benchmarks", "hub") for path in sorted((ROOT / folder).rglob("*.py"))
]

#: layer (first part of the path below src) -> layers it may import besides itself; None is every layer
ALLOWED: dict[str, set[str] | None] = {
    "__init__": {"tasks"},  # inside load_model
    "errors": set(),
    "config": {"errors"},
    "models": {"config"},
    "methods": {"config", "models"},
    "data": {"config", "errors"},
    "engine": {"config", "errors", "__init__"},  # __init__: the version, for checkpoints
    "weights": {"config", "errors", "models"},
    "visual": {"config", "engine", "methods"},
    "tasks": None,
}
ENCODER_WORDS = ("vit", "swin", "cait")
#: where the word of a single encoder may stand
ENCODER_PLACES = ("models/", "config/", "weights/names.py", "weights/derive.py")


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def is_main_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)


def without_main(tree: ast.Module) -> list[ast.stmt]:
    return [node for node in tree.body if not is_main_guard(node)]


def layer_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imported_layers(path: Path) -> set[str]:
    """Layers a module of src imports with relative imports, at import and inside functions."""
    package = path.relative_to(SRC).parts[:-1]  # folders below src
    found = set()
    for statement in without_main(parsed(path)):
        for node in ast.walk(statement):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            above = package[: len(package) - (node.level - 1)]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                parts = (*above, *name.split("."))
                found.add(parts[0] if (SRC / parts[0]).exists() or (SRC / f"{parts[0]}.py").exists() else "__init__")
    return found


def absolute_imports(path: Path) -> set[str]:
    """First parts of the absolute imports of a module."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.split(".")[0])
    return names


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("path", MODULES, ids=ids(MODULES))
def test_a_module_imports_only_the_layers_below_it(path: Path) -> None:
    layer = layer_of(path)
    assert layer in ALLOWED, f"src/{layer} is a new layer: say in ALLOWED what it may import"
    allowed = ALLOWED[layer]
    if allowed is not None:
        assert imported_layers(path) <= allowed | {layer}


def test_the_import_check_sees_imports() -> None:
    assert {"config", "data", "engine", "methods", "visual", "weights"} <= imported_layers(SRC / "tasks" / "train.py")
    assert imported_layers(SRC / "tasks" / "networks.py") == {"config", "models", "engine", "weights"}
    assert imported_layers(SRC / "engine" / "checkpoint.py") == {"__init__", "errors"}
    assert "models" in imported_layers(SRC / "methods" / "mim.py")


@pytest.mark.parametrize("path", MODULES, ids=ids(MODULES))
def test_inside_src_imports_are_relative(path: Path) -> None:
    assert "src" not in absolute_imports(path)


@pytest.mark.parametrize("path", OUTSIDE, ids=ids(OUTSIDE))
def test_outside_src_imports_are_absolute(path: Path) -> None:
    levels = [node.level for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom)]
    assert not any(levels)


def test_config_needs_only_the_standard_library_and_yaml() -> None:
    for path in (SRC / "config").glob("*.py"):
        assert absolute_imports(path) <= set(sys.stdlib_module_names) | ({"yaml"} if path.stem == "files" else set())


@pytest.mark.parametrize("module", ["src.config", "src.config.files", "src.tasks.command"])
def test_reading_a_recipe_does_not_load_mindspore(run_entry: Run, module: str) -> None:
    done = run_entry("-c", f"import sys, {module}; print('mindspore' in sys.modules, '{module}' in sys.modules)")
    assert done.stdout.split() == ["False", "True"], done.stderr


@pytest.mark.parametrize("task", ["networks", "evaluate", "predict", "export"])
def test_inference_imports_no_trainer(run_entry: Run, task: str) -> None:
    unwanted = ["src.tasks.train", "src.tasks.teacher", "src.engine.loop", "src.visual", "matplotlib"]
    done = run_entry("-c", f"import sys, src.tasks.{task}; print([n for n in {unwanted} if n in sys.modules])")
    assert done.stdout.split() == ["[]"], done.stdout + done.stderr


def docstrings(tree: ast.Module) -> set[int]:
    """Ids of the constants that are docstrings."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found.add(id(first.value))
    return found


def code_words(path: Path) -> list[tuple[int, str]]:
    """Line and text of every identifier and string of a module that is not a docstring."""
    tree = parsed(path)
    spared = docstrings(tree)
    words = []
    for node in ast.walk(tree):
        texts = []
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in spared:
            texts.append(node.value)
        for attribute in ("id", "attr", "name", "arg", "module", "asname"):
            value = getattr(node, attribute, None)
            if isinstance(value, str):
                texts.append(value)
        words += [(getattr(node, "lineno", 0), text) for text in texts]
    return words


GENERAL = [path for path in MODULES if not path.relative_to(SRC).as_posix().startswith(ENCODER_PLACES)]


@pytest.mark.parametrize("path", GENERAL, ids=ids(GENERAL))
def test_only_models_and_config_know_single_encoders(path: Path) -> None:
    named = [(line, text) for line, text in code_words(path) if any(w in text.lower() for w in ENCODER_WORDS)]
    assert not named


def test_the_word_check_sees_words() -> None:
    found = {text for _, text in code_words(SRC / "models" / "__init__.py")}
    assert {"ViT", "ViTConfig", "vit"} <= found


#: what a module of src must not do when it is imported
FORBIDDEN_CALLS = {"print", "open", "set_context", "set_device", "set_seed", "init", "parse_args", "mkdir", "urlopen"}


def at_import(path: Path) -> list[str]:
    """Forbidden calls and uses of sys.argv that run when a module is imported."""
    found = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in FORBIDDEN_CALLS:
                found.append(name)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.argv":
            found.append("sys.argv")
        for child in ast.iter_child_nodes(node):
            visit(child)

    for statement in without_main(parsed(path)):
        visit(statement)
    return found


@pytest.mark.parametrize("path", MODULES, ids=ids(MODULES))
def test_importing_does_nothing(path: Path) -> None:
    assert at_import(path) == []


@pytest.mark.parametrize("path", MODULES, ids=ids(MODULES))
def test_src_does_not_print(path: Path) -> None:
    calls = [node.func for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]


@pytest.mark.parametrize("name", ["train.py", "eval.py", "export.py"])
def test_entry_points_are_short(name: str) -> None:
    """Parse the command line and call src.tasks.train: nothing that belongs into src."""
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 40


#: where a configuration's class may be asked for: its own package, and the tables that build from it
BUILDERS = ("config/", "models/__init__.py", "methods/__init__.py", "methods/decoders.py", "methods/targets.py")
CONFIGURATIONS = [path for path in MODULES if not path.relative_to(SRC).as_posix().startswith(BUILDERS)] + [
    path for path in OUTSIDE if path.relative_to(ROOT).parts[0] != "tests"
]


def configurations_asked_for(path: Path) -> list[str]:
    """Calls of isinstance with a configuration's class."""
    calls = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
    asked = [ast.unparse(call) for call in calls if isinstance(call.func, ast.Name) and call.func.id == "isinstance"]
    return [text for text in asked if "Config" in text]


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=ids(CONFIGURATIONS))
def test_nobody_asks_which_configuration_it_is(path: Path) -> None:
    assert configurations_asked_for(path) == []


def test_the_configuration_check_sees_questions(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("isinstance(method, (MIMConfig, int)) or isinstance(x, dict)\n")
    assert configurations_asked_for(tmp_path / "one.py") == ["isinstance(method, (MIMConfig, int))"]
