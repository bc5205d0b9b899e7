"""What a model costs, counted from its own modules on the meta device, where nothing is allocated: parameters, FLOPs,
bytes of a decoding state, roughly the memory of a step. The tests hold it against closed formulas of the shapes.
A product with a matrix costs two FLOPs a number of it; norms, rotations and softmax are left out.
"""

import functools

import torch

from attention import Attention
from model import Hydra, HydraConfig
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


def matrix_flops(module: torch.nn.Module) -> int:
    """FLOPs per token of a module's matrices and filters."""
    return sum(2 * p.numel() for p in module.parameters() if p.dim() > 1)


def attention_flops(attn: Attention, T: int) -> float:
    """Forward FLOPs per token of one attention, over the causal mean of T/2 keys, or of those in its window."""
    keys = T / 2
    if 0 < attn.window < T:
        keys = attn.window * (1 - attn.window / (2 * T))
    return matrix_flops(attn) + 4 * keys * attn.score_width


def layer_flops(config: HydraConfig, T: int) -> list[float]:
    """Forward FLOPs of every layer of every recursion for one text of T tokens, at the routers' training capacities."""
    blocks = [*skeleton(config).blocks] * config.mor_recursions
    found = []
    for n, block in zip(layer_tokens(config, T), blocks, strict=True):
        found.append(n * (attention_flops(block.attn, n) + matrix_flops(block.mlp)))
    return found


def flops_per_token(config: HydraConfig, T: int) -> float:
    """Forward FLOPs per token at T tokens, head included, at the training's capacities; training takes three times."""
    candidates = recursion_tokens(config.mor_recursions, T)
    scored = sum(candidates[:-1]) + len(skeleton(config).depth_routers) * sum(candidates)
    layers = sum(layer_flops(config, T)) + 2 * config.dim * scored
    return 2 * config.dim * config.vocab_size + layers / T


def attention_state(attn: Attention, T: int) -> int:
    """Numbers that decoding keeps of one text of T tokens in one layer."""
    state = attn.new_state(1, T, torch.empty((), device="meta"))
    return sum(t.numel() for t in state.values())


def state_bytes(config: HydraConfig, T: int, itemsize: int = 2, allocated: bool = False) -> int:
    """Bytes of the decoding state of one text of T tokens over all layers. A routed layer holds the tokens that went
    through it: as many as in training if the causal rule keeps to it; up to T if not, which is what is `allocated`."""
    blocks = [*skeleton(config).blocks] * config.mor_recursions
    tokens = [T] * len(blocks) if allocated else layer_tokens(config, T)
    return itemsize * sum(attention_state(block.attn, n) for n, block in zip(tokens, blocks, strict=True))


def step_bytes(config: HydraConfig, B: int, T: int, copies: int) -> tuple[float, float]:
    """Roughly the bytes that are kept (`copies` of the weights in fp32) and that a step of B texts needs besides."""
    activations = B * sum(layer_tokens(config, T)) * (16 * config.dim + 5 * config.mlp_hidden)
    logits = 3 * B * T * config.vocab_size
    return 4 * count_params(config) * copies, 4 * (activations + logits)
