"""Continue texts with a trained HYDRA: `python sample.py [--out_dir=out] --prompt=def`.

Several prompts (repeat --prompt, or --prompt_file with one a line) and several continuations of each (--num_samples)
are generated in one batch; the first is printed as it comes, the others below it. How fast that was goes to stderr.
"""

import codecs
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import tiktoken
import torch
from torch import Tensor

from accounting import count_params, state_bytes
from checkpoints import load_checkpoint, load_weights
from configurator import AnyPath, UserError, build, cli, need, parse, usable_path
from data import stored_tokenizer, text_of, token_text
from files import Damaged, read_text
from generate import LEAST, DecodingState, check_sampling, compile_decoding, generate, longest_text, new_state, pack
from machine import DTYPES, choose_compile, choose_device, choose_dtype, copy_bandwidth, free_memory
from model import Hydra, HydraConfig


@dataclass(frozen=True)
class SampleConfig:
    """What to generate from which checkpoint; raises UserError for values that cannot be."""

    out_dir: AnyPath = "out"  # folder of the run
    checkpoint: str = "best"  # which of its checkpoints: best (lowest validation loss) or last
    prompt: tuple[str, ...] = ("import",)  # text to go on from; may be given several times
    prompt_file: AnyPath = ""  # a text file of prompts, one a line, instead; blank lines do not count
    num_samples: int = 1  # continuations of each prompt
    max_new_tokens: int = 200  # tokens to generate; an end of text ends it earlier
    temperature: float = 0.8  # above 1 flattens the distribution, below 1 sharpens it, 0 takes the likeliest token
    top_k: int = 0  # sample among this many likeliest tokens, 0 = all
    top_p: float = 0.95  # and among the fewest that hold this much probability, 1 = all
    seed: int = 1337  # of the sampling
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: str = "auto"  # auto, float32 or bfloat16 (of the weights too)
    compile: str = "off"  # on = compile the decode step: 10-20 s once; on a CPU for a single long text

    def __post_init__(self):
        need(self, "out_dir", len(self.out_dir) > 0, "name the folder of a run")
        need(self, "checkpoint", self.checkpoint in ("best", "last"), "use best or last")
        need(self, "dtype", self.dtype in ("auto", *DTYPES), "use auto, float32 or bfloat16")
        need(self, "compile", self.compile in ("on", "off"), "use on or off")
        need(self, "num_samples", self.num_samples >= 1, "it must be at least 1")
        need(self, "prompt", len(self.prompt) > 0, "give at least one")
        need(self, "seed", 0 <= self.seed < 2**63, "choose one from 0 to 2**63 - 1")
        check_sampling(self.max_new_tokens, self.temperature, self.top_k, self.top_p)


def read_prompts(path: str) -> list[str]:
    """The lines of a text file that are not blank."""
    text = read_text("prompt_file", path, " with one prompt a line")
    return [line for line in text.split("\n") if line.strip()]


def checkpoint_path(options: SampleConfig) -> Path:
    """UserError where that checkpoint is missing, with what there is instead."""
    folder = Path(options.out_dir)
    path = folder / f"{options.checkpoint}.pt"
    for name in (f"{options.checkpoint}.pt", "best.pt", "last.pt", "log.jsonl"):
        if not Path(usable_path(str(folder / name), "")).exists():
            continue
        if name == path.name:
            return path
        if name == "log.jsonl":
            raise UserError(f"{path} does not exist: the run in {folder} has not written a checkpoint yet, as it does "
                            "every eval_interval: train on, or name another run with --out_dir")  # fmt: skip
        raise UserError(f"{path} does not exist, but {name} does: use --checkpoint={name.removesuffix('.pt')}")
    raise UserError(f"{path} does not exist: train first, or name the run's folder with --out_dir=PATH")


def read_model(options: SampleConfig, device: torch.device) -> tuple[Hydra, tiktoken.Encoding, list[str]]:
    """`load_model`; Damaged where the checkpoint is."""
    path = checkpoint_path(options)
    checkpoint, notes = load_checkpoint(path, {"model_config": HydraConfig}, device)
    enc = stored_tokenizer(checkpoint["train_config"]["tokenizer"], checkpoint["tokenizer"])
    # the core that trained may not run here, eager and on another device
    (config,) = build(checkpoint["model_config"] | {"attn_backend": "auto"}, HydraConfig)
    model = Hydra(config).to(device).eval()
    model.end_token = enc.eot_token
    load_weights(model, checkpoint, path)
    dtype, _ = choose_dtype(options.dtype, device, config.dim)
    model.to(dtype)
    if options.compile == "on":
        compile_decoding(model)
    elif device.type == "cpu":
        problem = pack(model)
        if problem:
            notes.append(f"plain weights, 1.3-2 times slower: {problem}")
    return model, enc, notes


def load_model(options: SampleConfig, device: torch.device) -> tuple[Hydra, tiktoken.Encoding, list[str]]:
    """(model in the dtype and form that generates, its tokenizer, what is to be said) of the run's checkpoint; where it
    is damaged, the error names the run's other one, if that is whole."""
    try:
        return read_model(options, device)
    except Damaged as error:
        other = "last" if options.checkpoint == "best" else "best"
        if not Path(options.out_dir, f"{other}.pt").exists():
            raise
        try:
            read_model(replace(options, checkpoint=other), device)
        except UserError:
            raise error from None
        raise UserError(f"{error}; {other}.pt is whole: use --checkpoint={other}") from error


def check_memory(model: Hydra, num_samples: int, texts: int, slots: int) -> None:
    """UserError where so many texts of up to `slots` tokens do not fit: their states, and what sampling takes."""
    weight = model.embed.weight
    config = model.config
    sampling = 32 * config.vocab_size  # logits in fp32, sorted, with their places, summed up
    needed = texts * (state_bytes(config, slots, weight.element_size(), allocated=True) + sampling)
    room = free_memory(weight.device)
    if needed > room:
        raise UserError(f"num_samples={num_samples}: {texts:,} texts of {slots} tokens at once need "
                        f"{needed / 1e9:,.1f} GB, of which {room / 1e9:,.1f} are free: ask for fewer")  # fmt: skip


def write(steps: Iterator[Tensor], prompts: list[str], enc: tiktoken.Encoding):
    """Print the first text as it comes, then the others -> (ids of every row up to its end of text, the times at which
    they came)."""
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may be cut between two tokens
    texts: list[list[int]] = [[] for _ in prompts]
    times = []
    for token_B in steps:
        new = token_B.tolist()  # waits for the device
        if not times:  # what cannot be generated has raised by now
            print(prompts[0], end="")
        times.append(time.perf_counter())
        for text, token in zip(texts, new, strict=True):
            if text[-1:] != [enc.eot_token]:
                text.append(token)
        if texts[0][-1] != enc.eot_token:
            print(utf8.decode(token_text(enc, texts[0][-1])), end="", flush=True)
    print(utf8.decode(b"", final=True) if times else prompts[0])
    for prompt, text in zip(prompts[1:], texts[1:], strict=True):
        shown = text_of(enc, (token for token in text if token != enc.eot_token))
        print("-" * 30 + f"\n{prompt}{shown}")
    return texts, times


def report(model: Hydra, state: DecodingState, prompts: list[int], made: int, steps: int, seconds: float,
           copy: float) -> str:  # fmt: skip
    """How fast the tokens behind each row's first one came: `made` tokens in all, `steps` of them in the longest row,
    behind prompts of so many tokens; `copy` is the copy bandwidth in bytes/s."""
    config = model.config
    size = model.embed.weight.element_size()
    read = ""
    if not config.mod_capacity and config.mor_recursions == 1:  # else what a token reads is the routers' choice
        # a step reads all weights and what the states hold by then: on average half of the new tokens
        past = sum(state_bytes(config, n + steps // 2, size) for n in prompts)
        rate = (steps - 1) * (count_params(config) * size + past) / seconds
        read = (f"{rate / 1e9:.3g} GB/s read of weights and state, {rate / copy:.0%} of this machine's copy bandwidth "
                f"({copy / 1e9:.1f} GB/s); ")  # fmt: skip
    return (f"{made} tokens, {(made - len(prompts)) / seconds:.1f} tokens/s, {read}the state holds "
            f"{state.bytes(filled=True):,} of {state.bytes():,} bytes")  # fmt: skip


def main(argv: list[str]) -> int:
    (options,) = build(parse(argv, SampleConfig, doc=__doc__), SampleConfig)
    texts = read_prompts(options.prompt_file) if options.prompt_file else options.prompt
    count = len(texts) * options.num_samples
    device = choose_device(options.device)
    choose_compile(options.compile, device, 0)
    if options.compile == "on" and device.type == "cpu" and count > 1:
        raise UserError(f"compile='on': on a CPU {count} texts at once are slower compiled: use compile=off")
    model, enc, notes = load_model(options, device)
    for note in notes:
        print(note, file=sys.stderr)
    ids = [torch.tensor(enc.encode_ordinary(text) or [enc.eot_token]) for text in texts]
    slots = min(max(map(len, ids)) + options.max_new_tokens, longest_text(model))  # `generate` refuses a longer text
    check_memory(model, options.num_samples, count, slots)
    prompts = [text for text in texts for _ in range(options.num_samples)]
    rows = [row for row in ids for _ in range(options.num_samples)]
    static = options.compile == "on" or device.type == "cuda"
    least = slots if options.compile == "on" else LEAST  # each length would be compiled anew
    if static:  # two tokens now, so that the rate below is without the compilation and the loading of kernels
        state = new_state(model, len(rows), slots, static, least)
        list(islice(generate(model, rows, options.max_new_tokens, state=state), 2))
    state = new_state(model, len(rows), slots, static, least)
    generator = torch.Generator(device).manual_seed(options.seed)
    steps = generate(model, rows, options.max_new_tokens, options.temperature, options.top_k, options.top_p,
                     enc.eot_token, generator, state=state)  # fmt: skip
    texts, times = write(steps, prompts, enc)
    made = sum(map(len, texts))  # an end of text is a token too
    if len(times) < 2:
        print(f"{made} tokens, too few to time", file=sys.stderr)
        return 0
    seconds = times[-1] - times[0]  # the first token of each row is the prefill's
    lengths = list(map(len, rows))
    print(report(model, state, lengths, made, len(times), seconds, copy_bandwidth(device)), file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli(main)
