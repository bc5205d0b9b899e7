"""Decisions about this machine and their reasons; every fallback is forced, so that any machine proves it."""

import contextlib
import os
import platform
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_train import shape
from torch import nn

import machine
from configurator import UserError
from generate import generate, new_state, pack, prefill
from machine import PackedLinear, Prefetch, choose_compile, choose_device, choose_dtype, datasheet_peak
from model import Hydra

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def peaks(monkeypatch, fp32: float, bf16: float) -> list:
    """Give the machine these rates -> the list of what is measured."""
    measured = []

    def matmul_peak(device, dtype, n=0):
        measured.append(dtype)
        return {torch.float32: fp32, torch.bfloat16: bf16}[dtype]

    monkeypatch.setattr(machine, "matmul_peak", matmul_peak)
    return measured


def capabilities(monkeypatch, **features: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)


# ---- device, precision, compilation


def test_the_device_is_what_was_asked_for_or_an_error(monkeypatch):
    for name in ("tpu", "cpu:1", "cuda:x", "cuda:99", "cuda99", "", "cuda:-1", "auto:0"):
        with pytest.raises(UserError, match=f"device='{name}'"):
            choose_device(name)
    assert choose_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(UserError, match="sees no such GPU"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == CUDA and choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="sees no such GPU"):
        choose_device("cuda:2")


def test_an_apple_gpu_is_eager_and_in_fp32_and_says_that_it_is_untested(monkeypatch):
    with pytest.raises(UserError, match="device='mps': torch .* sees no Apple GPU"):
        choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    mps = choose_device("mps")
    assert mps == torch.device("mps")
    assert choose_dtype("auto", mps, 768)[0] == torch.float32
    compiled, reason = choose_compile("auto", mps, 1e20)
    assert not compiled and "untested" in reason
    with pytest.raises(UserError, match="compile='on': an Apple GPU runs eager"):
        choose_compile("on", mps, 1e20)


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("NVIDIA L4", 121e12),
    ("NVIDIA L40S", 362e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A10G", 70e12), ("NVIDIA GB200", 2500e12),
    ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA GeForce GTX 1080", None), ("NVIDIA H100 MIG 1g.10gb", None),
    ("NVIDIA L40", None)])  # fmt: skip
def test_the_peak_of_the_data_sheet_is_found_by_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert datasheet_peak(CUDA, torch.bfloat16) == peak
    assert datasheet_peak(CUDA, torch.float32) == (peak and peak / 2)
    assert datasheet_peak(CPU, torch.bfloat16) is None


def test_batches_are_made_once_a_step():
    made = []

    def make(step):
        made.append(step)
        return [(torch.tensor([step]), torch.tensor([step + 1]))]

    batches = Prefetch(make, CPU)
    for step in (0, 0, 1, 2, 2, 7):
        ((x, y),) = batches(step)
        assert (x.item(), y.item()) == (step, step + 1)
    assert made == [0, 1, 2, 7]


@pytest.mark.parametrize("features, least", [({"amx_bf16"}, 256), ({"avx512_bf16", "amx_bf16"}, 256),
                                             ({"avx512_bf16"}, 128)])  # fmt: skip
def test_bf16_where_a_cpu_has_it_and_a_model_earns_it(monkeypatch, features, least):
    capabilities(monkeypatch, **dict.fromkeys(features, True))
    measured = peaks(monkeypatch, 1e11, 1e12)
    assert choose_dtype("auto", CPU, 768) == (torch.bfloat16, "this CPU has bf16 instructions")
    assert measured == [torch.bfloat16, torch.float32]
    assert choose_dtype("auto", CPU, least)[0] == torch.bfloat16
    measured.clear()
    dtype, reason = choose_dtype("auto", CPU, least - 1)
    assert dtype == torch.float32 and "narrow" in reason and measured == []


def test_no_bf16_where_a_cpu_lacks_it(monkeypatch):
    measured = peaks(monkeypatch, 1e11, 1e12)
    for features in ({}, {"avx2": True}, {"amx_bf16": False, "avx512_bf16": False}):
        capabilities(monkeypatch, **features)
        assert choose_dtype("auto", CPU, 768) == (torch.float32, "this CPU has no bf16 instructions")
    assert measured == []
    assert choose_dtype("bfloat16", CPU, 64) == (torch.bfloat16, "asked for")
    assert choose_dtype("float32", CUDA, 768) == (torch.float32, "asked for")


@pytest.mark.parametrize("rate, emulated", [(0.01, True), (0.29, True), (0.31, False), (2.0, False)])
def test_no_bf16_where_a_cpu_says_so_and_emulates_it(monkeypatch, rate, emulated):
    capabilities(monkeypatch, amx_bf16=True)
    peaks(monkeypatch, 1e11, rate * 1e11)
    dtype, reason = choose_dtype("auto", CPU, 768)
    assert (dtype == torch.float32) == emulated == ("slower than fp32 ones" in reason)


def test_a_gpu_is_asked_for_its_bf16(monkeypatch):
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported, **_: supported)
        chosen, reason = choose_dtype("auto", CUDA, 64)
        assert chosen == dtype and "this GPU has" in reason


@pytest.mark.parametrize("gxx, header", [(True, True), (True, False), (False, True), (False, False)])
def test_compilation_is_earned_and_needs_its_tools(tmp_path, monkeypatch, gxx, header):
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/bin/g++" if gxx and name == "g++" else None)
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(tmp_path))
    if header:
        (tmp_path / "Python.h").touch()
    able = gxx and header
    assert choose_compile("auto", CUDA, 10)[0] and not choose_compile("off", CUDA, 1)[0]
    short, reason = choose_compile("auto", CPU, 3e13)
    assert not short and "3e+13 FLOPs" in reason and "does not earn it back" in reason
    long, reason = choose_compile("auto", CPU, 1e14)
    assert long == able and ("no g++ or no Python.h" in reason) == (not able)
    assert choose_compile("off", CPU, 1e14) == (False, "asked for")
    if able:
        assert choose_compile("on", CPU, 1) == (True, "asked for")
    else:
        with pytest.raises(UserError, match="compile='on': there is no g.*or use compile=off"):
            choose_compile("on", CPU, 1)


def test_a_machine_says_all_that_was_chosen(monkeypatch):
    """The peak is of the chosen dtype; autocast follows it."""
    measured = peaks(monkeypatch, 5e9, 7e12)
    chosen = machine.choose_machine("cpu", "bfloat16", "off", 768, 1e20)
    assert chosen.device == CPU and chosen.dtype == torch.bfloat16 and not chosen.compiled and chosen.peak == 7e12
    assert measured == [torch.bfloat16] and "7,000 GFLOP/s" in chosen.facts["device"]
    assert chosen.facts["dtype"] == "torch.bfloat16 (asked for)" and chosen.facts["compile"] == "off (asked for)"
    a = torch.ones(2, 2)
    with chosen.autocast():
        assert (a @ a).dtype == torch.bfloat16
    plain = machine.choose_machine("cpu", "float32", "off", 768, 1e20)
    with plain.autocast():
        assert (a @ a).dtype == torch.float32
    assert plain.peak == 5e9 and torch.get_float32_matmul_precision() == "highest"


# ---- packed weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_map_is_the_plain_one(dtype):
    """Or there is a reason, in one line, why it is not used."""
    problem = machine.packing_problem(CPU, dtype)
    assert "\n" not in problem
    if problem:
        with pytest.raises(RuntimeError):
            PackedLinear(torch.zeros(16, 16, dtype=dtype))(torch.zeros(1, 16, dtype=dtype))
        return
    torch.manual_seed(0)
    weight, x = torch.randn(48, 32).to(dtype), torch.randn(3, 32).to(dtype)
    exact = x.double() @ weight.double().t()
    got = PackedLinear(weight)(x)
    bound = 1e-4 if dtype == torch.float32 else 0.2
    assert got.dtype == dtype and (got.double() - exact).abs().max() < bound


def fail_to_pack(monkeypatch, dtypes: tuple[torch.dtype, ...]) -> None:
    """What oneDNN does where it has no reorder for a dtype."""
    real = torch.ops.mkldnn._reorder_linear_weight

    def reorder(weight, *args):
        if weight.dtype in dtypes:
            raise RuntimeError("could not create a primitive descriptor for a reorder primitive\nat some/file.cpp:12")
        return real(weight, *args)

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", reorder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_cannot_be_packed_stays_as_it_is(monkeypatch, dtype):
    fail_to_pack(monkeypatch, (dtype,))
    torch.manual_seed(0)
    model = Hydra(shape()).eval().to(dtype)
    idx = torch.randint(257, (2, 12))
    with torch.no_grad():
        before = prefill(model, idx, new_state(model, 2, 20))
        tokens = torch.stack(list(generate(model, idx, 5, temperature=0)))
        name = str(dtype).removeprefix("torch.")
        problem = pack(model)
        assert problem == machine.packing_problem(CPU, dtype) == (
            f"oneDNN cannot pack {name} weights on this CPU "
            "(could not create a primitive descriptor for a reorder primitive)")
        assert not any(isinstance(module, PackedLinear) for module in model.modules())
        assert torch.equal(prefill(model, idx, new_state(model, 2, 20)), before)
        assert torch.equal(torch.stack(list(generate(model, idx, 5, temperature=0))), tokens)
    model.train()
    model(idx, idx).loss.backward()  # it can be trained still


def test_packing_is_refused_by_dtype_by_library_and_by_device(monkeypatch):
    assert "for a CPU" in machine.packing_problem(CUDA, torch.float32)
    fail_to_pack(monkeypatch, (torch.bfloat16,))
    assert "bfloat16" in machine.packing_problem(CPU, torch.bfloat16)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert machine.packing_problem(CPU, torch.float32) == "this torch has no oneDNN"


def test_packing_is_refused_where_only_the_product_fails(monkeypatch):
    def product(*_):
        raise RuntimeError("could not execute a primitive")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", product)
    assert "could not execute a primitive" in machine.packing_problem(CPU, torch.float32)


# ---- compiled blocks


@torch._dynamo.config.patch(recompile_limit=1)
def test_blocks_are_compiled_in_place_with_room_for_their_graphs():
    compiled = []

    class Block(nn.Module):
        def compile(self, **options):
            compiled.append((self, options))

    blocks = [Block(), Block()]
    machine.compile_blocks(blocks, 128)
    options = {"fullgraph": True, "dynamic": False, "backend": "inductor"}
    assert compiled == [(block, options) for block in blocks]
    assert torch._dynamo.config.recompile_limit == 128


# ---- peaks and names


def clock(monkeypatch, seconds_a_call: float) -> None:
    """A clock that moves by so much with each call that is timed."""
    now = [0.0]

    def seconds_of(call, device):
        call()
        now[0] += seconds_a_call
        return seconds_a_call

    monkeypatch.setattr(machine, "seconds_of", seconds_of)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])


@pytest.mark.parametrize("seconds, calls", [(0.1, 7), (1.5, 2), (3.0, 1)])
def test_slow_calls_are_timed_less_often(monkeypatch, seconds, calls):
    clock(monkeypatch, seconds)
    made = []
    assert machine.best_of_seven(lambda: made.append(1), CPU) == seconds and len(made) == calls


def test_the_best_time_is_the_shortest(monkeypatch):
    times = iter([3e-3, 1e-3, 2e-3, 5e-3, 4e-3, 6e-3, 7e-3])
    monkeypatch.setattr(machine, "seconds_of", lambda call, device: next(times))
    assert machine.best_of_seven(None, CPU) == 1e-3


def test_a_time_is_that_of_the_call(monkeypatch):
    """The device has finished before the clock is read, both times."""
    events = []
    ticks = iter([10.0, 12.5])
    monkeypatch.setattr(machine, "sync", lambda device: events.append("sync"))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: events.append("clock") or next(ticks))
    assert machine.seconds_of(lambda: events.append("call"), CPU) == 2.5
    assert events == ["sync", "clock", "call", "sync", "clock"]


def test_on_cuda_a_time_is_between_two_events_of_the_devices_stream(monkeypatch):
    """What was before has ended; the present device may be another one."""
    device = torch.device("cuda:1")
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            log.append(("record", stream))

        def synchronize(self):
            log.append("ended")

        def elapsed_time(self, other):
            assert other is not self
            return 2500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("sync"))
    assert machine.seconds_of(lambda: log.append("call"), device) == 2.5
    record = ("record", "stream of cuda:1")
    assert log == ["sync", record, "call", record, "ended"]


def test_copies_between_two_uses_of_one_are_twice_the_cache(monkeypatch):
    x = torch.randn(4, 8)
    assert machine.cache_bytes(CPU) == 0 and [t is x for t in machine.cold_copies(x, 0)] == [True]
    found = machine.cold_copies(x, 100)
    assert len({t.data_ptr() for t in found}) == len(found) == 3 and found[0] is x
    assert sum(t.nbytes for t in found[1:]) >= 2 * 100 and all(torch.equal(t, x) for t in found)
    assert len(machine.cold_copies(x, 10**9)) == machine.MAX_COPIES
    gpu = SimpleNamespace(L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: {"cuda:1": gpu}[str(device)])
    assert machine.cache_bytes(torch.device("cuda:1")) == 50 * 2**20


def test_memory_on_a_cpu_needs_linux(monkeypatch):
    monkeypatch.setattr(machine.Path, "exists", lambda self: False)
    with pytest.raises(UserError, match="memory on a CPU is read from Linux's /proc"):
        machine.memory_of(lambda: None, CPU)


def test_peaks_are_operations_and_bytes_over_seconds(monkeypatch):
    shapes = []

    def best_of_seven(call, device):
        shapes.append(call())
        return 2.0

    monkeypatch.setattr(machine, "best_of_seven", best_of_seven)
    assert machine.matmul_peak(CPU, torch.float32, 64) == 2 * 64**3 / 2
    assert shapes[0].shape == (64, 64)
    assert machine.copy_bandwidth(CPU) == shapes[1].nbytes  # read and written, in two seconds
    assert shapes[1].nbytes == 2**28


def test_this_machine_has_a_name_peaks_and_memory(monkeypatch):
    found = machine.describe(CPU)
    assert found["device"] == "cpu" and found["gpu"] is None and found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads() and found["python"] == platform.python_version()
    assert found["cpu"] and found["cpu"] == found["cpu"].strip() and "\n" not in found["cpu"]
    assert 1e6 < machine.matmul_peak(CPU, torch.float32, 64) < 1e14
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < machine.free_memory(CPU) <= total
    monkeypatch.setattr(machine.Path, "exists", lambda self: False)  # a system without /proc
    assert machine.free_memory(CPU) == total and machine.describe(CPU)["cpu"] == platform.machine()


def test_free_memory_is_what_the_system_calls_available(monkeypatch):
    text = "MemTotal:       16000 kB\nMemFree:   100 kB\nMemAvailable:    5000 kB\nBuffers:  1 kB\n"
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert machine.free_memory(CPU) == 5000 * 1024
