"""What the CUDA road launches, writes and waits for, compiled and counted on a pretended device: upper bounds, so that
a lost fusion fails. tests/fakecuda/fake_device.py says what this proves and what it cannot: nothing runs on a GPU here.

The bounds are the counts of the pinned torch and triton: Triton kernels, products, and other operators of ATen."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

missing = [name for name, found in (("triton", find_spec("triton")), ("g++", shutil.which("g++"))) if not found]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)}")]

ROOT = Path(__file__).parent.parent
SMALL = dict(vocab_size=50257, block_size=1024, dim=768, n_head=12, n_kv_head=3, latent_head_dim=0, mlp_ratio=3.0,
             n_layer=1)  # fmt: skip
MACRO_BLOCK = SMALL | dict(pattern="MMCCCLML", n_layer=8)  # a third of config/small.toml
COUNT = """import ctypes, runpy, sys
ctypes.CDLL(sys.argv.pop(1))
runpy.run_module("tests.fakecuda.count", None, "__main__")"""
KINDS = ("triton", "product", "other")


@pytest.fixture(scope="module")
def count(tmp_path_factory):
    """Runs one job of count.py in a process of its own, into which shim.cpp is loaded before torch."""
    folder = tmp_path_factory.mktemp("fakecuda")
    torch = Path(find_spec("torch").origin).parent
    include = (torch / "include", torch / "include/torch/csrc/api/include")
    shim = folder / "shim.so"
    subprocess.run(["g++", "-std=c++20", "-fPIC", "-shared", ROOT / "tests/fakecuda/shim.cpp", "-o", shim,
                    *(f"-I{path}" for path in include), f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu",
                    f"-Wl,-rpath,{torch / 'lib'}"], check=True)  # fmt: skip
    folders = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}

    def run(job: str, capability: str = "9.0", **arguments) -> dict:
        jobs = json.dumps({job: [job, arguments]})
        command = [sys.executable, "-W", "ignore", "-c", COUNT, shim, capability, jobs]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=os.environ | folders)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout)[job]

    return run


@pytest.fixture(scope="module")
def dense(count):
    return count("step", config=MACRO_BLOCK, B=8)


def launches(figures: dict) -> tuple[int, ...]:
    return tuple(figures[kind] for kind in KINDS)


def within(figures: dict, bound: tuple[int, int, int], megabytes: float) -> None:
    over = [kind for kind, most in zip(KINDS, bound, strict=True) if figures[kind] > most]
    assert not over, f"{launches(figures)}, bound {bound}: {' '.join(figures['names'])}"
    assert figures["written"] <= 1e6 * megabytes


# letter: launches and megabytes written, forward and backward, of a block of `small` for 8 texts of 1024 tokens
BLOCKS = {
    "A": [(11, 4, 0), 293, (13, 8, 3), 399],
    "G": [(11, 4, 0), 263, (13, 8, 3), 356],
    "M": [(11, 4, 0), 256, (13, 8, 3), 347],
    "C": [(15, 5, 0), 242, (22, 10, 2), 334],
    "L": [(13, 5, 0), 256, (19, 10, 2), 351],
}


def hold(letters: str, calls: list[dict]) -> None:
    """One micro-batch's calls: the blocks' forwards in order, their backwards from the last one."""
    for i, letter in enumerate(letters):
        forward, forward_mb, backward, backward_mb = BLOCKS[letter]
        within(calls[i], forward, forward_mb)
        within(calls[-1 - i], backward, backward_mb)


@pytest.mark.parametrize("letter", ["A", "G"])
def test_a_baseline_block_is_one_graph_of_few_launches(count, letter):
    found = count("block", config=SMALL | {"pattern": letter}, B=8)
    assert (found["graphs"], found["breaks"], found["waits"]) == (1, 0, [])
    assert len(found["calls"]) == 2
    hold(letter, found["calls"])


def test_a_block_keeps_no_product_of_its_swiglu(count):
    """Bytes kept for the backward; the product would be 37.7 MB more."""
    found = count("block", config=SMALL | {"pattern": "M"}, B=8)
    assert found["kept"] <= 206e6


def test_every_block_of_a_step_is_one_graph_of_few_launches(dense):
    """Of two micro-batches: eight forwards, two chunks of the loss, eight backwards each."""
    assert (dense["graphs"], dense["breaks"]) == (4, 0)  # M, C, L and the loss
    calls = dense["calls"]
    assert len(calls) == 2 * (8 + 2 + 8)
    for batch in (calls[:18], calls[18:]):
        hold(MACRO_BLOCK["pattern"], batch)
        for chunk in batch[8:10]:
            assert launches(chunk) <= (3, 3, 0)


def test_a_step_waits_for_nothing_and_launches_little_around_the_blocks(dense):
    """Per micro-batch the embedding, the tables, the last norm and the loss's sums; then gradients are added to, one
    launch a parameter, and the norm, the clipping and AdamW are a few."""
    assert dense["waits"] == []
    names = dense["eager"]["names"]
    parameters = 8 * 7 + 3 * 3 + 2 + 2
    assert names.count("add_") <= parameters + 10
    assert len(names) - names.count("add_") <= 160
    assert not dense["eager"]["triton"] and not dense["eager"]["product"]
    assert names.count("_fused_adamw_") == 2 and names.count("_foreach_norm") == 1


def test_routed_steps_wait_for_nothing_either(count):
    """MoD inside MoR: blocks for T and T/2 tokens, every other one routed."""
    shape = dict(pattern="M", n_layer=2, mod_capacity=0.125, mor_recursions=2)
    found = count("step", config=shape, B=4)
    assert (found["graphs"], found["breaks"], found["waits"]) == (4, 0, [])
    assert len(found["eager"]["names"]) <= 330


def test_a_routed_block_has_few_launches(count):
    shape = SMALL | dict(pattern="M", n_layer=2, mod_capacity=0.125)
    found = count("block", config=shape, B=8, layer=1)
    assert (found["graphs"], found["breaks"], found["waits"]) == (1, 0, [])
    forward, backward = found["calls"]
    within(forward, (17, 4, 1), 114)  # the other one is topk
    within(backward, (24, 8, 3), 205)


def test_a_chunk_of_the_loss_is_three_kernels_and_three_products(count):
    """The loss of 32 texts of 1024 tokens, forward and backward, every pass over the logits counted."""
    found = count("loss", N=32 * 1024, V=50257, D=768)
    assert (found["graphs"], found["breaks"], found["waits"]) == (1, 0, [])
    for chunk in found["calls"]:
        assert chunk["triton"] <= 3 and chunk["product"] <= 3 and chunk["other"] == 0, chunk["names"]
    assert len(found["calls"]) <= 8
    assert found["all"]["moved"] <= 30e9


SHARED = {"9.0": 227 * 1024, "8.9": 99 * 1024}  # bytes that one block of threads can have


@pytest.mark.parametrize("capability", SHARED)
def test_attention_fits_into_shared_memory_and_registers(count, capability):
    """Heads of `small`: M 12 of 64 channels over 1, L 12 of 32 over 12, C 12 of 16 over 3. On sm_90 nothing is spilled,
    on sm_89 a kernel of M and one of C keep a little on the stack."""
    found = count("assemble", capability, configs={letter: SMALL | {"pattern": letter} for letter in "MLC"})
    assert found.keys() == {f"{letter} {side}" for letter in "MLC" for side in ("forward", "backward")}
    stack = {"M backward": 120, "C forward": 8} if capability == "8.9" else {}
    for name, need in found.items():
        assert need["shared"] <= SHARED[capability] and need["stack"] <= stack.get(name, 0), (name, need)
