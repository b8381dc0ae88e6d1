"""Public architectures with random weights and small inputs: torchvision, timm and transformers.

:func:`names` lists a zoo without building anything, :func:`build` makes one :class:`Case`. The zoos are optional
packages: ``pip install --no-deps torchvision timm transformers`` beside the torch that the compiler runs on.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

BATCH = 3
CLASSES = 10
IMAGE_SIZES = (64, 96, 128, 224)
LARGE = 30_000_000


class NotTried(Exception):
    """The architecture cannot be built or run in eager mode here; the message says why."""


@dataclass
class Case:
    """A model with a batch it can train on.

    Attributes:
        model: in training mode, with random weights.
        inputs: positional arguments, batch on the leading axis.
        targets: what ``loss`` takes beside the outputs.
        loss: ``(outputs, targets) -> (B,)``.
        note: how the published architecture was reduced, if it was.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    targets: Any
    loss: Callable[[Any, Any], Tensor]
    note: str = ""

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def to(self, dtype: torch.dtype) -> Case:
        """Model, inputs and targets in another precision."""

        def cast(value: Tensor) -> Tensor:
            return value.to(dtype) if value.is_floating_point() else value

        inputs, targets = tree_map_only(Tensor, cast, (self.inputs, self.targets))
        return Case(self.model.to(dtype), inputs, targets, self.loss, self.note)


def names(zoo: str) -> list[str]:
    """Architectures of a zoo, in its own order."""
    _load_torchvision()
    return _ZOOS[zoo][0]()


def build(zoo: str, name: str) -> Case:
    """One architecture, reproducibly.

    Raises:
        NotTried: it cannot be built, or not with small inputs.
    """
    _load_torchvision()
    torch.manual_seed(0)
    case = _ZOOS[zoo][1](name)
    _stir(case.model)
    return case


def installed(zoo: str) -> bool:
    """Whether the package of this name is there."""
    return importlib.util.find_spec(zoo) is not None


def preload(zoos: list[str]) -> None:
    """Import what every architecture needs, so that forked processes have it."""
    _load_torchvision()
    for module in ("torch._dynamo", "torch.export", "torch.fx.experimental.symbolic_shapes", "sympy"):
        importlib.import_module(module)
    if "timm" in zoos:
        importlib.import_module("timm")
    if "transformers" in zoos:
        transformers = importlib.import_module("transformers")
        transformers.logging.set_verbosity_error()
        transformers.AutoModel  # noqa: B018 (imported lazily by this access)


def _stir(model: nn.Module) -> None:
    """Give parameters that start as zeros small random values.

    Many architectures start their last layer or each block's last scale at zero, where all gradients before it vanish
    and nothing would be compared.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


# --- losses -----------------------------------------------------------------------------------------------------------


def classification(outputs: Any, targets: Tensor) -> Tensor:
    """Cross-entropy a sample, summed over all heads (auxiliary classifiers), averaged over pixels."""
    heads = [value for value in tree_leaves(_plain(outputs)) if isinstance(value, Tensor)]
    losses = [F.cross_entropy(head, targets, reduction="none").flatten(1) for head in heads if head.dim() == 4]
    losses += [F.cross_entropy(head, targets, reduction="none")[:, None] for head in heads if head.dim() == 2]
    return torch.stack([loss.mean(1) for loss in losses]).sum(0)


def regression(outputs: Any, targets: Any) -> Tensor:
    """Mean squared error a sample, summed over the tensors returned."""
    pairs = zip(tree_leaves(_plain(outputs)), tree_leaves(targets), strict=True)
    return torch.stack([(value - target).square().flatten(1).mean(1) for value, target in pairs]).sum(0)


def _plain(outputs: Any) -> Any:
    """Mappings (transformers' ModelOutput among them) as a list of what they hold."""
    return [value for value in outputs.values() if value is not None] if isinstance(outputs, Mapping) else outputs


# --- torchvision ------------------------------------------------------------------------------------------------------

_DEFINED: list[torch.library.Library] = []


def _load_torchvision() -> None:
    """Import torchvision, whose compiled operators may not fit this torch.

    Its models of classification and segmentation call none of them, but importing it refers to two; without the
    compiled library they are declared here, and calling one says so.
    """
    if not installed("torchvision") or _DEFINED:
        return
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DEFINED.append(library)
        import torchvision  # noqa: F401


def _torchvision_names() -> list[str]:
    from torchvision import models

    return models.list_models(module=models) + models.list_models(module=models.segmentation)


def _torchvision(name: str) -> Case:
    from torchvision import models

    dense = name in models.list_models(module=models.segmentation)
    size = {"inception_v3": 299, "maxvit_t": 224}.get(name, 64)
    options: dict[str, Any] = {"num_classes": CLASSES}
    if dense:
        options.update(weights_backbone=None, aux_loss=None if name.startswith("lraspp") else True)
    if name.startswith("vit_"):
        options.update(image_size=2 * 14 if name == "vit_h_14" else 64)
    if name in ("googlenet", "inception_v3"):
        options.update(init_weights=True)
    model = models.get_model(name, weights=None, **options)
    size = options.get("image_size", size)
    shape = (BATCH, size, size) if dense else (BATCH,)
    return Case(model, (torch.randn(BATCH, 3, size, size),), torch.randint(CLASSES, shape), classification)


# --- timm -------------------------------------------------------------------------------------------------------------


def _timm_names() -> list[str]:
    import timm

    return timm.list_modules()


def _timm(module: str) -> Case:
    """The smallest published variant of a family."""
    import timm

    name = _smallest(module)
    accepts = inspect.signature(timm.model_entrypoint(name)).parameters
    assert "kwargs" in accepts
    reasons: list[str] = []
    default = timm.get_pretrained_cfg(name).input_size[-1]
    for size in dict.fromkeys((*IMAGE_SIZES, default)):
        for options in ({"img_size": size}, {}):
            torch.manual_seed(0)
            try:
                model = timm.create_model(name, num_classes=CLASSES, **options).train()
                images = torch.randn(BATCH, 3, size, size)
                outputs = model(images)
                targets = torch.randint(CLASSES, (BATCH,))
                classification(outputs, targets).mean().backward()
            except Exception as problem:  # whatever an architecture raises for a size it does not take
                reasons.append(f"{size}: {type(problem).__name__}: {problem}")
                continue
            model.zero_grad()
            return Case(model, (images,), targets, classification, note=f"{name}, {size}x{size}")
    raise NotTried("; ".join(dict.fromkeys(reasons)))


def _smallest(module: str) -> str:
    """Fewest parameters among a module's published variants, counted on the meta device."""
    import timm

    found = {}
    for name in timm.list_models(module=module):
        if name.startswith("test_"):
            continue
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
        except Exception:  # some variants read values while they are built: those cannot be counted this way
            continue
        found[name] = sum(parameter.numel() for parameter in model.parameters())
    if not found:
        raise NotTried("no variant can be built on the meta device")
    return min(found, key=lambda name: (found[name], name))


def _transformers_names() -> list[str]:
    import zoo_transformers

    return zoo_transformers.names()


def _transformers(name: str) -> Case:
    import zoo_transformers

    return zoo_transformers.build(name)


_ZOOS: dict[str, tuple[Callable[[], list[str]], Callable[[str], Case]]] = {
    "torchvision": (_torchvision_names, _torchvision),
    "timm": (_timm_names, _timm),
    "transformers": (_transformers_names, _transformers),
}
ZOOS = tuple(_ZOOS)
