"""Timings of HYDRA: `python bench.py [decode] [--key=value ...]`. Shape: config/small.toml with random weights.

- decode: generation with states against without, this hybrid against the MHA baseline of the same code, and with
  --peers (needs transformers, which is for development only) against a Llama of equal width, depth and parameters.

Everything that is compared runs in one process, in turns, and the median counts. Absolute times of a shared CPU mean
little, ratios more.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from configurator import UserError, build, cli, need, parse, to_toml
from model import Hydra, HydraConfig, count_params, kv_bytes
from train import TrainConfig, copy_bandwidth, pick_device, sync, write_atomically

SMALL = Path(__file__).parent / "config" / "small.toml"


@dataclass(frozen=True)
class BenchConfig:
    """What to time; raises UserError, in one line, for values that cannot be."""

    prompt_tokens: int = 512  # length of the prompts
    new_tokens: int = 128  # tokens generated behind them
    context: int = 4096  # length of the past in the comparison of hybrid and MHA
    rounds: int = 12  # timed turns of every contestant, after one that is not counted
    peers: bool = False  # compare with transformers too
    json: str = ""  # also write the numbers to this file
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    seed: int = 1337  # of the weights and prompts

    def __post_init__(self):
        for name in ("prompt_tokens", "new_tokens", "context", "rounds"):
            need(self, name, getattr(self, name) >= 1, "it must be at least 1")


def in_turns(contestants: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every contestant in every round; one round of warm-up is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, call in contestants.items():
            sync(device)
            start = time.perf_counter()
            call()
            sync(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median of the ratios round by round: a slow phase of the machine is in both."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def decoder(model: Hydra, B: int, past: int, static: bool = False) -> Callable[[], None]:
    """One decode step of B rows at `past` tokens, in place. The state is random: its values do not change the time."""
    state = model.new_state(B, past + 1 if not static else 1 << past.bit_length())
    for layer in state.layers:
        for tensor in layer.values():
            tensor.normal_()
    token = torch.zeros(B, dtype=torch.int64, device=state.pos_B.device)

    def step() -> None:
        state.pos_B.fill_(past)
        state.visible = None if static or token.is_cuda else past
        model.decode(token, state)

    return step


def prefill_once(model: Hydra, prompts_BT: torch.Tensor, lengths_B: torch.Tensor) -> None:
    model.prefill(prompts_BT, lengths_B, model.new_state(*prompts_BT.shape))


def llama_like(c: HydraConfig, dtype: torch.dtype):
    """transformers' Llama of the same width, depth, heads and vocabulary, its MLP chosen for the same parameters."""
    try:
        import transformers
    except ImportError as error:
        raise UserError("--peers needs transformers, which is not installed: pip install transformers") from error
    attention = c.vocab_size * c.dim + c.n_layer * (4 * c.dim**2 + 2 * c.dim)
    hidden = round((count_params(c) - attention) / (3 * c.dim * c.n_layer))
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=hidden, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_head, tie_word_embeddings=True,
        max_position_embeddings=8192, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def generation(model, prompts: torch.Tensor, new: int) -> Callable[[], None]:
    """A whole greedy generation of `new` tokens, ours or transformers'."""

    def ours() -> None:
        for _ in model.generate(prompts, new, temperature=0.0):
            pass

    def theirs() -> None:
        model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new,
                       do_sample=False)  # fmt: skip

    return ours if isinstance(model, Hydra) else theirs


@torch.no_grad()
def decode_table(c: HydraConfig, b: BenchConfig, device: torch.device) -> list[dict]:
    rows = []
    mha = replace(c, pattern="A")
    copy = copy_bandwidth(device)
    print(f"copy bandwidth {copy / 1e9:.1f} GB/s; {count_params(c):,} parameters, {mha.layers[0]}-baseline "
          f"{count_params(mha):,}; state at {b.context} tokens in bf16 {kv_bytes(c, b.context) / 1e6:.1f} MB, "
          f"{kv_bytes(mha, b.context) / 1e6:.1f} MB", flush=True)  # fmt: skip
    print(f"\n{'dtype':9}{'batch':>6}{'ms/token':>10}{'tokens/s':>10}{'GB/s':>7}{'of copy':>9}"
          f"{'compiled':>10}{'of copy':>9}{'(a) states':>12}{f'(b) at {b.context}':>13}{'(c) Llama':>11}"
          f"{'compiled':>10}", flush=True)  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(b.seed)
        model, baseline, compiled = (Hydra(x).to(device, dtype).eval() for x in (c, mha, c))
        model.pack()
        baseline.pack()
        compiled.compile_decoding()
        peer = llama_like(c, dtype).to(device) if b.peers else None
        for B in (1, 8):
            prompts = torch.randint(0, c.vocab_size, (B, b.prompt_tokens), device=device)
            middle = torch.randint(0, c.vocab_size, (B, b.prompt_tokens + b.new_tokens // 2), device=device)
            lengths = torch.full((B,), b.prompt_tokens, device=device)
            steps = {"eager": decoder(model, B, middle.size(1))}
            if B == 1 or device.type == "cuda":  # on a CPU compiled is for one row
                steps["compiled"] = decoder(compiled, B, middle.size(1), static=True)
            t = in_turns(steps, b.rounds, device)
            ms = statistics.median(t["eager"])
            size = count_params(c) * dtype.itemsize + B * kv_bytes(c, middle.size(1), dtype.itemsize)
            row = {"dtype": str(dtype), "batch": B, "ms": ms * 1e3, "tokens_per_s": B / ms, "GB_per_s": size / ms / 1e9,
                   "of_copy": size / ms / copy}  # fmt: skip
            if "compiled" in t:
                row["compiled_ms"] = statistics.median(t["compiled"]) * 1e3
                row["compiled_of_copy"] = size / row["compiled_ms"] * 1e3 / copy
            # (a) all tokens with states, prefill included, against a full forward at the mean length for each
            once = {"prefill": partial(prefill_once, model, prompts, lengths), "uncached": partial(model, middle)}
            t = in_turns(once, 3 if B == 1 else 1, device)
            prefill, uncached = statistics.median(t["prefill"]), statistics.median(t["uncached"])
            row["a_states"] = b.new_tokens * uncached / (prefill + (b.new_tokens - 1) * ms)
            past = {"hybrid": decoder(model, B, b.context), "MHA": decoder(baseline, B, b.context)}
            t = in_turns(past, b.rounds, device)
            row["b_mha"] = ratio(t["MHA"], t["hybrid"])
            if peer:
                all_ = {"ours": model, "peer": peer} | ({"compiled": compiled} if "compiled" in steps else {})
                t = in_turns({name: generation(m, prompts, b.new_tokens) for name, m in all_.items()}, 2, device)
                row["c_llama"] = ratio(t["peer"], t["ours"])
                if "compiled" in t:
                    row["c_llama_compiled"] = ratio(t["peer"], t["compiled"])
                row["peer_tokens_per_s"] = B * b.new_tokens / statistics.median(t["peer"])
            rows.append(row)
            nan = float("nan")  # not measured
            print(f"{str(dtype).removeprefix('torch.'):9}{B:6}{row['ms']:10.1f}{row['tokens_per_s']:10.1f}"
                  f"{row['GB_per_s']:7.1f}{row['of_copy']:9.0%}{row.get('compiled_ms', nan):10.1f}"
                  f"{row.get('compiled_of_copy', nan):9.0%}{row['a_states']:11.1f}x{row['b_mha']:12.2f}x"
                  f"{row.get('c_llama', nan):10.2f}x{row.get('c_llama_compiled', nan):9.2f}x", flush=True)  # fmt: skip
    return rows


def main(argv: list[str]) -> int:
    table = argv[0] if argv and not argv[0].startswith("-") else "decode"
    if table != "decode":
        raise UserError(f"unknown table {table!r}: use decode")
    given = parse([a for a in argv if a != table], HydraConfig, BenchConfig, doc=__doc__)
    shape = parse([str(SMALL)], HydraConfig, TrainConfig)
    base = {name: value for name, value in shape.items() if name in asdict(HydraConfig())}
    c, b = build(given, HydraConfig, BenchConfig, base=base)
    c = replace(c, block_size=max(c.block_size, b.prompt_tokens + b.new_tokens))
    device = pick_device(b.device)
    where = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else where
    print(f"decode on {device} ({where}), torch {torch.__version__}, {b.prompt_tokens} + {b.new_tokens} tokens")
    rows = decode_table(c, b, device)
    print("(a) one generation without states over with; (b) MHA's time over the hybrid's; (c) transformers' generate "
          "over ours")  # fmt: skip
    if b.json:
        result = {"device": str(device), "where": where, "torch": torch.__version__, "config": to_toml(c, b)}
        result |= {"decode": rows}
        write_atomically(Path(b.json), lambda temporary: temporary.write_text(json.dumps(result, indent=1)))
    return 0


if __name__ == "__main__":
    cli(main)
