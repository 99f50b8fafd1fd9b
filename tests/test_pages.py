"""The pages: commands that can be run or parsed, links that lead somewhere, a Chinese README in step.

Quick Start runs in test_readme.py, docs/images.md in test_own_images.py.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from scipy.io import savemat

from src.config import DataConfig
from src.config.files import load_recipe
from src.data.loader import Faults, Loader
from src.data.opening import open_source
from src.tasks.images import left_out
from tests.helpers import ROOT
from tests.markdown import (
    PAGES,
    anchors,
    code_spans,
    fenced,
    folder_of,
    links,
    prose,
    read,
    tables,
    without_comment,
)

#: pages whose commands are shell scripts, which tests run as a whole
RUN_WHOLE = {"docs/images.md", "docs/imagenet.md", "config/ringmo/README.md"}
#: programs that are not of this project, and of which the tests check nothing
FOREIGN = {"git", "export", "pre-commit", "source"}
LIMIT = 9216  # bytes of the README
#: what the placeholders of a launcher's command stand for
PLACES = {"CONFIG_PATH": "config/demo/vit_finetune.yaml", "CHECKPOINT_PATH": "README.md", "DEVICE_ID": "0"}
#: in a folder's README, but a file of another project
OF_OTHERS = {"swin_tiny_patch4_window7_224.yaml"}


# --- commands -----------------------------------------------------------------------------------------------------


class ParsedError(Exception):
    """Stops a program after its command line was parsed."""

    def __init__(self, parser: argparse.ArgumentParser, values: argparse.Namespace):
        super().__init__("parsed")
        self.parser, self.values = parser, values


def module_of(script: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script of the project as a module, not run; a script imports its neighbours by their names."""
    assert (ROOT / script).exists(), f"{script}: no such file"
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def parse(script: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> ParsedError:
    """Parser and values of `python SCRIPT WORDS`, by the script's own `main`."""
    main = module_of(script, monkeypatch).main
    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            real = getattr(argparse.ArgumentParser, name)

            def stop(self: argparse.ArgumentParser, *_: Any, real: Callable[..., Any] = real) -> None:
                raise ParsedError(self, real(self, words))

            patch.setattr(argparse.ArgumentParser, name, stop)
        with pytest.raises(ParsedError) as stopped:
            main()
    return stopped.value


def check_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Options and recipe of a Python command, without running it."""
    if words[:2] == ["-m", "src.config"]:
        load_recipe(ROOT / words[2], words[3:])
        return
    values = parse(words[0], words[1:], monkeypatch).values
    config = getattr(values, "config", "")
    if config:
        load_recipe(ROOT / config, values.overrides)
    if words[0] == "scripts/experiment.py":
        assert (ROOT / values.file).exists(), values.file


def check_launcher(script: str, arguments: list[str], variables: dict[str, str]) -> None:
    """A launcher accepts its arguments: it goes on to look for the interpreter, which is not there."""
    environment = {**os.environ, **variables, "PYTHON": "no/such/python", "DEVICE_TARGET": "CPU"}
    words = [PLACES.get(word, word) for word in arguments]
    done = subprocess.run(["bash", script, *words], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr[:24]) == (2, "error: PYTHON: there is "), f"{script} {words}: {done.stderr}"


def check_shell(words: list[str], variables: dict[str, str]) -> None:
    script, *arguments = words
    assert (ROOT / script).exists(), f"{script}: no such file"
    done = subprocess.run(["bash", "-n", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if re.search(r"run_(distribute|standalone|eval)", script):
        check_launcher(script, arguments, variables)


def check_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(without_comment(line))
    variables = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, variables[name] = words.pop(0).partition("=")
    if not words or words[0] in FOREIGN:
        return
    program, *rest = words
    if program == "python":
        check_python(rest, monkeypatch)
    elif program == "bash":
        check_shell(rest, variables)
    else:
        assert [program, *rest[:1]] == ["pip", "install"], f"no check for: {line}"
        for file in rest[2:] if rest[1] == "-r" else []:
            assert (ROOT / file).exists(), file


def is_usage(command: str) -> bool:
    """Whether a code span shows the form of a command, with placeholders, and is no command."""
    return bool(re.search(r"\[|\.\.\.|\b(FILE|CKPT|IN|OUT|DIR|CARD|IMAGE_OR_FOLDER)\b", command))


@pytest.mark.parametrize("page", [page for page in PAGES if page not in RUN_WHOLE])
def test_the_commands_of_a_page_are_accepted(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [line for block in fenced(page, "bash") for line in block.splitlines() if line]
    spans = [span for span in code_spans(prose(page)) if re.match(r"(python|bash) \S*\w\.(py|sh)|python -m", span)]
    for line in shown + [span for span in spans if not is_usage(span)]:
        check_command(line, monkeypatch)


@pytest.mark.parametrize("page", PAGES)
def test_the_options_in_usages_exist(page: str) -> None:
    for span in code_spans(prose(page)):
        found = re.match(r"(?:python )?(\S+\.py) (.*)", span)
        if not found or not is_usage(span) or not (ROOT / found[1]).exists():
            continue
        known = options_of(found[1])
        for option in re.findall(r"--[a-z][\w-]*", found[2]):
            assert option in known, f"{page}: {span}: {option}"


def options_of(script: str) -> str:
    """The source of a script and of what adds options to several."""
    return (ROOT / script).read_text("utf-8") + (ROOT / "src/tasks/command.py").read_text("utf-8")


def resolved(text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints, run in this process."""
    program, script, *rest = shlex.split(text)
    assert program == "python"
    if [script, *rest[:1]] == ["-m", "src.config"]:
        main, rest = importlib.import_module("src.config.files").main, rest[1:]
    else:
        main = module_of(script, monkeypatch).main
    monkeypatch.setattr(sys, "argv", [script, *rest])
    main()
    printed = capsys.readouterr()
    return printed.out + printed.err


SESSIONS = [
    (page, *block.strip().split("\n", 1)) for page in PAGES for block in fenced(page, "text") if block.startswith("$ ")
]


@pytest.mark.parametrize(("page", "command", "output"), SESSIONS, ids=[case[1][2:80] for case in SESSIONS])
def test_what_a_page_shows_of_a_command_is_what_it_prints(
    page: str,
    command: str,
    output: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a folder with the demo's data and a run of the demo, as after the Quick Start."""
    (tmp_path / "config").symlink_to(ROOT / "config")
    for folder in ("data/demo/train", "data/demo/val", "runs/vit_fastmim_pretrain"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "runs/vit_fastmim_pretrain/metrics.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert resolved(command.removeprefix("$ "), monkeypatch, capsys) == f"{output}\n", page


# --- shell scripts, run ---------------------------------------------------------------------------------------------


def run_shell(text: str, folder: Path) -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text.replace("python - ", f"{sys.executable} - ")],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def archive(path: Path, folder: Path) -> None:
    """A tar file of a folder's contents."""
    subprocess.run(["tar", "-cf", path, "-C", folder, "."], check=True)


#: class of each validation image of a very small ImageNet
LABELS = ("n02", "n01", "n02", "n03")


def small_imagenet(folder: Path) -> None:
    """Archives named and laid out like those of ImageNet-1K, with files that hold their own names."""
    train, val, kit = (folder / "parts" / name for name in ("train", "val", "ILSVRC2012_devkit_t12/data"))
    for number in (1, 2, 3):
        inside = folder / f"n0{number}"
        for path in (inside, train, val, kit):
            path.mkdir(parents=True, exist_ok=True)
        (inside / f"n0{number}_1.JPEG").write_text(f"n0{number}")
        archive(train / f"n0{number}.tar", inside)
    for number, label in enumerate(LABELS, 1):
        (val / f"ILSVRC2012_val_{number:08d}.JPEG").write_text(label)
    archive(folder / "ILSVRC2012_img_train.tar", train)
    archive(folder / "ILSVRC2012_img_val.tar", val)
    # the kit's numbers are not in the order of the names
    numbers = {"n03": 1, "n01": 2, "n02": 3}
    fields = [(name, "O") for name in ("ILSVRC2012_ID", "WNID", "num_children")]
    rows = np.array([(number, name, 0) for name, number in numbers.items()], fields)
    savemat(kit / "meta.mat", {"synsets": rows})
    truth = "".join(f"{numbers[label]}\n" for label in LABELS)
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
    subprocess.run(["tar", "-czf", folder / "ILSVRC2012_devkit_t12.tar.gz", "-C", kit.parents[1], kit.parent.name])
    (folder / "imagenet_2012_validation_synset_labels.txt").write_text("".join(f"{label}\n" for label in LABELS))


@pytest.mark.parametrize("labels", ["the kit", "a list"])
def test_imagenet_is_sorted_into_folders(labels: str, tmp_path: Path) -> None:
    small_imagenet(tmp_path)
    train, val, by_kit, by_list, check, _ = fenced("docs/imagenet.md", "bash")
    run_shell(train + val + (by_kit if labels == "the kit" else by_list), tmp_path)
    for split, count in (("train", 3), ("val", len(LABELS))):
        files = sorted(path for path in (tmp_path / "data/imagenet" / split).rglob("*") if path.is_file())
        assert len(files) == count
        for path in files:
            assert path.read_text() == path.parent.name
    *counts, _ = check.splitlines()
    for command in counts:
        run_shell(command, tmp_path)


def test_imagenet_is_used_as_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_imagenet(tmp_path)
    train, val, _, _, check, records = fenced("docs/imagenet.md", "bash")
    run_shell(train + val, tmp_path)
    assignment, *commands = records.splitlines()
    variable, _, truth = assignment.partition("=")
    for place in ("data/imagenet/val", truth):
        source = open_source(tmp_path / place, labels="needed")
        assert [source.read(index).decode() for index in range(len(source))] == list(LABELS)
        assert [source.classes[label] for label in source.labels] == list(LABELS)
    for command in [check.splitlines()[-1], *commands]:
        check_command(command.replace(f"${variable}", truth), monkeypatch)


def test_resisc45_is_divided(tmp_path: Path) -> None:
    for name in ("airplane", "bridge"):
        folder = tmp_path / "NWPU-RESISC45" / name
        folder.mkdir(parents=True)
        for number in range(1, 143):
            (folder / f"{name}_{number:03d}.jpg").touch()
    (line,) = fenced("config/ringmo/README.md", "bash")
    _, script, *words = shlex.split(line)
    subprocess.run([sys.executable, ROOT / script, *words], cwd=tmp_path, check=True)
    for split, count in (("train", 140), ("val", 2)):
        source = open_source(tmp_path / f"data/resisc45/{split}.csv")
        assert source.classes == ["airplane", "bridge"] and np.bincount(source.labels).tolist() == [count] * 2


# --- lines of docs/data.md ------------------------------------------------------------------------------------------


def animals(folder: Path) -> None:
    """The images of the page's examples: 30 good ones in each of 3 classes, 3 broken ones, and what is left out."""
    good = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))[1].tobytes()
    for name in ("cat", "dog", "owl"):
        (folder / name).mkdir(parents=True)
        for number in range(30):
            (folder / name / f"{number:03d}.jpg").write_bytes(good)
    (folder / "cat/002.jpg").write_bytes(good[: len(good) // 2])
    (folder / "cat/empty.jpg").touch()
    (folder / "dog/text.png").write_text("no image")
    (folder / "dog/link.jpg").symlink_to("nowhere")
    (folder / "owl/.ipynb_checkpoints").mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / "owl" / name).touch()


def test_the_lines_about_images_are_those_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    animals(tmp_path / "animals")
    monkeypatch.chdir(tmp_path)
    shown = [block.strip() for block in fenced("docs/data.md", "text")]
    source = open_source(Path("animals"))
    assert source.summary() in shown
    config = DataConfig(workers=0)
    training = Loader(source, config, (16, 16), 3, 92, ("image",))
    list(training.epoch(0))
    assert any(json.dumps(fault) in shown for fault in training.take_faults())
    evaluation = replace(training, training=False, faults=Faults())
    list(evaluation.epoch(0))
    assert left_out(evaluation.take_faults(), source) in shown


def test_the_list_of_the_page_is_read(tmp_path: Path) -> None:
    (text,) = [block for block in fenced("docs/data.md", "text") if "\t" in block]
    (tmp_path / "train.txt").write_text(text)
    (tmp_path / "cat").mkdir()
    names = ["cat/1.jpg", "my dog 1.jpg", "no extension"]
    for name in names:
        (tmp_path / name).touch()
    source = open_source(tmp_path / "train.txt")
    assert [source.name(index) for index in range(len(source))] == [str(tmp_path / name) for name in names]
    assert [source.classes[label] for label in source.labels] == ["cat", "dog", "dog"]


# --- names and links ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])  # which names removed files
def test_named_files_exist(page: str) -> None:
    text = read(page)
    named = re.findall(
        r"`?(?<![\w/.])((?:scripts|benchmarks|config|src|hub|tests|docs)/[\w/.]+\.(?:py|sh|yaml|md))", text
    )
    missing = [name for name in named if not (ROOT / name).exists() and not (ROOT / "src" / name).exists()]
    assert [name for name in missing if not name.endswith("/x.py")] == []
    if page.startswith("config/"):
        recipes = {span for span in code_spans(prose(page)) if re.fullmatch(r"\w+\.yaml", span)} - OF_OTHERS
        assert [name for name in recipes if not (folder_of(page) / name).exists()] == []


@pytest.mark.parametrize("page", [*PAGES, *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("hub/*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    for target in links(prose(page)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (folder_of(page) / name).resolve() if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(path.relative_to(ROOT).as_posix()), f"{page}: {target}"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {target.partition("#")[0] for target in links(read("README.md"))}
    assert {page for page in PAGES if page not in linked} <= {"README.md"}


# --- the README and its translation -----------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= LIMIT


def comments_removed(block: str) -> list[str]:
    return [without_comment(line).rstrip() for line in block.splitlines()]


def test_the_translation_has_the_same_blocks() -> None:
    english, chinese = ([comments_removed(b) for b in fenced(page)] for page in ("README.md", "README_CN.md"))
    assert chinese == english


def test_the_translation_has_the_same_tables() -> None:
    english, chinese = tables("README.md"), tables("README_CN.md")
    assert [len(rows) for rows in chinese] == [len(rows) for rows in english]
    for left, right in zip(chain(*english), chain(*chinese), strict=True):
        for pattern in (r"\d+(?:\.\d+)?", r"`([^`]+)`"):
            assert re.findall(pattern, right) == re.findall(pattern, left), right
        assert right.count("|") == left.count("|"), right


def test_the_translation_has_the_same_headings_links_and_names() -> None:
    english, chinese = prose("README.md"), prose("README_CN.md")
    levels = [re.findall(r"^(#+) ", text, re.M) for text in (english, chinese)]
    assert levels[1] == levels[0]
    left, right = (
        [target for target in links(text) if not target.startswith(("#", "README"))] for text in (english, chinese)
    )
    assert right == left
    assert sorted(code_spans(chinese)) == sorted(code_spans(english))
    versions = [sorted(re.findall(r"\d+(?:\.\d+)+", text)) for text in (english, chinese)]
    assert versions[1] == versions[0]
