"""Imports point one way, names of single encoders stay in their layer, and importing does nothing."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

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
    "native": set(),
    "operations": {"config", "errors", "native"},
    "models": {"config", "operations"},
    "methods": {"config", "models", "operations"},
    "data": {"config", "errors", "native"},
    "engine": {"config", "errors", "native", "operations", "__init__"},  # __init__: the version, for checkpoints
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


def at_runtime(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below one, without what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from at_runtime(child)


def absolute_imports(path: Path) -> set[str]:
    """First parts of the absolute imports of a module."""
    names = set()
    for node in at_runtime(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.split(".")[0])
    return names


def offenders(paths: list[Path], rule: Callable[[Path], Iterable[Any]]) -> dict[str, list[Any]]:
    """Files that break a rule: name -> what breaks it there, as `rule` returns it."""
    broken = {str(path.relative_to(ROOT)): list(rule(path)) for path in paths}
    return {name: found for name, found in broken.items() if found}


def forbidden_layers(path: Path) -> set[str]:
    """Layers a module of src imports although `ALLOWED` does not list them."""
    allowed = ALLOWED[layer_of(path)]
    return set() if allowed is None else imported_layers(path) - allowed - {layer_of(path)}


def test_every_layer_has_its_imports_in_allowed() -> None:
    assert {layer_of(path) for path in MODULES} == set(ALLOWED)


def test_a_module_imports_only_the_layers_below_it() -> None:
    assert offenders(MODULES, forbidden_layers) == {}


def test_the_list_of_offenders_names_file_and_cause() -> None:
    assert offenders([SRC / "errors.py", SRC / "__init__.py"], imported_layers) == {"src/__init__.py": ["tasks"]}


def test_the_import_check_sees_imports() -> None:
    assert {"config", "data", "engine", "methods", "visual", "weights"} <= imported_layers(SRC / "tasks" / "train.py")
    assert imported_layers(SRC / "tasks" / "networks.py") == {"config", "models", "engine", "weights"}
    assert imported_layers(SRC / "engine" / "checkpoint.py") == {"__init__", "config", "engine", "errors"}
    assert "models" in imported_layers(SRC / "methods" / "mim.py")


def test_inside_src_imports_are_relative() -> None:
    assert offenders(MODULES, lambda path: absolute_imports(path) & {"src"}) == {}


def relative_imports(path: Path) -> list[str]:
    nodes = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom)]
    return [ast.unparse(node) for node in nodes if node.level]


def test_outside_src_imports_are_absolute() -> None:
    assert offenders(OUTSIDE, relative_imports) == {}


def test_config_needs_only_the_standard_library_and_yaml() -> None:
    allowed = set(sys.stdlib_module_names)
    modules = sorted((SRC / "config").glob("*.py"))
    assert offenders(modules, lambda path: absolute_imports(path) - allowed) == {
        "src/config/files.py": ["yaml"],
        "src/config/reading.py": ["yaml"],
    }


@pytest.mark.parametrize("module", ["src.config", "src.config.files", "src.tasks.command"])
def test_reading_a_recipe_does_not_load_mindspore(run_entry: Run, module: str) -> None:
    done = run_entry("-c", f"import sys, {module}; print('mindspore' in sys.modules, '{module}' in sys.modules)")
    assert done.stdout.split() == ["False", "True"], done.stderr


@pytest.mark.compiles
@pytest.mark.parametrize("task", ["networks", "evaluate", "predict", "export"])
def test_inference_imports_no_trainer(run_entry: Run, task: str) -> None:
    unwanted = ["src.tasks.train", "src.tasks.teacher", "src.engine.loop", "src.visual", "matplotlib"]
    done = run_entry("-c", f"import sys, src.tasks.{task}; print([n for n in {unwanted} if n in sys.modules])")
    assert done.stdout.split() == ["[]"], done.stdout + done.stderr


@pytest.mark.compiles
def test_what_few_commands_need_is_imported_when_used(run_entry: Run) -> None:
    """A training reads images, so it loads their libraries; a network in another program does not."""
    for task, unwanted in (
        ("train", {"matplotlib", "scipy"}),
        ("networks", {"matplotlib", "cv2", "simplejpeg", "tqdm"}),
    ):
        own = f"import sys, mindspore; before = set(sys.modules); import src.tasks.{task}"
        found = f"{{name.split('.')[0] for name in set(sys.modules) - before}} & {unwanted}"
        done = run_entry("-c", f"{own}; print(sorted({found}))")
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


def encoder_words(path: Path) -> list[tuple[int, str]]:
    return [(line, text) for line, text in code_words(path) if any(word in text.lower() for word in ENCODER_WORDS)]


def test_only_models_and_config_know_single_encoders() -> None:
    assert offenders(GENERAL, encoder_words) == {}


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


def test_importing_does_nothing() -> None:
    assert offenders(MODULES, at_import) == {}


def prints(path: Path) -> list[int]:
    """Lines that call print."""
    calls = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_src_does_not_print() -> None:
    assert offenders(MODULES, prints) == {}


def test_entry_points_are_short() -> None:
    """They parse the command line and call src.tasks; everything else belongs in src."""
    lengths = {
        name: len((ROOT / name).read_text("utf-8").splitlines()) for name in ("train.py", "eval.py", "export.py")
    }
    assert {name: length for name, length in lengths.items() if length > 40} == {}


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


def test_only_builders_compare_the_class_of_a_configuration() -> None:
    assert offenders(CONFIGURATIONS, configurations_asked_for) == {}


def test_the_configuration_check_sees_questions(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("isinstance(method, (MIMConfig, int)) or isinstance(x, dict)\n")
    assert configurations_asked_for(tmp_path / "one.py") == ["isinstance(method, (MIMConfig, int))"]


def private_patches(path: Path) -> list[str]:
    """Calls of setattr that replace a private name."""
    calls = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
    patches = [call for call in calls if getattr(call.func, "attr", getattr(call.func, "id", "")) == "setattr"]
    names = [[arg.value for arg in call.args if isinstance(arg, ast.Constant)] for call in patches]
    return [str(text) for texts in names for text in texts if str(text).split(".")[-1].startswith("_")]


def test_no_test_patches_a_private_name(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("monkeypatch.setattr(Fit, '_save', f)\nmonkeypatch.setattr('src.a._b', f)\n")
    assert private_patches(tmp_path / "one.py") == ["_save", "src.a._b"]
    assert offenders(sorted((ROOT / "tests").rglob("*.py")), private_patches) == {}
