"""One torch thread a worker: the networks are small, and the workers already share the cores."""

import torch

torch.set_num_threads(1)
if not torch.accelerator.is_available():
    # The same numbers; torch's own notes every call, with its stack, for devices that might come: a sixth of the tests'
    # time.
    torch.manual_seed = torch.default_generator.manual_seed
