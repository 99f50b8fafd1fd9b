"""Files of PyTorch and safetensors: every container is read and written bit by bit, and nothing in them runs."""

from __future__ import annotations

import argparse
import os
import pickle
import struct
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.weights import WeightsError
from src.weights.safetensors_file import is_safetensors, read_safetensors, write_safetensors
from src.weights.torch_file import InertObject, StoredTensor, read_torch, stored_tensor, write_torch
from tests.helpers import Run, numbers
from tests.torch_files import Bits, save_legacy, save_zip, torch_names

__all__ = ["torch_names"]
Save = Callable[[Path, Any, types.ModuleType], None]
SAVES = pytest.mark.parametrize("save", [save_zip, save_legacy])


def state() -> dict[str, Any]:
    """A tensor of every number type, of odd shapes and in another order of memory."""
    return OrderedDict(
        {
            "weight": numbers(0, 3, 4),
            "turned": numbers(1, 5, 2).T,
            "half": numbers(2, 7).astype(np.float16),
            "brain": Bits((numbers(3, 2, 3).view(np.uint32) >> 16).astype(np.uint16), "bfloat16"),
            "double": numbers(4, 2).astype(np.float64),
            "index": np.arange(6).reshape(2, 3),
            "scalar": np.array(3.5, np.float32),
            "odd": np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
        }
    )


def check(tensors: dict[str, StoredTensor]) -> None:
    """The tensors of `state`, bit by bit."""
    expected = {name: value if isinstance(value, Bits) else Bits(value) for name, value in state().items()}
    assert list(tensors) == list(expected)
    for name, bits in expected.items():
        assert tensors[name].dtype == (bits.dtype or str(bits.values.dtype))
        assert tensors[name].shape == bits.values.shape
        assert tensors[name].read().tobytes() == np.ascontiguousarray(bits.values).tobytes()


@SAVES
def test_both_formats_are_read_with_everything_around_the_tensors(
    save: Save, tmp_path: Path, torch_names: types.ModuleType
) -> None:
    import sys

    config = sys.modules["yacs.config"].CfgNode({"MODEL": {"TYPE": "x"}})  # type: ignore[attr-defined]
    config.frozen = True
    tree = {
        "model": state(),
        "optimizer": {"state": {0: {"exp_avg": numbers(5, 3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "args": argparse.Namespace(model="base", where=Path("x")),
        "config": config,
        "best": np.float64(0.5),
        "epoch": 7,
    }
    save(tmp_path / "f.pth", tree, torch_names)
    found = read_torch(tmp_path / "f.pth")
    check(found["model"])
    assert found["epoch"] == 7 and isinstance(found["best"], InertObject)
    assert found["args"].fields()["model"] == "base" and isinstance(found["args"], InertObject)
    assert found["config"].fields()["MODEL"] == {"TYPE": "x"} and found["config"].path == "yacs.config.CfgNode"
    assert found["optimizer"]["param_groups"][0]["lr"] == 0.1


@pytest.mark.parametrize("key", ["", "model"])
def test_a_written_file_is_read_back(key: str, tmp_path: Path, torch_names: types.ModuleType) -> None:
    save_zip(tmp_path / "f.pth", state(), torch_names)
    write_torch(tmp_path / "g.pth", read_torch(tmp_path / "f.pth"), key)
    again = read_torch(tmp_path / "g.pth")
    check(again[key] if key else again)
    with zipfile.ZipFile(tmp_path / "g.pth") as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            header = (tmp_path / "g.pth").read_bytes()[info.header_offset + 26 : info.header_offset + 30]
            start = info.header_offset + 30 + sum(struct.unpack("<HH", header))
            assert start % 64 == 0, info.filename


def test_safetensors_are_read_back(tmp_path: Path, torch_names: types.ModuleType) -> None:
    from safetensors.numpy import load_file

    save_zip(tmp_path / "f.pth", state(), torch_names)
    tensors = read_torch(tmp_path / "f.pth")
    write_safetensors(tmp_path / "g.safetensors", tensors)
    assert is_safetensors(tmp_path / "g.safetensors") and not is_safetensors(tmp_path / "f.pth")
    check(read_safetensors(tmp_path / "g.safetensors"))
    del tensors["brain"]  # NumPy has no bfloat16, nor has the library then
    write_safetensors(tmp_path / "h.safetensors", tensors)
    for name, value in load_file(tmp_path / "h.safetensors").items():
        assert value.tobytes() == tensors[name].read().tobytes()


def test_narrow_numbers_become_float32_and_come_back() -> None:
    bits = np.arange(65536, dtype=np.uint16)  # every number there is
    for dtype, values in (("float16", bits.view(np.float16)), ("bfloat16", bits)):
        wide = StoredTensor(dtype, values.shape, lambda values=values: values).array()
        assert wide.dtype == np.float32
        back = stored_tensor(wide, dtype).read()
        real = ~np.isnan(wide)
        np.testing.assert_array_equal(back.view(np.uint16)[real], bits[real])
        again = StoredTensor(dtype, back.shape, lambda back=back: back).array()
        assert np.isnan(again[~real]).all()
    rounded = stored_tensor(np.array([1 + 2**-9, 1 + 3 * 2**-8], np.float32), "bfloat16").read()
    assert rounded.tolist() == [0x3F80, 0x3F82]  # to nearest, ties to even


# --- hostile and broken files -----------------------------------------------------------------------------------


class Call:
    """An object whose pickle asks for a call."""

    def __init__(self, function: Any, *args: Any):
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def hostile(marker: Path) -> dict[str, Any]:
    text = f"open({str(marker)!r}, 'w')"
    return {
        "a command": Call(os.system, f"touch {marker}"),
        "eval": Call(eval, text),
        "exec": Call(exec, text),
        "open": Call(open, str(marker), "w"),
        "getattr": Call(getattr, Path(marker), "touch"),
        "a method": Call(Call(getattr, Path(marker), "touch").function, marker, "touch"),
        "import": Call(__import__, "antigravity"),
        "pickle": Call(pickle.loads, pickle.dumps(Call(eval, text))),
    }


@SAVES
@pytest.mark.parametrize("kind", hostile(Path("x")))
def test_a_file_that_wants_to_run_code_is_refused_and_runs_nothing(
    kind: str, save: Save, tmp_path: Path, torch_names: types.ModuleType
) -> None:
    marker = tmp_path / "marker"
    save(tmp_path / "f.pth", {"model": state(), "extra": hostile(marker)[kind]}, torch_names)
    with pytest.raises(WeightsError) as caught:
        read_torch(tmp_path / "f.pth")
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'f.pth'}: ") and "nothing in it was run" in text and "\n" not in text
    assert not marker.exists()


def archive_of(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("name/data.pkl", content)
        archive.writestr("name/data/0", b"\0" * 16)
    return path


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__code__K\x01sb.",  # state of a function
        b"\x80\x02cx.y\nZ\n}X\x04\x00\x00\x00pathK\x01sb.",  # state of a class
        b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.",
        b"\x80\x02ctorch.hub\nload\nX\x01\x00\x00\x00a\x85R.",  # functions of the libraries that files are for
        b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00a\x85R.",
        b"\x80\x02ctorch.utils.cpp_extension\nload_inline\nX\x01\x00\x00\x00a\x85R.",
        b"\x80\x02cnumpy\nload\nX\x01\x00\x00\x00a\x85R.",
        b"\x80\x02cnumpy.testing\nrunstring\nX\x01\x00\x00\x00a}\x86R.",
        b"\x80\x02ctypes\nFunctionType\n}}\x86R.",
        b"\x80\x02(X\x04\x00\x00\x00trueios\nsystem\n.",  # the old INST opcode
        b"\x80\x02\x82\x01.",  # the extension registry
        b"\x80\x02X\x01\x00\x00\x00aQ.",  # a persistent id that is no storage
        b"\x80\x04\x96\xff\xff\xff\xff\xff\xff\xff\x00.",  # a byte array of 2^56 bytes
        b"\x80\x02",
        b"not a pickle",
    ],
)
def test_pickles_made_by_hand_are_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"refused|damaged"):
        read_torch(archive_of(tmp_path / "f.pth", content))


def test_a_class_beside_its_source_text_is_passed_over(tmp_path: Path) -> None:
    """What torch.save wrote of an object of a Module before PyTorch 1.6: ('module', class, file, text)."""
    names = b"X\x01\x00\x00\x00aX\x01\x00\x00\x00b"
    content = b"\x80\x02(X\x06\x00\x00\x00modulecmodels.x\nNet\n" + names + b"tQ)\x81."
    assert isinstance(read_torch(archive_of(tmp_path / "f.pth", content)), InertObject)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, (5,), (1,)), (4, (1,), (1,)), (-1, (1,), (1,)), (0, (2, 2), (3, 1)), (0, (1 << 40,), (0,)), (0, (2,), (-1,))],
)
def test_a_tensor_beyond_its_numbers_is_refused(
    offset: int, size: tuple[int, ...], stride: tuple[int, ...], tmp_path: Path
) -> None:
    def put(*values: int) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", v) for v in values) + b"t"

    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    call = storage + b"\x8a\x08" + struct.pack("<q", offset) + put(*size) + put(*stride)
    content = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + call + b"\x89}tR."
    with pytest.raises(WeightsError, match="reaches beyond its numbers"):
        read_torch(archive_of(tmp_path / "f.pth", content))


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_cut_short_is_one_line(kind: str, tmp_path: Path, torch_names: types.ModuleType) -> None:
    path = tmp_path / "f"
    if kind == "legacy":
        save_legacy(path, {"model": state()}, torch_names)
    else:
        save_zip(tmp_path / "zip", {"model": state()}, torch_names)
        if kind == "safetensors":
            write_safetensors(path, read_torch(tmp_path / "zip")["model"])
        else:
            (tmp_path / "zip").rename(path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 41), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError) as caught:
            tensors = read_safetensors(path) if is_safetensors(path) else read_torch(path)["model"]
            for tensor in tensors.values():
                tensor.read()
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_flipped_bit_in_the_numbers_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "f.pth"
    write_torch(path, {"a": stored_tensor(np.full(64, 3.0, np.float32))})
    content = bytearray(path.read_bytes())
    content[content.index(np.full(64, 3.0, np.float32).tobytes()) + 9] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(WeightsError, match="damaged"):
        read_torch(path)["a"].read()


def test_other_files_are_not_checkpoints(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("readme.txt", "x")
    with zipfile.ZipFile(tmp_path / "small", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("name/data.pkl", b"\x80\x02}." * 100)
    (tmp_path / "text").write_text("hello")
    (tmp_path / "pickle").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "empty").touch()
    for name in ("zip", "small", "text", "pickle", "empty"):
        with pytest.raises(WeightsError, match=r"not a PyTorch checkpoint|not one that torch\.save writes"):
            read_torch(tmp_path / name)


def test_reading_loads_neither_framework(run_entry: Run) -> None:
    done = run_entry(
        "-c", "import sys, src.weights.torch_file; print(*[m in sys.modules for m in ('torch', 'mindspore')])"
    )
    assert done.stdout.split() == ["False", "False"], done.stderr
