"""Continue a text with a trained HYDRA: `python sample.py [--out_dir=out] --prompt='def '`.

Prints the prompt and its continuation as it is generated. Temperature, top-k and nucleus (top-p, arXiv:1904.09751)
sampling; a seed makes it repeatable. The past is recomputed for every token.
"""

import codecs
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from configurator import UserError, build, cli, need, parse
from data import get_tokenizer, token_text
from model import Hydra, HydraConfig
from train import load_checkpoint, pick_device, pick_dtype


@dataclass(frozen=True)
class SampleConfig:
    """What to generate from which checkpoint; raises UserError, in one line, for values that cannot be."""

    out_dir: str = "out"  # folder of the run
    checkpoint: str = "best"  # which of its checkpoints: best (lowest validation loss) or last
    prompt: str = "import "  # text to go on from
    max_new_tokens: int = 200  # tokens to generate; an end of text ends it earlier
    temperature: float = 0.8  # above 1 flattens the distribution, below 1 sharpens it, 0 takes the likeliest token
    top_k: int = 0  # sample among this many likeliest tokens, 0 = all
    top_p: float = 0.95  # and among the fewest that hold this much probability, 1 = all
    seed: int = 1337  # of the sampling
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    dtype: str = "auto"  # auto, float32 or bfloat16

    def __post_init__(self):
        need(self, "checkpoint", self.checkpoint in ("best", "last"), "use best or last")
        need(self, "dtype", self.dtype in ("auto", "float32", "bfloat16"), "use auto, float32 or bfloat16")
        need(self, "top_p", 0 < self.top_p <= 1, "choose a value above 0 and at most 1")
        for name in ("max_new_tokens", "temperature", "top_k", "seed"):
            need(self, name, getattr(self, name) >= 0, "it must not be negative")
        need(self, "temperature", self.temperature == 0 or self.temperature >= 1e-3, "use 0 for the likeliest token")
        need(self, "seed", self.seed < 2**63, "choose one below 2**63")


def main(argv: list[str]) -> int:
    (c,) = build(parse(argv, SampleConfig, doc=__doc__), SampleConfig)
    device = pick_device(c.device)
    path = Path(c.out_dir) / f"{c.checkpoint}.pt"
    if not path.exists() and path.with_name("last.pt").exists():
        raise UserError(f"{path} does not exist, the run was not evaluated yet: use --checkpoint=last")
    checkpoint = load_checkpoint(path, device)
    # the core that trained may not run here, eager and on another device
    config = replace(HydraConfig(**checkpoint["model_config"]), attn_backend="auto")
    enc = get_tokenizer(checkpoint["train_config"]["tokenizer"])
    model = Hydra(config).to(device).eval()
    model.load_state_dict(checkpoint["model"])
    dtype, _ = pick_dtype(c.dtype, device, config.dim)

    ids = torch.tensor([enc.encode_ordinary(c.prompt) or [enc.eot_token]], device=device)
    generator = torch.Generator(device).manual_seed(c.seed)
    print(c.prompt, end="", flush=True)
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may be cut between two tokens
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        for token_B in model.generate(ids, c.max_new_tokens, c.temperature, c.top_k, c.top_p, generator):
            token = int(token_B)
            if token == enc.eot_token:
                break
            print(utf8.decode(token_text(enc, token)), end="", flush=True)
    print(utf8.decode(b"", final=True))
    return 0


if __name__ == "__main__":
    cli(main)
