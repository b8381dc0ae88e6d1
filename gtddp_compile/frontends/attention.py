"""torch's attention and transformer layers, recorded as what they compute: projections, attention, projection.

torch's own ``forward`` branches on sizes and flattens batch and sequence into one axis; here the batch stays in front.
A packed input projection is one player, separate ones are three that decide as a coalition.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gtddp_compile import kernels


def record_attention(
    tracer: Any, m: nn.MultiheadAttention, query: Any, key: Any, value: Any, key_padding_mask: Any = None,
    need_weights: bool = True, attn_mask: Any = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """``softmax(q kᵀ / √d + mask) v`` between its projections; the weights too where they are asked for.

    ``is_causal`` is a hint about ``attn_mask``, which is what counts.
    """
    q, k, v = _projections(m, query, key, value)
    heads = (m.num_heads, m.head_dim)
    added = int(m.bias_k is not None) + int(m.add_zero_attn)
    if m.bias_k is not None and m.bias_v is not None:
        k = torch.cat([k, m.bias_k.expand(k.shape[0], 1, -1)], 1)
        v = torch.cat([v, m.bias_v.expand(v.shape[0], 1, -1)], 1)
    if m.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    q, k, v = (part.unflatten(-1, heads).transpose(1, 2) for part in (q, k, v))
    mask = None
    if attn_mask is not None or key_padding_mask is not None:
        masks = (attn_mask, key_padding_mask, m.num_heads, added)
        mask = tracer.create_proxy("call_function", kernels.attention_mask, (q, *masks), {})
    dropout = m.dropout if m.training else 0.0
    if not need_weights:
        weights, mixed = None, F.scaled_dot_product_attention(q, k, v, mask, dropout)
    else:
        scores = q * (m.head_dim**-0.5) @ k.transpose(-2, -1)
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        weights = F.dropout(weights, dropout) if dropout else weights
        mixed = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    output = F.linear(mixed.transpose(1, 2).flatten(-2), m.out_proj.weight, m.out_proj.bias)
    if m.training:  # torch's layout, for a dropout that follows draws its mask in the order of the memory
        output = tracer.create_proxy("call_function", kernels.time_first, (output,), {})
    return output if m.batch_first else output.transpose(0, 1), weights


def record_attention_function(
    tracer: Any, query: Any, key: Any, value: Any, embed_dim_to_check: int, num_heads: int, in_proj_weight: Any,
    in_proj_bias: Any, bias_k: Any, bias_v: Any, add_zero_attn: bool, dropout_p: float, out_proj_weight: Any,
    out_proj_bias: Any, training: bool = True, key_padding_mask: Any = None, need_weights: bool = True,
    attn_mask: Any = None, use_separate_proj_weight: bool = False, q_proj_weight: Any = None, k_proj_weight: Any = None,
    v_proj_weight: Any = None, static_k: Any = None, static_v: Any = None, average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """``F.multi_head_attention_forward``, which models call with weights of their own.

    Raises:
        ValueError: with ``static_k`` or ``static_v``.
    """
    if static_k is not None or static_v is not None:
        raise ValueError("multi_head_attention_forward with static keys or values")
    module: Any = SimpleNamespace(
        embed_dim=embed_dim_to_check, num_heads=num_heads, head_dim=embed_dim_to_check // num_heads,
        in_proj_weight=in_proj_weight, in_proj_bias=in_proj_bias, bias_k=bias_k, bias_v=bias_v,
        add_zero_attn=add_zero_attn, dropout=dropout_p, training=training, batch_first=False,
        out_proj=SimpleNamespace(weight=out_proj_weight, bias=out_proj_bias),
        _qkv_same_embed_dim=not use_separate_proj_weight,
        q_proj_weight=q_proj_weight, k_proj_weight=k_proj_weight, v_proj_weight=v_proj_weight,
    )  # fmt: skip
    masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask, "is_causal": is_causal}
    wanted = {"need_weights": need_weights, "average_attn_weights": average_attn_weights}
    return record_attention(tracer, module, query, key, value, **masks, **wanted)


def _projections(m: nn.MultiheadAttention, query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    """``q``, ``k`` and ``v``, batch leading."""
    same, pair = query is key and key is value, key is value
    if not m.batch_first:
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    size, bias = m.embed_dim, m.in_proj_bias
    if not m._qkv_same_embed_dim:
        parts = [None] * 3 if bias is None else [bias[i * size : (i + 1) * size] for i in range(3)]
        weights = (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
        rows = zip((query, key, value), weights, parts, strict=True)
        q, k, v = (F.linear(x, weight, part) for x, weight, part in rows)
        return q, k, v
    if same:
        packed = F.linear(query, m.in_proj_weight, bias)
        return packed[..., :size], packed[..., size : 2 * size], packed[..., 2 * size :]

    def project(x: Any, start: int, end: int) -> Any:
        rows = slice(start * size, end * size)
        return F.linear(x, m.in_proj_weight[rows], None if bias is None else bias[rows])

    if pair:
        packed = project(key, 1, 3)
        return project(query, 0, 1), packed[..., :size], packed[..., size:]
    return project(query, 0, 1), project(key, 1, 2), project(value, 2, 3)


# --- transformers: torch's own without the tests for its fast inference path ------------------------------------------


def record_encoder_layer(
    tracer: Any, m: nn.TransformerEncoderLayer, src: Any, src_mask: Any = None, src_key_padding_mask: Any = None,
    is_causal: bool = False,
) -> Any:  # fmt: skip
    """Attention and feed-forward blocks, each with its shortcut."""
    if m.norm_first:
        x = src + m._sa_block(m.norm1(src), src_mask, src_key_padding_mask, is_causal=is_causal)
        return x + m._ff_block(m.norm2(x))
    x = m.norm1(src + m._sa_block(src, src_mask, src_key_padding_mask, is_causal=is_causal))
    return m.norm2(x + m._ff_block(x))


def record_encoder(
    tracer: Any, m: nn.TransformerEncoder, src: Any, mask: Any = None, src_key_padding_mask: Any = None,
    is_causal: bool | None = None,
) -> Any:  # fmt: skip
    """The layers in turn."""
    x = src
    for layer in m.layers:
        x = layer(x, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
    return x if m.norm is None else m.norm(x)


def record_decoder(
    tracer: Any, m: nn.TransformerDecoder, tgt: Any, memory: Any, tgt_mask: Any = None, memory_mask: Any = None,
    tgt_key_padding_mask: Any = None, memory_key_padding_mask: Any = None, tgt_is_causal: bool | None = None,
    memory_is_causal: bool = False,
) -> Any:  # fmt: skip
    """The layers in turn."""
    x = tgt
    for layer in m.layers:
        x = layer(x, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
    return x if m.norm is None else m.norm(x)


def record_transformer(
    tracer: Any, m: nn.Transformer, src: Any, tgt: Any, src_mask: Any = None, tgt_mask: Any = None,
    memory_mask: Any = None, src_key_padding_mask: Any = None, tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None, src_is_causal: bool | None = None, tgt_is_causal: bool | None = None,
    memory_is_causal: bool = False,
) -> Any:  # fmt: skip
    """Encoder, then decoder."""
    memory = m.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask)
    return m.decoder(
        tgt, memory, tgt_mask=tgt_mask, memory_mask=memory_mask, tgt_key_padding_mask=tgt_key_padding_mask,
        memory_key_padding_mask=memory_key_padding_mask,
    )  # fmt: skip
