"""Recipes that are hostile or merely odd: one line at once, in bounded memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from src.config import Recipe
from src.config.files import load_recipe, parse_recipe
from src.errors import UserError
from tests.helpers import ROOT, Run, assert_one_line_error

ALIASES = "\n".join(
    [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 12)],
)
MERGES = "\n".join(
    [f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 9)}]}}" for level in range(1, 12)],
)
LAYERS = "student_layers: {0}, teacher_layers: {0}"


def refusal(tmp_path: Path, content: str | bytes, *changes: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as caught:
        load_recipe(path, changes)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 2500
    return text.replace(str(path), "FILE")


#: text of a recipe, words of its error
TEXTS = {
    "a list in itself": ("train: &t [*t]\n", "FILE: line 1: *t refers to itself; write the value out"),
    "a mapping in itself": ("train: &t\n  x: *t\n", "line 2: *t refers to itself"),
    "a merge of itself": ("train: &t\n  <<: *t\n", "line 2: *t refers to itself"),
    "deep lists": ("a: " + "[" * 3000 + "]" * 3000, "is nested too deeply"),
    "deep mappings": ("a: " + "{a: " * 3000 + "}" * 3000, "is nested too deeply"),
    "deep by aliases": ("\n".join(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 30)).replace("*a0", "1"), "20 levels"),
    "lists of aliases": ("a0: &a0 [x]\n" + ALIASES, "more than 100000 characters, with its aliases written out"),
    "merges of aliases": ("a0: &a0 {x: 1}\n" + MERGES, "more than 100000 characters, with its aliases written out"),
    "long texts by aliases": (f"a: &a {'x' * 50_000}\nb: [*a, *a, *a]\n", "more than 100000 characters"),
    "digits": ("seed: " + "9" * 5000, "line 1: a number of 5000 digits; write at most 100"),
    "hexadecimal digits": ("seed: 0x" + "f" * 50_000, "a number of 50002 digits"),
    "base 60": ("seed: 1" + ":59" * 20_000, "a number of 60001 digits"),
    "digits of a fraction": ("train: {base_lr: 1." + "9" * 5000 + "}", "a number of 5002 digits"),
    "digits of a key": ("9" * 5000 + ": 1", "FILE: line 1"),
    "a long key": ("? " + "k" * 5000 + "\n: 1", "a key of 5000 characters"),
    "exponents": ("train: {base_lr: 1.0e+999999}", "FILE: train.base_lr: must be a number, not inf"),
    "a seed in exponents": ("seed: 5e9", "FILE: seed: must be a whole number, not '5e9'"),
    "a seed above 32 bits": ("seed: 5000000000", "FILE: seed: 5000000000 is larger than any number here"),
    "a long list": ("train: {milestones: [" + "1," * 40_000 + "]}", "FILE: train.milestones: has 40000 values"),
    "10 MB of comment": ("#" * 10_000_000, "it has more than 100000 bytes"),
    "10 MB of keys": ("\n".join(f"k{n}: {n}" for n in range(700_000)), "it has more than 100000 bytes"),
    "a long preset": ("encoder: " + "x" * 90_000, "FILE: encoder.name: unknown preset 'xxx"),
    "a call": ('a: !!python/object/apply:os.system ["true"]', "the tag 'python/object/apply:os.system' has no meaning"),
    "a name of Python": ("seed: !!python/name:os.system", "has no meaning in a recipe"),
    "a tag of YAML": ("seed: !!binary aaaa", "the tag 'binary' has no meaning in a recipe; write the value alone"),
    "a tag of its own": ("seed: !mine 1", "the tag '!mine' has no meaning in a recipe"),
    "a number by its tag only": ("seed: !!int foo", "FILE: has a value that is not what it looks like"),
    "a truth by its tag only": ("seed: !!bool maybe", "FILE: has a value that is not what it looks like"),
    "a time by its tag only": ("seed: !!timestamp x", "FILE: has a value that is not what it looks like"),
    "a date that is none": ("output: 2001-99-99", "FILE: has a value that is not what it looks like"),
    "a time that is none": ("seed: 2001-01-01T99:00:00Z", "FILE: has a value that is not what it looks like"),
    "a character that is none": ('output: "\\U00110000"', "FILE: has a value that is not what it looks like"),
    "a NUL character": ('output: "a\\0b"', "line 1: has the character '\\x00', which no name can have; remove it"),
    "a NUL byte": (b"seed: 1\0", "is not YAML"),
    "half a character": ('output: "\\ud800"', "line 1: has the character '\\ud800'"),
    "a NUL character in a base": ('base: "a\\0b"', "has the character '\\x00'"),
    "UTF-16": ("seed: 1".encode("utf-16"), "cannot read FILE (it is not UTF-8 text; save it as UTF-8)"),
    "Latin-1": ("output: é".encode("latin-1"), "it is not UTF-8 text"),
    "a list as a key": ("? [a]\n: 1", "line 1: a key is a word, not a list or mapping"),
    "a key twice, one merged": ("train: {<<: {epochs: 1}, epochs: 2, epochs: 3}", "epochs: appears in lines 1 and 1"),
    "zeros as a base": ("base: /dev/zero", "FILE: base: cannot read /dev/zero (it is a device, not a file)"),
    "a terminal as a base": ("base: /dev/tty", "/dev/tty"),
    "a folder as a base": ("base: /", "FILE: base: cannot read / (it is a folder, not a recipe)"),
    "a long base": ("base: " + "x" * 5000, "FILE: base: cannot read "),
    "a link in a circle": ("base: loop.yaml", "FILE: base: cannot read "),
    "a named pipe as a base": ("base: pipe.yaml", "it is a pipe"),
    "bases that double": ("base: d0.yaml", "the bases of this recipe have more than 100000 characters or 100 files"),
    "a base many times": ("base: [" + "empty.yaml, " * 2000 + "]", "more than 100000 characters or 100 files"),
    "an image for no memory": ("encoder: {image_size: 16000000}", "FILE: encoder.image_size: 16000000 is larger than"),
    "patches for no memory": (
        "encoder: {image_size: 16384, patch_size: 4}",
        "FILE: encoder.image_size: 16384x16384 has",
    ),
    "windows for no memory": (
        "encoder: {name: swin_tiny, image_size: 1600, window_size: 300, cap_window: false}\nmethod: classify",
        "FILE: encoder.window_size: 300 is too large for 600x600 patches; write at most ",
    ),
    "too many blocks": ("encoder: {depth: 200000}", "FILE: encoder.depth: 200000 blocks are more than any network has"),
    "too many decoder blocks": ("method: {decoder: {depth: 200000}}", "FILE: method.decoder.depth: 200000 blocks"),
    "too many encoder stages": (
        f"encoder: {{name: swin_tiny, depths: {[1] * 900}, num_heads: {[1] * 900}}}",
        "FILE: encoder.depths: has 900 encoder stages; write 1 to 10",
    ),
    "no encoder stage": (
        "encoder: {name: swin_tiny, depths: [], num_heads: []}",
        "encoder.depths: has 0 encoder stages",
    ),
    "too many stages": (f"stages: [{'{epochs: 1},' * 900}]\ntrain: {{epochs: 900}}", "FILE: stages: has 900 stages"),
    "a batch without a divisor": ("train: {effective_batch: 4294967295}", "FILE: train.effective_batch: 4294967295"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_recipe_that_no_machine_can_read_is_one_line(kind: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "empty.yaml").touch()
    for number in range(40):
        (tmp_path / f"d{number}.yaml").write_text(f"base: [d{number + 1}.yaml, d{number + 1}.yaml]")
    (tmp_path / "d40.yaml").touch()
    text, words = TEXTS[kind]
    assert words in refusal(tmp_path, text)


#: a change on the command line, words of its error
CHANGES = {
    "seed=&a [*a]": "command line: seed: line 1: *a refers to itself",
    "seed=" + "9" * 5000: "command line: seed: line 1: a number of 5000 digits",
    "seed=5000000000": "command line: seed: 5000000000 is larger than any number here; write at most 4294967295",
    "seed=5e9": "command line: seed: must be a whole number, not '5e9'",
    "seed=" + "[" * 5000: "command line: seed: line 1: is nested too deeply",
    "seed=!!int x": "command line: seed: has a value that is not what it looks like",
    "seed=2001-99-99": "command line: seed: has a value that is not what it looks like",
    "seed=!!python/name:os.system": "command line: seed: line 1: the tag",
    'output="\\0"': "command line: output: line 1: has the character",
    ".".join(["seed", *"a" * 5000]) + "=1": "is no key of a recipe",
    "x" * 90_000: "is not key=value",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda text: text[:20])
def test_a_change_that_no_machine_can_read_is_one_line(change: str, tmp_path: Path) -> None:
    assert CHANGES[change] in refusal(tmp_path, "", change)


def test_a_recipe_in_a_checkpoint_has_the_same_limits() -> None:
    with pytest.raises(UserError, match=r"^FILE: has more than 100000 characters"):
        parse_recipe("#" * 8_000_000, "FILE")
    for text, words in (TEXTS[kind] for kind in ("a list in itself", "lists of aliases", "digits", "too many blocks")):
        with pytest.raises(UserError) as caught:
            parse_recipe(text, "FILE")
        assert words in str(caught.value)


def test_anchors_merges_and_odd_numbers_stay_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "data: {mean: &m [0.5, 0.5, 0.5], std: *m}\n"
        "train: &t {<<: {epochs: 2, batch_size: 0x10}, epochs: 1_0}\n"
        "seed: 010\noutput: =\n"
    )
    recipe = load_recipe(path)
    assert recipe.data.mean == recipe.data.std == (0.5, 0.5, 0.5)
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.seed, recipe.output) == (10, 16, 8, "=")
    assert load_recipe(path, ["seed=4294967295"]).seed == 2**32 - 1


def test_a_merge_used_twice_is_no_key_twice(tmp_path: Path) -> None:
    """The outer merge unfolds the inner one before its own mapping is read."""
    path = tmp_path / "mine.yaml"
    path.write_text("method: {target: &t {<<: {cell: 4}, cell: 8}}\n<<: {seed: 3}\n")
    assert load_recipe(path).seed == 3 and load_recipe(path).method == Recipe().method


def test_an_open_pipe_is_read(tmp_path: Path) -> None:
    """As with `--config <(...)`."""
    reading, writing = os.pipe()
    os.write(writing, b"seed: 7\n")
    os.close(writing)
    try:
        assert load_recipe(f"/dev/fd/{reading}").seed == 7
    finally:
        os.close(reading)


def test_control_characters_are_printed_escaped(tmp_path: Path, run_entry: Run) -> None:
    path = tmp_path / "\x1b[31mred\n.yaml"
    path.write_text('train: {"\\e[2J": 1}\n')
    done = run_entry("-m", "src.config", path)
    assert_one_line_error(done, "\\x1b[31mred\\n.yaml: train.\\x1b[2J: unknown key of TrainConfig")
    path.write_text('output: "\\e[2J\\u202e"\n')
    done = run_entry("-m", "src.config", path)
    assert done.returncode == 0 and "\x1b" not in done.stdout and "\u202e" not in done.stdout


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [("{} > /dev/full; echo code $? >&2", 2, "error: stdout: "), ("({}; echo code $? >&2) | true", 141, "")],
)
def test_a_recipe_that_cannot_be_printed(line: str, code: int, words: str) -> None:
    command = line.format(f"{sys.executable} -m src.config config/demo/vit_fastmim_pretrain.yaml")
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert f"code {code}\n" in done.stderr and words in done.stderr and "Traceback" not in done.stderr
