"""Several processes, over gloo on a CPU: the same training as in one, the same files, and what happens when one dies.

Two processes run a list of trainings in a row, since each start costs seconds; what needs no second rank is tested in a
group of one, within this process. NCCL is not met here.
"""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import checkpoints
import health
import parallel
import runs
import sample
import train
from checkpoints import Progress
from configurator import UserError
from data import eval_batches
from machine import compile_blocks
from model import Hydra, HydraConfig
from parallel import Ranks

ROOT = Path(train.__file__).parent
SHAPE = {"vocab_size": 257, "block_size": 32, "dim": 32, "n_head": 2, "n_kv_head": 1, "compression": 2,
         "latent_head_dim": 0, "mlp_ratio": 1.0, "pattern": "MCL", "n_layer": 3}  # fmt: skip
# a learning rate that does not depend on max_iters, so that a run of 8 steps is the beginning of one of 12
OPTIONS = {"tokenizer": "bytes", "data": ROOT / "config" / "python4096.tiktoken", "dtype": "float32", "batch_size": 4,
           "eval_iters": 3, "final_eval_iters": 4, "eval_interval": 4, "warmup_iters": 2, "min_lr_ratio": 1.0,
           "log_interval": 1, "sample_tokens": 2, "max_iters": 8, "log_layers": 3}  # fmt: skip
DENSE = {"gradient_accumulation_steps": 2}
ROUTED = {"mod_capacity": 0.25, "mor_recursions": 2, "recompute": "block"}
TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
# trainings in a row, in the processes of one group
DRIVER = """
import json, sys
sys.path.insert(0, {root!r})
import torch
import train
{patch}
for argv in json.loads(sys.argv[1]):
    code = train.main(argv)
    print("code", code, flush=True)
"""
# rank 1's loss, but no gradient, is not finite in the third step
POISON = """
import os
real, calls = train.Hydra.forward, []
def forward(self, idx, targets):
    output = real(self, idx, targets)
    if self.training and os.environ["RANK"] == "1":
        calls.append(1)
        if len(calls) == 3:
            return output._replace(cross_entropy=output.cross_entropy * float("nan"))
    return output
train.Hydra.forward = forward
"""


def argv(tmp: Path, name: str, **keys) -> list[str]:
    options = SHAPE | OPTIONS | {"out_dir": tmp / name, "cache_dir": tmp / "cache"} | keys
    return [f"--{key}={value}" for key, value in options.items()]


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def launch(trainings: list[list[str]], patch: str = "") -> list[subprocess.Popen]:
    """Two processes, as torchrun would start them."""
    env = os.environ | TORCHRUN | {"MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER.format(root=str(ROOT), patch=patch), json.dumps(trainings)]
    processes = []
    for rank in ("0", "1"):
        processes.append(subprocess.Popen(command, env=env | {"RANK": rank, "LOCAL_RANK": rank}, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE))  # fmt: skip
    return processes


def finish(processes: list[subprocess.Popen], codes: tuple[int, int]) -> tuple[list[str], list[str]]:
    """What they printed and complained about."""
    found = [process.communicate(timeout=200) for process in processes]
    assert tuple(process.returncode for process in processes) == codes, found
    return [out for out, _ in found], [err for _, err in found]


def records(folder: Path, key: str) -> list[dict]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if key in record]


def values(folder: Path, key: str) -> list[float]:
    return [record[key] for record in records(folder, key)]


def wait_for_step(process: subprocess.Popen, step: int) -> None:
    for line in process.stdout:
        if f"step {step:5d} |" in line:
            return
    raise AssertionError(process.communicate())


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Trainings of one process and of two, and of two that go on where one or two, whole or sharded, left off. A folder
    is called by its model and by what trained its first 8 steps and the next 4."""
    tmp = tmp_path_factory.mktemp("parallel")
    assert train.main(argv(tmp, "dense-one-one", **DENSE, max_iters=12)) == 0
    assert train.main(argv(tmp, "routed-one-one", **ROUTED, max_iters=12)) == 0
    assert train.main(argv(tmp, "dense-one-ddp", **DENSE)) == 0
    assert train.main(argv(tmp, "dense-one-fsdp", **DENSE)) == 0
    trainings = []
    for mode in ("ddp", "fsdp"):
        trainings += [argv(tmp, f"routed-{mode}-one", **ROUTED, parallel=mode),
                      argv(tmp, f"dense-{mode}-one", **DENSE, parallel=mode),
                      argv(tmp, f"dense-one-{mode}", **DENSE, parallel=mode, max_iters=12, resume=True)]  # fmt: skip
    for first, then in (("ddp", "fsdp"), ("fsdp", "ddp")):
        trainings += [argv(tmp, f"dense-{first}-{then}", **DENSE, parallel=first),
                      argv(tmp, f"dense-{first}-{then}", **DENSE, parallel=then, max_iters=12, resume=True)]
    printed, complaints = finish(launch(trainings), (0, 0))
    assert printed[0].count("validation split: ") == len(trainings) == printed[0].count("code 0")
    assert printed[1] == "" and complaints == ["", ""]
    assert printed[0].count("sample at step") == 3 * 3 + 2 * 2  # by ddp alone, from its start or from step 8 on
    for model in ("dense", "routed"):
        for mode in ("ddp", "fsdp"):
            shutil.copytree(tmp / f"{model}-{mode}-one", tmp / f"{model}-{mode}")
            assert train.main(["--resume", f"--out_dir={tmp / f'{model}-{mode}-one'}", "--max_iters=12"]) == 0
    return tmp


HISTORIES = [f"dense-{first}-{then}" for first in ("ddp", "fsdp") for then in ("ddp", "fsdp", "one") if first != then]
HISTORIES += ["dense-one-ddp", "dense-one-fsdp", "routed-ddp-one", "routed-fsdp-one"]


@pytest.mark.slow
@pytest.mark.parametrize("history", HISTORIES)
def test_two_processes_train_as_one(folders, history):
    """The same losses, norms and evaluations, from the start and after a resume by other processes."""
    ours, one = folders / history, folders / f"{history.partition('-')[0]}-one-one"
    for key in ("loss", "grad_norm", "val_loss", "val_bpb"):
        assert values(ours, key) == pytest.approx(values(one, key), rel=1e-5), key
    for key in ("aux_loss", "routed_fraction", "mean_depth", "val_routed_fraction"):
        assert values(ours, key) == pytest.approx(values(one, key), abs=0.01), key  # by comparisons, which may tip
    norms = zip(values(ours, "layers"), values(one, "layers"), strict=True)
    assert all(layers == pytest.approx(expected, rel=1e-4) for layers, expected in norms)
    assert [record["step"] for record in records(ours, "layers")] == [3, 6, 9, 12]
    assert values(ours, "val_loss")[0] == pytest.approx(values(one, "val_loss")[0], rel=1e-6)  # of the same weights
    steps = [record["step"] for record in records(ours, "loss")]
    assert steps == list(range(1, 13)) and len(records(ours, "best")) == 4  # one process wrote


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dense", "routed"])
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_files_of_two_processes_are_for_one(folders, model, mode):
    """last.pt, whole or in parts, and best.pt of the same step hold the same weights, for sample.py too."""
    folder = folders / f"{model}-{mode}"
    stored = torch.load(folder / "last.pt")
    assert stored["train_config"]["parallel"] == mode and ("shards" in stored) == (mode == "fsdp")
    assert len(list(folder.glob("shards-*/*.distcp"))) == (2 if mode == "fsdp" else 0)
    best = checkpoints.load_checkpoint(folder / "best.pt", {})[0]
    assert best["step"] == stored["step"] == 8
    read = Hydra(HydraConfig(**stored["model_config"]))
    checkpoints.load_weights(read, stored, folder / "last.pt")
    assert all(torch.equal(tensor, best["model"][name]) for name, tensor in read.state_dict().items())
    patient = health.read_patient(folder / "last.pt")
    assert {state["step"].item() for state in patient.optimizer.state.values()} == {8}
    assert torch.equal(patient.model.embed.weight, read.embed.weight)
    options = sample.SampleConfig(out_dir=str(folder), checkpoint="last", dtype="float32")
    assert torch.equal(sample.load_model(options, torch.device("cpu"))[0].embed.weight, read.embed.weight)
    after = folders / f"{model}-{mode}-one"  # one process went on from there
    assert not list(after.glob("shards-*")) and torch.load(after / "last.pt")["step"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_dead_rank_ends_the_others_with_one_line_and_a_checkpoint(tmp_path, mode):
    processes = launch([argv(tmp_path, "run", parallel=mode, max_iters=100000)])
    wait_for_step(processes[0], 5)
    processes[1].kill()
    began = time.monotonic()
    printed, complaints = finish(processes, (1, -signal.SIGKILL))
    assert time.monotonic() - began < 30
    assert complaints[0].count("\n") == 1 and "rank 0 has lost another process" in complaints[0]
    kept = torch.load(tmp_path / "run" / "last.pt")["step"]
    assert kept % 4 == 0
    assert train.main(["--resume", f"--out_dir={tmp_path / 'run'}", f"--max_iters={kept + 2}"]) == 0


@pytest.mark.slow
def test_torchrun_starts_a_run_anew_where_it_was(tmp_path):
    """With one rank killed: all go on by themselves, from the last checkpoint to the losses of an undisturbed run."""
    assert train.main(argv(tmp_path, "one", max_iters=60)) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1",
               ROOT / "train.py", *argv(tmp_path, "run", max_iters=60)]  # fmt: skip
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    wait_for_step(process, 6)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {int(pid): Path(f"/proc/{pid}/environ").read_text() for pid in children}
    os.kill(next(pid for pid, env in ranks.items() if "\0RANK=1\0" in env), signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    resumed = values(tmp_path / "run", "resumed_at")
    assert len(resumed) == 1 and resumed[0] >= 4 and not (tmp_path / "run" / "run-1").exists()
    assert values(tmp_path / "run", "loss") == pytest.approx(values(tmp_path / "one", "loss"), rel=1e-4)


@pytest.mark.slow
def test_all_ranks_skip_a_step_that_one_of_them_finds_not_finite_and_stop_when_one_is_asked_to(tmp_path):
    processes = launch([argv(tmp_path, "run", eval_interval=1, eval_iters=2, max_iters=100000)], POISON)
    wait_for_step(processes[0], 6)
    processes[1].send_signal(signal.SIGTERM)
    printed, complaints = finish(processes, (0, 0))
    assert printed[0].count("code 130") == 1 and "stopped at step" in printed[0] and complaints[0] == ""
    (skipped,) = records(tmp_path / "run", "skipped")[2:3]
    assert skipped == {"kind": "skipped", "step": 3, "skipped": "loss"}
    losses = {record["step"]: record["val_loss"] for record in records(tmp_path / "run", "best")}
    assert losses[3] == losses[2] != losses[4]
    stopped = int(re.search(r"stopped at step (\d+), saved", printed[0])[1])
    assert torch.load(tmp_path / "run" / "last.pt")["step"] == stopped


# ---- a group of one

@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tiny(mode: str, dtype: torch.dtype = torch.float32):
    """(model, what training calls, optimiser, two batches)."""
    torch.manual_seed(0)
    model = Hydra(HydraConfig(**SHAPE))
    trained = parallel.distribute(model, Ranks(mode), torch.device("cpu"), dtype)
    optimizer = train.make_optimizer(model, train.TrainConfig())
    batches = [tuple(torch.randint(257, (2, 2, 32))) for _ in range(2)]
    return model, trained, optimizer, batches


def test_gradients_travel_once_a_step(alone):
    """Accumulation: in DDP the first batch's backward calls no hook, in FSDP2 it leaves no gradient of a part."""
    _, trained, _, batches = tiny("ddp")
    sent = []
    trained.register_comm_hook(None, lambda state, bucket: sent.append(1) or done(bucket.buffer()))
    for last in (False, True):
        with parallel.accumulates(trained, last):
            trained(*batches[0]).loss.backward()
        assert bool(sent) == last
    model, trained, _, batches = tiny("fsdp")
    for last in (False, True):
        with parallel.accumulates(trained, last):
            trained(*batches[0]).loss.backward()
        assert {p.grad is not None for p in model.parameters()} == {last}


def done(tensor: torch.Tensor) -> torch.futures.Future:
    future = torch.futures.Future()
    future.set_result(tensor)
    return future


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_step_of_a_group_is_a_step_of_one_process(alone, mode):
    config = (1.0, torch.autocast("cpu", enabled=False))
    model, trained, optimizer, batches = tiny("none")
    plain = train.train_step(trained, optimizer, batches, *config)
    ours, trained, optimizer, batches = tiny(mode)
    step = train.train_step(trained, optimizer, batches, *config, Ranks(mode))
    assert step.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    norms = [norm.item() for norm in step.norms.values()]
    assert norms == pytest.approx([norm.item() for norm in plain.norms.values()], rel=1e-5)
    weights = parallel.gathered(ours, Ranks(mode))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)


def test_fsdp_gathers_blocks_in_bf16_and_keeps_the_rest_in_fp32(alone):
    model, trained, _, batches = tiny("fsdp", torch.bfloat16)
    seen = {}
    model.blocks[1].mlp.register_forward_pre_hook(lambda mlp, args: seen.update(block=mlp.down.weight.dtype))
    model.norm.register_forward_pre_hook(lambda norm, args: seen.update(rest=norm.weight.dtype, x=args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        trained(*batches[0]).loss.backward()
    assert seen == {"block": torch.bfloat16, "rest": torch.float32, "x": torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_a_sharded_checkpoint_is_whole_before_it_is_named(alone, tmp_path, monkeypatch):
    model, trained, optimizer, batches = tiny("fsdp")
    ranks = Ranks("fsdp")
    path = tmp_path / "last.pt"
    config = {"model_config": {}, "train_config": {"tokenizer": "bytes"}, "fingerprint": "", "tokenizer": ""}

    def save(step: int) -> None:
        train.train_step(trained, optimizer, batches, 1.0, torch.autocast("cpu", enabled=False), ranks)
        checkpoints.save_run(path, config | asdict(Progress(step=step)), model, optimizer, ranks)

    save(4)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_checkpoint", lambda path, content: (_ for _ in ()).throw(UserError("full")))
        with pytest.raises(UserError, match="full"):
            save(8)
    assert torch.load(path)["shards"] == "shards-4" and (tmp_path / "shards-4" / ".metadata").exists()
    before = parallel.gathered(model, ranks)["embed.weight"].clone()
    save(12)
    assert [folder.name for folder in tmp_path.glob("shards-*")] == ["shards-12"]
    other, _, fresh, _ = tiny("fsdp")
    checkpoints.restore(path, checkpoints.load_checkpoint(path, {})[0], other, fresh)
    after = parallel.gathered(other, ranks)
    assert all(torch.equal(tensor, parallel.gathered(model, ranks)[name]) for name, tensor in after.items())
    assert not torch.equal(after["embed.weight"], before)
    moments = [{n: parallel.local(t) for n, t in optimizer.state[p].items()} for p in model.parameters()]
    read = [{n: parallel.local(t) for n, t in fresh.state[p].items()} for p in other.parameters()]
    assert all(torch.equal(a[n], b[n]) for a, b in zip(moments, read, strict=True) for n in a)
    assert runs.set_aside(tmp_path) and (tmp_path / "run-1" / "shards-12").exists()
    with pytest.raises(UserError, match="shards-12 .*restore it"):
        checkpoints.restore(path, {"shards": "shards-12"}, other, fresh)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_compiled_blocks_stay_one_graph_each(alone, mode, monkeypatch):
    """Compiled inside of DDP and under FSDP2's hooks: no graph more than in one process, and its gradients."""
    monkeypatch.setattr("model.compile_blocks", partial(compile_blocks, backend="aot_eager"))  # without kernels
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, trained, optimizer, batches = tiny("none")
    config = (0.0, torch.autocast("cpu", enabled=False))
    expected = train.train_step(trained, optimizer, batches, *config)
    model, trained, optimizer, batches = tiny(mode)
    model.compile_training()
    step = train.train_step(trained, optimizer, batches, *config, Ranks(mode))
    train.train_step(trained, optimizer, batches, *config, Ranks(mode))
    norms = [norm.item() for norm in step.norms.values()]
    assert norms == pytest.approx([norm.item() for norm in expected.norms.values()], rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # M, C and L
    assert not torch._dynamo.utils.counters["graph_break"]


# ---- without a group

def test_rows_are_disjoint_and_are_all():
    ranks = [Ranks("ddp", rank, rank, 4) for rank in range(4)]
    assert [i for one in ranks for i in range(12)[one.rows(12)]] == list(range(12))
    with pytest.raises(UserError, match="batch_size=6: it is of all 4 processes .* use --batch_size=8"):
        ranks[0].rows(6)


def test_an_evaluation_by_rows_is_the_evaluation(monkeypatch):
    """Also where a rank's last rows hold no target."""
    torch.manual_seed(0)
    model = Hydra(HydraConfig(**SHAPE))
    tokens = torch.randint(257, (32 * 5 + 7,)).numpy()
    sizes = torch.ones(257, dtype=torch.int64)
    assert len(list(eval_batches(tokens, 4, 32))) == 2
    whole = train.evaluate(model, tokens, sizes, 4, 0, torch.device("cpu"))
    sums = []
    monkeypatch.setattr(Ranks, "total", lambda self, values: sums.append(values) or values)
    for rank in range(2):
        train.evaluate(model, tokens, sizes, 4, 0, torch.device("cpu"), Ranks("ddp", rank, rank, 2))
    nats, count, size = map(sum, zip(*sums, strict=True))
    assert count == len(tokens) - 1 == size
    assert whole["val_loss"] == pytest.approx(nats / count, rel=1e-6)
    assert whole["val_bpb"] == pytest.approx(nats / size / math.log(2), rel=1e-6)


@pytest.mark.parametrize("env, call, message", [
    ({}, ("fsdp", "cpu"), "parallel='fsdp': this is a single process: start .* torchrun --nproc_per_node=N train.py"),
    ({"MASTER_ADDR": None}, ("auto", "cpu"), "MASTER_ADDR='' in the environment: start the processes with torchrun"),
    ({"LOCAL_RANK": "one"}, ("auto", "cpu"), "LOCAL_RANK='one' in the environment"),
    ({"LOCAL_RANK": "2"}, ("auto", "cuda"), "LOCAL_RANK=2: 2 GPUs are here: use --nproc_per_node=2 or --device=cpu"),
    ({}, ("auto", "cuda:1"), "device='cuda:1': with torchrun each process takes its own"),
])  # fmt: skip
def test_processes_that_cannot_meet_are_one_line(monkeypatch, env, call, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if call[0] == "auto":
        for name, value in (TORCHRUN | env).items():
            if value:
                monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        parallel.join(*call)


def test_only_a_restart_of_just_this_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    config, run = HydraConfig(**SHAPE), train.TrainConfig(out_dir=str(tmp_path))
    assert not checkpoints.has_begun(config, run)
    content = {"model": {}, "fingerprint": "", "tokenizer": "", "model_config": asdict(config)}
    checkpoints.save_checkpoint(tmp_path / "last.pt", content | {"train_config": asdict(run)} | asdict(Progress()))
    assert checkpoints.has_begun(config, run)
    assert not checkpoints.has_begun(config, train.TrainConfig(out_dir=str(tmp_path), seed=1))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another call of torchrun")
    assert not checkpoints.has_begun(config, run)
