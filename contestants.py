"""What bench.py and scaling.py time, each with a `step`: a part of a model, all of it, training, generation; and the
FLOPs of the step."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial, reduce
from itertools import cycle, pairwise

import torch
from torch import Tensor, nn

import machine
from accounting import attention_flops, flops_per_token, matrix_flops, skeleton
from attention import ccqa_heads
from generate import Replayed, compile_decoding, decode_step, new_state, pack, prefill, take_slot
from machine import DTYPES
from model import Hydra, HydraConfig
from routing import layer_tokens, recursion_tokens
from train import TrainConfig, make_optimizer, train_step

CYCLE = 24  # decode: tokens of a round, after which routers of 1 in 2, 3 or 8 have selected just that
GENERATING = ("decode", "prefill", "uncached")
WHOLE = ("model", "train", *GENERATING)  # levels with embedding and head


def subject(level: str, config: HydraConfig, T: int) -> HydraConfig:
    """The shape that is built for a level."""
    config = replace(config, block_size=max(T, config.block_size))
    if level in WHOLE:
        return config
    return replace(config, n_layer=len(config.pattern) if level == "macro" else 1, vocab_size=1)


class Contestant:
    """Something with a step, on random input, under autocast where `dtype` is bf16. Levels attention and block (of the
    pattern's first letter), macro (the pattern once), peer (ZayaAttention) and model (with embedding, head and loss):
    forward+backward. train: a training step. prefill, uncached: B texts of T tokens, into a new state or without one;
    decode: CYCLE tokens one by one behind T others. These have weights in `dtype`, and routers forced."""

    def __init__(self, level: str, config: HydraConfig, B: int, T: int, device: torch.device, dtype: str,
                 compiled: bool = False, run: TrainConfig | None = None):  # fmt: skip
        mixed = dtype == "bfloat16" and level not in GENERATING
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=mixed)
        self.net = net = Hydra(subject(level, config, T)).to(device)
        net.end_token = 0  # for doc_mask; the ids are random
        self.parts = list(net.blocks)  # what is compiled
        self.leaves = list(net.parameters())
        self.batch = torch.randint(0, net.config.vocab_size, (2, B, T), device=device)
        self.output = lambda: net(*self.batch).loss
        self.note = ""
        if level in GENERATING:
            self.take_generation(level, DTYPES[dtype], compiled)
        elif level == "train":
            run = run or TrainConfig()
            optimizer = make_optimizer(net, run)
            self.step = lambda: train_step(net, optimizer, [tuple(self.batch)], run.grad_clip, self.autocast)
        elif level != "model":  # the blocks, or one attention; the input has a gradient, as it does behind other layers
            x_BTD = torch.randn(B, T, config.dim, device=device)
            turns = cycle(machine.cold_copies(x_BTD, machine.cache_bytes(device)))
            inputs = (x.detach().requires_grad_() for x in turns)
            ctx = net.context(torch.arange(T, device=device))
            if level == "attention":
                self.parts = [net.blocks[0].attn]
            if level == "peer":
                self.parts = [zaya(net.config, ctx, B).to(device)]
            self.leaves = list(nn.ModuleList(self.parts).parameters())
            self.output = lambda: reduce(lambda y, part: part(y, ctx), self.parts, next(inputs))
        if level not in ("train", *GENERATING):
            self.grad = torch.randn_like(self.forward())
        if compiled and level == "decode":
            compile_decoding(net)
        elif compiled and level in WHOLE:
            net.compile_training()
        elif compiled:
            machine.compile_blocks(self.parts)

    def take_generation(self, level: str, dtype: torch.dtype, compiled: bool) -> None:
        net = self.net.to(dtype).eval()
        text_BT = self.batch[0]
        if text_BT.device.type == "cpu" and not compiled:
            problem = pack(net)
            self.note = f"plain weights are measured in prefill and decode: {problem}" if problem else ""
        force_routers(net)
        steps = {"uncached": partial(net, text_BT),
                 "prefill": lambda: prefill(net, text_BT, new_state(net, *text_BT.shape))}  # fmt: skip
        step = decoder(net, *text_BT.shape, compiled) if level == "decode" else steps[level]
        self.step = torch.no_grad()(step)

    def forward(self) -> Tensor:
        with self.autocast:
            return self.output()

    def step(self) -> None:
        self.forward().backward(self.grad)
        for leaf in self.leaves:
            leaf.grad = None


def zaya(config: HydraConfig, ctx, B: int) -> nn.Module:
    """transformers' CCQA of the same widths and taps, random weights (the tests hold the two equal), called as ours."""
    H, G, K = ccqa_heads(config)
    theirs = importlib.import_module("transformers").ZayaConfig(
        hidden_size=config.dim, num_attention_heads=H, num_key_value_heads=G, head_dim=K, num_hidden_layers=1,
        cca_time0=config.conv_kernel, cca_time1=config.conv_kernel, vocab_size=1, attn_implementation="sdpa")
    attn = importlib.import_module("transformers.models.zaya.modeling_zaya").ZayaAttention(theirs, 0)
    for p in attn.parameters():
        nn.init.normal_(p, std=0.02)
    [(cos, signed)] = ctx.rope.values()  # ours carries the half's sign
    rope = [t.squeeze(1).expand(B, -1, -1) for t in (cos, signed.chunk(2, dim=-1)[1].repeat(1, 1, 2))]
    plain = attn.forward
    attn.forward = lambda x, _: plain(x, position_embeddings=rope)[0]
    return attn


def force_routers(net: Hydra) -> None:
    """Routers that select their training capacity's part of the tokens, evenly: those of random weights select half."""
    each = pairwise(recursion_tokens(net.config.mor_recursions, 10**6))
    shares = [net.config.mod_capacity] * len(net.depth_routers) + [k / n for n, k in each]
    seen = [*range(len(shares))]  # tokens, by router; in decoding they do not all select the same ones

    def scores(x: Tensor, router: int, k: int, of: int) -> Tensor:
        n = torch.arange(seen[router], seen[router] + x.size(1), device=x.device)
        seen[router] += x.size(1)
        return (((n + 1) * k // of) - (n * k // of) - 0.5).expand(x.size(0), -1)

    for i, router in enumerate([*net.depth_routers, *net.recursion_routers]):
        k, of = Fraction(shares[i]).limit_denominator(1000).as_integer_ratio()
        router.forward = partial(scores, router=i, k=k, of=of)


def decoder(model: Hydra, B: int, past: int, compiled: bool = False) -> Callable[[], None]:
    """CYCLE decoding steps of B rows at `past` tokens, captured on CUDA. The state is random: values cost no time."""
    state = new_state(model, B, past + 1, compiled or model.embed.weight.is_cuda)
    step = partial(decode_step, model, torch.zeros_like(state.pos_B), state, uniform=not state.static)
    run = Replayed(step, state.pos_B.device) if state.pos_B.is_cuda else step
    tokens = layer_tokens(model.config, past)
    for layer in state.layers:
        for name in layer.keys() - {"count"}:
            layer[name].normal_()

    def call() -> None:
        for _ in range(CYCLE):
            state.tokens = past
            state.pos_B.fill_(past)
            for layer, n in zip(state.layers, tokens, strict=True):
                if "count" in layer:
                    layer["count"].fill_(n)
            run(take_slot(model, state))

    return call


def step_flops(level: str, config: HydraConfig, B: int, T: int) -> float:
    head = 2 * config.dim * config.vocab_size
    if level == "decode":  # the count is a mean over the text, which has T / 2 tokens before each one
        return B * flops_per_token(config, 2 * T)
    if level in GENERATING:  # the head sees a text's last token alone
        return B * (T * (flops_per_token(config, T) - head) + head)
    if level in WHOLE:
        return 3 * B * T * flops_per_token(config, T)
    blocks = skeleton(subject(level, config, T)).blocks
    mlp = matrix_flops(blocks[0].mlp) if level in ("block", "macro") else 0
    return 3 * B * T * sum(attention_flops(block.attn, T) + mlp for block in blocks)
