"""Configurations of transformers made tiny: two layers, two heads, width 32, vocabulary 100.

A configuration is shrunk by the names of its fields, its nested configurations too.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Any

TOKENS = 8
VOCABULARY = 100
LAYERS = 2
HEADS = 2
WIDTH = 32
IMAGE = 32
FRAMES = 2
FEATURES = 32

# Fields of one integer and the value they get; the first pattern that fits a name decides.
_FIELDS: tuple[tuple[int, str], ...] = (
    (VOCABULARY, ".*vocab_size(_per_layer_input)?"),
    (1, "num_key_value_heads num_global_key_value_heads num_kv_heads decoder_num_key_value_heads"),
    (
        HEADS,
        "(encoder_|decoder_)?(num_)?attention_heads (encoder|decoder)_num_attention_heads num_heads n_heads? n_head",
    ),
    (HEADS, "linear_num_(key|value)_heads num_linear_heads index_n_heads"),
    (
        LAYERS,
        "num_(hidden_|encoder_|decoder_)?layers n_layers? (encoder|decoder)_layers depth decoder_num_hidden_layers",
    ),
    (LAYERS, "(encoder_|decoder_)num_hidden_layers num_(layers_)?blocks num_transformer_layers num_loops"),
    (WIDTH, "hidden_size d_model n_embd dim embed_dim embedding_size emb_dim out_hidden_size text_hidden_size d_embed"),
    (WIDTH, "text_embed_dim hidden_dim projection_dim (encoder|decoder)_hidden_(size|dim) output_dim lru_width"),
    (
        WIDTH,
        "word_embed_proj_dim (encoder|decoder)_embed_dim fusion_hidden_size reduce_hidden_size classifier_proj_size",
    ),
    (WIDTH, "output_hidden_size hidden_size_per_layer_input backbone_hidden_size projector_hidden_size"),
    (WIDTH, "output_proj_dims feature_size"),
    (2 * WIDTH, ".*intermediate_size .*ffn_dim d_ff mlp_dim n_inner d_inner ffn_(hidden_)?size"),
    (8, "qk_rope_head_dim"),
    (WIDTH // HEADS, "head_dim d_kv v_head_dim qk_nope_head_dim index_head_dim linear_(key|value)_head_dim d_head"),
    (WIDTH // HEADS, "global_head_dim rotary_dim attention_head_dim attention_head_size kv_channels qk_head_dim"),
    (WIDTH // HEADS, "query_pre_attn_scalar"),
    (2, "num_experts_per_tok(en)? moe_topk top_k moe_k topk index_topk"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (1, "n_group topk_group first_k_dense_replace num_codebooks num_dense_layers moe_layer_start_index"),
    (16, "kv_lora_rank q_lora_rank o_lora_rank"),
    (FEATURES // 2, "max_source_positions"),
    (64, "max_(2d_)?position_embeddings max_target_positions n_positions n_ctx max_seq.*_len.* max_.*_positions"),
    (4, "sliding_window attention_window local_attention attention_window_size window_attn"),
    (TOKENS, "mamba_chunk_size attention_chunk_size chunk_length"),
    (16, "num_mel_bins feature_dim input_feat_per_channel num_freq_bins"),
    (4, "num_queries num_query_tokens num_latents query_length"),
    (3, "num_feat_extract_layers"),
    (4, "num_conv_pos_embeddings mamba_d_state state_size ssm_state_size mamba_d_conv conv_kernel"),
    (2, "num_conv_pos_embedding_groups"),
    (4, "mamba_n_heads mamba_num_heads"),
    (16, "mamba_d_head mamba_head_dim context_length"),
    (FRAMES, "num_frames frames_per_clip"),
    (2, "prediction_length mask_time_length"),
    (0, "pad_token_id"),
)
# Fields that change no width: all that is reduced at the last attempt, for configurations that tie widths together.
_SAFE = re.compile(r".*vocab_size|.*layers|n_layers?|.*experts|.*positions?(_embeddings)?|num_frames|num_mel_bins")
# Fields that are None until a checkpoint sets them.
_UNSET = re.compile(
    r"vocab_size|pad_token_id|num_experts_per_tok|n_routed_experts|n_group|topk_group|moe_intermediate_size|prediction_length"
)
_PLAIN = {"image_size": IMAGE, "patch_size": 8}
_LISTS: dict[str, tuple[Any, ...]] = {"conv_dim": (32, 32, 32), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3)}
_OFF = {
    "use_cache": False,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A way to shrink: the widths or not, with fewer heads for keys and values than for queries or not."""

    widths: bool
    grouped: bool
    note: str = ""


ATTEMPTS = (
    Attempt(widths=True, grouped=True),
    Attempt(widths=True, grouped=False),
    Attempt(widths=False, grouped=False, note="widths as published"),
)
# What field names do not tell.
_TYPES: dict[str, dict[str, Any]] = {
    "bark": {"block_size": 64, "input_vocab_size": VOCABULARY, "output_vocab_size": VOCABULARY},
    "csm": {"backbone_hidden_size": WIDTH},
    "decision_transformer": {"state_dim": 4, "act_dim": 3, "hidden_size": WIDTH},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite_speech5_encoder": {"context_size": TOKENS},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "perceiver": {"d_latents": WIDTH, "d_model": WIDTH, "num_self_attends_per_block": 2, "num_self_attention_heads": 2},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [2, 4], "attn_layers": ["local", "lsh"]},
    "wav2vec2-bert": {"feature_projection_input_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layer_types": None},
    "zamba2": {"layer_types": None},
}


def configuration(name: str, attempt: Attempt) -> Any:
    """The type's configuration, shrunk."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = _shrink(CONFIG_MAPPING[name], attempt, name)
    config.use_cache = False
    return config


def _shrink(cls: type, attempt: Attempt, name: str) -> Any:
    fields = {field.name: _default(field) for field in dataclasses.fields(cls)}
    if "depths" in fields:  # stages of growing width, tied to each other
        attempt = dataclasses.replace(attempt, widths=False)
    special = itertools.count(VOCABULARY - 1, -1)
    options: dict[str, Any] = {}
    for field, value in fields.items():
        options.update(_field(field, value, fields, attempt, special))
    for key, spec in getattr(cls, "sub_configs_defaults", {}).items():
        if key != "backbone_config":  # comes with the stages to use
            options[key] = _nested(spec, attempt)
    if "mrope_section" in getattr(cls, "ignore_keys_at_rope_validation", ()) and attempt.widths:
        options["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
        if not attempt.grouped:  # or half of the head's channels rotate
            options["rope_parameters"]["mrope_section"] = [1, 1, 2]
    options.update(_TYPES.get(name, {}))
    return cls(**options)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _nested(spec: Any, attempt: Attempt) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = getattr(spec, "config_class", spec)
    if not dataclasses.is_dataclass(cls):
        cls = CONFIG_MAPPING[spec.model_type]
    return _shrink(cls, attempt, getattr(cls, "model_type", ""))


def _field(
    name: str, value: Any, fields: dict[str, Any], attempt: Attempt, special: Iterator[int]
) -> Iterator[tuple[str, Any]]:
    """The field's new value, if it gets one."""
    size = _size(name)
    if size == 1 and not attempt.grouped and "kv_heads" in name.replace("key_value", "kv"):
        size = HEADS
    if name in _OFF and value is not None:
        yield name, _OFF[name]
    elif value is None and _UNSET.fullmatch(name):
        yield name, size
    elif isinstance(value, int) and not isinstance(value, bool):
        if re.fullmatch(r".*_token_(id|index)", name):
            if value >= VOCABULARY:
                yield name, next(special)
        elif name in _PLAIN:
            if attempt.widths and {"patch_size", "image_size"} <= fields.keys():
                yield name, _PLAIN[name]
            elif name == "image_size" and "window_size" not in fields:
                yield name, 64
        elif size is not None and (attempt.widths or _SAFE.fullmatch(name)):
            yield name, size
    elif isinstance(value, list | tuple) and value:
        yield from _list(name, value, fields, attempt)


def _size(name: str) -> int | None:
    return next((size for size, names in _FIELDS if any(re.fullmatch(each, name) for each in names.split())), None)


def _list(name: str, value: Any, fields: dict[str, Any], attempt: Attempt) -> Iterator[tuple[str, Any]]:
    kind = type(value)
    layers = next((fields[key] for key in ("num_hidden_layers", "num_layers", "n_layer") if key in fields), None)
    if name == "depths":
        yield name, kind(min(depth, 2) for depth in value)
    elif name in _LISTS and attempt.widths and "num_feat_extract_layers" in fields:
        yield name, kind(_LISTS[name])
    elif re.search(r"ind(ex|ice)", name) and all(isinstance(index, int) and index >= 0 for index in value) and layers:
        yield name, kind(index * LAYERS // (max(value) + 1) for index in value)
    elif len(value) == layers:
        kinds = list(dict.fromkeys(value))
        yield name, kind((kinds + list(value))[:LAYERS])
    elif name.endswith("_token_id") and all(isinstance(token, int) for token in value):
        yield name, kind(min(token, VOCABULARY - 1) for token in value)
