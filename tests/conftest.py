"""One thread for every test: at these shapes a second one costs more than it gains."""

import torch

torch.set_num_threads(1)
