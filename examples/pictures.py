"""Draw a transformer of 24 blocks: ``python examples/pictures.py`` writes ``docs/transformer.svg``.

A page instead of a picture, by the command line:
``gtddp-compile inspect examples/pictures.py:Transformer --input 2,16:int64 --out net.html``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from gtddp_compile import compile_optimizer


class Attention(nn.Module):
    """Causal self-attention with projections of their own: q, k and v decide together."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a two-layer network, each around a shortcut, normalised before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Decoder-only language model with as many blocks as GPT-2 medium, and little width."""

    def __init__(self, depth: int = 24, width: int = 64, heads: int = 4, words: int = 100, length: int = 16) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(words, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(words) + self.positions)))


def word_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the words of each sample, shape (B,)."""
    return nn.functional.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").mean(1)


def main(out: str = "docs/transformer.svg") -> None:
    opt = compile_optimizer(Transformer(), torch.zeros(2, 16, dtype=torch.int64), loss=word_loss)
    opt.graph.save(Path(out))
    print(f"wrote {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
