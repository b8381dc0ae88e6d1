"""A network with buffers and random numbers."""

import torch
from torch import Tensor, nn

LOSS = nn.CrossEntropyLoss()


class Noisy(nn.Module):
    """Batch-norm and dropout: buffers and random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.out = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(torch.relu(self.bn(self.fc(x)))))


def batch(seed: int = 0, size: int = 7) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=source), torch.randint(3, (size,), generator=source)
