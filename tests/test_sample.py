"""Continuing texts from a checkpoint: what is printed, when, and how fast it came."""

import contextlib
import io
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tape import listed
from test_train import checkpoint, options, shape, text_tokens

import generate as generation
import sample
import train
from accounting import count_params, state_bytes
from configurator import UserError, build, parse, to_toml
from generate import continue_text, new_state
from machine import PackedLinear
from model import Hydra
from sample import SampleConfig

RULE = "-" * 30 + "\n"


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run of two steps; ids 257 to 299 have no text. Its best weights are replaced by large ones, so
    that the likeliest token depends on the prompt, and is a letter that can be told from another."""
    tmp = tmp_path_factory.mktemp("trained")
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(options(tmp, "run", max_iters=2, vocab_size=300, dtype="float32"))
    content = checkpoint(tmp / "run", "best")
    random = torch.Generator().manual_seed(0)
    for name, p in content["model"].items():
        if p.dim() == 2 and "conv" not in name:
            p.normal_(std=1.0 if name == "embed.weight" else 0.3, generator=random)
    content["model"]["embed.weight"][127:] = 0.0
    torch.save(content, tmp / "run" / "best.pt")
    return tmp / "run"


@pytest.fixture
def run(trained, capsys):
    """Samples from that run -> (what it prints, what it says on stderr)."""

    def call(*args: str) -> tuple[str, str]:
        capsys.readouterr()
        assert sample.main([f"--out_dir={trained}", "--dtype=float32", *args]) == 0
        return capsys.readouterr()

    return call


def test_sample_continues_a_prompt_repeatably(run):
    args = ["--prompt=import é", "--max_new_tokens=12", "--temperature=2"]
    first = run(*args)[0]
    assert first.startswith("import é") and first == run(*args)[0] == run(*args, "--seed=1337")[0]
    assert first != run(*args, "--seed=3")[0]
    greedy = run(*args, "--temperature=0")[0]
    for same in (["--temperature=0", "--seed=9"], ["--top_k=1"], ["--top_p=1e-9"]):
        assert run(*args, *same)[0] == greedy
    assert greedy != first
    assert run(*args, "--checkpoint=last", "--max_new_tokens=0")[0] == "import é\n"
    assert run(*args, "--checkpoint=last")[0] != first
    assert len(run(*args, "--prompt=")[0]) > 1
    with pytest.raises(UserError, match="max_new_tokens=60: with a prompt of 9 tokens .* block_size=32"):
        run(*args, "--max_new_tokens=60")


def test_sample_takes_several_prompts_and_reports_its_speed(run, tmp_path):
    """Every text in its place, greedy ones as each gives alone; the report goes to stderr."""
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffab\n \nimport é\n")
    greedy = ["--max_new_tokens=9", "--temperature=0"]
    one, two = run("--prompt=ab", *greedy)[0], run("--prompt=import é", *greedy)[0]
    assert one.removeprefix("ab") != two.removeprefix("import é")
    both = one + RULE + two
    assert run("--prompt=ab", "--prompt", "import é", *greedy)[0] == both
    assert run(f"--prompt_file={file}", "--prompt=c", *greedy)[0] == both
    assert run("--prompt=ab", "--num_samples=3", *greedy)[0] == RULE.join([one] * 3)
    told = run("--prompt=ab", "--num_samples=3", "--max_new_tokens=8", "--temperature=0")[1]
    assert told.startswith("24 tokens, ") and told.count("\n") == 1
    assert "of this machine's copy bandwidth (1.0 GB/s)" in told
    assert "2 tokens, too few to time" in run(f"--prompt_file={file}", "--max_new_tokens=1")[1]
    with pytest.raises(UserError, match="prompt_file='/no/such': No such file or directory: give .*one prompt a line"):
        run("--prompt_file=/no/such")
    with pytest.raises(UserError, match="compile='on': on a CPU 2 texts"):
        run(f"--prompt_file={file}", "--compile=on")
    file.write_text(" \n\n")
    with pytest.raises(UserError, match="prompt_file=.*: it is blank: give"):
        run(f"--prompt_file={file}")
    file.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="prompt_file=.*: give a UTF-8 text file"):
        run(f"--prompt_file={file}")


def test_captured_steps_give_the_same_text(run, monkeypatch):
    """As on CUDA, where they are compiled as well: one size, that nothing is compiled behind the first two tokens."""
    args = ["--prompt=import é", "--max_new_tokens=20", "--temperature=0"]
    expected = run(*args)[0]
    captures = []
    monkeypatch.setattr(generation, "Replayed", listed(captures))
    monkeypatch.setattr(sample, "choose_compile", lambda *_: None)
    monkeypatch.setattr(sample, "compile_decoding", lambda model: None)
    assert run(*args, "--compile=on")[0] == expected
    assert captures == [32, 32]


def test_a_prompt_that_is_given_twice_is_continued_twice(run):
    """Not greedily, each with random numbers of its own."""
    printed = run("--prompt=ab", "--prompt=ab", "--temperature=2", "--max_new_tokens=9")[0]
    first, second = printed.split(RULE)
    assert first.startswith("ab") and second.startswith("ab") and first.strip() != second.strip()


def test_samples_of_a_prompt_are_side_by_side(run):
    args = ["--prompt=ab", "--prompt=cd", "--temperature=0", "--max_new_tokens=3"]
    texts = run(*args, "--num_samples=2")[0].split(RULE)
    assert [text[:2] for text in texts] == ["ab", "ab", "cd", "cd"]


def test_prompts_in_a_file_of_options_are_a_list(run, tmp_path):
    file = tmp_path / "prompts.toml"
    file.write_text('prompt = ["ab", "c\\nd"]\nmax_new_tokens = 5\ntemperature = 0\n')
    greedy = ["--max_new_tokens=5", "--temperature=0"]
    both = run("--prompt=ab", "--prompt=c\nd", *greedy)[0]
    assert run(str(file))[0] == both
    assert run(str(file), "--prompt=x")[0] == run("--prompt=x", *greedy)[0]  # options stand for themselves
    file.write_text('prompt = "ab"\n')
    assert run(str(file), *greedy)[0] == run("--prompt=ab", *greedy)[0]
    (config,) = build(parse([str(file)], SampleConfig), SampleConfig)
    assert config.prompt == ("ab",) and 'prompt = ["ab"]' in to_toml(config)
    file.write_text("prompt = []\n")
    with pytest.raises(UserError, match="prompt=.*: give at least one"):
        run(str(file))


def test_sample_prints_each_token_as_it_comes_up_to_the_end_of_text(trained, capsys, monkeypatch):
    """In UTF-8 that is cut between tokens; what cannot be generated raises before anything is printed."""
    args = [f"--out_dir={trained}", "--prompt=a", "--prompt=b"]
    with pytest.raises(UserError, match="block_size"):
        sample.main([*args, "--max_new_tokens=99"])
    assert capsys.readouterr().out == ""
    seen = []

    def generate(model, *_, state):
        for pair in zip([*"é".encode(), *b"x", 256, *b"z"], [*b"yyy", 256, *b"z"], strict=True):
            yield torch.tensor(pair)
            seen.append(capsys.readouterr().out)

    monkeypatch.setattr(sample, "generate", generate)
    sample.main([*args, "--max_new_tokens=9"])
    printed = capsys.readouterr()
    assert seen == ["a", "é", "x", "", ""] and printed.out == "\n" + RULE + "byyy\n"
    assert printed.err.startswith("8 tokens, ")  # the ends of text are tokens, what is behind them is not


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_cannot_be_packed_are_used_as_they_are(run, monkeypatch, dtype):
    """Said once; the same text in float32."""
    args = ["--prompt=ab", "--prompt=import é", "--max_new_tokens=9", "--temperature=0", f"--dtype={dtype}"]
    packed, told = run(*args)
    if dtype == "float32":
        assert "plain weights" not in told

    def refuse(*_):
        raise RuntimeError("could not create a reorder\nsecond line")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    plain, told = run(*args)
    assert plain.startswith("ab") and RULE + "import é" in plain
    reason = f"oneDNN cannot pack {dtype} weights on this CPU (could not create a reorder)"
    assert told.splitlines()[0] == f"plain weights, 1.3-2 times slower: {reason}"
    assert told.count("plain weights") == 1 and told.count("\n") == 2
    if dtype == "float32":
        assert plain == packed


def test_a_model_is_loaded_in_the_dtype_and_the_form_that_generates(trained):
    for dtype in ("float32", "bfloat16"):
        model, enc, notes = sample.load_model(SampleConfig(out_dir=str(trained), dtype=dtype), torch.device("cpu"))
        assert model.embed.weight.dtype == getattr(torch, dtype) and not model.training and enc.name == "bytes"
        assert isinstance(model.blocks[0].attn.out, PackedLinear) == (not notes)
    eager, _, notes = sample.load_model(
        SampleConfig(out_dir=str(trained), dtype="float32", compile="on"), torch.device("cpu"))  # fmt: skip
    assert not isinstance(eager.blocks[0].attn.out, PackedLinear) and notes == []
    assert torch.equal(eager.embed.weight, checkpoint(trained, "best")["model"]["embed.weight"])


@pytest.mark.slow
def test_a_compiled_sample_is_the_eager_one(tmp_path, capsys):
    torch._dynamo.reset()
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(options(tmp_path, "run", max_iters=2, n_layer=1, pattern="M", dtype="float32"))
    args = [f"--out_dir={tmp_path / 'run'}", "--prompt=ab", "--max_new_tokens=9", "--temperature=0", "--dtype=float32"]
    capsys.readouterr()
    sample.main(args)
    eager = capsys.readouterr()
    sample.main([*args, "--compile=on"])
    compiled = capsys.readouterr()
    assert eager.out == compiled.out and compiled.err.startswith("9 tokens, ")


def test_the_report_of_a_generation():
    """Rates of what happened after the first tokens; the state at its end, without the last token of each row."""
    config = shape()
    model = Hydra(config)
    state = new_state(model, 2, 20)
    state.pos_B += torch.tensor([13, 15])
    line = sample.report(model, state, [3, 5], made=17, steps=11, seconds=2.0, copy=1e9)
    past = sum(state_bytes(config, n + 5, 4) for n in (3, 5))
    rate = 10 * (4 * count_params(config) + past) / 2.0
    assert f"17 tokens, {15 / 2:.1f} tokens/s, {rate / 1e9:.3g} GB/s" in line and f" {rate / 1e9:.0%} of" in line
    holds = sum(state_bytes(config, n, 4) for n in (13, 15))
    assert f"holds {holds:,} of {2 * state_bytes(config, 20, 4):,} bytes" in line
    for routing in ({"mod_capacity": 0.5}, {"mor_recursions": 2}):
        routed = Hydra(replace(config, **routing))
        assert "GB/s" not in sample.report(routed, new_state(routed, 2, 20), [3, 5], 17, 11, 2.0, 1e9)


def test_the_bandwidth_of_the_report_is_measured(trained, capsys, monkeypatch):
    """On the device that generates; the rate is of the time between the first token and the last."""
    asked = []
    ticks = iter([100.0, 102.0, 104.0, 106.0])
    monkeypatch.setattr(sample, "copy_bandwidth", lambda device: asked.append(device.type) or 2e9)
    monkeypatch.setattr(sample.time, "perf_counter", lambda: next(ticks))
    sample.main([f"--out_dir={trained}", "--prompt=ab", "--max_new_tokens=4", "--temperature=0", "--dtype=float32"])
    told = capsys.readouterr().err
    assert asked == ["cpu"] and "4 tokens, 0.5 tokens/s, " in told and "(2.0 GB/s)" in told


def test_a_sample_works_where_the_training_backend_would_not(tmp_path):
    """attn_backend=flex is for the compiled training; its samples are eager, and leave the model in its mode."""
    torch.manual_seed(0)
    model = Hydra(shape(attn_backend="flex"))
    enc = text_tokens(tmp_path).enc
    first = continue_text(model, enc, "ab", 9, 0)
    assert first.startswith("ab") and len(first) > 2 and model.training
    assert continue_text(model, enc, "ab", 9, 0) == first != continue_text(model, enc, "ab", 9, 1)
    assert continue_text(model, enc, "x" * 100, 9, 0) == "x" * 100  # the block is full
    assert 30 < len(continue_text(model, enc, "x" * 30, 9, 0)) <= 32  # and has room for two bytes


@pytest.mark.parametrize("changes, words", [
    ([], "best.pt does not exist: train first"), (["--checkpoint=first"], "checkpoint='first': use best or last"),
    (["--top_p=0"], "top_p=0.0"), (["--temperature=-1"], "temperature=-1.0"), (["--promt=x"], "did you mean prompt"),
    (["--num_samples=0"], "num_samples=0: it must be at least 1"), (["--seed=-1"], "seed=-1"),
    (["--compile=auto"], "compile='auto': use on or off"), (["--device=cpu:1"], "device='cpu:1'"),
    (["--dtype=float16"], "dtype='float16': use auto, float32 or bfloat16"),
])  # fmt: skip
def test_sample_refuses_in_one_line(tmp_path, changes, words):
    with pytest.raises(UserError, match=words) as error:
        sample.main([f"--out_dir={tmp_path}", *changes])
    assert "\n" not in str(error.value)


@pytest.mark.faults
def test_a_missing_checkpoint_is_named_with_what_there_is(trained, tmp_path, monkeypatch):
    def refused(*args: str) -> str:
        with pytest.raises(UserError) as error:
            sample.main([f"--out_dir={tmp_path}", *args])
        return str(error.value).removeprefix(f"{tmp_path}/")

    assert refused() == "best.pt does not exist: train first, or name the run's folder with --out_dir=PATH"
    assert refused("--checkpoint=last").startswith("last.pt does not exist: train first")
    (tmp_path / "log.jsonl").touch()
    assert f"the run in {tmp_path} has not written a checkpoint yet" in refused()
    (tmp_path / "last.pt").write_bytes((trained / "last.pt").read_bytes())
    assert refused() == "best.pt does not exist, but last.pt does: use --checkpoint=last"
    assert sample.main([f"--out_dir={tmp_path}", "--checkpoint=last", "--max_new_tokens=2"]) == 0
    (tmp_path / "last.pt").rename(tmp_path / "best.pt")
    assert refused("--checkpoint=last") == "last.pt does not exist, but best.pt does: use --checkpoint=best"
    real = os.stat

    def denied(path, *args, **keys):  # chmod would not stop root
        if str(path).endswith(".pt"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **keys)

    monkeypatch.setattr("configurator.os.stat", denied)
    assert refused() == f"'{tmp_path}/best.pt': Permission denied: give another path"


@pytest.mark.faults
def test_the_other_checkpoint_is_named_where_it_is_whole(trained, tmp_path):
    out = Path(shutil.copytree(trained, tmp_path / "run"))

    def refused(*args: str) -> str:
        with pytest.raises(UserError) as error:
            sample.main([f"--out_dir={out}", "--max_new_tokens=2", *args])
        return str(error.value)

    content = checkpoint(out, "best")
    for change in ({"model": {}}, {"model": content["model"] | {"norm.weight": torch.full((32,), torch.nan)}}):
        torch.save(content | change, out / "best.pt")
        assert refused().startswith(f"{out}/best.pt")
        assert refused().endswith("; last.pt is whole: use --checkpoint=last")
    assert sample.main([f"--out_dir={out}", "--max_new_tokens=2", "--checkpoint=last"]) == 0
    (out / "last.pt").rename(out / "whole.pt")
    (out / "last.pt").write_bytes(b"")
    for name in ("best", "last"):
        assert refused(f"--checkpoint={name}").startswith(f"{out}/{name}.pt") and "whole" not in refused()
    (out / "whole.pt").rename(out / "best.pt")
    assert refused("--checkpoint=last").endswith("; best.pt is whole: use --checkpoint=best")


@pytest.mark.faults
@pytest.mark.parametrize("args", [["--num_samples=9223372036854775807"], ["--num_samples=100000000"],
                                  ["--num_samples=1000000000", "--max_new_tokens=0"]])  # fmt: skip
def test_more_texts_than_fit_are_refused_with_the_estimate(trained, args):
    with pytest.raises(UserError, match=r"num_samples=.*: [0-9,]* texts of .* need [0-9,.]* GB, of which .* are free"):
        sample.main([f"--out_dir={trained}", "--prompt=ab", "--max_new_tokens=9", *args])
