"""torch's recurrent layers, one operation a layer: a flat value (B, …) that holds everything the layer gives.

What torch returns is cut out of it. A deep recurrent module is as many players as it has layers; the dropout between
them is an operation of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from gtddp_compile import kernels


def record_recurrent(tracer: Any, m: nn.RNNBase, x: Any, hx: Any = None) -> tuple[Any, Any]:
    """``output, h_n`` or ``output, (h_n, c_n)`` as torch lays them out."""
    lstm = m.mode == "LSTM"
    directions = 2 if m.bidirectional else 1
    size = m.proj_size or m.hidden_size
    sizes = (size, m.hidden_size) if lstm else (size,)
    given = () if hx is None else (tuple(hx) if isinstance(hx, tuple | list) else (hx,))
    starts = [state.transpose(0, 1) for state in given]
    x = x if m.batch_first else x.transpose(0, 1)
    finals: list[list[Any]] = [[] for _ in sizes]
    for layer in range(m.num_layers):
        first = layer * directions
        own = [state[:, first : first + directions] for state in starts]
        weights = [getattr(m, name) for name in _names(m, layer)]
        options = {"mode": m.mode, "directions": directions, "bias": m.bias, "sizes": sizes}
        flat = tracer.create_proxy("call_function", kernels.recurrent, (x, weights, *own), options)
        offset = 0
        for found, width in zip(finals, sizes, strict=True):
            end = offset + directions * width
            found.append(flat[:, offset:end].unflatten(1, (directions, width)))
            offset = end
        x = flat[:, offset:].unflatten(1, (-1, directions * size))
        x = x.transpose(0, 1).contiguous()  # in memory as torch's: masks of dropout are drawn in that order
        if m.training and m.dropout and layer + 1 < m.num_layers:
            x = F.dropout(x, m.dropout, True)
        x = x.transpose(0, 1)
    states = tuple(torch.cat(found, 1).transpose(0, 1) for found in finals)
    return x if m.batch_first else x.transpose(0, 1), states if lstm else states[0]


def _names(m: nn.RNNBase, layer: int) -> list[str]:
    """Parameters of one layer, in the order of torch's flat weights."""
    width = len(m._flat_weights_names) // m.num_layers
    return list(m._flat_weights_names[layer * width : (layer + 1) * width])


MODES = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN_TANH", "rnn_relu": "RNN_RELU"}
"""By the name of torch's operation of a whole module."""


def recurrent_graph(operation: str, a: Mapping[str, Any], sizes: tuple[int, ...]) -> fx.Graph:
    """The same for ``aten.lstm.input`` and its kin as torch.export records them, by the arguments.

    ``sizes``: features of ``h_n`` (and ``c_n``). The graph has placeholders for ``input``, the states and the
    parameters, in this order, and returns ``(output, h_n)`` or ``(output, h_n, c_n)``.
    """
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    x, *given = [fx.Proxy(graph.placeholder(f"x_{i}"), tracer) for i in range(1 + len(sizes))]
    weights = {f"w_{i}": fx.Proxy(graph.placeholder(f"w_{i}"), tracer) for i in range(len(a["params"]))}
    module: Any = SimpleNamespace(
        mode=MODES[operation], hidden_size=sizes[-1], proj_size=sizes[0] if sizes[0] != sizes[-1] else 0,
        num_layers=a["num_layers"], bias=a["has_biases"], batch_first=a["batch_first"], dropout=a["dropout"],
        training=a["train"], bidirectional=a["bidirectional"], _flat_weights_names=list(weights), **weights,
    )  # fmt: skip
    output, states = record_recurrent(tracer, module, x, tuple(given))
    flat = (output, *states) if isinstance(states, tuple) else (output, states)
    graph.output(tuple(value.node for value in flat))
    return graph


def record_lstm_cell(tracer: Any, m: nn.LSTMCell, x: Any, hx: Any = None) -> tuple[Any, Any]:
    """``h, c``."""
    hx = hx if hx is not None else (x.new_zeros(x.shape[0], m.hidden_size),) * 2
    return record_lstm_cell_function(tracer, x, hx, m.weight_ih, m.weight_hh, m.bias_ih, m.bias_hh)


def record_lstm_cell_function(tracer: Any, x: Any, hx: Any, *weights: Any, **named: Any) -> tuple[Any, Any]:
    """``torch.lstm_cell``."""
    flat = tracer.create_proxy("call_function", kernels.lstm_cell, (x, *hx, *weights), named)
    halves = flat.chunk(2, 1)
    return halves[0], halves[1]


def record_cell(tracer: Any, m: nn.GRUCell | nn.RNNCell, x: Any, hx: Any = None) -> Any:
    """``h``."""
    h = hx if hx is not None else x.new_zeros(x.shape[0], m.hidden_size)
    function = torch.gru_cell if isinstance(m, nn.GRUCell) else _cells[m.nonlinearity]
    args = (x, h, m.weight_ih, m.weight_hh, m.bias_ih, m.bias_hh)
    return tracer.create_proxy("call_function", function, args, {})


_cells = {"tanh": torch.rnn_tanh_cell, "relu": torch.rnn_relu_cell}
