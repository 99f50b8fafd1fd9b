"""Our CPU kernels are found, compiled, chosen by a recipe, or replaced by MindSpore's; files never contain them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from src import load_model, native
from src.config import PrecisionConfig, TrainConfig
from src.config.files import ConfigError, dump_recipe, load_recipe, override, parse_recipe
from src.engine import checkpoint, device, loop, parallel
from src.engine.log import RunError
from src.engine.step import TrainStep
from src.operations import forms, kernels
from src.operations.rows import Normalize, NormalizeCPU
from src.tasks.evaluate import evaluate_checkpoint, open_checkpoint, open_classifier
from src.tasks.export import export_checkpoint
from src.tasks.train import train
from tests.helpers import ROOT, Run, assert_one_line_error

BFLOAT16 = {"avx512_bf16", "amx_bf16"}


# --- recipes --------------------------------------------------------------------------------------------------------


def recipe_with(folder: Path, keys: str, overrides: tuple[str, ...] = (), base: str = "") -> Any:
    """A recipe whose section `train` has some keys, and whose base has others."""
    (folder / "base.yaml").write_text(f"train: {{{base}}}\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(f"base: base.yaml\ntrain: {{{keys}}}\n", encoding="utf-8")
    return load_recipe(folder / "recipe.yaml", overrides)


def everywhere(precision: Any) -> PrecisionConfig:
    return PrecisionConfig(CPU=precision, GPU=precision, Ascend=precision)


@pytest.mark.parametrize(
    ("base", "keys", "overrides", "expected"),
    [
        ("", "", (), everywhere("float32")),
        ("", "precision: bfloat16", (), everywhere("bfloat16")),
        ("", "precision: {CPU: bfloat16}", (), PrecisionConfig(CPU="bfloat16")),
        ("", "", ("train.precision=bfloat16",), everywhere("bfloat16")),
        ("", "", ("train.precision={CPU: bfloat16}",), PrecisionConfig(CPU="bfloat16")),
        ("", "", ("train.precision.CPU=bfloat16",), PrecisionConfig(CPU="bfloat16")),
        ("", "precision: {GPU: bfloat16}", ("train.precision=float32",), everywhere("float32")),
        (
            "",
            "",
            ("train.precision=bfloat16", "train.precision.CPU=float32"),
            PrecisionConfig(GPU="bfloat16", Ascend="bfloat16"),
        ),
        ("precision: bfloat16", "precision: {CPU: float32}", (), PrecisionConfig(GPU="bfloat16", Ascend="bfloat16")),
        (
            "precision: {CPU: bfloat16}",
            "precision: {GPU: bfloat16}",
            (),
            PrecisionConfig(CPU="bfloat16", GPU="bfloat16"),
        ),
        ("precision: {CPU: bfloat16}", "precision: float32", (), everywhere("float32")),
    ],
)
def test_precision_is_one_word_or_a_mapping(
    tmp_path: Path, base: str, keys: str, overrides: tuple[str, ...], expected: PrecisionConfig
) -> None:
    recipe = recipe_with(tmp_path, keys, overrides, base)
    assert recipe.train.precision == expected
    assert parse_recipe(dump_recipe(recipe), "text") == recipe
    changed = override(recipe, ["train.precision.Ascend=bfloat16"], "text")
    assert changed.train.precision.on("Ascend") == "bfloat16"
    assert changed.train.precision.on("CPU") == expected.CPU


@pytest.mark.parametrize(
    ("keys", "overrides", "words"),
    [
        ("precision: float16", (), ("recipe.yaml: train.precision: 'float16' is not one of float32, bfloat16",)),
        ("precision: {cpu: float32}", (), ("recipe.yaml: train.precision.cpu: unknown key", "valid: CPU, GPU, Ascend")),
        ("precision: {CPU: half}", (), ("recipe.yaml: train.precision.CPU: 'half' is not one of float32, bfloat16",)),
        ("", ("train.precision=half",), ("command line: train.precision: 'half' is not one of",)),
        ("", ("train.precision.CPU=half",), ("command line: train.precision.CPU: 'half' is not one of",)),
        ("kernels: own", (), ("recipe.yaml: train.kernels: 'own' is not one of auto, builtin",)),
        ("threads: -1", (), ("recipe.yaml: train.threads: -1 is negative",)),
        ("threads: 1.5", (), ("recipe.yaml: train.threads: must be a whole number",)),
    ],
)
def test_a_wrong_setting_is_one_line(
    tmp_path: Path, keys: str, overrides: tuple[str, ...], words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as error:
        recipe_with(tmp_path, keys, overrides)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_a_preset_named_on_the_command_line_stays_when_a_key_of_it_follows() -> None:
    recipe = load_recipe(ROOT / "config/demo/vit_fastmim_pretrain.yaml", ["encoder=vit_base", "encoder.depth=3"])
    assert (recipe.encoder.name, recipe.encoder.stage_depths) == ("vit_base", (3,))


def test_a_recipe_of_an_earlier_version_has_the_defaults(tmp_path: Path) -> None:
    lines = dump_recipe(recipe_with(tmp_path, "")).splitlines()
    old = "\n".join(line for line in lines if line.split(":")[0].strip() not in ("kernels", "threads", "precision"))
    train_part = parse_recipe(old, "text").train
    assert (train_part.kernels, train_part.threads, train_part.precision) == ("auto", 0, everywhere("float32"))


# --- devices --------------------------------------------------------------------------------------------------------


@pytest.fixture
def restored() -> Iterator[None]:
    """Afterwards the process has the default kernels again."""
    yield
    kernels.set_up()


@pytest.fixture
def own(restored: None) -> Path:
    """The file of our kernels, without which a test is skipped."""
    kernels.set_up()
    if kernels.reason():
        pytest.skip(f"no kernels here: {kernels.reason()}")
    return kernels.library()


@pytest.mark.parametrize("name", ["GPU", "Ascend"])
def test_other_devices_refuse_bfloat16(name: str) -> None:
    device.check_precision(name, "float32")
    with pytest.raises(device.DeviceError, match=f"^train.precision: bfloat16 .*{name}.*write float32$"):
        device.check_precision(name, "bfloat16")


@pytest.mark.usefixtures("restored")
def test_a_cpu_without_our_kernels_refuses_bfloat16() -> None:
    kernels.set_up("builtin", 0, "bfloat16")
    with pytest.raises(device.DeviceError, match=r"^train.precision: .*train.kernels is builtin.*write float32$"):
        device.check_precision("CPU", "bfloat16")
    device.check_precision("CPU", "float32")


@pytest.mark.usefixtures("own")
def test_a_processor_without_bfloat16_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernels.processor()
    monkeypatch.setattr(kernels, "processor", lambda: " ".join(word for word in real.split() if word not in BFLOAT16))
    kernels.set_up("auto", 0, "bfloat16")
    with pytest.raises(device.DeviceError, match=r"^train.precision: .*avx512_bf16.*write float32$"):
        device.check_precision("CPU", "bfloat16")


@pytest.mark.usefixtures("own")
def test_a_processor_with_bfloat16_uses_it() -> None:
    if not BFLOAT16 & set(kernels.processor().split()):
        pytest.skip("this processor has no bfloat16")
    line = kernels.set_up("auto", 1, "bfloat16")
    device.check_precision("CPU", "bfloat16")
    assert "our own" in line and "1 thread," in line and line.endswith("products in bfloat16")


@pytest.mark.parametrize(
    ("threads", "cores", "ranks", "share"), [(0, 8, 1, 8), (0, 8, 4, 2), (6, 8, 4, 1), (1, 8, 2, 1), (5, 2, 1, 5)]
)
def test_the_ranks_of_a_machine_share_its_threads(
    monkeypatch: pytest.MonkeyPatch, threads: int, cores: int, ranks: int, share: int
) -> None:
    monkeypatch.setattr(parallel, "local_size", lambda: ranks)
    monkeypatch.setattr(native, "cores", lambda: cores)
    assert device.share_of_cpu(threads) == share


# --- compiling ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(restored: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    yield tmp_path / "cache" / "mim_mindspore"
    monkeypatch.undo()


def script(path: Path, lines: str) -> str:
    """A program with the answer to --version of a compiler."""
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo made up && exit\n{lines}\n', encoding="utf-8")
    path.chmod(0o755)
    return str(path)


#: in a made-up compiler: sets `last` to the file to write
LAST = "for last; do :; done"


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        ("/bin/false", "/bin/false fails: exit code 1"),
        ("no-such-compiler", "no-such-compiler does not run"),
        ("'", "is not a command"),
        ("exit 0", "fails: exit code 0"),
        ("echo a.cpp:1: error: no such header >&2; exit 1", "error: no such header"),
        (f'{LAST}; echo rubbish > "$last"', "cannot be loaded"),
    ],
)
def test_a_broken_compiler_leaves_mindspores_operations(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, words: str
) -> None:
    program = script(tmp_path / "cc", compiler) if " " in compiler else compiler
    monkeypatch.setenv("CXX", program)
    check_replaced(kernels.set_up(), words)
    assert "rubbish" in compiler or not list(cache.glob("*.*o"))


def check_replaced(line: str, words: str) -> None:
    """MindSpore's operations are in use, and the line says why."""
    assert line.startswith("CPU kernels: MindSpore's, since ") and words in line and "\n" not in line, line
    assert type(forms.build(Normalize, 1e-6)) is NormalizeCPU


def test_a_compiler_that_hangs_is_ended_with_its_processes(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "cc", f"sleep 1000 & echo $! > {tmp_path}/child; wait"))
    monkeypatch.setattr(native, "COMPILE_SECONDS", 1)
    check_replaced(kernels.set_up(), "does not end within 1 seconds")
    state = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    assert not state.exists() or state.read_text().split()[2] in "ZX"  # no parent may wait for it in a container
    assert sorted(path.name for path in cache.iterdir()) == [".lock"]


def test_without_a_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    check_replaced(kernels.set_up(), "no C++ compiler")
    assert not cache.exists()


@pytest.mark.parametrize("folder", ["/proc/none", "{file}", "{file}/below"])
def test_a_cache_folder_that_cannot_be_written(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", folder.format(file=tmp_path / "file"))
    check_replaced(kernels.set_up(), "cannot be used")


def test_a_cache_folder_with_a_colon(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a:b"))
    check_replaced(kernels.set_up(), "a colon")


def test_a_user_without_a_home_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # by its specification a relative path is ignored
    monkeypatch.setattr(Path, "home", home)
    check_replaced(kernels.set_up(), "set XDG_CACHE_HOME")


@pytest.mark.compiles
def test_a_damaged_file_in_the_cache_is_made_again(
    own: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "cc", f'{LAST}; cp {own} "$last"'))
    assert "our own" in kernels.set_up()
    (made,) = cache.glob("*.so")
    content = made.read_bytes()
    for damaged in (b"", content[:5000], content[:-1], b"x" + content[1:]):
        made.unlink()  # this process has loaded the file itself
        made.write_bytes(damaged)
        assert "our own" in kernels.set_up()
        assert made.read_bytes() == content
    assert sorted(path.name for path in cache.iterdir()) == [".lock", made.name]


@pytest.mark.compiles
@pytest.mark.usefixtures("own")
def test_two_processes_compile_once(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "compiled"
    monkeypatch.setenv("CXX", script(tmp_path / "cc", f'echo compiled >> {log}; exec g++ "$@"'))
    code = "from src.operations import kernels; print(kernels.set_up())"
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    lines = [process.communicate(timeout=300)[0] for process in both]
    assert lines[0] == lines[1] and "our own" in lines[0], lines
    assert log.read_text(encoding="utf-8").splitlines() == ["compiled"]
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".so"]


@pytest.mark.compiles
@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", "import src, src.operations.kernels, src.tasks.train, src.tasks.export"),
        ("train.py", "--config", "config/demo/vit_fastmim_pretrain.yaml", "--plan", "--images", "1000"),
    ],
)
def test_nothing_is_compiled_before_a_network_is_built(cache: Path, run_entry: Run, arguments: tuple[str, ...]) -> None:
    done = run_entry(*arguments)
    assert done.returncode == 0, done.stderr
    assert not cache.exists()


# --- runs -----------------------------------------------------------------------------------------------------------


def tiny_recipe(one_fine_tuned: Path, output: Path, *overrides: str) -> Any:
    """A run of one epoch."""
    config = one_fine_tuned.parent / "config.yaml"
    return load_recipe(config, ["train.epochs=1", f"output={output}", *overrides])


def test_a_run_without_a_compiler_trains(
    cache: Path, one_fine_tuned: Path, run_entry: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    config = one_fine_tuned.parent / "config.yaml"
    keys = ["train.epochs=1", f"output={tmp_path / 'run'}"]
    done = run_entry("train.py", "--config", config, *keys)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "run" / "train.log").read_text(encoding="utf-8").splitlines()
    assert "MindSpore's, since /bin/false fails" in log[1], log
    done = run_entry("train.py", "--config", config, *keys, "train.precision=bfloat16", "--resume", "auto")
    assert_one_line_error(done, "train.precision: bfloat16 on CPU needs our own kernels", "write float32")


@pytest.mark.usefixtures("own")
def test_a_run_continues_with_other_kernels(one_fine_tuned: Path, tmp_path: Path) -> None:
    train(tiny_recipe(one_fine_tuned, tmp_path / "run", "train.threads=1"))
    changed = ("train.epochs=2", "train.kernels=builtin")
    train(tiny_recipe(one_fine_tuned, tmp_path / "run", *changed), resume="auto")
    log = (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
    said = [line for line in log.splitlines() if "CPU kernels" in line]
    assert len(said) == 2 and "our own" in said[0] and "1 thread," in said[0] and "builtin" in said[1], said
    assert "changed since the checkpoint: train.kernels was auto, is builtin" in log
    assert "changed since the checkpoint: train.threads was 1, is 0" in log


class Still(TrainStep):
    """A step whose update does nothing."""

    def construct(self, values: Tensor, *batch: Tensor) -> Any:
        outputs, grads = self.value_and_grad(*batch)
        return (*outputs, self.norm(grads))


def test_an_update_that_changes_nothing_ends_the_run(
    one_fine_tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "TrainStep", Still)
    with pytest.raises(RunError, match=r"changed no weight .* write train.kernels=builtin"):
        train(tiny_recipe(one_fine_tuned, tmp_path / "run", "train.warmup_epochs=0.5"))


# --- what a checkpoint gives, and files -----------------------------------------------------------------------------


@pytest.fixture
def of_another_machine(one_fine_tuned: Path, tmp_path: Path) -> Path:
    """A checkpoint whose run had other kernels, threads and precision than the defaults."""
    found = checkpoint.load(one_fine_tuned)
    keys = ["train.kernels=builtin", "train.threads=1", "train.precision=bfloat16"]
    recipe = override(parse_recipe(found.meta["recipe"], "text"), keys, "text")
    network = load_model(one_fine_tuned)
    meta = {**found.meta, "recipe": dump_recipe(recipe)}
    del meta["names"], meta["format"]
    checkpoint.save(tmp_path / "other.ckpt", checkpoint.weights_of(network), {}, meta)
    return tmp_path / "other.ckpt"


@pytest.mark.usefixtures("own", "graph_mode")
def test_evaluation_does_not_take_the_machine_from_a_checkpoint(of_another_machine: Path) -> None:
    default = TrainConfig()
    for open_it in (open_checkpoint, open_classifier):
        kept = open_it(str(of_another_machine), [])[0].train
        assert (kept.kernels, kept.threads, kept.precision) == (default.kernels, default.threads, default.precision)
        assert open_it(str(of_another_machine), ["train.kernels=builtin"])[0].train.kernels == "builtin"
    evaluate_checkpoint(str(of_another_machine), "", [])
    assert not kernels.reason()
    evaluate_checkpoint(str(of_another_machine), "", ["train.kernels=builtin"])
    assert kernels.reason()


@pytest.mark.usefixtures("own", "graph_mode")
def test_an_exported_file_has_no_kernels(one_fine_tuned: Path, tmp_path: Path) -> None:
    content = export_checkpoint(str(one_fine_tuned), "mindir", str(tmp_path / "a.mindir"), 0, []).path.read_bytes()
    assert b"Custom" not in content and b"kernels-" not in content and len(content) > 10_000
    assert kernels.available()
    example = Tensor(np.zeros((1, 3, 32, 32), np.float32))
    with pytest.raises(kernels.ExportError, match=r"kernels\.builtin"):
        ms.export(load_model(one_fine_tuned), example, file_name=str(tmp_path / "b"), file_format="MINDIR")
    assert not (tmp_path / "b.mindir").exists()
    with kernels.builtin():
        network = load_model(one_fine_tuned)
    ms.export(network, example, file_name=str(tmp_path / "c"), file_format="MINDIR")
    assert b"Custom" not in (tmp_path / "c.mindir").read_bytes()


@pytest.mark.usefixtures("own", "graph_mode")
def test_an_exported_file_has_no_bfloat16(one_fine_tuned: Path, tmp_path: Path) -> None:
    with pytest.raises((RunError, device.DeviceError), match=r"^train.precision: .*write float32$"):
        export_checkpoint(str(one_fine_tuned), "mindir", str(tmp_path / "a.mindir"), 0, ["train.precision=bfloat16"])


def test_a_published_project_has_the_source_of_the_kernels(tmp_path: Path) -> None:
    from hub.publish import copy_project, named_network

    copy_project(tmp_path, named_network("fastmim_vit_base"))
    assert (tmp_path / "src" / "operations" / "kernels.cpp").is_file()
    assert (tmp_path / "src" / "data" / "resample.cpp").is_file()
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".so", ".o", ".pyc")]
