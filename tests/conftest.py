"""One thread for every test: at these shapes a second one costs more than it gains. And no graphs from a cache: its key
misses what torch is told of the CPU, so that a run that imitates another CPU would be given graphs of this one."""

import torch
import torch._inductor.config

torch.set_num_threads(1)
torch._inductor.config.fx_graph_cache = False
