"""Data parallel: every process trains on its shard, all make the update of the joined batch.

torchrun --nproc-per-node=2 examples/loops/several_processes.py
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from gtddp_compile import CompiledOptimizer, compile_optimizer


def save(path: Path, model: nn.Module, optimizer: CompiledOptimizer) -> None:
    """By the first process, elsewhere first: a process that ends meanwhile leaves the checkpoint before it whole."""
    if dist.get_rank() == 0:
        part = path.with_suffix(".part")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, part)
        os.replace(part, path)


def moons(samples: int = 256) -> TensorDataset:
    """Two interleaved half circles."""
    source = torch.Generator().manual_seed(0)
    angle, label = torch.rand(samples, generator=source) * torch.pi, torch.arange(samples) % 2
    side = 1.0 - 2.0 * label
    return TensorDataset(torch.stack([angle.cos() * side + label, angle.sin() * side + 0.5 * label], 1), label)


def train(path: Path, epochs: int = 4) -> list[float]:
    """Every epoch's last loss, which is that of the joined batch and so the same in every process."""
    on_device = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_device else torch.device("cpu")
    if on_device:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_device else "gloo", timeout=timedelta(minutes=5))
    torch.manual_seed(0)  # the same parameters everywhere, or the first step is refused
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).to(device)
    data = moons()
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=16, sampler=sampler)
    optimizer = compile_optimizer(model, loss=nn.CrossEntropyLoss(), process_group="world")
    history = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        loss = Tensor()
        for x, y in loader:
            loss = optimizer.step(x.to(device), y.to(device))
        history.append(float(loss))
        save(path, model, optimizer)
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()
    return history


if __name__ == "__main__":
    losses = train(Path(os.environ.get("CHECKPOINT", "several_processes.pt")))
    if os.environ.get("RANK", "0") == "0":
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
