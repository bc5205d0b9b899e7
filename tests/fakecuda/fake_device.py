"""A CUDA device that is not there: enough of one that torch.compile writes its kernels for it and a whole training step
runs on fake tensors, on a machine without a GPU and with a torch for CPUs. For tests only, see test_fakecuda.py.

How: `install` answers what torch, Inductor and Triton ask about a GPU, and shim.cpp, loaded before torch, what autograd
asks. Fake tensors have shapes, dtypes and devices, but no memory. The code that Inductor writes is really run on them,
but a Triton kernel is recorded where it would be launched, and a `Recorder` sees every operator around these kernels.

It proves: a block is one graph without a break, all that its backward needs is there in the right shapes and dtypes;
how many launches a block and a step are, how many bytes they write, and where the host would wait for the device; and,
by Triton's own assembler (`resources`), the registers, stack and shared memory of a kernel.
It cannot prove any number, time or peak of memory, nor that a kernel can be launched. That takes a GPU.

Inductor's patterns for padded products and for attention are left out, since it traces them on a real GPU. An operator
of ATen counts as one launch, though some are several (topk, sort, the embedding's gradient, a _foreach_ or _fused_
operator over many tensors), and one that this torch composes of others for want of a CUDA kernel (the final RMSNorm)
counts as those. A reduction over long rows moves its input once for each loop over them, whatever a cache would spare.
So these counts are for bounds, not for comparing with a profiler's.
Private names of the pinned torch and triton are used here and nowhere else.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch._dynamo.device_interface
import torch._functorch.config
import torch._inductor.async_compile
import torch._inductor.fx_passes.joint_graph
import torch._inductor.runtime.triton_heuristics
import torch._inductor.utils
import torch.utils._foreach_utils
import triton
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import _load_triton_kernel_from_source
from torch._inductor.output_code import CompiledFxGraph
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget

# bytes of shared memory that one block of threads may have, by compute capability
SHARED = {(9, 0): 227 * 1024, (8, 9): 99 * 1024}
# operators that launch nothing, besides views
NO_LAUNCH = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias",
             "lift_fresh", "set_", "resize_")  # fmt: skip
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmm_")
# arguments that FlexAttention's templates write to, besides those that Inductor names out_ptr
FORWARD_RESULTS, BACKWARD_RESULTS = ["arg_LSE"], ["arg_DQ", "arg_DV"]
COPY = ("_to_copy", "copy_")  # between devices


class Launch(NamedTuple):
    """A kernel or an operator, at the place where a GPU would be given it."""

    kind: str  # triton, product, or other: any other operator of ATen
    name: str
    graph: int | None  # which call of a compiled graph it is a part of
    written: int  # bytes of its results
    moved: int  # the same and those of its arguments


def size_of(values: Iterable) -> int:
    """Bytes of the tensors among `values`, each counted as what it shows, not as the storage behind it."""
    return sum(t.numel() * t.element_size() for t in values if isinstance(t, Tensor))


class Recorder(TorchDispatchMode):
    """While it is entered: `launches` in their order, and `waits`, the copies between host and device. (What asks for a
    number, such as item() or a mask as an index, fails: fake tensors have none.)"""

    current: "Recorder | None" = None

    def __init__(self):
        super().__init__()
        self.launches: list[Launch] = []
        self.waits: list[str] = []
        self.graph: int | None = None
        self.graphs = 0  # calls so far

    def record(self, kind: str, name: str, written: list, given: Iterable) -> None:
        self.launches.append(Launch(kind, name, self.graph, size_of(written), size_of(given)))

    def __enter__(self):
        Recorder.current = self
        return super().__enter__()

    def __exit__(self, *error):
        Recorder.current = None
        return super().__exit__(*error)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled code is run, not skipped, while this mode is active

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if func.namespace == "prim":
            return func(*args, **kwargs)
        read = (args, {key: value for key, value in kwargs.items() if key != "out"})
        given = [t for t in tree_leaves(read) if isinstance(t, Tensor)]
        result = func(*args, **kwargs)
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if name in COPY and len({t.device.type for t in (*given, *results)}) > 1:
            self.waits.append(name)
        if any(t.is_cuda for t in (*given, *results)) and not func.is_view and name not in NO_LAUNCH:
            self.record("product" if name in PRODUCTS else "other", name, results, (*given, *results))
        return result


class Kernel:
    """Stands where Inductor's code has a compiled Triton kernel."""

    sources: dict[str, str] = {}  # of all kernels that were made, by their names

    def __init__(self, name: str, source: str):
        self.name = name
        self.source = self.sources[name] = source
        self.arguments = re.search(rf"def {name}\((.*?)\)", source, re.DOTALL)[1].split(", ")
        self.results = [argument for argument in self.arguments if re.match("(in_)?out_ptr", argument)]
        self.results += BACKWARD_RESULTS if "arg_DO" in self.arguments else FORWARD_RESULTS

    def run(self, *values, stream: int) -> None:
        tensors = list(zip(self.arguments, values, strict=False))  # the sizes and the grid follow
        written = [value for argument, value in tensors if argument in self.results]
        if Recorder.current:
            updated = [value for argument, value in tensors if argument.startswith("in_out_ptr")]  # read and written
            again = [value for argument, value in tensors for _ in range(self.passes(argument) - 1)]
            Recorder.current.record("triton", self.name, written, (*values, *updated, *again))

    def passes(self, argument: str) -> int:
        """How often a reduction over long rows reads an argument: once in each loop over the row."""
        return max(1, len(re.findall(rf"tl\.load\({argument} \+ .*r0_\d.*r0_mask", self.source)))


def call_graph(call, graph: CompiledFxGraph, inputs):
    """A call of a compiled graph, whose launches know that they are a part of it."""
    recorder = Recorder.current
    if recorder is None:
        return call(graph, inputs)
    recorder.graph = recorder.graphs
    recorder.graphs += 1
    results = call(graph, inputs)
    recorder.graph = None
    return results


def resources(name: str, source: str) -> dict[str, int]:
    """A kernel, assembled for the installed device -> bytes of shared memory, registers and bytes of stack a thread:
    what is spilled lies on the stack. The largest of each, if there are several configurations to choose from."""
    kernel = _load_triton_kernel_from_source(name, source)
    kernel.precompile(warm_cache_only=True)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found = []
    for result in kernel.compile_results:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(result.kernel.asm["cubin"])
            file.flush()
            text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
        shared = result.kernel.metadata.shared
        found.append({"shared": shared, "registers": int(registers), "stack": int(stack)})
    return {key: max(values[key] for values in found) for key in found[0]}


def install(capability: tuple[int, int]) -> None:
    """From here on torch has one GPU of this compute capability."""
    answer_for_cuda(capability)
    answer_for_triton(capability)
    change_inductor()


def answer_for_cuda(capability: tuple[int, int]) -> None:
    """What torch.cuda and Dynamo's view of it tell."""
    properties = SimpleNamespace(
        name="none", major=capability[0], minor=capability[1], multi_processor_count=132, total_memory=80 << 30,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
        shared_memory_per_block=48 * 1024, shared_memory_per_block_optin=SHARED[capability],
        shared_memory_per_multiprocessor=SHARED[capability] + 1024, L2_cache_size=50 << 20, gcnArchName="",
        clock_rate=1980000, memory_clock_rate=2619000, memory_bus_width=5120, is_integrated=0, uuid="none")  # fmt: skip
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "set_device": None, "synchronize": None,
        "get_device_properties": properties, "get_device_capability": capability, "is_bf16_supported": True,
        "get_device_name": "none", "_lazy_init": None, "get_rng_state": torch.empty(0), "set_rng_state": None,
        "is_initialized": True, "memory_allocated": 0,
        "_exchange_device": 0, "_maybe_exchange_device": 0, "current_stream": SimpleNamespace(cuda_stream=0),
    }  # fmt: skip
    interface = torch._dynamo.device_interface.CudaInterface
    for name, value in answers.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
        setattr(interface, name.removeprefix("_"), staticmethod(getattr(torch.cuda, name)))
    interface.get_raw_stream = staticmethod(lambda _: 0)
    interface.Worker.current_device = staticmethod(lambda: 0)
    interface.Worker.get_device_properties = staticmethod(lambda *_: properties)
    torch._dynamo.device_interface.device_interfaces.clear()
    torch._dynamo.device_interface._device_initialized = False
    torch.version.cuda = "12.8"
    torch._C._cuda_getCurrentRawStream = lambda _: 0
    torch._C._CudaDeviceProperties = SimpleNamespace


def answer_for_triton(capability: tuple[int, int]) -> None:
    """A driver that knows its target."""
    shared = {"max_shared_mem": SHARED[capability], "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}
    driver = SimpleNamespace(
        binary_ext="cubin", get_current_target=lambda: GPUTarget("cuda", 10 * capability[0] + capability[1], 32),
        get_current_device=lambda: 0, get_current_stream=lambda *_: 0, get_device_interface=lambda: torch.cuda,
        get_active_torch_device=lambda: torch.device("cuda", 0), launcher_cls=None,
        utils=SimpleNamespace(get_device_properties=lambda _: shared))  # fmt: skip
    triton.runtime.driver.set_active(driver)
    for module in (torch._inductor.runtime.triton_helpers, torch._inductor.runtime.triton_heuristics.triton_helpers):
        module.set_driver_to_gpu = lambda: None


def change_inductor() -> None:
    """Its code allocates fake tensors, and has a `Kernel` for each Triton kernel."""
    guards = torch._C._dynamo.guards
    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda")  # fmt: skip
    guards._reinterpret_tensor = lambda t, size, stride, offset=0: t.as_strided(
        size, stride, t.storage_offset() + offset)  # fmt: skip
    guards.assert_alignment = lambda *_: None  # an address
    torch._inductor.utils.copy_misaligned_inputs = lambda *_: ([], [])
    AsyncCompile.triton = lambda _, name, source, device_str="cuda": Kernel(name, source)
    torch._inductor.fx_passes.joint_graph.lazy_init = lambda *_: None  # its patterns are traced on a real GPU
    call = CompiledFxGraph.__call__
    CompiledFxGraph.__call__ = lambda graph, inputs: call_graph(call, graph, inputs)
    config = torch._inductor.config
    config.compile_threads = 1
    config.use_static_triton_launcher = False  # it drops the assembled kernels
    config.fx_graph_cache = False
    config.joint_graph_constant_folding = False
    torch.utils._foreach_utils._foreach_supported_types.append(FakeTensor)
    torch._functorch.config.enable_autograd_cache = False
