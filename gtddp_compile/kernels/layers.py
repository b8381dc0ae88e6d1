"""Layers of torch's that the front ends record as one function."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_mask(
    q: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int, added: int
) -> Tensor:
    """What is added to the scores, ``(B, 1 or heads, T or 1, S)``: both masks of ``torch.nn.MultiheadAttention``.

    ``True`` forbids; ``added`` keys at the end (``bias_k``, ``add_zero_attn``) are never masked.
    """
    total = q.new_zeros(())
    for mask, keys in ((attn_mask, False), (key_padding_mask, True)):
        if mask is None:
            continue
        bias = (
            q.new_zeros(mask.shape).masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else mask.to(q.dtype)
        )
        if keys:
            bias = bias[:, None, None]
        elif bias.dim() == 3:
            bias = bias.unflatten(0, (-1, heads))
        total = total + F.pad(bias, (0, added))
    return total.expand(q.shape[0], *total.shape[1:]) if total.dim() == 4 else total.expand(q.shape[0], 1, *total.shape)


def masked_scores(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores ``(…, T, S)`` with the mask of ``scaled_dot_product_attention``; ``None``: the causal one.

    Unlike that of ``torch.nn.MultiheadAttention``, ``True`` allows.
    """
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask


def time_first(x: Tensor) -> Tensor:
    """``x`` itself, (B, T, n), laid out in memory with T first."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def recurrent(
    x: Tensor, weights: Sequence[Tensor], *states: Tensor, mode: str, directions: int, bias: bool,
    sizes: tuple[int, ...],
) -> Tensor:  # fmt: skip
    """One layer of ``torch.nn.LSTM``, ``GRU`` or ``RNN``, flat: ``(B, h_n | c_n | output)``.

    ``x`` is ``(B, T, n)``, ``states`` (of the given ``sizes``; zero if there are none) ``(B, directions, size)``.
    """
    begin = tuple(state.transpose(0, 1).contiguous() for state in states) or tuple(
        x.new_zeros(directions, x.shape[0], size) for size in sizes
    )
    options = (list(weights), bias, 1, 0.0, True, directions == 2, True)  # in training: else cuDNN has no derivative
    if mode == "LSTM":
        output, *ends = torch.lstm(x, begin, *options)
    else:
        function = {"GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}[mode]
        output, *ends = function(x, begin[0], *options)
    return torch.cat([*(end.transpose(0, 1).flatten(1) for end in ends), output.flatten(1)], 1)


def lstm_cell(
    x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``torch.lstm_cell``, flat: ``(B, h | c)``."""
    return torch.cat(torch.lstm_cell(x, (h, c), w_ih, w_hh, b_ih, b_hh), 1)
