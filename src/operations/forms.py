"""The forms of an operation: a general one, one for MindSpore's operations on CPU, one with our own kernels.

All forms of an operation give the same numbers (tests/test_kernel_forms.py, tests/test_models.py). No other file
chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import mindspore as ms
from mindspore import nn

Form = TypeVar("Form", bound=type)
#: operation -> its form for MindSpore's operations on CPU, and its form with our own kernels
_CPU_FORMS: dict[type, type] = {}
_KERNEL_FORMS: dict[type, type] = {}
_STATELESS: set[type] = set()
#: form, kernels and arguments -> the cell that layers share
_shared: dict[tuple[Any, ...], nn.Cell] = {}


def on_cpu() -> bool:
    """Whether cells are built for the CPU."""
    return bool(ms.get_context("device_target") == "CPU")


def cpu_form(operation: type) -> Callable[[Form], Form]:
    """Register a class as the form of an operation for MindSpore's operations on CPU."""
    return _register(_CPU_FORMS, operation)


def kernel_form(operation: type) -> Callable[[Form], Form]:
    """Register a class as the form of an operation with our own kernels."""
    return _register(_KERNEL_FORMS, operation)


def _register(forms: dict[type, type], operation: type) -> Callable[[Form], Form]:
    def register(form: Form) -> Form:
        forms[operation] = form
        return form

    return register


def stateless(operation: Form) -> Form:
    """Mark an operation without state: all layers share one cell of it, which MindSpore parses once."""
    _STATELESS.add(operation)
    return operation


def build(operation: type, *arguments: Any) -> nn.Cell:
    """A cell of an operation, in the form for the current device and the kernels in use (`kernels.set_up`)."""
    form, setting = operation, ""
    if on_cpu():
        from . import kernels  # registers its forms; it needs the general ones

        form = _CPU_FORMS.get(operation, operation)
        if kernels.available():
            form, setting = _KERNEL_FORMS.get(operation, form), kernels.description()
    if operation not in _STATELESS:
        return form(*arguments)
    key = (form, setting, *arguments)
    if key not in _shared:
        _shared[key] = form(*arguments)
    return _shared[key]
