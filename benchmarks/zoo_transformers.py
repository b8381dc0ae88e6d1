"""Model types of transformers, made tiny, with inputs for the arguments that their ``forward`` has.

What cannot be built or run that way is not tried, and says why.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from zoo import BATCH, Case, NotTried, regression
from zoo_configurations import ATTEMPTS, FEATURES, FRAMES, LAYERS, TOKENS, VOCABULARY, WIDTH, configuration

PARAMETER_LIMIT = 120_000_000


def names() -> list[str]:
    """Model types with a model class of their own."""
    from transformers.models.auto import modeling_auto

    return sorted(modeling_auto.MODEL_MAPPING_NAMES)


def build(name: str) -> Case:
    """One model type.

    Raises:
        NotTried: with the reason of every attempt.
    """
    problems: list[str] = []
    for attempt in ATTEMPTS:
        try:
            return _case(configuration(name, attempt), attempt.note)
        except NotTried as problem:
            problems.append(str(problem))
        except Exception as problem:  # a configuration may refuse anything; the reason is kept
            problems.append(f"{type(problem).__name__}: {problem}")
    raise NotTried(" | ".join(dict.fromkeys(_short(problem) for problem in problems)))


# --- models -----------------------------------------------------------------------------------------------------------


class Positional(nn.Module):
    """A transformers model as a function of tensors that returns one tensor."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], output: str) -> None:
        super().__init__()
        self.model, self.names, self.output = model, names, output

    def forward(self, *values: Tensor) -> Tensor:
        """The chosen output."""
        return _pick(self.model(**dict(zip(self.names, values, strict=True))), self.output)


def _case(config: Any, note: str) -> Case:
    from transformers import AutoModel

    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModel.from_config(config).parameters())
    if size > PARAMETER_LIMIT:
        raise NotTried(f"{size / 1e6:.0f} million parameters even with {LAYERS} layers")
    torch.manual_seed(0)
    model = AutoModel.from_config(config).float().train()
    problems = []
    for inputs in _batches(model):
        try:
            torch.manual_seed(0)
            outputs = model(**inputs)
            name = _choose(outputs)
            value = _pick(outputs, name)
            value.square().mean().backward()
        except Exception as problem:  # the next set of inputs may fit
            problems.append(f"{'+'.join(inputs)}: {type(problem).__name__}: {problem}")
            continue
        model.zero_grad()
        wrapped = Positional(model, tuple(inputs), name).train()
        said = "; ".join(filter(None, (note, f"{type(model).__name__}({', '.join(inputs)}).{name}")))
        return Case(wrapped, tuple(inputs.values()), torch.randn_like(value), regression, said)
    if not problems:
        raise NotTried("no set of inputs fits the arguments of its forward")
    raise NotTried("; ".join(dict.fromkeys(_short(problem) for problem in problems)))


def _choose(outputs: Any) -> str:
    """Name of the output to train on: what a task would read, else the first that carries gradients."""
    if isinstance(outputs, Tensor):
        return ""
    found = [name for name, value in outputs.items() if _fits(value)]
    for name in ("logits", "last_hidden_state", "prediction_outputs", "pooler_output"):
        if name in found:
            return name
    if not found:
        raise NotTried("no output with the batch on its leading axis that carries gradients")
    return found[0]


def _fits(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() >= 1 and value.shape[0] == BATCH and value.requires_grad


def _pick(outputs: Any, name: str) -> Tensor:
    return outputs[name] if name else outputs


# --- inputs -----------------------------------------------------------------------------------------------------------


def _batches(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Sets of inputs worth trying, the smallest that uses the model's main input first."""
    arguments = inspect.signature(model.forward).parameters
    required = [
        name
        for name, argument in arguments.items()
        if argument.default is inspect.Parameter.empty
        and argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY)
    ]
    main = model.main_input_name
    decoder = ["decoder_input_ids"] if "decoder_input_ids" in arguments else []
    sets = [
        [main, *decoder],
        [main],
        ["input_ids", *decoder],
        ["input_ids", "pixel_values"],
        ["pixel_values", *decoder],
        ["input_ids", "input_features"],
        ["input_ids", "bbox", *decoder],
        ["states", "actions", "rewards", "returns_to_go", "timesteps"],
        ["past_values", "past_time_features", "past_observed_mask", "future_values", "future_time_features"],
        ["input_ids", "bbox", "pixel_values"],
    ]
    seen = []
    for chosen in sets:
        wanted = list(dict.fromkeys([*required, *chosen]))
        if wanted not in seen and all(name in arguments for name in wanted):
            seen.append(wanted)
            for variant in range(_VARIANTS):
                made = {name: _input(name, model.config, variant) for name in wanted}
                yield {name: value for name, value in made.items() if value is not None}


_VARIANTS = 3


def _input(name: str, config: Any, variant: int) -> Tensor:
    text = _sub(config, "text_config", "text_encoder", "decoder")
    vision = _sub(config, "vision_config", "backbone_config", "encoder")
    audio = _sub(config, "audio_config", "encoder_config", "audio_encoder")
    if name in ("input_ids", "decoder_input_ids"):
        return torch.randint(10, min(getattr(text, "vocab_size", VOCABULARY), 60), (BATCH, TOKENS))
    if name in ("inputs_embeds", "hidden_states", "patch_embeds"):
        return torch.randn(BATCH, TOKENS, getattr(text, "hidden_size", WIDTH))
    if name in ("attention_mask", "decoder_attention_mask"):
        return torch.ones(BATCH, TOKENS, dtype=torch.long)
    if name in ("past_observed_mask", "past_values", "past_time_features", "future_values", "future_time_features"):
        return _series(name, config)
    if name in ("states", "actions", "rewards", "returns_to_go", "timesteps"):
        return _trajectory(name, config)
    if name == "bbox":
        return torch.tensor([1, 2, 5, 9]).repeat(BATCH, TOKENS, 1)
    if name in ("pixel_values", "pixel_values_videos", "images"):
        return _pixels(vision, variant, video=name.endswith("videos"))
    if name in ("input_values", "audio_values", "waveform"):
        if variant == 2:
            return torch.randn(BATCH, FEATURES, getattr(audio, "num_mel_bins", 16))
        return torch.randn(*((BATCH, 2000), (BATCH, 1, 2000))[variant])
    if name in ("input_features", "spectrogram", "audio_mel"):
        sizes = (getattr(audio, key, None) for key in ("feature_projection_input_dim", "num_mel_bins", "feature_dim"))
        bins = next((size for size in sizes if size), 16)
        return torch.randn(*((BATCH, bins, FEATURES), (BATCH, FEATURES, bins), (BATCH, 1, bins, FEATURES))[variant])
    raise NotTried(f"no recipe for the input {name}")


def _series(name: str, config: Any) -> Tensor:
    length = getattr(config, "context_length", 16)
    if not hasattr(config, "lags_sequence"):
        return torch.randn(BATCH, length, getattr(config, "num_input_channels", 1))
    length = config.prediction_length if name.startswith("future") else length + max(config.lags_sequence)
    if name == "past_observed_mask":
        return torch.ones(BATCH, length)
    return torch.randn(BATCH, length, config.num_time_features) if "time" in name else torch.randn(BATCH, length)


def _trajectory(name: str, config: Any) -> Tensor:
    if name == "timesteps":
        return torch.arange(TOKENS).repeat(BATCH, 1)
    return torch.randn(BATCH, TOKENS, {"states": config.state_dim, "actions": config.act_dim}.get(name, 1))


def _pixels(config: Any, variant: int, *, video: bool) -> Tensor:
    size = getattr(config, "image_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(config, "num_channels", 3)
    channels = channels if isinstance(channels, int) else 3
    frames = getattr(config, "num_frames", FRAMES)
    if video or variant == 1:
        return torch.randn(BATCH, frames, channels, height, width)
    if variant == 2:
        return torch.randn(BATCH, channels, 224, 224)
    return torch.randn(BATCH, channels, height, width)


def _sub(config: Any, *names: str) -> Any:
    """The first nested configuration of these names, else the configuration itself."""
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), config)


def _short(text: str) -> str:
    return " ".join(text.split())[:240]
