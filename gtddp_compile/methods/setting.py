"""What a program was compiled for besides the network: the base method, its options by parameter, and the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gtddp_compile.methods.curvature import Curvature
from gtddp_compile.methods.losses import Loss


@dataclass(frozen=True, eq=False)
class Group:
    """One param_group: a module's trained parameters and the options they have now.

    Attributes:
        name: qualified name of the module.
        parameters: canonical names.
        options: torch.optim's names; a learning rate may be a tensor of one element.
    """

    name: str
    parameters: tuple[str, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class BufferInfo:
    """Shape and dtype of a buffer of the model."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Setting:
    """What leaves with an exported program.

    Attributes:
        curvature: the base method.
        groups: parameters with their options, one entry a param_group.
        loss: the per-sample losses.
        constants: tensors that the model keeps as plain attributes, by qualified name: they are no buffers, so a
            caller of the exported step does not have them.
        buffers: the model's buffers by torch's own names.
    """

    curvature: Curvature
    groups: tuple[Group, ...]
    loss: Loss
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, BufferInfo] = field(default_factory=dict)

    @property
    def shared(self) -> dict[str, Any]:
        """Options that all groups have in common."""
        first = self.groups[0].options
        return {
            name: value
            for name, value in first.items()
            if all(same(group.options.get(name), value) for group in self.groups)
        }


def buffer_infos(model: nn.Module) -> dict[str, BufferInfo]:
    """What buffers a model has."""
    return {name: BufferInfo(tuple(value.shape), value.dtype) for name, value in model.named_buffers()}


def same(left: object, right: object) -> bool:
    """Whether two option values are one (tensors by identity or value)."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return isinstance(left, Tensor) and isinstance(right, Tensor) and left.equal(right)
    return type(left) is type(right) and left == right


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a param_group, without its parameters and names."""
    return {name: value for name, value in group.items() if name not in ("params", "name", "param_names")}
