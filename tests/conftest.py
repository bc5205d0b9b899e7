"""One thread for every test: at these shapes a second one costs more than it gains. And no graphs from a cache: its key
misses what torch is told of the CPU, so that a run that imitates another CPU would be given graphs of this one."""

import signal

import pytest
import torch
import torch._inductor.config

# A shell that starts the tests in the background leaves them, and the processes that they start, deaf to Ctrl-C, and
# nohup to a terminal that goes away.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
torch.set_num_threads(1)
torch._inductor.config.fx_graph_cache = False


# Every letter with what makes a comparison fair, CCQA without its parts and in the form of its authors' model, and all
# options in one model. Tests of the invariants take these beside the plain letters.
FAIR = [
    *({"pattern": p, "qk_norm": True, "short_conv": 3} for p in "AGL"),
    {"pattern": "M", "qk_norm": True, "short_conv": 3, "window": 5}, {"pattern": "L", "qk_norm": True},
    {"pattern": "L", "short_conv": 4, "rope_fraction": 0.5}, {"pattern": "A", "short_conv": 1, "rope_fraction": 0.0},
    {"pattern": "G", "qk_norm": True, "k_temperature": False, "rope_fraction": 0.5, "pre_out_norm": False},
    {"pattern": "C", "ccqa_norm": False}, {"pattern": "C", "k_temperature": False},
    {"pattern": "C", "conv_kernel": 2, "qk_gain": 0.5, "rope_fraction": 0.5, "alpha": "learned", "pre_out_norm": False},
    {"pattern": "MMCCCLML", "qk_norm": True, "short_conv": 3, "rope_fraction": 0.5, "alpha": "learned", "window": 6},
]  # fmt: skip


def write_folder(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(root)


@pytest.fixture
def folder(tmp_path):
    """Forty small texts."""
    files = {f"part{i % 3}/{i}.txt": f"text {i}\nénd {i * i}\n" * 20 for i in range(40)}
    return write_folder(tmp_path / "texts", files)


@pytest.fixture
def quick(monkeypatch):
    """The peaks of this machine, not measured."""
    monkeypatch.setattr("machine.matmul_peak", lambda device, dtype, n=0: 1e11)
    monkeypatch.setattr("sample.copy_bandwidth", lambda device: 1e9)
