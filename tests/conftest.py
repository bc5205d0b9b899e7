"""One thread for every test: at these shapes a second one costs more than it gains. And no graphs from a cache: its key
misses what torch is told of the CPU, so that a run that imitates another CPU would be given graphs of this one."""

import pytest
import torch
import torch._inductor.config

torch.set_num_threads(1)
torch._inductor.config.fx_graph_cache = False


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
