"""What a run borrows of its process: signals, streams and threads; its folder, which one process has at a time, and
which is set aside by one rename; its log, on full disks and with damaged lines.

Nearly all of it happens in this process: signals are raised, streams replaced and system calls made to fail at the
place that is meant.
"""

import contextlib
import errno
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import write_folder
from test_runs import contents
from test_train import ROOT, checkpoint, equal, losses, options, records, start, step_records, wait_for_step

import checkpoints
import data
import files
import machine
import model
import parallel
import runs
import soundness
import train
from configurator import UserError, say
from files import Lock, reason, remove_leftovers, saved_file
from parallel import Ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ENOSPC = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(autouse=True)
def handlers():
    """Every test finds the process's signal handlers as they were, and leaves them so."""
    numbers = (*SIGNALS, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    after = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    assert after == before


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A run that nothing happens to."""
    tmp = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr("machine.matmul_peak", lambda device, dtype, n=0: 1e9)
        assert train.main(options(tmp, "run", **RUN)) == 0
    return tmp / "run"


RUN = {"max_iters": 4, "eval_interval": 2, "eval_iters": 3, "final_eval_iters": 5, "dtype": "float32"}


def resumes_to(straight: Path, out: Path) -> None:
    """A run that was stopped goes on to the same losses and weights."""
    assert train.main([f"--out_dir={out}", "--resume"]) == 0
    assert losses(out) == losses(straight) and equal(checkpoint(out)["model"], checkpoint(straight)["model"])


def at_call(patch: pytest.MonkeyPatch, owner: object, name: str, number: int, act) -> list[int]:
    """`act()` when owner.name is called for the `number`th time. Returns a list that grows by every call."""
    real, calls = getattr(owner, name), []

    def wrapped(*args, **keys):
        calls.append(len(calls) + 1)
        if calls[-1] == number:
            act()
        return real(*args, **keys)

    patch.setattr(owner, name, wrapped)
    return calls


# ---- signals

@pytest.mark.faults
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_a_step_saves_behind_it_and_leaves(tmp_path, monkeypatch, capfd, straight, number):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_call(patch, train, "train_step", 3, partial(signal.raise_signal, number))
        assert train.main(options(tmp_path, "run", **RUN)) == 128 + number
    printed = capfd.readouterr()
    assert "stopped at step 3, saved in" in printed.out and printed.err.count("stopping after this step") == 1
    assert checkpoint(out)["step"] == 3
    resumes_to(straight, out)


@pytest.mark.faults
def test_a_second_signal_does_not_wait(tmp_path, monkeypatch):
    def twice() -> None:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)  # both at once is what a service's end looks like: it is still asked
        signal.raise_signal(signal.SIGTERM)

    calls = at_call(monkeypatch, train, "train_step", 3, twice)
    with pytest.raises(KeyboardInterrupt):
        train.main(options(tmp_path, "run", **RUN))
    assert calls == [1, 2, 3] and checkpoint(tmp_path / "run")["step"] == 2
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.faults
def test_a_warning_saves_and_the_run_goes_on(tmp_path, monkeypatch, capfd, straight):
    """SIGUSR1 in step 3, and one before the first step, which is kept for it."""
    saved, real = [], checkpoints.save_run

    def save_run(path, content, *args):
        saved.append((path.name, content["step"]))
        real(path, content, *args)

    monkeypatch.setattr(checkpoints, "save_run", save_run)
    at_call(monkeypatch, train, "train_step", 3, partial(signal.raise_signal, signal.SIGUSR1))
    at_call(monkeypatch, train, "choose_machine", 1, partial(signal.raise_signal, signal.SIGUSR1))
    assert train.main(options(tmp_path, "run", **RUN)) == 0
    assert [step for name, step in saved if name == "last.pt"] == [1, 2, 3, 4]
    printed = capfd.readouterr()
    assert printed.err.count("saving after this step") == 2 and printed.out.count("| saved in") == 2
    assert losses(tmp_path / "run") == losses(straight)


@pytest.mark.faults
@pytest.mark.parametrize("owner, name, number", [
    (data, "read_texts", signal.SIGINT), (data, "encode", signal.SIGTERM), (train, "choose_machine", signal.SIGHUP),
    (train, "make_optimizer", signal.SIGINT), (checkpoints, "resumable", signal.SIGTERM)])  # fmt: skip
def test_a_signal_in_preparation_ends_it_with_nothing_changed(tmp_path, monkeypatch, capfd, owner, name, number):
    out = tmp_path / "run"
    train.main(options(tmp_path, "run", max_iters=1))
    before = contents(out)
    text = write_folder(tmp_path / "text", {"a.txt": "another text\n" * 500})
    args = [*options(tmp_path, "run"), f"--data={text}", f"--cache_dir={tmp_path / 'new'}"]
    capfd.readouterr()
    at_call(monkeypatch, owner, name, 1, partial(signal.raise_signal, number))
    assert train.main([*args, "--resume"] if name == "resumable" else args) == 128 + number
    printed = capfd.readouterr()
    assert printed.out == "stopped before the first step: no file of a run was changed\n" and printed.err == ""
    assert contents(out) == before and not (out / "run-1").exists() and not list(tmp_path.glob("new/*.tmp"))


@pytest.mark.faults
def test_a_signal_amid_the_tokens_leaves_no_file_of_them(tmp_path, monkeypatch):
    at_call(monkeypatch, data.np, "array", 1, partial(signal.raise_signal, signal.SIGTERM))
    assert train.main(options(tmp_path, "run")) == 143
    assert os.listdir(tmp_path / "cache") == []


@pytest.mark.faults
@pytest.mark.parametrize("call, step, kept, number", [
    (2, 0, "no checkpoint was written yet", signal.SIGINT), (5, 2, "saved in", signal.SIGTERM),
    (8, 4, "saved in", signal.SIGHUP), (12, 4, "saved in", signal.SIGINT)])  # fmt: skip
def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(tmp_path, monkeypatch, capfd, straight, number, call,
                                                             step, kept):  # fmt: skip
    """Three evaluations of three batches, the last one of five; what came before is saved already."""
    out, real, calls = tmp_path / "run", train.Hydra.forward, []

    def forward(self, idx, targets=None):
        if not torch.is_grad_enabled() and targets is not None and len(idx) == 2 and not sound:
            calls.append(1)
            if len(calls) == call:
                signal.raise_signal(number)
        return real(self, idx, targets)

    sound = []
    is_sound = soundness.is_sound

    def quiet(*args):
        sound.append(1)
        found = is_sound(*args)
        sound.clear()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(train.Hydra, "forward", forward)
        patch.setattr(soundness, "is_sound", quiet)
        assert train.main(options(tmp_path, "run", **RUN)) == 128 + number
    assert len(calls) == call
    printed = capfd.readouterr()
    assert f"stopped at step {step}, {kept}" in printed.out and printed.err == ""
    assert not (out / ".lock").exists()
    if step:
        assert checkpoint(out)["step"] == step
        resumes_to(straight, out)


@pytest.mark.faults
def test_a_signal_in_a_sample_does_not_wait_for_its_end(tmp_path, monkeypatch, capsys):
    at_call(monkeypatch, train, "continue_text", 2, partial(signal.raise_signal, signal.SIGTERM))
    calls = at_call(monkeypatch, train, "train_step", 0, None)
    assert train.main(options(tmp_path, "run", **RUN)) == 143
    assert calls == [1, 2] and "stopped at step 2, saved in" in capsys.readouterr().out


@pytest.mark.faults
def test_a_signal_in_a_compilation_says_that_it_waits_and_is_obeyed_then(tmp_path, monkeypatch, capfd):
    """In the first evaluation's: its second batch never comes."""
    calls = []

    def backend(graph, inputs):
        calls.append(1)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(model, "compile_blocks", partial(machine.compile_blocks, backend=backend))
    batches = at_call(monkeypatch, train.Hydra, "forward", 0, None)
    assert train.main(options(tmp_path, "run", **RUN, compile="on", pattern="M", n_layer=1)) == 143
    printed = capfd.readouterr()
    assert printed.err.count("stopping when this compilation is done") == 1 and "stopped at step 0" in printed.out
    assert batches == [1] and calls


@pytest.mark.faults
def test_an_evaluation_of_several_processes_ends_where_one_was_asked_to(monkeypatch):
    """Between two batches, all of them together."""
    asked = []
    monkeypatch.setattr(Ranks, "total", lambda self, values: asked.append(values) or [float(len(asked) == 3)])
    module = train.Hydra(train.HydraConfig(vocab_size=9, block_size=8, dim=32, n_head=2, n_kv_head=1, n_layer=1))
    tokens, sizes = torch.randint(9, (8 * 12 + 1,)).numpy(), torch.ones(9, dtype=torch.int64)
    batches = at_call(monkeypatch, train.Hydra, "forward", 0, None)
    with pytest.raises(runs.Stopped):
        train.evaluate(module, tokens, sizes, 2, 0, torch.device("cpu"), Ranks("ddp", 0, 0, 2), [])
    assert asked == [[False]] * 3 and batches == [1, 2]


@pytest.mark.parametrize("variables", [{"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "1", "WORLD_SIZE": "2"}])
def test_one_of_several_processes_listens_from_the_first_step_on(tmp_path, monkeypatch, variables):
    """Before it, it may wait for the others, where no signal handler of Python's is run. Rank 0 has the folder."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM)
    with runs.Session() as session:
        assert signal.getsignal(signal.SIGTERM) == before and not session.at_once
        session.take(tmp_path)
        assert (tmp_path / ".lock").exists() == (variables["RANK"] == "0")
        session.begin()
        signal.raise_signal(signal.SIGTERM)
        with session.saved():  # the ranks agree first
            signal.raise_signal(signal.SIGHUP)
        assert session.stop == [signal.SIGTERM, signal.SIGHUP] and session.code == 143


@pytest.mark.faults
def test_a_handler_that_cannot_speak_saves_all_the_same(tmp_path, monkeypatch):
    real = os.write

    def write(number, text):
        if number == 2:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return real(number, text)

    monkeypatch.setattr(os, "write", write)
    at_call(monkeypatch, train, "train_step", 3, partial(signal.raise_signal, signal.SIGHUP))
    assert train.main(options(tmp_path, "run", **RUN)) == 129
    assert checkpoint(tmp_path / "run")["step"] == 3


def test_what_ignores_or_is_not_python_s_is_left_alone(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    real = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGUSR1 else real(number))
    other = real(signal.SIGUSR1)
    with runs.Session() as session:
        assert real(signal.SIGHUP) == signal.SIG_IGN and real(signal.SIGUSR1) == other
        assert real(signal.SIGTERM) == session.hear
    assert real(signal.SIGHUP) == signal.SIG_IGN
    monkeypatch.undo()
    signal.signal(signal.SIGHUP, before)


@pytest.mark.faults
@pytest.mark.parametrize("ending", [0, UserError("no"), RuntimeError("a bug"), SystemExit(3), KeyboardInterrupt()])
def test_the_handlers_and_the_folder_are_given_back_however_a_run_ends(tmp_path, monkeypatch, ending):
    """The fixture `handlers` compares them."""
    def end(*args) -> None:
        if ending:
            raise ending

    at_call(monkeypatch, train, "train_step", 2, end)
    with pytest.raises(type(ending)) if ending else contextlib.nullcontext():
        train.main(options(tmp_path, "run", max_iters=2))
    assert not (tmp_path / "run" / ".lock").exists()
    Lock().take(tmp_path / "run")  # the one before may still be referred to, by a traceback


@pytest.mark.faults
def test_a_run_works_in_a_thread(tmp_path, straight):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(train.main(options(tmp_path, "run", **RUN))))
    thread.start()
    thread.join()
    assert codes == [0] and losses(tmp_path / "run") == losses(straight)


# ---- streams

class Stream:
    """A stdout that is none: every print from number `first` on fails."""

    def __init__(self, error: Exception | None = None, first: int = 1):
        self.error, self.left = error, first
        self.text = ""

    def write(self, text: str) -> int:
        if self.left == 1 and self.error:
            raise self.error
        self.text += text
        return len(text)

    def flush(self) -> None:
        self.left = max(1, self.left - 1)


@pytest.mark.faults
@pytest.mark.parametrize("first, error", [(1, BrokenPipeError), (3, BrokenPipeError), (5, ConnectionResetError),
                                          (9, BrokenPipeError)])  # fmt: skip
def test_a_reader_that_goes_away_saves_and_leaves(tmp_path, monkeypatch, straight, error, first):
    """At the header; at a step's line, at one before an evaluation; at the last evaluation."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Stream(error(errno.EPIPE, "gone"), first))
        assert train.main(options(tmp_path, "run", **RUN)) == 128 + signal.SIGPIPE
    if first == 1:
        assert not (out / "last.pt").exists()
        return
    assert checkpoint(out)["step"] == len(step_records(out)) > 0
    resumes_to(straight, out)


@pytest.mark.faults
@pytest.mark.parametrize("error", [ValueError("I/O operation on closed file"), ENOSPC, RuntimeError("no kernel"),
                                   OSError(errno.EIO, "Input/output error"), TypeError("bytes"), KeyError("socket"),
                                   UnicodeEncodeError("ascii", "é", 0, 1, "no"), AttributeError("write")])  # fmt: skip
def test_a_stdout_that_breaks_stops_nothing(monkeypatch, error):
    monkeypatch.setattr(sys, "stdout", Stream(error))
    monkeypatch.setattr(sys, "stderr", Stream(error))
    session = runs.Session()
    session.say("text")
    session.say("text", error=True)
    assert session.stop == []


@pytest.mark.faults
@pytest.mark.parametrize("error, first", [(ValueError("I/O operation on closed file"), 1), (ENOSPC, 4)])
def test_a_run_whose_stdout_breaks_goes_on(tmp_path, monkeypatch, straight, error, first):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Stream(error, first))
        assert train.main(options(tmp_path, "run", **RUN)) == 0
    assert losses(tmp_path / "run") == losses(straight)


@pytest.mark.faults
@pytest.mark.parametrize("make", [lambda: None, object, io.BytesIO, lambda: io.TextIOWrapper(io.BytesIO(), "ascii")])
def test_a_stdout_that_is_none_stops_nothing(tmp_path, monkeypatch, straight, make):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", make())
        patch.setattr(sys, "stderr", make())
        at_call(patch, train, "train_step", 4, lambda: sys.stdout.close() if hasattr(sys.stdout, "close") else None)
        assert train.main(options(tmp_path, "run", **RUN)) == 0
    assert losses(tmp_path / "run") == losses(straight)


def test_a_stream_without_a_problem_gets_the_text(monkeypatch):
    for name, error in (("stdout", False), ("stderr", True)):
        stream = Stream()
        monkeypatch.setattr(sys, name, stream)
        assert say("text", error) and stream.text == "text\n"


@pytest.mark.faults
def test_a_dead_reader_of_the_progress_is_no_error_of_the_text(tmp_path, monkeypatch):
    """It is said on stderr while a text is encoded."""
    monkeypatch.setattr("sources.PROGRESS_SECONDS", 0)
    monkeypatch.setattr(sys, "stderr", Stream(BrokenPipeError(errno.EPIPE, "gone")))
    assert len(data.prepare(write_folder(tmp_path / "text", {"a.txt": "text\n" * 500}), "bytes", tmp_path).train) > 9


CLI = "import sys; from configurator import cli, say; cli(lambda argv: {})"


def shell(code: str, redirection: str) -> subprocess.CompletedProcess:
    """A program of a line, which imports no torch; -E: its stdout has a buffer, whatever the environment says."""
    command = f"{sys.executable} -E -c {shlex.quote(CLI.format(code))} {redirection}"
    return subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.faults
@pytest.mark.parametrize("code, redirection, expected, words", [
    ("print('text')", ">&-", 0, ""), ("print('text')", ">&- 2>&-", 0, ""), ("len(sys.stdout.name)", ">&-", 9, ""),
    ("print('text')", "> /dev/full", 1, "error: the output cannot be written (No space left on device)\n"),
    ("say('text') and 7", "> /dev/full", 7, ""),
    ("say('text' * 9999) or 141", "| true; exit ${PIPESTATUS[0]}", 141, ""),
    ("[print('text' * 99) for _ in range(9999)]", "| head -1 > /dev/null; exit ${PIPESTATUS[0]}", 1, ""),
    ("sys.stdout.close()", "", 0, ""), ("print('text' * 9999)", "| true; exit ${PIPESTATUS[0]}", 1, ""),
    ("sys.stdout.reconfigure(line_buffering=True) or print('text')", "> /dev/full", 1,
     "error: the output cannot be written (No space left on device)\n"),
])  # fmt: skip
def test_a_program_s_streams_may_be_anything(code, redirection, expected, words):
    done = shell(code, redirection)
    assert (done.returncode, done.stderr) == (expected, words)


# ---- one process a folder

HOLD = """
import sys, pathlib, files
lock = files.Lock()
lock.take(pathlib.Path(sys.argv[1]))
print(flush=True)
input()
"""


@pytest.mark.faults
def test_a_folder_that_another_process_has_is_refused_by_its_name_until_it_dies(tmp_path, monkeypatch):
    """Nothing of the folder is touched or read, nor is a text prepared in vain."""
    out = tmp_path / "run"
    train.main(options(tmp_path, "run", max_iters=1))
    before = contents(out)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], cwd=ROOT, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)  # fmt: skip
    holder.stdout.readline()
    (out / "last.pt").write_bytes(b"half")  # which would be said of a checkpoint that is read
    prepared = at_call(monkeypatch, train, "prepare", 0, None)
    words = rf"run': process {holder.pid} on .*, since 20\d\d-.* has it: wait for it or stop it, or choose another fol"
    for more in ([], ["--resume"]):
        with pytest.raises(UserError, match=words) as error:
            train.main([*options(tmp_path, "run"), *more])
        assert "\n" not in str(error.value) and str(out) in str(error.value)
    assert prepared == []
    (out / "last.pt").write_bytes(before["last.pt"])
    found = contents(out)
    assert found.pop(".lock").startswith(b"process") and found == before and not list(out.glob("run-*"))
    holder.kill()
    holder.wait()
    assert (out / ".lock").exists()  # a file that says nothing
    assert train.main([f"--out_dir={out}", "--resume", "--max_iters=2"]) == 0
    assert not (out / ".lock").exists()


@pytest.mark.faults
def test_two_runs_at_once_leave_one_run(tmp_path, monkeypatch, straight):
    """The second one comes within a step of the first, in a folder that was there before and in one that was not."""
    refused = []

    def another() -> None:
        for more in ([], ["--resume"], ["--max_iters=1", "--seed=2"]):
            with pytest.raises(UserError, match=f"process {os.getpid()} on .* has it") as error:
                train.main([*options(tmp_path, "run", **RUN), *more])
            refused.append(error.value)

    at_call(monkeypatch, train, "train_step", 3, another)
    assert train.main(options(tmp_path, "run", **RUN)) == 0
    assert len(refused) == 3 and losses(tmp_path / "run") == losses(straight)
    assert sorted(os.listdir(tmp_path / "run")) == ["best.pt", "config.toml", "last.pt", "log.jsonl"]


def test_a_plan_looks_at_a_run_that_goes_on(tmp_path, monkeypatch):
    train.main(options(tmp_path, "run", max_iters=1))
    lock = Lock()
    lock.take(tmp_path / "run")
    monkeypatch.setattr(train, "print_plan", lambda config, run: 0)  # which takes seconds
    assert train.main([f"--out_dir={tmp_path / 'run'}", "--resume", "--plan"]) == 0
    lock.release()


def test_a_lock_that_was_removed_before_it_was_had_is_taken_anew(tmp_path, monkeypatch):
    """By the process that had it, at its end: else two would have it, of which one has a file without a name."""
    at_call(monkeypatch, files, "locks", 1, (tmp_path / ".lock").unlink)
    first, second = Lock(), Lock()
    (tmp_path / ".lock").touch()
    first.take(tmp_path)
    with pytest.raises(UserError, match="has it"):
        second.take(tmp_path)
    first.take(tmp_path)  # which it has already
    first.release()
    second.take(tmp_path)
    second.release()
    assert os.listdir(tmp_path) == []


@pytest.mark.faults
def test_a_planted_lock_writes_nothing_elsewhere_and_is_one_line(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="choose a folder that can be written"):
        Lock().take(tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").write_bytes(b"\xff\x00\x1b[31m\r odd " + b"x" * 999 + b"\nmore")
    with (tmp_path / ".lock").open("rb") as file:
        said = files.holder(file)
    assert said.isprintable() and "odd" in said and len(said) < 600


@pytest.mark.faults
def test_a_file_system_without_locks_has_runs_and_nothing_of_another_is_removed_there(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    (tmp_path / ".hydra-1.tmp").touch()
    remove_leftovers(tmp_path)
    assert (tmp_path / ".hydra-1.tmp").exists()
    Lock().take(tmp_path)
    Lock().take(tmp_path)
    assert train.main(options(tmp_path, "run", max_iters=1)) == 0


@pytest.mark.faults
def test_a_run_removes_what_killed_ones_left(tmp_path):
    """In its folder and in the cache; a pipe of that name makes nothing wait."""
    (tmp_path / "run").mkdir()
    (tmp_path / "cache").mkdir()
    for folder in ("run", "cache"):
        (tmp_path / folder / ".hydra-1.tmp").write_bytes(b"half")
        os.mkfifo(tmp_path / folder / ".hydra-2.tmp")
    (tmp_path / "run" / ".hydra-3.aside").mkdir()
    train.main(options(tmp_path, "run", max_iters=0))
    assert [path for path in tmp_path.rglob(".*")] == []


# ---- setting aside

OLD = {"last.pt": "1", "best.pt": "2", "step-10.pt": "3", "log.jsonl": "4", "config.toml": "5", "trace.json": "6",
       "shards-10/.metadata": "7", "shards-10/__0_0.distcp": "8"}  # fmt: skip
MINE = {"notes.txt": "mine", "step-10/last.pt": "mine", "run-1/last.pt": "older", "run-7b/last.pt": "mine"}
SYSTEM = ("mkdir", "link", "rename", "replace", "unlink", "rmdir", "open", "fsync", "scandir")


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


class Killed(BaseException):
    pass


def killed_at(patch: pytest.MonkeyPatch, number: int, behind: bool) -> list[str]:
    """From the system call `number` on none is made; `behind`: that one still is. Returns a list of the calls."""
    calls = []

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*args, **keys):
            calls.append(name)
            if len(calls) > number or (len(calls) == number and not behind):
                raise Killed
            found = real(*args, **keys)
            if len(calls) == number:
                raise Killed
            return found

        patch.setattr(os, name, call)

    for name in SYSTEM:
        wrap(name)
    return calls


@pytest.mark.faults
@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("behind", [False, True])
def test_setting_aside_may_be_interrupted_anywhere(tmp_path, monkeypatch, links, behind):
    """The run is whole in its folder or whole in run-2, where --resume finds it or is told; the next run finishes."""
    def link(*args, **keys):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fsync", lambda number: None)  # it is counted, too, and slow
    if not links:
        monkeypatch.setattr(os, "link", link)
    seen = set()
    for number in range(1, 200):
        out = tmp_path / str(number)
        write_folder(out, OLD | MINE | {".lock": "held"})
        with monkeypatch.context() as patch:
            calls = killed_at(patch, number, behind)
            with contextlib.suppress(Killed):
                runs.set_aside(out)
        if len(calls) < number:
            break
        here = {name: text for name, text in tree(out).items() if name in OLD}
        aside = tree(out / "run-2") if (out / "run-2").exists() else {}
        assert here == OLD or aside == OLD, (number, calls)
        if "last.pt" in here:
            assert here == OLD
            runs.check_resumable(out, out / "last.pt")
        else:
            command = re.escape(f"python train.py --resume --out_dir={out / 'run-2'}")
            with pytest.raises(UserError, match=f"last.pt does not exist.* was set aside: go on with it: {command}$"):
                runs.check_resumable(out, out / "last.pt")
        seen.add((here == OLD, aside == OLD))
        left = runs.run_files(out)
        said = runs.set_aside(out)
        assert (f"in {out / 'run-2'} now" in said) == bool(left)
        found = tree(out)
        expected = MINE | {".lock": "held"} | {f"run-2/{name}": text for name, text in OLD.items()}
        assert found == expected and not list(out.glob(".hydra-*")), number
    assert number > 15 and seen == {(True, False), (True, True), (False, True)}


@pytest.mark.faults
def test_a_disk_that_is_full_while_a_run_is_set_aside_keeps_it(tmp_path, monkeypatch):
    """Where there are no second names, copies take room."""
    def full(*args, **keys):
        raise ENOSPC

    write_folder(tmp_path, OLD)
    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device: free some space, or choose"):
        runs.open_folder(tmp_path, "", None, True, Ranks(), runs.Session())
    (tmp_path / ".lock").unlink()
    assert tree(tmp_path) == OLD


@pytest.mark.faults
def test_a_lock_that_a_full_disk_does_not_hold_is_to_be_given_space(tmp_path):
    class NoRoom(io.FileIO):
        def write(self, text: bytes) -> int:
            raise ENOSPC

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "open", lambda number, *_: NoRoom(number, "r+b"), raising=False)
        with pytest.raises(UserError, match="No space left on device: free some space, or choose a folder on another"):
            train.main(options(tmp_path, "run", max_iters=1))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Not a directory: choose a folder that can be written"):
        Lock().take(tmp_path / "file")


@pytest.mark.faults
def test_a_pipe_is_set_aside_and_never_waited_for(tmp_path, monkeypatch):
    """Without second names it would be copied, which has no end."""
    os.mkfifo(tmp_path / "log.jsonl")
    runs.set_aside(tmp_path)
    assert (tmp_path / "run-1" / "log.jsonl").is_fifo() and os.listdir(tmp_path) == ["run-1"]
    os.mkfifo(tmp_path / "log.jsonl")
    monkeypatch.setattr(os, "link", lambda *paths, **_: (_ for _ in ()).throw(OSError(1, "Operation not permitted")))
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(30)
    try:
        with pytest.raises(UserError, match=r"log.jsonl cannot be read \(it is a pipe\): move it away"):
            runs.set_aside(tmp_path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert sorted(os.listdir(tmp_path)) == ["log.jsonl", "run-1"]


def test_a_run_that_went_on_after_an_interrupted_setting_aside_is_set_aside_whole(tmp_path):
    """Some of its files are still those of run-1."""
    write_folder(tmp_path, OLD)
    runs.link(tmp_path / "best.pt", tmp_path / "best")
    runs.set_aside(tmp_path)
    write_folder(tmp_path, OLD | {"last.pt": "later"})
    (tmp_path / "best.pt").unlink()
    (tmp_path / "best").rename(tmp_path / "best.pt")
    assert "run-2 now" in runs.set_aside(tmp_path)
    assert tree(tmp_path / "run-2") == OLD | {"last.pt": "later"} and tree(tmp_path / "run-1") == OLD


def test_links_are_set_aside_as_links(tmp_path):
    """Nothing is read through them: it may be endless."""
    (tmp_path / "log.jsonl").symlink_to("/dev/zero")
    (tmp_path / "shards-3").symlink_to("/dev")
    runs.set_aside(tmp_path)
    assert os.listdir(tmp_path) == ["run-1"]
    assert {path.name: os.readlink(path) for path in (tmp_path / "run-1").iterdir()} == {
        "log.jsonl": "/dev/zero", "shards-3": "/dev"}  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("name", ["my run", "it's\u00a0mine\u3000 $HOME \u202f`é`"])
def test_the_command_that_a_resume_names_goes_on(tmp_path, capsys, name):
    """As printed, with a path that needs quotes; a best.pt of the folder's own is somebody else's business."""
    out = tmp_path / name
    train.main(options(tmp_path, name, max_iters=1))
    runs.set_aside(out)
    with pytest.raises(UserError) as error:
        train.main([f"--out_dir={out}", "--resume"])
    words = shlex.split(str(error.value).partition(": go on with it: ")[2])
    assert words[:2] == ["python", "train.py"] and train.main([*words[2:], "--max_iters=2"]) == 0
    assert checkpoint(out / "run-1")["step"] == 2 and os.listdir(out) == ["run-1"]
    (out / "best.pt").write_text("a new run's")
    runs.check_resumable(out, out / "last.pt")


# ---- the log

class Disk(io.FileIO):
    """A file on a disk that has `room` bytes left, and more from line `more` on."""

    room, more, lines = 0, math.inf, 0

    def write(self, text: bytes) -> int:
        if self.lines < self.more and self.room < len(text):
            part, Disk.room = text[: self.room], 0
            if not part:
                Disk.lines += 1
                raise ENOSPC
            return super().write(part)  # half of it, as systems do
        Disk.room -= len(text)
        Disk.lines += 1
        return super().write(text)


@pytest.mark.faults
@pytest.mark.parametrize("room, more, steps", [(0, math.inf, []), (3000, math.inf, [1]), (0, 5, [3, 4])])
def test_a_disk_that_is_full_at_a_log_line_stops_nothing(tmp_path, monkeypatch, capsys, straight, room, more, steps):
    """One line of warning; what there is in the log is whole lines; what has room again is written."""
    monkeypatch.setattr(Disk, "room", room)
    monkeypatch.setattr(Disk, "more", more)
    monkeypatch.setattr(Disk, "lines", 0)
    monkeypatch.setattr(runs, "open", lambda path, mode, buffering: Disk(path, mode), raising=False)
    if steps == [1]:  # the header, the first evaluation, the first step and half a line
        header = sum(len(json.dumps(record)) + 1 for record in records(straight)[:3])
        monkeypatch.setattr(Disk, "room", header + 200)
    assert train.main(options(tmp_path, "run", **RUN)) == 0
    out = tmp_path / "run"
    assert [r["step"] for r in step_records(out)] == steps
    printed = capsys.readouterr()
    warning = f"WARNING: cannot write to {out / 'log.jsonl'} (No space left on device): the run goes on without these"
    assert printed.out.count("WARNING") == printed.out.count(warning) == 1
    assert equal(checkpoint(out)["model"], checkpoint(straight)["model"])


BAD = [b"\x00\xff\xfe binary \x80", b'{"step": null}', b'{"step": "4", "loss": 1.0}', b'{"step": true}',
       b'{"step": 2.5}', b'{"step": 1, "best": true}', b'{"step": 1, "best": true, "val_loss": null}',
       b'{"step": 1, "best": true, "val_loss": "low"}', b'{"step": 1, "val_loss": NaN}',
       b'{"step": 1, "loss": -Infinity}', b'{"step": 1, "loss": 1e999}', b'{"step": 1, "loss": [1]}', b"[1, 2]", b"3",
       b"null", b'"text"', b"[" * 5000, b'{"a":' * 5000, b'{"step": ' + b"9" * 5000 + b"}", b'{"step": 1, "lo',
       b'{"step": 1}{"step": 1}', "{\"step\": 1, \"é".encode("latin-1"), b'{"x": "' + b"y" * (3 << 20) + b'"}',
       b"z" * runs.LONGEST, b"\xef\xbb\xbf{}"]  # fmt: skip
GOOD = [b'{"started": 0, "config": {"dim": 32}}', b'{"step": 1, "loss": 2.0}', b'{"step": 1, "loss": null}',
        b'{"step": 0, "val_loss": 5.5, "best": true}', b'{"step": 2, "val_loss": null, "best": false}',
        '{"note": "\u2028 é"}'.encode(), b'{"step": 2, "skipped": "loss"}']  # fmt: skip


@pytest.mark.faults
def test_a_log_with_bad_lines_keeps_the_good_ones_and_says_how_many_were_bad(tmp_path, capsys):
    """At every place: first, between, last without its end; and in a real run."""
    path = tmp_path / "log.jsonl"
    for bad in BAD:
        for lines in ([bad, *GOOD], [*GOOD, bad], [*GOOD[:3], bad, b"", b"  ", bad, *GOOD[3:]]):
            path.write_bytes(b"\n".join(lines))
            assert runs.truncate_log(path, 9, False) == (5.5, lines.count(bad)), bad[:40]
            assert path.read_bytes() == b"".join(line + b"\n" for line in GOOD), bad[:40]
    train.main(options(tmp_path, "run", max_iters=2))
    log = tmp_path / "run" / "log.jsonl"
    before = log.read_bytes()
    log.write_bytes(b"\r\n".join([b"\x00\xff", *before.splitlines(), BAD[5], b'{"step": 2, "loss"']))
    capsys.readouterr()
    assert train.main([f"--out_dir={tmp_path / 'run'}", "--resume", "--max_iters=3"]) == 0
    assert "log.jsonl: 3 lines could not be read and were dropped" in capsys.readouterr().out
    assert log.read_bytes().startswith(before)
    assert train.main([f"--out_dir={tmp_path / 'run'}", "--resume", "--max_iters=4"]) == 0
    assert "could not be read" not in capsys.readouterr().out


@pytest.mark.faults
def test_a_log_that_is_a_folder_is_one_line(tmp_path):
    train.main(options(tmp_path, "run", max_iters=1))
    (tmp_path / "run" / "log.jsonl").unlink()
    (tmp_path / "run" / "log.jsonl").mkdir()
    with pytest.raises(UserError, match="log.jsonl.*Is a directory"):
        train.main([f"--out_dir={tmp_path / 'run'}", "--resume", "--max_iters=2"])


class Full(io.BytesIO):
    """Room for `room` bytes."""

    def __init__(self, room: int):
        super().__init__()
        self.room = room

    def write(self, text) -> int:
        self.room -= len(text)
        if self.room < 0:
            raise ENOSPC
        return super().write(text)


@pytest.mark.faults
@pytest.mark.parametrize("room", [0, 200, 1000, 20000, 400000])
def test_errors_are_said_in_the_system_s_words(tmp_path, room):
    """Wherever the disk is full: torch's archive turns it into an error of its own."""
    with pytest.raises(UserError, match=r"^cannot write .*last.pt \(No space left on device\): free some space"):
        with saved_file(tmp_path / "last.pt"):
            torch.save({"model": torch.zeros(100000)}, Full(room))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error, words", [
    (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                  "tried to allocate 80 bytes. Error code 12 (Cannot allocate memory)"), "Cannot allocate memory"),
    (RuntimeError("[Errno 28] No space left on device: 'x'"), "No space left on device"),
    (RuntimeError("first line\nstack"), "first line"), (MemoryError(), "MemoryError"), (OSError(), "OSError"),
])  # fmt: skip
def test_reasons(error, words):
    assert reason(error) == words


@pytest.mark.faults
def test_a_profile_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, capsys):
    real = runs.saved_file

    def saved(path):
        if path.name == "trace.json":
            raise UserError("cannot write trace.json (No space left on device)")
        return real(path)

    monkeypatch.setattr(runs, "saved_file", saved)
    assert train.main(options(tmp_path, "run", max_iters=5, profile=1)) == 0
    assert "WARNING: cannot write trace.json (No space left on device)" in capsys.readouterr().out


def test_a_shard_that_cannot_be_written_is_said_in_the_system_s_words(tmp_path, monkeypatch):
    import torch.distributed.checkpoint as dcp

    def save(tensors, storage_writer):
        raise dcp.CheckpointException("x", {0: (ENOSPC, None)})

    monkeypatch.setattr(dcp, "save", save)
    with pytest.raises(UserError, match=r"shards-3 \(No space left on device\): free"):
        parallel.write_parts(tmp_path / "shards-3", {})


# ---- real processes

@pytest.mark.slow
@pytest.mark.faults
def test_two_programs_and_a_killed_one(tmp_path):
    """The second one ends with 2 and a line that names the first; after SIGKILL the folder is free."""
    first = start(options(tmp_path, "run", max_iters=10**6))
    wait_for_step(tmp_path / "run", 3, first)
    second = start(options(tmp_path, "run"))
    out, err = second.communicate(timeout=100)
    assert second.returncode == 2 and out == "" and err.count("\n") == 1 and f"process {first.pid} on" in err
    first.kill()
    first.communicate()
    assert train.main(options(tmp_path, "run", max_iters=1)) == 0


@pytest.mark.slow
@pytest.mark.faults
def test_head_and_a_hangup_save_and_leave(tmp_path):
    command = shlex.join([sys.executable, str(ROOT / "train.py"), *options(tmp_path, "run", max_iters=10**6)])
    done = subprocess.run(["bash", "-c", f"{command} | grep -m 3 'step .* loss'; exit ${{PIPESTATUS[0]}}"], cwd=ROOT,
                          capture_output=True, text=True, timeout=100)  # fmt: skip
    assert done.returncode == 128 + signal.SIGPIPE and done.stderr == ""
    reached = checkpoint(tmp_path / "run")["step"]
    assert reached == len(step_records(tmp_path / "run")) >= 3
    run = start([f"--out_dir={tmp_path / 'run'}", "--resume"])
    wait_for_step(tmp_path / "run", reached + 2, run, "resumed_at")
    run.send_signal(signal.SIGHUP)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 129, out + err
    assert "saved in" in out and "Traceback" not in err
    assert checkpoint(tmp_path / "run")["step"] > reached


@pytest.mark.slow
@pytest.mark.faults
def test_a_signal_while_tokens_are_made_is_obeyed_within_a_second(tmp_path):
    text = write_folder(tmp_path / "text", {"a.txt": (ROOT / "train.py").read_text() * 1000})
    args = [*options(tmp_path, "run"), "--tokenizer=python4096", "--vocab_size=4096", f"--data={text}"]
    run = start(args)
    while not list(tmp_path.glob("cache/.hydra-*.tmp")):
        assert run.poll() is None
        time.sleep(0.005)
    began = time.monotonic()
    run.terminate()
    out, err = run.communicate(timeout=100)
    assert time.monotonic() - began < 1.5 and run.returncode == 143  # a second, and a busy machine
    assert out == "stopped before the first step: no file of a run was changed\n" and "Traceback" not in err
    assert os.listdir(tmp_path / "cache") == [] and not (tmp_path / "run").exists()
