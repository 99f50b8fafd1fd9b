"""The launch scripts as a user types them, with two real processes on the CPU."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.config.files import load_recipe
from src.data.loader import Loader
from src.data.opening import open_source
from src.engine import checkpoint
from tests.helpers import ROOT, MakeFolder, Run

ASCEND, GPU = "run_distribute_train_ascend.sh", "run_distribute_train_gpu.sh"

#: crops, augmentation, masks and dropped branches are the real ones: no number of ranks changes them
RECIPE = """
encoder: {{name: vit, image_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, drop_path: 0.3}}
method: {{name: fastmim, mask_block: 8, target: {{cell: 4}}, decoder: {{width: 32, depth: 1}}}}
data: {{root: {root}, workers: 1, auto_augment: rand-m9-mstd0.5-inc1, erasing: 0.25}}
train: {{epochs: 4, batch_size: 4, base_lr: 4e-3, lr_batch: 16, warmup_epochs: 1, log_every: 1, knn: 3}}
device: CPU
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launch")


@pytest.fixture(scope="module")
def recipe(folder: Path, image_folder_factory: MakeFolder) -> Path:
    root = image_folder_factory(folder / "data", train=19)  # 57 images: 7 updates of 8, one image is left over
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(root=root))
    return path


def command(script: str, *arguments: Any) -> list[str]:
    return ["bash", str(ROOT / "scripts" / script), *map(str, arguments)]


def environment(**changes: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("DEVICE_TARGET", "LOG_DIR", "MASTER_PORT", "NODE_NUM")}
    return {**clean, "PYTHON": sys.executable, **changes}


def launch(script: str, *arguments: Any, cwd: Path = ROOT, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher to its end, on the CPU unless `changes` says otherwise."""
    env = environment(**{"DEVICE_TARGET": "CPU", **changes})
    return subprocess.run(command(script, *arguments), cwd=cwd, env=env, capture_output=True, text=True, timeout=500)


def processes_with(text: str) -> list[int]:
    """Processes whose command line has `text`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            content = path.read_bytes()
        except OSError:  # gone in the meantime
            continue
        if text.encode() in content:
            found.append(int(path.parent.name))
    return found


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def port_of(text: str) -> int:
    return int(re.findall(r"port (\d+)", text)[0])


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def weights_without_key_bias(path: Path) -> dict[str, np.ndarray]:
    """Final weights, less the biases of the keys.

    The softmax over keys takes no notice of those: their gradient is zero but for rounding, which Adam divides by its
    own size.
    """
    weights = checkpoint.load(path / "last.ckpt").weights
    for name in [name for name in weights if name.endswith("qkv.bias")]:
        query, _, value = np.split(weights[name], 3)
        weights[name] = np.concatenate([query, value])
    return weights


# --- equality ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(compiled: None, folder: Path, recipe: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """2 ranks x batch 4."""
    done = launch(ASCEND, recipe, 2, f"output={folder / 'two'}")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "two", done


@pytest.fixture(scope="module")
def one_rank(compiled: None, folder: Path, recipe: Path) -> Path:
    """1 rank x batch 8, through the standalone launcher."""
    done = launch("run_standalone_train_gpu.sh", 0, recipe, "train.batch_size=8", f"output={folder / 'one'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 7/7" in done.stdout
    assert (folder / "one" / "log" / "worker_0.log").read_text() in done.stdout
    return folder / "one"


def test_ranks_equal_the_large_batch(two_ranks: Any, one_rank: Path) -> None:
    """28 updates with random masks and stochastic depth, rate and warm-up scaled from the global batch."""
    reference = events(one_rank, "train")
    weights = weights_without_key_bias(one_rank)
    start = load_recipe(one_rank / "config.yaml").train
    assert len(reference) == 28 and max(step["lr"] for step in reference) == start.base_lr * 8 / 16
    steps = events(two_ranks[0], "train")
    for key, tolerance in (("loss", 1e-6), ("baseline", 1e-7), ("grad_norm", 1e-5)):
        found, expected = ([step[key] for step in run] for run in (steps, reference))
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance, err_msg=key)
    found_weights = weights_without_key_bias(two_ranks[0])
    assert set(found_weights) == set(weights)
    for name, value in weights.items():
        np.testing.assert_allclose(found_weights[name], value, rtol=0, atol=1e-5, err_msg=name)
    np.testing.assert_allclose([step["lr"] for step in steps], [step["lr"] for step in reference], rtol=1e-12)


def test_ranks_evaluate_every_image_once(two_ranks: Any, one_rank: Path) -> None:
    """Batches of 4 of 9 images on two ranks and on one, and of 8: the same count, losses and k-NN accuracy."""
    found, expected = events(two_ranks[0], "eval"), events(one_rank, "eval")
    assert len(found) == len(expected) == 5
    for ours, theirs in zip(found, expected, strict=True):
        assert set(ours) == set(theirs) and ours.get("count") == theirs.get("count")
        assert ours["knn_top1"] == theirs["knn_top1"]
        assert ours.get("loss", 0) == pytest.approx(theirs.get("loss", 0), abs=2e-6)
    assert found[-1]["count"] == 9


def test_what_a_run_of_two_ranks_says_and_writes(two_ranks: Any) -> None:
    path, done = two_ranks
    for text in (
        "effective batch 8 (4 x 1 pass x 2 ranks), learning rate 0.002 (train.base_lr 0.004 x 8 / 16)",
        "2 ranks: self-test passed (28 images each in an epoch, disjoint;",
        f"logs {path}/log/worker_N.log",
        "epoch 4/4 step 7/7",
    ):
        assert text in done.stdout, text
    assert done.stderr == ""
    written = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    files = {"config.yaml", "train.log", "metrics.jsonl", "environment.json", "last.ckpt", "best.ckpt", "curves.png"}
    logs = {f"log/{name}.log" for name in ("worker_0", "worker_1", "scheduler", "msrun")}
    assert written == files | logs | {"gallery/epoch_0004.png"}  # once: rank 1 writes nothing but its log
    for rank in (0, 1):
        assert f"rank {rank} of 2" in (path / f"log/worker_{rank}.log").read_text()
    assert "rank 1 of 2" not in done.stdout
    assert json.loads((path / "environment.json").read_text())["ranks"] == 2
    assert (path / "train.log").read_text().count("step 7/7") == 4
    assert processes_with(str(path)) == [] and port_is_free(port_of(done.stdout))


# --- evaluation -------------------------------------------------------------------------------------------------


@pytest.mark.compiles
def test_evaluation_through_the_launcher(folder: Path, recipe: Path) -> None:
    """Train a classifier and evaluate it: the accuracy that training reported; the log lies beside the checkpoint."""
    config, path = folder / "classify.yaml", folder / "classifier"
    method = "method: {name: classify, num_classes: 3}"
    config.write_text(re.sub(r"^method: .*$", method, recipe.read_text(), flags=re.M).replace("knn: 3", "knn: 0"))
    done = launch("run_standalone_train_ascend.sh", 0, config, "train.epochs=2", f"output={path}")
    assert done.returncode == 0, done.stdout + done.stderr
    done = launch("run_eval_ascend.sh", 0, config, path / "last.ckpt", "data.eval_crop=0.875")
    assert done.returncode == 0, done.stdout + done.stderr
    found, reported = json.loads(done.stdout.splitlines()[-1]), events(path, "eval")[-1]
    assert found["count"] == 9 and found["top1"] == pytest.approx(reported["top1"], abs=1e-6)
    assert done.stdout.splitlines()[-1] in (path / "log_1" / "worker_0.log").read_text()


# --- a run that ends early ----------------------------------------------------------------------------------------


def started(until: Path | str, *arguments: Any, **changes: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A launcher in the background once a file is there or its output has a text, and the output so far."""
    env = environment(DEVICE_TARGET="CPU", **changes)
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if (until in line) if isinstance(until, str) else until.exists():
            break
    yield process, output
    process.kill()


def test_a_killed_rank_ends_the_run_and_one_rank_finishes_it(
    folder: Path, recipe: Path, two_ranks: Any, run_entry: Run
) -> None:
    path = folder / "killed"
    short = ("train.knn=0", "train.eval_every=0", f"output={path}")  # neither changes the weights
    for process, output in started(path / "last.ckpt", ASCEND, recipe, 2, *short):
        worker = [
            pid
            for pid in processes_with(str(path))
            if (text := Path(f"/proc/{pid}/environ").read_text()) and "RANK_ID=1\0" in text and "MS_WORKER\0" in text
        ]
        os.kill(max(worker), signal.SIGKILL)  # the wrapper came first
        rest = process.communicate(timeout=100)[0]
        assert process.returncode == 137, output + rest
        assert f"the end of {path}/log/worker_1.log:" in rest
        assert f"rank 1 failed with code 137; logs in {path}/log" in rest
        assert "epoch 1/4" in rest.split("the end of ")[1]  # the last lines of that log
        assert processes_with(str(path)) == [] and port_is_free(port_of(output))
    done = run_entry("train.py", "--config", recipe, "--resume", "auto", "train.batch_size=8", *short)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resumed from {path}/last.ckpt after epoch" in done.stdout
    straight, resumed = (weights_without_key_bias(run) for run in (two_ranks[0], path))
    for name, value in straight.items():
        np.testing.assert_allclose(resumed[name], value, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.compiles
def test_sigterm_leaves_nothing_behind(folder: Path, recipe: Path) -> None:
    path = folder / "signal"
    arguments = (GPU, recipe, 2, "0,1", f"output={path}", "train.epochs=2000")
    for process, output in started("step 7/7", *arguments):
        port = port_of(output)
        assert len(processes_with(str(path))) > 4 and not port_is_free(port)
        process.terminate()
        rest = process.communicate(timeout=60)[0]
        assert process.returncode == 143, rest
        assert rest.splitlines()[-1] == f"terminated: ending the run; logs in {path}/log"
        deadline = time.monotonic() + 10  # the follower of the log ends a moment later
        while processes_with(str(path)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert processes_with(str(path)) == [] and port_is_free(port)


def rank_table(path: Path, *devices: int) -> Path:
    """A table of servers with so many devices each."""
    count = iter(range(sum(devices)))
    servers = [
        {"server_id": f"10.0.0.{s}", "device": [{"device_id": str(d), "rank_id": str(next(count))} for d in range(n)]}
        for s, n in enumerate(devices)
    ]
    path.write_text(json.dumps({"version": "1.0", "server_count": str(len(servers)), "server_list": servers}))
    return path


@pytest.mark.compiles
def test_an_error_of_one_rank_is_shown_once(folder: Path, recipe: Path, tmp_path: Path) -> None:
    """A picture that only rank 1 reads is damaged, and no other one has its class; the command is the zoo's, from its
    folder, with a rank table."""
    config = load_recipe(recipe)
    source = open_source(folder / "data" / "train")
    loader = Loader(source, config.data, (32, 32), 3, 4, ("image",), config.seed, True, 1, 2)
    alone = int(loader.order(0)[2])
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(Path(source.name(alone)).read_bytes()[:40])
    names = [str(broken) if index == alone else source.name(index) for index in range(len(source))]
    rows = [f"{name},{'alone' if index == alone else 'other'}\n" for index, name in enumerate(names)]
    (tmp_path / "train.csv").write_text("path,label\n" + "".join(rows))
    table = rank_table(tmp_path / "hccl_2p.json", 2)
    classifier = tmp_path / "classifier.yaml"
    method = "method: {name: classify, num_classes: 2, pool: mean, fc_norm: true}"
    classifier.write_text(re.sub("method:.*", method, recipe.read_text()))
    changes = (f"output={tmp_path / 'run'}", f"data.train={tmp_path / 'train.csv'}", "data.val=", "train.knn=0")
    done = launch(ASCEND, table, classifier, *changes, cwd=ROOT / "scripts")
    assert done.returncode == 2, done.stdout + done.stderr
    errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(f"error: data.train: {broken}: damaged JPEG")
    assert "; no other image of class alone can be used instead; " in errors[0]
    assert done.stderr.splitlines()[-1] == f"rank 1 failed with code 2; logs in {tmp_path / 'run'}/log"
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run" / "last.ckpt").exists()
    assert processes_with(str(tmp_path)) == []


@pytest.mark.compiles
def test_damaged_files_change_no_step_and_are_listed_once(folder: Path, recipe: Path, tmp_path: Path) -> None:
    """The same files on one rank and on two; the losses show that they use the same images instead."""
    source = open_source(folder / "data" / "train")
    damaged = {}
    for place, (index, content) in enumerate({3: b"", 20: b"\x89PNG\r\n\x1a\n", 21: b"no image", 50: None}.items()):
        path = tmp_path / f"{place}.jpg"
        damaged[index] = path
        if content is not None:
            path.write_bytes(content)
    names = [str(damaged.get(index, source.name(index))) for index in range(len(source))]
    rows = [f"{name},{source.classes[label]}\n" for name, label in zip(names, source.labels, strict=True)]
    (tmp_path / "train.csv").write_text("path,label\n" + "".join(rows))
    changes = (f"data.train={tmp_path / 'train.csv'}", "train.epochs=2", "train.knn=0")
    two = launch(GPU, recipe, 2, "0,1", f"output={tmp_path / 'two'}", *changes)
    assert two.returncode == 0, two.stdout + two.stderr
    one = launch("run_standalone_train_gpu.sh", 0, recipe, "train.batch_size=8", f"output={tmp_path / 'one'}", *changes)
    assert one.returncode == 0, one.stdout + one.stderr
    assert "4 unusable images replaced" in two.stdout
    lists = []
    for run in ("one", "two"):
        lines = [json.loads(line) for line in (tmp_path / run / "bad_images.jsonl").read_text().splitlines()]
        assert {line["image"] for line in lines} == {str(path) for path in damaged.values()}
        lists.append(sorted(lines, key=lambda line: str(line["image"])))
    assert lists[0] == lists[1] and len(lists[0]) == 4
    losses = [[line["loss"] for line in events(tmp_path / run, "train")] for run in ("one", "two")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=2e-6)
    assert len(losses[0]) == 14


# --- what is refused before anything starts -----------------------------------------------------------------------


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (ASCEND, []),
        (ASCEND, ["table.json"]),
        (GPU, ["{recipe}", "2"]),
        (GPU, ["{recipe}", "two", "0,1"]),
        (GPU, ["{recipe}", "2", "0"]),
        (GPU, ["{recipe}", "2", "0;1"]),
        ("run_standalone_train_ascend.sh", ["0"]),
        ("run_standalone_train_gpu.sh", ["{recipe}", "0"]),
        ("run_eval_ascend.sh", ["0", "{recipe}"]),
        ("run_eval_gpu.sh", []),
    ],
)
def test_wrong_arguments_print_the_usage(recipe: Path, script: str, arguments: list[str]) -> None:
    done = launch(script, *[text.format(recipe=recipe) for text in arguments])
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    place = lines.index("usage:")
    assert place <= 1 and all(line.startswith("error: ") for line in lines[:place])
    assert lines[place + 1].startswith(f"    bash scripts/{script} ")


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("script", "arguments", "changes", "text"),
    [
        (ASCEND, ["gone.yaml", 2], {}, "CONFIG_PATH: no such file gone.yaml"),
        (ASCEND, ["gone.json", "{recipe}"], {}, "RANK_TABLE_FILE: no such file gone.json"),
        (ASCEND, ["{recipe}", 2, "train.epoch=3"], {}, "command line: train.epoch: unknown key of TrainConfig"),
        (ASCEND, ["{recipe}", 2], {"DEVICE_TARGET": "Ascend"}, "device: no Ascend 0 here (/dev/davinci0)"),
        (GPU, ["{recipe}", 1, "93"], {"DEVICE_TARGET": ""}, "device: no GPU 93 here (nvidia-smi lists "),
        (GPU, ["{recipe}", 1, "0"], {"DEVICE_TARGET": "TPU"}, "DEVICE_TARGET: TPU is not one of Ascend, GPU, CPU"),
        (GPU, ["{recipe}", 1, "0"], {"PYTHON": "no-python"}, "PYTHON: there is no no-python"),
        (GPU, ["{recipe}", 1, "0"], {"NODE_NUM": "2"}, "NODE_RANK: set it to the number of this node, 0 to 1"),
        (
            GPU,
            ["{recipe}", 1, "0"],
            {"NODE_NUM": "2", "NODE_RANK": "1", "MASTER_ADDR": ""},
            "MASTER_ADDR: set it to the address of node 0",
        ),
        ("run_eval_gpu.sh", [0, "{recipe}", "gone.ckpt"], {}, "CHECKPOINT_PATH: no such file gone.ckpt"),
        ("run_standalone_train_ascend.sh", [7, "{recipe}"], {"DEVICE_TARGET": "Ascend"}, "device: no Ascend 7 here"),
    ],
)
def test_what_cannot_start_is_one_line(
    recipe: Path, script: str, arguments: list[Any], changes: dict[str, str], text: str
) -> None:
    done = launch(script, *[str(a).format(recipe=recipe) for a in arguments], **changes)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith(f"error: {text}") and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (ROOT / "runs" / "tiny").exists()


def table_error(path: Path, **changes: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "rank_table.py"), str(path)],
        env=environment(**changes),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr.removeprefix("error: ").strip()


def test_a_rank_table_says_who_this_node_is(tmp_path: Path) -> None:
    table = rank_table(tmp_path / "t.json", 3, 3)
    reader = [sys.executable, str(ROOT / "scripts" / "rank_table.py"), str(table)]
    done = subprocess.run(reader, env=environment(NODE_RANK="1"), capture_output=True, text=True)
    assert done.stdout == "2 1 10.0.0.0 0 1 2\n", done.stderr
    assert table_error(table).startswith(f"NODE_RANK: set it to the number of this node in server_list of {table}")
    assert table_error(table, NODE_RANK="2").endswith("0 to 1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "has no server_list"),
        ('{"server_list": []}', "has no server_list"),
        ('{"server_count": "2", "server_list": [{}]}', "server_count is 2, but server_list has 1"),
        ('{"server_list": [{"server_id": "a", "device": [{"rank_id": 0}]}]}', "server 0 needs server_id and a list"),
        ('{"server_list": [{"server_id": "a", "device": []}]}', "server 0 has 0 devices"),
        ('{"server_list": [{"server_id": "a", "device": [{"rank_id": 1, "device_id": 0}]}]}', "rank_id must count"),
    ],
)
def test_a_rank_table_that_cannot_be_used(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    assert table_error(path).startswith(f"{path}: {words}")


def test_the_page_has_the_usage_of_the_scripts() -> None:
    text = (ROOT / "docs/distributed.md").read_text(encoding="utf-8")
    names = sorted(path.name for path in (ROOT / "scripts").glob("run_*_*.sh") if path.name != "run_demo.sh")
    assert ASCEND in names and GPU in names
    for name in names:
        usage = re.findall(r"^#   (bash .*)$", (ROOT / "scripts" / name).read_text(encoding="utf-8"), re.M)
        assert usage and all(f"`{line}`" in text for line in usage), name


def test_shell_scripts_are_clean() -> None:
    """shellcheck, which requirements-dev.txt brings."""
    scripts = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "scripts").glob("*.sh"))
    assert len(scripts) > 8
    done = subprocess.run(["shellcheck", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
