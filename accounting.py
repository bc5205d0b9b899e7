"""What a model costs, counted from its own modules on the meta device, where nothing is allocated: parameters, FLOPs,
bytes of a decoding state; and the memory of a training step, counted by running it on tensors without numbers. The
tests hold it against closed formulas of the shapes, and against measured peaks.
A product with a matrix costs two FLOPs a number of it; norms, rotations and softmax are left out.
"""

import functools
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attention import Attention
from machine import choose_compile, choose_device, choose_dtype, compile_blocks, free_memory, total_memory
from model import Block, Hydra, HydraConfig
from routing import layer_tokens, recursion_tokens


@functools.lru_cache(maxsize=32)
def skeleton(config: HydraConfig) -> Hydra:
    """The model without its numbers."""
    with torch.device("meta"):
        return Hydra(config)


def count_params(module: torch.nn.Module | HydraConfig) -> int:
    """Parameters of a module, or of a configuration's model; the head is the embedding."""
    if isinstance(module, HydraConfig):
        module = skeleton(module)
    return sum(p.numel() for p in module.parameters())


def one_of_each(config: HydraConfig) -> dict[str, Block]:
    """A block without numbers of every letter in use."""
    with torch.device("meta"):
        return {letter: Block(letter, config) for letter in set(config.layers)}


def matrix_flops(module: torch.nn.Module) -> int:
    """FLOPs per token of a module's matrices and filters."""
    return sum(2 * p.numel() for p in module.parameters() if p.dim() > 1)


def pair_flops(attn: Attention, T: int) -> float:
    """Forward FLOPs per token of one attention's scores and of what they weigh, over the causal mean of T/2 keys, or of
    those in its window."""
    keys = T / 2
    if 0 < attn.window < T:
        keys = attn.window * (1 - attn.window / (2 * T))
    return 4 * keys * attn.score_width


def attention_flops(attn: Attention, T: int) -> float:
    """Forward FLOPs per token of one attention."""
    return matrix_flops(attn) + pair_flops(attn, T)


def layers_of(config: HydraConfig, T: int) -> list[tuple[Block, int]]:
    """The layers of every recursion, each with its tokens of a text of T, at the routers' training capacities."""
    blocks = [*skeleton(config).blocks] * config.mor_recursions
    return list(zip(blocks, layer_tokens(config, T), strict=True))


def layer_flops(config: HydraConfig, T: int) -> list[float]:
    """Forward FLOPs of `layers_of` one text."""
    return [n * (attention_flops(block.attn, n) + matrix_flops(block.mlp)) for block, n in layers_of(config, T)]


def flops_per_token(config: HydraConfig, T: int) -> float:
    """Forward FLOPs per token at T tokens, head included, at the training's capacities; training takes three times."""
    candidates = recursion_tokens(config.mor_recursions, T)
    scored = sum(candidates[:-1]) + len(skeleton(config).depth_routers) * sum(candidates)
    if config.router == "random":  # which looks at no token
        scored = 0
    layers = sum(layer_flops(config, T)) + 2 * config.dim * scored
    return 2 * config.dim * config.vocab_size + layers / T


def pair_flops_per_token(config: HydraConfig, T: int) -> float:
    """What of `flops_per_token` is `pair_flops`, which run at a rate of their own."""
    return sum(n * pair_flops(block.attn, n) for block, n in layers_of(config, T)) / T


def attention_state(attn: Attention, T: int) -> int:
    """Numbers that decoding keeps of one text of T tokens in one layer."""
    state = attn.new_state(1, T, torch.empty((), device="meta"))
    return sum(t.numel() for t in state.values())


def state_bytes(config: HydraConfig, T: int, itemsize: int = 2, allocated: bool = False) -> int:
    """Bytes of the decoding state of one text of T tokens over all layers. A routed layer holds the tokens that went
    through it: as many as in training if the causal rule keeps to it; up to T if not, which is what is `allocated`."""
    layers = layers_of(config, T)
    return itemsize * sum(attention_state(block.attn, T if allocated else n) for block, n in layers)


# ---- memory of a training step: the step itself is run on tensors without numbers, and what is alive is counted

PARTS = ("parameters", "gradients", "optimiser", "copies", "activations", "loss", "backward", "gathered")


def hidden(func: torch._ops.OpOverload, given: list[Tensor]) -> list[Tensor]:
    """What a kernel of a CPU allocates besides its result, where that is as large: logsumexp makes exp(x - max) as a
    whole, and an operand of another dtype is cast as a whole."""
    if func is torch.ops.aten.logsumexp.default:
        return [torch.empty_like(given[0])]
    if torch.Tag.pointwise not in func.tags:
        return []
    common = functools.reduce(torch.promote_types, [t.dtype for t in given])
    return [torch.empty_like(t, dtype=common) for t in given if t.dtype != common]


class Ledger(TorchDispatchMode):
    """Bytes of the storages that are alive, by part: those made from now on belong to `part` until they are freed."""

    def __init__(self, model: Hydra):
        super().__init__()
        self.part = "parameters"
        self.live = dict.fromkeys(PARTS, 0)
        self.held: dict[int, tuple[str, int]] = {}  # by storage
        self.history: list[dict[str, int]] = []  # `live` after every allocation
        for p in model.parameters():
            self.add(p)
            p.register_post_accumulate_grad_hook(lambda p: self.add(p.grad, "gradients"))
        self.history.clear()
        model.norm.register_forward_pre_hook(lambda *_: self.begin("loss"))  # what follows the trunk

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # it changes nothing, so that Dynamo may compile below it

    def begin(self, part: str) -> None:
        self.part = part
        self.history.append(dict(self.live))

    def add(self, t: Tensor, part: str = "") -> None:
        """Count the storage of `t` if it is new; put it under `part` where that is given."""
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self.held:
            self.held[key] = "", storage.nbytes()
            weakref.finalize(storage, self.move, key)
        elif not part:
            return
        self.move(key, part or self.part)
        self.history.append(dict(self.live))

    def move(self, key: int, part: str = "") -> None:
        """To another part, or out, where the storage is freed."""
        before, size = self.held.pop(key)
        if before:
            self.live[before] -= size
        if part:
            self.live[part] += size
            self.held[key] = part, size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inside = hidden(func, [t for t in args if isinstance(t, Tensor)])
        for t in inside:
            self.add(t)
        found = func(*args, **(kwargs or {}))
        cast = False  # of a weight, by autocast
        if args and isinstance(args[0], Tensor) and isinstance(found, Tensor):
            source = self.held.get(args[0].untyped_storage()._cdata, ("", 0))[0]
            cast = source == "parameters" and found.dtype != args[0].dtype
        for t in tree_leaves(found):
            if isinstance(t, Tensor):
                self.add(t, "copies" if cast else "")
        return found


def fused_chunk(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, grad_x_ND: Tensor,
                grad_weight_VD: Tensor) -> Tensor:  # fmt: skip
    """What `layers.loss_chunk` compiled writes: logits and their gradient, in the dtype of the products."""
    logits = x_ND @ weight_VD.t()
    grad = torch.empty_like(logits)
    grad_x_ND.copy_(grad @ weight_VD)
    grad_weight_VD.copy_(grad.t() @ x_ND)
    return targets_N.float()


@functools.lru_cache(maxsize=32)
def step_history(config: HydraConfig, B: int, T: int, dtype: torch.dtype, compiled: str, recompute: bool,
                 forwards: int) -> list[dict[str, int]]:  # fmt: skip
    """Bytes alive, by part, in the course of `forwards` forwards and backwards of B texts of T tokens, without the
    optimiser's. `compiled`: the device that the blocks are compiled for, "" = eager; they are cut into forward and
    backward by the partitioner that torch.compile uses, but their operations stay apart."""
    config = replace(config, attn_backend="sdpa", block_size=max(T, config.block_size))  # keeps what FlexAttention does
    with FakeTensorMode():
        model = Hydra(config)
        model.recompute = recompute
        if compiled:
            compile_blocks(model.blocks, 64 * config.mor_recursions, backend="aot_eager_decomp_partition")
        if compiled == "cuda":
            model.compiled_loss = fused_chunk
        batch = torch.zeros(2, B, T, dtype=torch.int64)
        ledger = Ledger(model)
        with ledger:
            for _ in range(forwards):
                ledger.begin("activations")
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    output = model(*batch)
                ledger.begin("backward")
                output.loss.backward()
            ledger.begin("")
    return ledger.history


def memory_plan(config: HydraConfig, batch: int, T: int, dtype: torch.dtype, compiled: str = "",
                recompute: bool = False, devices: int = 1, parallel: str = "ddp",
                forwards: int = 1) -> dict[str, int]:  # fmt: skip
    """Bytes of each of PARTS at the peak of a training step on each of `devices`, which share `batch` texts:
    - parameters, gradients (those alive at the peak; in DDP's buckets always) and AdamW's moments, fp32: fsdp shards
      them, except for gradients that several forwards add up, which are whole until the last one;
    - copies of the weights in bf16; activations that wait for the backward; logits and buffers of the loss; working
      memory of the backward;
    - gathered, with fsdp alone, instead of the copies: the root's weights in fp32 and `dtype`, those of two blocks (one
      in use, one on its way) in `dtype`, a block's whole gradient in `dtype` and fp32; by FSDP2's rules, not measured.
    An allocator's gaps, a library's work space and the device's context come on top."""
    history = step_history(config, batch // devices, T, dtype, compiled, recompute, min(2, forwards))
    model = skeleton(config)
    weights = 4 * count_params(model)
    blocks = [count_params(block) for block in model.blocks]
    shards = devices > 1 and parallel == "fsdp"
    root = count_params(model) - sum(blocks)
    gathered = 4 * root + max(blocks) * (3 * dtype.itemsize + 4)
    if dtype != torch.float32:
        gathered += root * dtype.itemsize
    moments = []
    for live in history:
        live = live | {"optimiser": 2 * weights}
        if shards:
            sharded = ("parameters", "optimiser") if forwards > 1 else ("parameters", "gradients", "optimiser")
            own = {name: math.ceil(live[name] / devices) for name in sharded}
            live |= own | {"copies": 0, "gathered": gathered}
        elif devices > 1:
            live["gradients"] = weights
        moments.append(live)
    return max(moments, key=lambda live: sum(live.values()))


def least_memory(config: HydraConfig, batch: int, forwards: int, masked: bool, devices: int = 1,
                 parallel: str = "ddp") -> int:  # fmt: skip
    """Bytes below which no training step is, whatever the precision: a bound of `memory_plan` that is known at once,
    for shapes that it would take hours to count. Weights, gradients and moments; token ids of all `forwards`; inputs of
    the blocks that see all tokens; where SDPA is `masked` by pairs of tokens, a mask."""
    rows, T = batch // devices, config.block_size
    blocks = one_of_each(config)
    params = config.vocab_size * config.dim
    for letter, block in blocks.items():
        params += config.layers.count(letter) * count_params(block)
    shards = devices if parallel == "fsdp" else 1
    least = 16 * params // shards + 16 * rows * T * forwards + 4 * rows * T * config.dim * ((config.n_layer + 1) // 2)
    if masked and config.doc_mask:
        least += rows * T * T
    elif masked and any(0 < block.attn.window < T < 4 * block.attn.window for block in blocks.values()):
        least += T * T
    return least


def plan_lines(config: HydraConfig, run, flops: float) -> Iterator[str]:
    """`memory_plan` of a run (a TrainConfig) of `flops` FLOPs on 1, 2, 4 .. devices, as many as divide its batch, and
    which of it this machine's device has room for. --device=cuda plans for a GPU where there is none, too."""
    absent = run.device == "cuda" and not torch.cuda.is_available()
    device = torch.device("cuda") if absent else choose_device(run.device)
    dtype = torch.bfloat16
    if run.dtype != "auto" or not absent:
        dtype, _ = choose_dtype(run.dtype, device, config.dim)
    compiled = device.type if choose_compile(run.compile, device, flops)[0] else ""
    free = math.nan if absent else free_memory(device)
    T = config.block_size
    how = f"compiled for {compiled}" if compiled else "eager"
    yield "Memory of each device at the peak of a training step, in GB; an allocator's gaps come on top. In a forward"
    yield f"{run.batch_size} texts of {T} tokens, {dtype}, {how}, recompute={run.recompute}"
    yield " ".join(f"{name:>11}" for name in ("devices", "parallel", *PARTS, "total", "fits"))
    devices = 1
    while run.batch_size % devices == 0:
        for parallel in ("ddp", "fsdp") if devices > 1 else ("none",):
            plan = memory_plan(config, run.batch_size, T, dtype, compiled, run.recompute == "block", devices, parallel,
                               run.gradient_accumulation_steps)  # fmt: skip
            total = sum(plan.values())
            fits = "not known" if absent else "yes" if total < free else "no"
            cells = [devices, parallel, *(f"{size / 1e9:.3f}" for size in (*plan.values(), total)), fits]
            yield " ".join(f"{cell:>11}" for cell in cells)
        devices *= 2
    if not absent:
        yield f"{device} has {total_memory(device) / 1e9:.1f} GB, {free / 1e9:.1f} GB of them free now"


def step_bytes(config: HydraConfig, B: int, T: int, copies: int) -> tuple[int, int]:
    """Bytes that are kept (`copies` of the weights in fp32) and what an eager step of B texts in fp32 needs besides,
    without gradients."""
    plan = memory_plan(config, B, T, torch.float32)
    return plan["parameters"] * copies, plan["activations"] + plan["loss"] + plan["backward"]


def step_bound(config: HydraConfig, B: int, T: int) -> int:
    """Bytes that a training step stays well below: where there is room for so many, `memory_plan` is not worth its
    seconds."""
    return 256 * B * T * config.dim * config.n_layer * config.mor_recursions + 40 * count_params(config)
