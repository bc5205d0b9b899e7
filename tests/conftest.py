"""One thread for every test: at these shapes a second one costs more than it gains, and other processes do not disturb."""

import torch

torch.set_num_threads(1)
