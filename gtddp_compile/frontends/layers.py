"""Layers whose ``forward`` torch.fx cannot pass through, recorded as one function of their parameters each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from gtddp_compile import kernels
from gtddp_compile.frontends.attention import (
    record_attention,
    record_attention_function,
    record_decoder,
    record_encoder,
    record_encoder_layer,
    record_transformer,
)
from gtddp_compile.frontends.recurrent import (
    record_cell,
    record_lstm_cell,
    record_lstm_cell_function,
    record_recurrent,
)

Record = Callable[..., Any]


def record_batch_norm(tracer: Any, m: _BatchNorm, x: Any) -> Any:
    """``kernels.batch_norm`` with its buffers and parameters as arguments."""
    args = (x, m.running_mean, m.running_var, m.num_batches_tracked, m.weight, m.bias)
    kwargs = {"training": m.training, "momentum": m.momentum, "eps": m.eps}
    kwargs |= {"sync": True} if isinstance(m, nn.SyncBatchNorm) else {}
    return tracer.create_proxy("call_function", kernels.batch_norm, args, kwargs)


def record_batch_norm_function(
    tracer: Any, x: Any, mean: Any, var: Any, weight: Any = None, bias: Any = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """:func:`record_batch_norm` of what ``F.batch_norm`` takes, which counts no batches."""
    kwargs = {"training": training, "momentum": momentum, "eps": eps}
    return tracer.create_proxy("call_function", kernels.batch_norm, (x, mean, var, None, weight, bias), kwargs)


def record_instance_norm(tracer: Any, m: _InstanceNorm, x: Any) -> Any:
    """``F.instance_norm`` without the check of the number of axes."""
    statistics = m.training or not m.track_running_stats
    momentum = 0.1 if m.momentum is None else m.momentum
    args = (x, m.running_mean, m.running_var, m.weight, m.bias, statistics, momentum, m.eps)
    return tracer.create_proxy("call_function", F.instance_norm, args, {})


LAYERS: dict[type[nn.Module], Record] = {
    _BatchNorm: record_batch_norm, _InstanceNorm: record_instance_norm, nn.MultiheadAttention: record_attention,
    nn.TransformerEncoderLayer: record_encoder_layer, nn.TransformerEncoder: record_encoder,
    nn.TransformerDecoder: record_decoder, nn.Transformer: record_transformer, nn.RNNBase: record_recurrent,
    nn.LSTMCell: record_lstm_cell, nn.GRUCell: record_cell, nn.RNNCell: record_cell,
}  # fmt: skip
"""By class; a subclass is recorded as its nearest base here."""

FUNCTIONS: dict[Callable[..., Any], Record] = {
    F.multi_head_attention_forward: record_attention_function, torch.lstm_cell: record_lstm_cell_function,
    F.batch_norm: record_batch_norm_function,
}  # fmt: skip
"""Functions of torch that are recorded as what they compute."""
