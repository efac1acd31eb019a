"""The training example under DDP and FSDP2 with two gloo processes on the CPU: the single process's losses, step by step.

Accelerate's FSDP2 and DeepSpeed need GPUs; those configurations run where there are two.
"""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from common.families import COMMON, ROWS, TINY, in_every_run
from safetensors.torch import load_file
from sea.hosts import make_teacher
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from hf_linear_attn.conversion import linearize
from hf_linear_attn.training.tokenized_text import train_bpe_tokenizer

pytestmark = [pytest.mark.long, pytest.mark.thorough]

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "distributed"
RUNNER = Path(__file__).with_name("run_examples.py")
# Each family's language model, and an encoder; SEA is distilled from a tiny Llama.
KINDS = ("leap", "fastformer", "danet", "danet-encoder", "sea")
TRAINED = [row for row in ROWS if row.name in KINDS]
every_kind = in_every_run("leap", "sea", of=TRAINED)
STEPS, SAVE = 4, 2


def arguments(row, output, text, *more):
    """Arguments of a tiny run; beside `text` lies the teacher of SEA."""
    config = {k: v for k, v in (COMMON | TINY[row.family] | row.options).items() if k != "vocab_size"}
    model = ["--family", row.family]
    if row.family == "sea":
        model, config = ["--teacher", str(text.with_name("teacher"))], {"k": 4, "predictor_length": 16}
    fixed = ["--vocab-size", "280", "--block-length", "12", "--batch-size", "4", "--steps", str(STEPS), "--cpu"]
    named = [*model, "--config", json.dumps(config), "--data", str(text), "--output", str(output)]
    return [*fixed, "--save-steps", str(SAVE), *named, *([] if row.causal else ["--masked"]), *more]


def save_teacher(text):
    """A tiny Llama with a tokenizer of `text`, in a folder beside it."""
    tokenizer = train_bpe_tokenizer([text.read_text()], 280)
    tokenizer.save_pretrained(text.with_name("teacher"))
    make_teacher("llama", vocab_size=len(tokenizer)).save_pretrained(text.with_name("teacher"))


def environment(**more):
    """Of a child process: this checkout's package, no network, one thread."""
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | more


def launch(command, folder, settings=None, **options):
    """Run a command to its end."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        env=environment(**(settings or {})),
        cwd=folder,
        capture_output=True,
        text=True,
        **options,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def kinds(request):
    """The rows that this run's tests ask about."""
    here = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    names = {item.callspec.params["row"].name for item in here if "row" in item.callspec.params}
    return [row for row in TRAINED if row.name in names]


@pytest.fixture(scope="module")
def single(kinds, tmp_path_factory):
    """Each kind in one process on the CPU; the folder of the outputs, with the text that they read."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "text.txt"
    text.write_text(" ".join(f"Message {i * i % 97} of {i}: peace and work." for i in range(150)))
    save_teacher(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_LINEAR_ATTN_CACHE", str(folder / "cache"))
        for row in kinds:
            alone(patch, arguments(row, folder / "alone" / row.name, text))
    return folder


@pytest.fixture(scope="module")
def runs(single, kinds):
    """The same in two processes beside it, with DDP and then sharded by FSDP2."""
    ways = {"ddp": [], "fsdp2": ["--shard"]}
    work = [
        arguments(row, single / way / row.name, single / "text.txt", *more)
        for way, more in ways.items()
        for row in kinds
    ]
    (single / "runs.json").write_text(json.dumps(work))
    settings = {"CUDA_VISIBLE_DEVICES": "", "HF_LINEAR_ATTN_CACHE": str(single / "cache")}
    starter = ["accelerate.commands.launch", "--config_file", EXAMPLES / "ddp.yaml"]
    launch([*starter, RUNNER, single / "runs.json"], single, settings, timeout=500)
    return single


def alone(patch, words):
    """The example in this process."""
    patch.setattr(sys, "argv", ["train.py", *words])
    runpy.run_path(str(EXAMPLES / "train.py"), run_name="__main__")


def result(folder):
    """What a run wrote down."""
    return json.loads((folder / "losses.json").read_text())


@every_kind
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_losses_are_those_of_one_process(runs, row, kind):
    """Step by step, and the weights at the end."""
    expected, found = result(runs / "alone" / row.name), result(runs / kind / row.name)
    assert (expected["processes"], found["processes"]) == (1, 2)
    assert list(found["losses"]) == [str(step) for step in range(1, STEPS + 1)]
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-4)
    weights = load_file(runs / kind / row.name / "model.safetensors")  # a sharded run also writes tied weights twice
    for name, weight in load_file(runs / "alone" / row.name / "model.safetensors").items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m)


def test_heads_learn_the_same_on_two_processes(runs, tmp_path):
    """Rows differ in the number of targets; each process has two of the four, and a mean over all of them is taken."""
    runpy.run_path(str(RUNNER.with_name("heads.py")))["train_heads"](str(tmp_path / "heads.json"))
    expected, found = (json.loads((folder / "heads.json").read_text()) for folder in (tmp_path, runs))
    assert found.keys() == expected.keys()
    for head, numbers in expected.items():
        assert found[head] == pytest.approx(numbers, rel=1e-6), head


@every_kind
def test_fsdp2_really_shards(runs, row):
    """Every parameter of the sharded run is a DTensor, none of DDP's is."""
    auto_class = AutoModelForCausalLM if row.causal else AutoModelForMaskedLM
    model = auto_class.from_pretrained(runs / "fsdp2" / row.name)
    assert result(runs / "fsdp2" / row.name)["sharded_parameters"] == len(list(model.parameters()))
    assert result(runs / "ddp" / row.name)["sharded_parameters"] == 0


@every_kind
def test_resumes_on_another_number_of_processes(runs, row, tmp_path, monkeypatch):
    """A checkpoint of two processes goes on in one, with the losses of a run that was never stopped."""
    shutil.copytree(runs / "ddp" / row.name / f"checkpoint-{SAVE}", tmp_path / f"checkpoint-{SAVE}")
    monkeypatch.setenv("HF_LINEAR_ATTN_CACHE", str(runs / "cache"))
    alone(monkeypatch, arguments(row, tmp_path, runs / "text.txt", "--resume"))
    assert result(tmp_path)["losses"] == pytest.approx(result(runs / "alone" / row.name)["losses"], abs=1e-4)


@every_kind
def test_activation_checkpointing(runs, row, tmp_path, monkeypatch):
    """Recomputing activations changes no loss."""
    monkeypatch.setenv("HF_LINEAR_ATTN_CACHE", str(runs / "cache"))
    alone(monkeypatch, arguments(row, tmp_path, runs / "text.txt", "--activation-checkpointing"))
    assert result(tmp_path)["losses"] == pytest.approx(result(runs / "alone" / row.name)["losses"], abs=1e-4)


@pytest.mark.slow
def test_a_killed_process_ends_the_run(runs, tmp_path):
    """The other one is stopped, and the launcher says which died of what."""
    words = arguments(TRAINED[0], tmp_path / "out", runs / "text.txt")
    words[words.index("--steps") + 1] = "100000"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        str(EXAMPLES / "train.py"),
        *words,
    ]
    settings = environment(HF_LINEAR_ATTN_CACHE=str(runs / "cache"))
    with subprocess.Popen(
        command, env=settings, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as run:
        try:
            while not (tmp_path / "out" / f"checkpoint-{SAVE}").exists():
                assert run.poll() is None, run.stderr.read().decode()[-3000:]
                time.sleep(0.2)
            children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
            os.kill(int(children[1]), signal.SIGKILL)
            _, errors = run.communicate(timeout=120)
        finally:
            run.kill()
    assert run.returncode != 0
    assert "Signal 9 (SIGKILL)" in errors.decode()
    assert "rank      : 1" in errors.decode()


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2"])
def test_configurations_are_read_by_accelerate(name):
    """Every key of the shipped configurations is one that `accelerate launch` knows."""
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(EXAMPLES / f"{name}.yaml"))
    assert loaded.num_processes == 2
    assert loaded.distributed_type.name == yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())["distributed_type"]


@pytest.fixture
def one_process():
    """A group of one process, as far as FSDP is concerned."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("dp_shard",))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_accelerate_prepares_a_student(kind, one_process):
    """Accelerate's FSDP2 with the shipped configuration, buffers and all, as far as it goes without a GPU."""
    settings = yaml.safe_load((EXAMPLES / "fsdp2.yaml").read_text())["fsdp_config"]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy=settings["fsdp_auto_wrap_policy"].lower(),
        reshard_after_forward=settings["fsdp_reshard_after_forward"],
        cpu_ram_efficient_loading=settings.get("fsdp_cpu_ram_efficient_loading", True),
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=one_process,
        parallelism_config=SimpleNamespace(fsdp_dim_names=["dp_shard"]),
        device=torch.device("cpu"),
        is_main_process=True,
        mixed_precision="no",
    )
    student = linearize(make_teacher(kind), "sea", k=4, predictor_length=16).eval()
    ids = torch.randint(0, student.config.vocab_size, (2, 9))
    with torch.no_grad():
        expected = student(ids).logits
        fsdp2_prepare_model(accelerator, student)
        assert all(isinstance(x, DTensor) for x in student.parameters())
        torch.testing.assert_close(student(ids).logits, expected)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@every_kind
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2"])
def test_configurations_on_two_gpus(single, row, name, tmp_path):
    """The shipped commands: the losses of one CPU process, up to the GPU's arithmetic."""
    if name == "zero2":
        pytest.importorskip("deepspeed", reason="needs deepspeed: pip install deepspeed")
    words = [word for word in arguments(row, tmp_path, single / "text.txt") if word != "--cpu"]
    starter = ["accelerate.commands.launch", "--config_file", EXAMPLES / f"{name}.yaml", EXAMPLES / "train.py"]
    launch([*starter, *words], tmp_path, {"HF_LINEAR_ATTN_CACHE": str(single / "cache")}, timeout=500)
    found = result(tmp_path)
    assert found["processes"] == 2
    assert (found["sharded_parameters"] > 0) == (name == "fsdp2")
    assert found["losses"] == pytest.approx(result(single / "alone" / row.name)["losses"], abs=1e-2)
