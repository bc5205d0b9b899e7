"""Continue texts with a trained HYDRA: `python sample.py [--out_dir=out] --prompt=def`.

- Several prompts: repeat --prompt=..., or --prompt_file with one a line; --num_samples continuations of each. They are
  generated in one batch; the first is printed as it comes, the others below it.
- Temperature, top-k and nucleus (top-p, arXiv:1904.09751) sampling; a seed makes it repeatable.
- On stderr at the end: tokens/s, the bytes/s that decoding read, as a part of this machine's copy bandwidth, and the
  size of the decoding state.
"""

import codecs
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from configurator import UserError, build, cli, need, parse
from data import decode, get_tokenizer, token_text
from model import Decoding, Hydra, HydraConfig, check_sampling, count_params, kv_bytes
from train import copy_bandwidth, load_checkpoint, pick_compile, pick_device, pick_dtype, sync


@dataclass(frozen=True)
class SampleConfig:
    """What to generate from which checkpoint; raises UserError, in one line, for values that cannot be."""

    out_dir: str = "out"  # folder of the run
    checkpoint: str = "best"  # which of its checkpoints: best (lowest validation loss) or last
    prompt: str = "import"  # text to go on from; may be given several times
    prompt_file: str = ""  # a text file of prompts, one a line, instead; blank lines do not count
    num_samples: int = 1  # continuations of each prompt
    max_new_tokens: int = 200  # tokens to generate; an end of text ends it earlier
    temperature: float = 0.8  # above 1 flattens the distribution, below 1 sharpens it, 0 takes the likeliest token
    top_k: int = 0  # sample among this many likeliest tokens, 0 = all
    top_p: float = 0.95  # and among the fewest that hold this much probability, 1 = all
    seed: int = 1337  # of the sampling
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    dtype: str = "auto"  # auto, float32 or bfloat16 (of the weights too)
    compile: str = "off"  # on = compile the decode step: 10-20 s once; on a CPU for a single long text

    def __post_init__(self):
        need(self, "checkpoint", self.checkpoint in ("best", "last"), "use best or last")
        need(self, "dtype", self.dtype in ("auto", "float32", "bfloat16"), "use auto, float32 or bfloat16")
        need(self, "compile", self.compile in ("on", "off"), "use on or off")
        need(self, "num_samples", self.num_samples >= 1, "it must be at least 1")
        need(self, "seed", 0 <= self.seed < 2**63, "choose one from 0 to 2**63 - 1")
        check_sampling(self.max_new_tokens, self.temperature, self.top_k, self.top_p)


def read_prompts(path: str) -> list[str]:
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt_file={path!r}: {error}: give a UTF-8 text file with one prompt a line") from error
    if not lines:
        raise UserError(f"prompt_file={path!r}: it is blank: give a text file with one prompt a line")
    return lines


def load_model(c: SampleConfig, device: torch.device):
    """(model in the dtype that it will run in, its tokenizer) of the run's checkpoint."""
    path = Path(c.out_dir) / f"{c.checkpoint}.pt"
    if not path.exists() and path.with_name("last.pt").exists():
        raise UserError(f"{path} does not exist, the run was not evaluated yet: use --checkpoint=last")
    checkpoint = load_checkpoint(path, device)
    # the core that trained may not run here, eager and on another device
    config = replace(HydraConfig(**checkpoint["model_config"]), attn_backend="auto")
    model = Hydra(config).to(device).eval()
    model.load_state_dict(checkpoint["model"])
    dtype, _ = pick_dtype(c.dtype, device, config.dim)
    model.to(dtype)
    if c.compile == "on":
        model.compile_decoding()
    else:
        model.pack()
    return model, get_tokenizer(checkpoint["train_config"]["tokenizer"])


def report(
    model: Hydra, state: Decoding, prompts: list[int], made: int, steps: int, seconds: float, copy: float
) -> str:
    """How fast the tokens behind each row's first one came: `made` tokens in all, `steps` of them in the longest row,
    behind prompts of so many tokens; `copy` is the copy bandwidth in bytes/s."""
    size, read = model.embed.weight.element_size(), ""
    if not model.routing():  # which weights a routed token reads, and how often, is the routers' choice
        # a step reads all weights and what the states hold by then: on average half of the new tokens
        past = sum(kv_bytes(model.config, n + steps // 2, size) for n in prompts)
        rate = (steps - 1) * (count_params(model.config) * size + past) / seconds
        read = (f"{rate / 1e9:.3g} GB/s read of weights and state, {rate / copy:.0%} of this machine's copy bandwidth "
                f"({copy / 1e9:.1f} GB/s); ")  # fmt: skip
    return (f"{made} tokens, {(made - len(prompts)) / seconds:.1f} tokens/s, {read}the state holds "
            f"{state.bytes(filled=True):,} of {state.bytes():,} bytes")  # fmt: skip


def main(argv: list[str]) -> int:
    (c,) = build(parse(argv, SampleConfig, doc=__doc__), SampleConfig)
    given = [arg.partition("=")[2] if "=" in arg else argv[i + 1]
             for i, arg in enumerate(argv) if arg.partition("=")[0] == "--prompt"]  # fmt: skip
    prompts = read_prompts(c.prompt_file) if c.prompt_file else given or [c.prompt]
    prompts = [prompt for prompt in prompts for _ in range(c.num_samples)]
    device = pick_device(c.device)
    pick_compile(c.compile, device, 0)
    if c.compile == "on" and device.type == "cpu" and len(prompts) > 1:
        raise UserError(f"compile='on': on a CPU {len(prompts)} texts at once are slower compiled: use compile=off")
    model, enc = load_model(c, device)
    rows = [torch.tensor(enc.encode_ordinary(prompt) or [enc.eot_token]) for prompt in prompts]
    generator = torch.Generator(device).manual_seed(c.seed)
    slots = max(map(len, rows)) + c.max_new_tokens
    # beyond the block `generate` refuses: no reason to allocate for it
    fits = model.endless or slots <= model.config.block_size
    state = model.new_state(len(rows), slots) if fits else None
    if c.compile == "on" and fits and c.max_new_tokens > 1:  # compile now, so that the rate below is without it
        list(model.generate(rows, 2, state=model.new_state(len(rows), slots)))
    steps = model.generate(rows, c.max_new_tokens, c.temperature, c.top_k, c.top_p, enc.eot_token, generator,
                           state=state)  # fmt: skip

    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may be cut between two tokens
    texts: list[list[int]] = [[] for _ in rows]
    times, live = [], True
    for token_B in steps:
        sync(device)
        if not times:  # what cannot be generated has raised by now
            print(prompts[0], end="")
        times.append(time.perf_counter())
        tokens = token_B.tolist()
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        live = live and tokens[0] != enc.eot_token
        print(utf8.decode(token_text(enc, tokens[0])) if live else "", end="", flush=True)
    print(utf8.decode(b"", final=True) if times else prompts[0])
    ends = [text.index(enc.eot_token) if enc.eot_token in text else len(text) for text in texts]
    for prompt, text, end in list(zip(prompts, texts, ends, strict=True))[1:]:
        print("-" * 30 + f"\n{prompt}{decode(enc, text[:end])}")
    made = sum(min(end + 1, len(times)) for end in ends)  # an end of text is a token too, what follows it is not
    if len(times) > 1:
        seconds = times[-1] - times[0]  # the first token of each row is the prefill's
        lengths, copy = list(map(len, rows)), copy_bandwidth(device)
        print(report(model, state, lengths, made, len(times), seconds, copy), file=sys.stderr)
    else:
        print(f"{made} tokens, too few to time", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli(main)
