"""The claims of an older report beside what this project measured: `python diagnose.py report [--markdown]`.

Every row has the command that measured it, or "not measured here" with the command that would. Parameters, state and
FLOPs are counted on the spot, by accounting.py; what takes longer is read from the JSON files of results/, whichever
there are: of compare.py, of bench.py and scaling.py, of diagnose.py's recall and stability. No result is written here.
The last line is one JSON object; with --markdown there is the table alone.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

from accounting import count_params, flops_per_token
from bench import size_of
from configurator import AnyPath, UserError, build, need, parse
from files import reason
from model import HydraConfig
from train import TrainConfig

HERE = Path(__file__).parent
USAGE = "usage: python diagnose.py report [--key=value ...]"
LENGTHS = (512, 1024, 8192)  # tokens, at which FLOPs are compared
AT = " / ".join(map(str, LENGTHS))
COUNTED = "python diagnose.py report"
RECALL = "python diagnose.py recall"
STABILITY = "python diagnose.py stability"
LEARNING = ("python compare.py config/learning/mha_both.toml config/learning/hybrid.toml config/learning/ccqa.toml "
            "--json=results/letters.json")  # fmt: skip
SPEED = "python bench.py speed --json=results/speed.json"
SCALING = "python scaling.py --json=results/scaling.json"


@dataclass(frozen=True)
class ReportConfig:
    """What to report of."""

    results: AnyPath = ""  # folder of the stored results, empty: results/ beside the code
    markdown: bool = False  # the table alone, in Markdown

    def __post_init__(self):
        need(self, "results", not self.results or Path(self.results).is_dir(), "it is no folder: name one")


class Answer(NamedTuple):
    """What was measured of a claim."""

    text: str
    command: str


class Stored(NamedTuple):
    """A JSON of a measurement."""

    name: str
    content: dict


class Claim(NamedTuple):
    claim: str  # the older report's
    command: str  # what measures it
    count: Callable[[], str] | None = None  # here and now
    read: Callable[[Stored], Iterator[Answer]] | None = None  # from a file, if it is of the kind


# ---- what is stored

def read_results(folder: Path) -> list[Stored]:
    """Every JSON file of the folder, by name; none where there is no folder. UserError where one cannot be read."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: {reason(error)}: measure it again, or delete it") from error
        if isinstance(content, dict):
            found.append(Stored(path.name, content))
    return found


def subject_rows(it: Stored, subject: str) -> list[dict]:
    """Those of a result of that subject of diagnose.py."""
    return it.content.get("rows", []) if it.content.get("subject") == subject else []


def table_rows(it: Stored, table: str) -> list[dict]:
    """The measured rows of a table of bench.py or scaling.py."""
    rows = it.content.get("tables", {}).get(table, [])
    return [row for row in rows if "left_out" not in row and "failed" not in row]


def numbers_of(row: dict, keys: list[str]) -> str:
    return ", ".join(f"{key} {row[key]:.4g}" for key in keys if isinstance(row.get(key), (int, float)))


# ---- what can be counted

def shipped(name: str, **changes) -> HydraConfig:
    """A shipped shape, dense and with changes."""
    kinds = HydraConfig, TrainConfig
    config, _ = build(parse([str(HERE / "config" / f"{name}.toml")], *kinds), *kinds)
    return replace(config, **changes)


def trunk_flops(config: HydraConfig, T: int) -> float:
    """Forward FLOPs of a token, without the head."""
    return flops_per_token(config, T) - 2 * config.dim * config.vocab_size


def percents(values: list[float]) -> str:
    return " / ".join(f"{100 * value:.1f}" for value in values) + "%"


def of_mha(**changes) -> str:
    """The FLOPs of the small shape with these changes, in parts of MHA's."""
    ours, mha = shipped("small", **changes), shipped("small", pattern="A")
    return percents([trunk_flops(ours, T) / trunk_flops(mha, T) for T in LENGTHS])


def sizes() -> str:
    counts = [count_params(shipped(name)) / 1e6 for name in ("small", "medium", "large")]
    return f"{' / '.join(f'{count:.1f}M' for count in counts)}, tied head"


def compression() -> str:
    ours, mix, mha = shipped("small", pattern="C"), shipped("small"), shipped("small", pattern="A")
    attention = 1 - size_of(ours)["params"] / size_of(mha)["params"]
    model, mixed = (1 - count_params(config) / count_params(mha) for config in (ours, mix))
    return (f"{attention:.0%} fewer parameters in the attention than MHA; in the whole small model {model:.0%} with "
            f"CCQA in every layer, {mixed:.0%} with its mix")  # fmt: skip


def states() -> str:
    kept = {letter: size_of(shipped("small", pattern=letter))["kv_bytes"] for letter in ("A", "C", "M", "L")}
    saved = [f"{letter} {1 - kept[letter] / kept['A']:.2%}" for letter in ("C", "M", "L")]
    return f"bytes a token and layer less than MHA's: {', '.join(saved)}"


def ccqa_flops() -> str:
    return f"{of_mha(pattern='C')} at T = {AT}, without the head"


def stack_flops() -> str:
    stack = {"n_layer": 8, "mor_recursions": 3}
    shapes = {"hybrid alone": {}, "with MoD 0.75 on alternate layers": {"mod_capacity": 0.75},
              "with MoD 0.125": {"mod_capacity": 0.125}, "MoR of 3": stack,
              "MoD 0.125 inside MoR": stack | {"mod_capacity": 0.125}}  # fmt: skip
    found = [f"{name} {of_mha(**changes)}" for name, changes in shapes.items()]
    return f"at T = {AT}: {'; '.join(found)}"


# ---- what was measured

def against_mha(it: Stored) -> bool:
    """Whether it is a comparison with MHA."""
    first = it.content.get("contestants", {}).get(it.content.get("reference"), {}).get("config", {})
    return set(first.get("pattern", "")) == {"A"}


def learning(it: Stored) -> Iterator[Answer]:
    """Of a comparison with MHA the losses of the others against it."""
    for basis, found in it.content.get("bases", {}).items() if against_mha(it) else ():
        said: dict[str, list[str]] = {}
        for row in found["rows"]:
            if row.get("difference") is not None:
                resolved = row["verdict"] != "not resolved"
                number = f" {row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" if resolved else ""
                said.setdefault(row["verdict"], []).append(row["contestant"] + number)
        texts = [f"{verdict}: {', '.join(names)}" for verdict, names in sorted(said.items())]
        if texts:
            yield Answer(f"held-out {it.content['measure']} against {it.content['reference']} at equal {basis}: "
                         f"{'; '.join(texts)}", it.content["command"])  # fmt: skip


def curves(it: Stored) -> Iterator[Answer]:
    """Of a comparison at equal FLOPs with MHA."""
    if "flops" in it.content.get("bases", {}) and against_mha(it):
        yield Answer(f"no score, but curves over tokens, FLOPs and seconds: results/{it.name}", it.content["command"])


def stability(it: Stored, keys: tuple[str, ...]) -> Iterator[Answer]:
    """The variants' numbers with these names, at each rate."""
    rows, texts = subject_rows(it, "stability"), []
    for key, rate in product(keys, dict.fromkeys(row["rate"] for row in rows)):
        found = [f"{row['variant']} {row[key]:.3g}" for row in rows if row["rate"] == rate and row[key] is not None]
        texts.append(f"{key.replace('_', ' ')} at rate {rate:g}: {', '.join(found)}")
    if texts:
        every = it.content["config"]["log_layers"]
        note = f" (norms of every {every}th step)" if any("norm" in key for key in keys) else ""
        yield Answer("; ".join(texts) + note, it.content["command"])


def recall(it: Stored) -> Iterator[Answer]:
    """Of every variant the accuracy at the most pairs, by task."""
    rows = subject_rows(it, "recall")
    for task in dict.fromkeys(row["task"] for row in rows):
        found, most = [], ""
        for row in rows:
            if row["task"] == task:
                most = list(row["accuracy"])[-1]
                verdict = f" ({row['verdict']})" if row["control"] else ""
                found.append(f"{row['variant']} {row['accuracy'][most]:.1%}{verdict}")
        where = f"{task}, {most} pairs" if most != "1" else task
        yield Answer(f"{where}: {', '.join(found)}", it.content["command"])


def speed(it: Stored, levels: tuple[str, ...]) -> Iterator[Answer]:
    """Milliseconds of the shortest text that was timed, eager."""
    rows = [row for row in table_rows(it, "speed") if row.get("level") in levels and row.get("mode") == "eager"]
    short = min((row["B"] * row["T"] for row in rows), default=0)
    found = [f"{row['level']} {row['mix']} {row['dtype']} {row['ms']:.2f}" for row in rows
             if row["B"] * row["T"] == short]  # fmt: skip
    if found:
        where = it.content.get("gpu") or it.content.get("cpu")
        yield Answer(f"ms at {short} tokens on {where}: {', '.join(found)}", it.content["command"])


def scaling(it: Stored) -> Iterator[Answer]:
    keys = ["ms_per_token", "routed_fraction", "mean_depth"]
    rows = [row for row in table_rows(it, "scaling") if row.get("level") in ("scaling", "predicted")]
    texts = [f"{row['mix']} ({row['level']}): {numbers_of(row, keys)}" for row in rows]
    if texts:
        yield Answer("; ".join(texts), it.content["command"])


CLAIMS = [
    Claim("Small / Medium / Large = ~220M / ~350M / ~480M", COUNTED, sizes),
    Claim('CCQA: "75% parameter reduction"', COUNTED, compression),
    Claim('"KV-cache reduction 25%" for CCQA, "100%" for MLA', COUNTED, states),
    Claim('FLOPs "62% of baseline" for CCGQA only', COUNTED, ccqa_flops),
    Claim('FLOPs "37.5% of baseline" for the full stack', COUNTED, stack_flops),
    Claim('"Learning improvement" MQA 24.17, CCQA 23.28, MLA 22.90%, of random targets', LEARNING, read=learning),
    Claim("What each attention learns to recall: no figure", RECALL, read=recall),
    Claim('"Macro-block -57% -> +26%, transformer +13% -> +23%", by four fixes', STABILITY,
          read=partial(stability, keys=("loss", "diverged"))),
    Claim('"Exploding gradients 1.35e6 -> < 1.0", which is the clip itself', STABILITY,
          read=partial(stability, keys=("largest_norm", "clipped"))),
    Claim('"Convergence steps", "Learning capacity score"', LEARNING, read=curves),
    Claim('"Gradient flow score", mean / std of gradient norms', STABILITY,
          read=partial(stability, keys=("median_norm",))),
    Claim("Speed of macro-block 25.87 / 24.87 and 24 layers 70.67 / 69.71 ms, at 64 to 1,024 tokens", SPEED,
          read=partial(speed, levels=("macro", "model"))),
    Claim("Speed of CCGQA 8.12 / 3.03 / 4.79, MQA 1.49 / 1.76, CCQA 3.98 / 4.04, MLA 1.90 / 1.84 ms", SPEED,
          read=partial(speed, levels=("attention",))),
    Claim('Scaling: "MoD prob" 0.76 to 0.98, at 4B 1.744; "MoR depth" 1.000 everywhere', SCALING, read=scaling),
]  # fmt: skip


def report(stored: list[Stored]) -> list[dict]:
    """A row for every answer to every claim, or one that has none. UserError for a result of a form that is unknown."""
    rows = []
    for claim in CLAIMS:
        answers = [Answer(claim.count(), COUNTED)] if claim.count else []
        for it in stored if claim.read else ():
            try:
                answers += claim.read(it)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise UserError(f"results/{it.name}: it is of another form ({type(error).__name__}): measure it again, "
                                "or delete it") from error  # fmt: skip
        for found, command in answers or [Answer("", claim.command)]:
            rows.append({"claim": claim.claim, "measured": found or None, "command": command})
    return rows


def markdown(rows: list[dict]) -> Iterator[str]:
    yield "| the older report | measured here | by |\n|---|---|---|"
    for row in rows:
        cells = [row["claim"], row["measured"] or "not measured here", f"`{row['command']}`"]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main(argv: list[str]) -> int:
    (options,) = build(parse(argv, ReportConfig, doc=f"{USAGE}\n\n{__doc__.strip()}"), ReportConfig)
    folder = Path(options.results) if options.results else HERE / "results"
    rows = report(read_results(folder))
    if options.markdown:
        print("\n".join(markdown(rows)))
        return 0
    for row in rows:
        print(f"{row['claim']}\n    {row['measured'] or 'not measured here'}\n    {row['command']}")
    print(json.dumps({"subject": "report", "results": str(folder), "rows": rows}, allow_nan=False))
    return 0
