"""Weights of others that are hostile: one line at once, in bounded memory."""

from __future__ import annotations

import collections
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.weights import WeightsError
from src.weights.derive import Hints
from src.weights.foreign import open_foreign, to_ours, to_theirs
from src.weights.safetensors_file import read_safetensors
from src.weights.torch_file import LEGACY_START, InertObject, read_torch, stored_tensor, write_torch
from tests.limited import answers

# --- .pth -------------------------------------------------------------------------------------------------------


def word(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def whole(number: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", number)


def storage(count: bytes, key: bytes = word("0")) -> bytes:
    return b"(" + word("storage") + b"ctorch\nFloatStorage\n" + key + word("cpu") + count + b"tQ"


def tensor(size: bytes, stride: bytes, numbers: bytes) -> bytes:
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + numbers + b"K\x00" + size + stride + b"\x89}tR"


def digits(count: int) -> bytes:
    """A number of many bytes."""
    return b"\x8b" + struct.pack("<i", count) + b"\x7f" * count


#: four numbers
FOUR = tensor(b"K\x04\x85", b"K\x01\x85", storage(b"K\x04"))


def doubled(times: int) -> bytes:
    """A tuple of two equal tuples, and so on: 2**times values in a few bytes."""
    return b"K\x01" + b"2\x86" * times


#: content of a pickle, words of the error
PICKLES = {
    "a memo index of a gigabyte": (b"\x80\x02Nr" + struct.pack("<I", 2**28) + b".", "no table of named tensors"),
    "a key that takes for ever": (b"\x80\x02}" + doubled(60) + b"K\x01s.", "a key of tuples within tuples"),
    "keys that take for ever": (b"\x80\x02}(" + doubled(60) + b"K\x01u.", "a key of tuples within tuples"),
    "a dict of such a key": (b"\x80\x02(" + doubled(60) + b"K\x01d.", "a key of tuples within tuples"),
    "a set of such a value": (b"\x80\x04\x8f(" + doubled(60) + b"\x90.", "a key of tuples within tuples"),
    "a frozen set of such a value": (b"\x80\x04(" + doubled(60) + b"\x91.", "a key of tuples within tuples"),
    "an ordered dict of such a key": (
        b"\x80\x02ccollections\nOrderedDict\n(](" + doubled(60) + b"K\x01\x86etR.",
        "a key of tuples within tuples",
    ),
    "a storage named by such a value": (
        b"\x80\x02" + tensor(b"K\x01\x85", b"K\x01\x85", storage(b"K\x01", doubled(60))) + b".",
        "a run of numbers without a name",
    ),
    "a shape of such a value": (
        b"\x80\x02" + tensor(doubled(60), doubled(60), storage(b"K\x04")) + b".",
        "a tensor with an invalid shape",
    ),
    "bytes that are not there": (b"\x80\x03B\xff\xff\xff\x7fa.", "longer than the file"),
    "more bytes than there are": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".", "longer than the file"),
    "a byte array of gigabytes": (b"\x80\x05\x96" + struct.pack("<Q", 2**33) + b".", "longer than the file"),
    "a frame of gigabytes": (b"\x80\x04\x95" + struct.pack("<Q", 2**33) + b".", "longer than the file"),
    "a text of gigabytes": (b"\x80\x02X\xff\xff\xff\xffa.", "longer than the file"),
    "a line without an end": (b"\x80\x02c" + b"x" * 9999, "cannot be read"),
    "five million lists": (b"\x80\x02(" + b"]" * 5_000_000 + b"t.", "more parts than any checkpoint"),
    "deep lists": (b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b".", "no table of named tensors"),
    "many classes": (
        b"\x80\x02" + b"".join(b"cx\nY%d\n0" % number for number in range(5000)) + b"N.",
        "names more classes than any checkpoint",
    ),
    "digits": (b"\x80\x02I" + b"9" * 5000 + b"\n.", "cannot be read"),
    "a size of many digits": (
        b"\x80\x02" + tensor(digits(9000) + b"\x85", b"K\x01\x85", storage(b"K\x04")) + b".",
        "a tensor with an invalid shape",
    ),
    "a count of many digits": (
        b"\x80\x02" + storage(digits(9000)) + b".",
        "a run of numbers without a name or length",
    ),
    "the state of a tensor": (
        b"\x80\x02" + FOUR + b"}" + word("shape") + whole(2**40) + b"\x85sb.",
        "sets the state of a function or tensor",
    ),
    "the state of a dict": (b"\x80\x02}}b.", "sets the state of a function or tensor"),
    "a stack that ends": (b"\x80\x02R.", "cannot be read"),
    "a mark that is missing": (b"\x80\x02t.", "cannot be read"),
    "no end": (b"\x80\x02N", "cannot be read"),
    "an operation that is none": (b"\x80\x02\xff.", "cannot be read"),
    "a memo that is empty": (b"\x80\x02h\x07.", "cannot be read"),
}  # fmt: skip


def archive(path: Path, content: bytes, numbers: bytes = b"\0" * 16) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("name/data.pkl", content)
        file.writestr("name/data/0", numbers)
    return path


@pytest.fixture(scope="module")
def pickles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pickles")
    files = [archive(folder / f"{kind}.pth", content) for kind, (content, _) in PICKLES.items()]
    for kind, (content, _) in PICKLES.items():
        files.append(folder / f"legacy {kind}.pth")
        files[-1].write_bytes(LEGACY_START + b".\x80\x02K\x01.\x80\x02}." + content + b"\x80\x02].")
    return answers("src.weights.foreign:open_foreign", files)


@pytest.mark.compiles
@pytest.mark.parametrize("form", ["", "legacy "])
@pytest.mark.parametrize("kind", PICKLES)
def test_a_hostile_pickle_is_one_line(kind: str, form: str, pickles: dict[str, str]) -> None:
    text = pickles[f"{form}{kind}.pth"]
    assert PICKLES[kind][1] in text and f"{form}{kind}.pth: " in text and "\n" not in text


def test_what_ordinary_pickles_have_is_still_read(tmp_path: Path) -> None:
    """Protocol 4 with frames, a memo, sets, byte arrays, and objects with a state."""
    tree = {
        ("a", 1): {"b": {1, 2}, "c": frozenset("xy"), "d": bytearray(b"123"), "e": b"4", "f": 10**30},
        "g": collections.OrderedDict([("h", [1.5, None, True])]),
        "i": (shared := [1, 2], shared),
    }
    for protocol in range(6):
        found = read_torch(archive(tmp_path / f"{protocol}.pth", pickle.dumps(tree, protocol)))
        assert found["i"] == ([1, 2], [1, 2]) and found["i"][0] is found["i"][1]
        assert found["g"]["h"] == [1.5, None, True] and isinstance(found["g"], InertObject)
        if protocol > 3:
            assert found[("a", 1)]["b"] == {1, 2} and found[("a", 1)]["c"] == frozenset("xy")
            assert found[("a", 1)]["f"] == 10**30


def test_many_views_of_the_same_numbers_are_refused(tmp_path: Path) -> None:
    each = tensor(whole(4000) + b"\x85", b"K\x01\x85", storage(whole(4000)))
    content = b"\x80\x02}(" + b"".join(word(f"t{number}") + each for number in range(400)) + b"u."
    with pytest.raises(WeightsError, match=r"share their numbers: they take 6400000 bytes, more than the file"):
        open_foreign(archive(tmp_path / "a.pth", content, b"\0" * 16_000))


def test_a_zip_archive_of_many_members_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as file:
        for number in range(60_000):
            file.writestr(f"name/data/{number:020d}", b"")
    with pytest.raises(WeightsError, match=r"more members than any checkpoint"):
        read_torch(tmp_path / "a.pth")


def test_a_zip_archive_that_claims_more_than_it_has(tmp_path: Path) -> None:
    content = bytearray(archive(tmp_path / "a.pth", b"\x80\x02}.").read_bytes())
    place = content.index(b"PK\x01\x02")  # the size of data.pkl in the list at the end
    for size in (100, 2**31, 2**32 - 2):
        content[place + 20 : place + 28] = struct.pack("<II", size, size)
        (tmp_path / "a.pth").write_bytes(content)
        with pytest.raises(WeightsError, match=r"longer than any checkpoint's|cannot be read"):
            read_torch(tmp_path / "a.pth")


# --- safetensors ------------------------------------------------------------------------------------------------


def header_of(**entries: tuple[Any, Any, Any]) -> str:
    parts = {name: dict(zip(("dtype", "shape", "data_offsets"), entry, strict=True)) for name, entry in entries.items()}
    return json.dumps(parts)


EIGHT = ("F32", [2], [0, 8])
#: header, bytes after it, words of the error
HEADERS = {
    "tensors that overlap": (header_of(a=EIGHT, b=("F32", [2], [4, 12])), 12, "'b' lie in those of another tensor"),
    "the same place twice": (header_of(a=EIGHT, b=EIGHT), 8, "'b' lie in those of another tensor, from byte 0"),
    "a gap": (header_of(a=EIGHT, b=("F32", [2], [12, 20])), 20, "'b' follow a gap"),
    "a gap at the start": (header_of(a=("F32", [2], [8, 16])), 16, "'a' follow a gap"),
    "bytes of no tensor": (header_of(a=EIGHT), 24, "has 16 bytes that belong to no tensor"),
    "numbers that are missing": (header_of(a=("F32", [4], [0, 16])), 8, "cut short, the numbers of 'a' are missing"),
    "a negative place": (header_of(a=("F32", [2], [-8, 0])), 8, "'a' has no shape or place"),
    "a place in fractions": (header_of(a=("F32", [2], [0.0, 8.0])), 8, "'a' has no shape or place"),
    "a place in words": (header_of(a=("F32", [2], "08")), 8, "'a' has no shape or place"),
    "three ends": (header_of(a=("F32", [2], [0, 8, 8])), 8, "'a' has no shape or place"),
    "a negative size": (header_of(a=("F32", [-2, -1], [0, 8])), 8, "'a' has no shape or place"),
    "a size that is true": (header_of(a=("F32", [True], [0, 4])), 4, "'a' has no shape or place"),
    "a size of many digits": (header_of(a=EIGHT).replace("[2]", f"[{'9' * 5000}]"), 8, "cannot be read"),
    "large sizes": (header_of(a=("F32", [2**59] * 32, [0, 8])), 8, "the size of 'a' does not fit its shape"),
    "many axes": (header_of(a=("F32", [1] * 100_000, [0, 4])), 4, "'a' has no shape or place"),
    "an unknown number type": (header_of(a=("F8", [2], [0, 2])), 2, "'a' has number type 'F8', which is not supported"),
    "a number type that is a list": (header_of(a=([1], [2], [0, 8])), 8, "'a' has number type [1]"),
    "an entry that is a list": ('{"a":[1]}', 0, "cannot be read"),
    "an entry that is a number": ('{"a":1}', 0, "cannot be read"),
    "a name twice": ('{"a":' + json.dumps({}) + ',"a":1}', 0, "its header has 'a' twice"),
    "deep lists": ('{"a":' + "[" * 200_000 + "]" * 200_000 + "}", 0, "cannot be read"),
    "text that is no JSON": ("{a", 0, "cannot be read"),
    "bytes that are no text": ('{"a\\ud800":1}', 0, "cannot be read"),
    "a header of 11 MB": ("{" + " " * 11_000_000 + "}", 0, "its header has 11000002 bytes"),
    "many tensors": (header_of(**{f"t{n}": ("F32", [0], [0, 0]) for n in range(30_000)}), 0, "has 30000 tensors"),
    "a long name": (header_of(**{"x" * 100_000: EIGHT}), 8, "is no name of a tensor"),
    "no tensor": ("{}", 0, "no table of named tensors"),
}  # fmt: skip


def safetensors(path: Path, header: str, size: int) -> Path:
    content = header.encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(content)) + content + b"\0" * size)
    return path


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("headers")
    files = [safetensors(folder / kind, header, size) for kind, (header, size, _) in HEADERS.items()]
    return answers("src.weights.foreign:open_foreign", files)


@pytest.mark.compiles
@pytest.mark.parametrize("kind", HEADERS)
def test_a_hostile_header_is_one_line(kind: str, headers: dict[str, str]) -> None:
    text = headers[kind]
    assert HEADERS[kind][2] in text and f"{kind}: " in text and "\n" not in text and len(text) < 1000


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    for length in (100, 10**8, 2**63, 2**64 - 1):
        (tmp_path / "a").write_bytes(struct.pack("<Q", length) + b"{}" + b"\0" * 20)
        with pytest.raises(WeightsError, match="its header does not fit the file"):
            read_safetensors(tmp_path / "a")


def test_empty_tensors_and_any_order_are_fine(tmp_path: Path) -> None:
    header = header_of(b=("F32", [1], [4, 8]), a=("F32", [1], [0, 4]), c=("F32", [0, 3], [8, 8]), d=("U8", [0], [4, 4]))
    tensors = read_safetensors(safetensors(tmp_path / "a", header, 8))
    assert {name: tensor.read().shape for name, tensor in tensors.items()} == {
        **{"b": (1,), "a": (1,), "c": (0, 3), "d": (0,)}
    }


# --- networks that no file has ------------------------------------------------------------------------------------


def vit(**changes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (8, 3, 4, 4),
        "pos_embed": (1, 4, 8),
        "blocks.0.mlp.fc1.weight": (32, 8),
    }
    return shapes | {name.replace("_0_", ".0."): shape for name, shape in changes.items()}


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (
            vit() | {"blocks.999999999.norm1.weight": (8,)},
            "numbers encoder.blocks.#. up to 999999999, but has",
        ),
        (vit() | {f"blocks.{'9' * 5000}.norm1.weight": (8,)}, "is no name of a tensor"),
        (vit() | {"layers.999999999.blocks.0.norm1.weight": (8,)}, "numbers encoder.layers.#. up to 999999999"),
        (vit() | {"blocks.0.mlp.fc1.weight": (0, 0)}, "form no known network"),
        (vit() | {"patch_embed.proj.weight": (8, 3)}, "form no known network"),
        (vit() | {"patch_embed.proj.weight": (0, 0, 0, 0)}, ": "),
        (vit() | {"pos_embed": (4,)}, "form no known network"),
        (vit() | {"pos_embed": (1, 0, 8)}, ": "),
        (vit() | {f"blocks.{number}.norm1.weight": (8,) for number in range(1100)}, "depth: 1100 blocks are more than"),
    ],
)
def test_shapes_that_no_network_has_are_one_line(
    shapes: dict[str, tuple[int, ...]], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.pth"
    write_torch(path, {name: stored_tensor(np.zeros(shape, np.float32)) for name, shape in shapes.items()})
    with pytest.raises(WeightsError) as caught:
        to_ours(open_foreign(path), "", Hints(num_heads=2))
    assert words in str(caught.value) and str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


#: a value in the arguments of a training script or the configuration of Hugging Face, words of the error
HINTS: dict[str, Any] = {
    "mask_ratio": "half",
    "block_size": [1],
    "input_size": 10**9,
}
CONFIGS: list[tuple[str, Any]] = [
    ("image_size", "big"), ("image_size", [1, 2, 3]), ("image_size", 10**12), ("image_size", -4),
    ("num_attention_heads", 10**9), ("layer_norm_eps", "small"), ("layer_norm_eps", float("nan")),
    ("mask_ratio", [0.5]), ("window_size", 1.5), ("pretrained_window_sizes", 7), ("pretrained_window_sizes", ["a"]),
    ("decoder_num_attention_heads", {}), ("pretrained_cfg", 5), ("pretrained_cfg", {"mean": 3}),
    ("pretrained_cfg", {"input_size": [3, 1]}), ("pretrained_cfg", {"crop_pct": "x"}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), CONFIGS)
def test_a_configuration_with_another_type_is_one_line(key: str, value: Any, tmp_path: Path) -> None:
    write_torch(tmp_path / "a.pth", {"x": stored_tensor(np.zeros(1, np.float32))})
    (tmp_path / "config.json").write_text(json.dumps({key: value}))
    with pytest.raises(WeightsError) as caught:
        open_foreign(tmp_path / "a.pth")
    inner = next(iter(value)) if key == "pretrained_cfg" and isinstance(value, dict) else key
    assert f"config.json: {inner} is " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "5", "x", '"' + "a" * 11_000_000 + '"', "9" * 5000, "\0"])
def test_a_configuration_that_is_none_is_one_line(text: str, tmp_path: Path) -> None:
    write_torch(tmp_path / "a.pth", {"x": stored_tensor(np.zeros(1, np.float32))})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=r"config\.json: not a configuration of Hugging Face or timm$"):
        open_foreign(tmp_path / "a.pth")


@pytest.mark.parametrize("key", HINTS)
def test_arguments_with_another_type_are_one_line(key: str, tmp_path: Path) -> None:
    value = HINTS[key]
    content = {str: word, int: whole}.get(type(value), lambda _: b"]")(value)
    table = b"}" + word("x") + FOUR + b"s"
    pickled = b"\x80\x02}(" + word("model") + table + word("args") + b"}" + word(key) + content + b"su."
    with pytest.raises(WeightsError, match=rf"a\.pth: its configuration: {key} is "):
        open_foreign(archive(tmp_path / "a.pth", pickled))


def test_arguments_that_take_for_ever_are_one_line(tmp_path: Path) -> None:
    """The text of a value of 2**60 parts is never made."""
    table = b"}" + word("x") + FOUR + b"s"
    start = b"\x80\x02}(" + word("model") + table + word("args") + b"}"
    for key in ("model", "mim_loss"):  # other words mean nothing
        open_foreign(archive(tmp_path / "a.pth", start + word(key) + doubled(60) + b"su."))
    with pytest.raises(WeightsError, match="mask_ratio is a tuple, not a number"):
        open_foreign(archive(tmp_path / "a.pth", start + word("mask_ratio") + doubled(60) + b"su."))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (["patch_embed.proj.weight", "datetime64", [8, 3, 4, 4]], "had 'datetime64' numbers, which cannot be written"),
        (["patch_embed.proj.weight", "float32", [5]], "its arrays do not fit its names"),
        (["patch_embed.proj.bias", "float32", [8]], "lacks patch_embed.proj.bias"),
    ],
)
def test_a_way_back_that_does_not_fit_is_one_line(entry: list[Any], words: str) -> None:
    weights = {"encoder.patch_embed.proj.weight": np.zeros((8, 3, 4, 4), np.float32)}
    with pytest.raises(WeightsError) as caught:
        to_theirs(weights, {}, {"key": "", "prefix": "", "entries": [entry]}, "")
    assert words in str(caught.value)


def test_an_array_that_has_no_thirds_is_one_line() -> None:
    weights = {f"encoder.blocks.0.attn.qkv.{kind}": np.zeros(7, np.float32) for kind in ("weight", "bias")}
    with pytest.raises(WeightsError, match="its arrays do not fit its names"):
        to_theirs(weights, {}, None, "hf")
