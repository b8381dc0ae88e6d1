"""One torch thread a worker: the networks are small, and the workers already share the cores."""

import torch

torch.set_num_threads(1)
