"""Entry point of MindSpore Hub: `create_network(name)` builds a network of this project.

The hub puts this folder on sys.path and runs this file. All models of the zoo have a package `src`, so this file
imports its `src` under a unique name.
"""

from __future__ import annotations

import importlib.util
import sys
import zlib
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


def create_network(name: str, **options: Any) -> Any:
    """A classifier with fresh weights in evaluation mode: images (B, 3, H, W) -> logits (B, num_classes).

    Args:
        name: a model of `config/_models`, in upper or lower case, for example fastmim_vit_base.
        options: keys of its encoder or classifier, for example `num_classes=37` or `drop_path=0.1`.

    Raises:
        ValueError: unknown name (also a NotImplementedError) or option; the message lists the known ones.
    """
    return _package("tasks.networks").create_model(name, **options)


def _package(module: str) -> Any:
    """A module of this folder's `src`, in a package with a name unique to this folder."""
    name = f"mindspore_mim_{zlib.crc32(str(FOLDER).encode()):08x}"
    if name not in sys.modules:
        source = FOLDER / "src"
        spec = importlib.util.spec_from_file_location(
            name, source / "__init__.py", submodule_search_locations=[str(source)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(f"{name}.{module}")
