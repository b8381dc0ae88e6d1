"""The loss as one number a sample (docs/theory.md#value-function).

The recursions need ``φ_i`` with ``J = (1/B) Σ φ_i`` or ``J = Σ φ_i``. A torch loss module of reduction "mean"
or "sum" is evaluated through a copy with reduction "none", whose elements are summed over all axes but the
batch and scaled so that ``J`` is exactly the module's own value.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gtddp_compile import kernels
from gtddp_compile.errors import CompileError
from gtddp_compile.methods.functions import module_of

Reduction = Literal["mean", "sum"]

_NEGATIVE_LOG = (nn.CrossEntropyLoss, nn.NLLLoss)
_CLASS_TARGETS = (*_NEGATIVE_LOG, nn.MultiMarginLoss)
_OTHER_INPUTS = {
    nn.CosineEmbeddingLoss: "input1, input2, target",
    nn.MarginRankingLoss: "input1, input2, target",
    nn.TripletMarginLoss: "anchor, positive, negative",
    nn.TripletMarginWithDistanceLoss: "anchor, positive, negative",
    nn.CTCLoss: "log_probs, targets, input_lengths, target_lengths",
}
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
_CALLABLE = "pass a callable (outputs, targets) -> one loss a sample, shape (B,)"


@dataclass(frozen=True)
class Loss:
    """A loss, split by samples.

    Attributes:
        name: as the user knows it, ``"CrossEntropyLoss"``.
        reduction: how ``φ`` makes the user's loss: ``J = (1/B) Σ φ_i`` ("mean") or ``J = Σ φ_i`` ("sum").
        per_sample: ``(outputs, targets) -> φ``, shape (B,), differentiable in the outputs: a tensor (B, …) for a torch
            loss module, any structure for a callable. Raises CompileError where outputs do not fit the loss, or what
            comes back is not one loss a sample.
        module: the user's loss module, where :func:`check` can compare with its value; else ``None``.
        function: the user's own callable; ``None`` where ``module`` is given.
        unreduced: a copy of ``module`` with reduction "none", which ``per_sample`` calls.
        least: ``(outputs, targets)`` -> the least that ``φ`` can be with these targets, (B,), whatever the outputs, of
            which shape and dtype are read; ``None``: it is 0, or not known.
    """

    name: str
    reduction: Reduction
    per_sample: Callable[[Any, Any], Tensor]
    module: nn.Module | None = None
    function: Callable[[Any, Any], Any] | None = None
    unreduced: nn.Module | None = None
    least: Callable[[Any, Any], Tensor | None] | None = None

    @property
    def is_absent(self) -> bool:
        """Whether only its name is known (:func:`absent`)."""
        return self.module is None and self.function is None

    @property
    def is_torchs(self) -> bool:
        """Whether it is a module of torch's as it comes: its code is known."""
        return type(self.module).__module__ == nn.MSELoss.__module__

    def after(self, change: Callable[[Any], Any]) -> Loss:
        """The loss of ``change(outputs)``."""
        least = self.least
        return replace(
            self,
            per_sample=lambda outputs, targets: self.per_sample(change(outputs), targets),
            least=None if least is None else lambda outputs, targets: least(change(outputs), targets),
        )

    def within(self, context: Callable[[], AbstractContextManager[None]]) -> Loss:
        """The loss as it is in such a context."""

        def samples(outputs: Any, targets: Any) -> Tensor:
            with context():
                return self.per_sample(outputs, targets)

        return replace(self, per_sample=samples)

    def count(self, phi: Tensor, outputs: Any, samples: int) -> None:
        """There is one loss a sample."""
        if phi.shape[0] != samples:
            shapes = ", ".join(_shape(value) for value in _tensors(outputs))
            raise CompileError(
                f"the loss {self.name} makes {phi.shape[0]} losses of outputs {shapes}, but the batch has {samples}"
                " samples",
                "Let the model return samples along the leading axis (tokens in sequences: (B, C, T)), or " + _CALLABLE,
            )

    def depend_on_outputs_alone(self, phi: Tensor, outputs: Any, targets: Any, parameters: Mapping[str, Tensor]) -> str:
        """No parameter of the model is read by the loss itself: it would have no gradient.

        Args:
            phi: the losses.
            outputs, targets: what they were made of.
            parameters: of the model, by name.

        Returns:
            What else it reads that requires one, a discriminator's weights or a temperature, in words.
        """
        ends = {id(leaf) for leaf in _tensors((outputs, targets))}
        seen, todo, read = {leaf.grad_fn for leaf in _tensors(outputs)}, [phi.grad_fn], list[Tensor]()
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
            leaf = None if node.next_functions else getattr(node, "variable", None)
            if isinstance(leaf, Tensor) and id(leaf) not in ends:
                read.append(leaf)
        names = {value.data_ptr(): name for name, value in parameters.items()} if read else {}
        found = {names[leaf.data_ptr()] for leaf in read if leaf.data_ptr() in names}
        if found:
            raise CompileError(
                f"the loss {self.name} reads trained parameters itself, {', '.join(sorted(found))}: what it makes of"
                " them is no function of the model's outputs, and would have no gradient",
                "Make it part of forward: compute that term there and return it, or return p.expand(len(x), *p.shape)"
                " beside the outputs (a penalty: weight_decay). What is not to be trained: detach() it, or"
                " requires_grad_(False)",
            )
        return ", ".join(sorted({str(_shape(leaf)) for leaf in read}))

    def mixes(self, phi: Tensor, outputs: Any) -> bool:
        """Whether a sample's loss depends on the outputs of others, as far as gradients tell."""
        leaves = [leaf for leaf in _tensors(outputs) if leaf.requires_grad and leaf.shape[:1] == phi.shape]
        weights = torch.linspace(1, 2, len(phi), dtype=phi.dtype, device=phi.device)
        for leaf in leaves:
            each, weighted = (
                torch.autograd.grad([phi], [leaf], [w], retain_graph=True, allow_unused=True, materialize_grads=True)[0]
                for w in (torch.ones_like(phi), weights)
            )
            own = each * weights.to(each.dtype).reshape(-1, *(1,) * (each.dim() - 1))
            if not torch.allclose(own, weighted, rtol=1e-2, atol=1e-3 * largest(each), equal_nan=True):
                return True
        return False

    def divisor(self, outputs: Any, targets: Any) -> Tensor | None:
        """What a class loss's mean divides by where that is not the number of samples (weights, ignored targets)."""
        if self.module is None or self.reduction != "mean" or not is_kind(self.module, *_NEGATIVE_LOG):
            return None
        main, module = _main(self.module, outputs, self.name), _unreduced(self.module)
        scale = kernels.class_mean_scale(main, targets, module.weight, module.ignore_index)
        return torch.as_tensor(main.shape[0] / scale)

    def total(self, phi: Tensor) -> Tensor:
        """``J``, a 0-d tensor: mean or sum of ``φ``."""
        return phi.mean() if self.reduction == "mean" else phi.sum()


def absent(name: str) -> Loss:
    """The loss of a program that was read from a file: a function, of which the file has the name."""

    def missing(outputs: Any, targets: Any) -> Tensor:
        raise CompileError(
            f"the program came from a file that has only the name of its loss, {name}",
            "Give the function: compile_optimizer(model, program=program, loss=...)",
        )

    return Loss(name, "mean", missing)


def split(loss: nn.Module | Callable[[Any, Any], Tensor]) -> Loss:
    """The loss as one number a sample.

    Args:
        loss: a torch loss module of reduction "mean" or "sum" (KLDivLoss: "batchmean" too), or its function, or a
            ``partial`` of that; or a callable, a module without ``reduction`` included, that returns the losses of
            the B samples, shape (B,): their mean is minimised.

    Raises:
        CompileError: neither of them; trainable parameters; another reduction; more than two inputs.
    """
    if isinstance(loss, type) or not callable(loss):
        shown = f"the class {loss.__name__}" if isinstance(loss, type) else repr(loss)
        raise CompileError(f"the loss is {shown}", "Pass a loss module, as in torch.nn.MSELoss(), or a callable")
    name = _name(loss := module_of(loss))
    own = Loss(name, "mean", partial(_of_callable, loss, name), function=loss)
    if not isinstance(loss, nn.Module):
        return own
    trainable = [key for key, parameter in loss.named_parameters() if parameter.requires_grad]
    if trainable:
        why = f"the loss {name} has trainable parameters: {', '.join(trainable)}"
        raise CompileError(why, "Make them part of the model, or freeze them with requires_grad_(False)")
    if not hasattr(loss, "reduction"):
        return own
    for kind, inputs in _OTHER_INPUTS.items():
        if is_kind(loss, kind):
            raise CompileError(f"the loss {name} takes ({inputs}), not (outputs, targets)", "P" + _CALLABLE[1:])
    if loss.reduction not in ("mean", "sum") and not (is_kind(loss, nn.KLDivLoss) and loss.reduction == "batchmean"):
        why = f"the loss {name} has reduction={loss.reduction!r}, so the loss to minimise is not defined"
        raise CompileError(why, "Use reduction='mean' or 'sum', or " + _CALLABLE)
    elements = partial(_of_elements, unreduced := _unreduced(loss), str(loss.reduction), name)
    best = next((best for kind, best in BEST.items() if is_kind(loss, kind)), None)
    least = None if best is None else partial(_least, best, unreduced, elements)
    return Loss(name, "sum" if loss.reduction == "sum" else "mean", elements, loss, unreduced=unreduced, least=least)


def check(loss: Loss, outputs: Any, targets: Any) -> None:
    """Outputs and targets fit the loss and each other, and ``φ`` the user's own loss: asked at the first step.

    Raises:
        CompileError: empty batch; outputs and targets of different batch size; a class target out of range; the loss
            cannot take them; or ``φ`` does not add up to the module's value (relative 1e-5, or 1e-9 in float64).
    """
    if loss.module is None:
        if any(leaf.dim() and not leaf.shape[0] for leaf in _tensors(outputs)):
            raise CompileError("the batch is empty", "Leave empty batches out")
        return
    main = _check_shapes(loss, outputs, targets)
    if is_kind(loss.module, *_CLASS_TARGETS) and targets.shape != main.shape:
        _check_classes(loss, main, targets, getattr(loss.module, "ignore_index", None))
    _check_value(loss, loss.module, outputs, targets)


def _check_value(loss: Loss, module: nn.Module, outputs: Any, targets: Any) -> None:
    """``φ`` adds up to the module's own value; a loss that is not finite is not judged here."""
    try:
        expected = module(*_arguments(module, outputs, targets)).item()
    except (torch.OutOfMemoryError, CompileError):
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise CompileError(
            f"the loss {loss.name} refuses outputs {_shape(_main(module, outputs, loss.name))} and targets"
            f" {_shape(targets)}: {error}",
            _classes_last(module, outputs, targets) or "Give it the shapes and dtypes it documents",
        ) from error
    phi = loss.per_sample(outputs, targets)
    total, size = loss.total(phi).item(), loss.total(phi.abs()).item()
    close = abs(total - expected) <= _TOLERANCE.get(phi.dtype, 2e-2) * max(size, abs(expected))
    if math.isfinite(total) and not close:
        raise CompileError(
            f"the loss {loss.name} is {expected:.9g}, but its samples add up to {total:.9g}",
            "Write it without a reduction of its own: " + _CALLABLE,
        )


# --- per-sample losses --------------------------------------------------------------------------------------


def _of_callable(function: Callable[[Any, Any], Tensor], name: str, outputs: Any, targets: Any) -> Tensor:
    """A callable has to return one loss a sample."""
    try:
        phi = function(outputs, targets)
    except (CompileError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the user's own code runs here and may raise anything
        raise CompileError(
            f"the loss {name} fails on {_listed(outputs, 'outputs')} and {_listed(targets, 'targets')}: "
            f"{type(error).__name__}: {error}",
            "Pass a callable (outputs, targets) -> one loss a sample, shape (B,), that leaves both as they are",
        ) from error
    remedy = "Return one loss a sample, shape (B,): reduction='none', then a sum or mean over all other axes"
    if not isinstance(phi, Tensor):
        raise CompileError(f"the loss {name} returned {type(phi).__name__}, not a tensor", remedy)
    if phi.is_complex():
        raise CompileError(f"the loss {name} is complex", "Return a real number a sample, a modulus say")
    leaves = [leaf for leaf in _tensors(outputs) if leaf.dim()]
    if phi.dim() != 1 or (leaves and not any(_may_hold(leaf, phi.shape[0]) for leaf in leaves)):
        batch = f" for a batch of {leaves[0].shape[0]}" if leaves else ""
        scalar = ", a scalar," if phi.dim() == 0 else ""
        raise CompileError(f"the loss {name} returned shape {tuple(phi.shape)}{scalar}{batch}", remedy)
    if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves) and not phi.requires_grad:
        why = f"the loss {name} does not depend on the outputs in a differentiable way"
        raise CompileError(why, "Compute it with torch operations, without detach(), item() or numpy")
    return phi


def _of_elements(unreduced: Any, reduction: str, name: str, outputs: Any, targets: Any) -> Tensor:
    """A loss module through its copy with reduction "none"."""
    main = _main(unreduced, outputs, name)
    elements = unreduced(*_arguments(unreduced, outputs, targets))
    if not isinstance(elements, Tensor) or not _by_sample(elements, main, targets):
        raise CompileError(
            f"the loss {name} makes elements {_shape(elements)} of outputs {_shape(main)} and"
            f" targets {_shape(targets)}: they mix samples",
            "Give outputs and targets the same batch axis and number of axes, or " + _CALLABLE,
        )
    if reduction != "mean":
        return kernels.sample_sums(elements)
    if not is_kind(unreduced, *_NEGATIVE_LOG):
        return kernels.sample_means(elements)
    scale = kernels.class_mean_scale(main, targets, unreduced.weight, unreduced.ignore_index)
    return kernels.sample_sums(elements) * scale


def _by_sample(elements: Tensor, main: Tensor, targets: Any) -> bool:
    """Whether axis 0 of the elements is the batch, and broadcasting has not crossed samples."""
    if isinstance(targets, Tensor) and targets.shape[:1] != main.shape[:1]:
        return False
    largest = max(main.numel(), targets.numel()) if isinstance(targets, Tensor) else elements.numel()
    same_batch = elements.shape[:1] == main.shape[:1]
    return same_batch and 1 <= elements.dim() <= main.dim() and elements.numel() <= largest


BEST: Mapping[type[nn.Module], Callable[[Any, Tensor, Tensor], Tensor | None]] = {
    nn.CrossEntropyLoss: lambda loss, outputs, targets: kernels.best_classes(
        outputs, targets, loss.weight, loss.label_smoothing
    ),
    nn.BCEWithLogitsLoss: lambda loss, _, targets: kernels.best_logits(targets, loss.pos_weight),
    nn.BCELoss: lambda loss, _, targets: kernels.best_shares(targets),
    nn.PoissonNLLLoss: lambda loss, _, targets: kernels.best_rates(targets, loss.log_input),
}
"""Losses whose least value depends on the targets, and the outputs at which they have it (docs/theory.md#aim)."""


def _least(
    best: Callable[[Any, Tensor, Tensor], Tensor | None], module: Any, elements: Any, outputs: Tensor, targets: Tensor
) -> Tensor | None:
    """``φ`` of the best outputs."""
    found = best(module, outputs, targets)
    if found is None:
        return None
    least: Tensor = elements(torch.broadcast_tensors(found, outputs)[0], targets)
    return least


# --- small predicates ---------------------------------------------------------------------------------------


def _may_hold(value: Tensor, samples: int) -> bool:
    """Whether samples may lie along some axis of the value, alone or with something else."""
    return samples > 0 and any(size % samples == 0 for size in value.shape)


def is_kind(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether it is one of torch's losses, a subclass with the same ``forward`` included."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def _unreduced(module: Any) -> Any:
    """A copy with reduction "none". It shares the buffers (class weights), so ``loss.to`` moves them."""
    copied = copy.copy(module)
    copied.reduction = "none"
    return copied


def _arguments(module: nn.Module, outputs: Any, targets: Any) -> tuple[Any, ...]:
    """What the loss module's ``forward`` takes: GaussianNLLLoss has ``outputs = (mean, variance)``."""
    return (outputs[0], targets, outputs[1]) if is_kind(module, nn.GaussianNLLLoss) else (outputs, targets)


def _main(module: nn.Module, outputs: Any, name: str) -> Tensor:
    """The tensor among the outputs that carries the batch."""
    if is_kind(module, nn.GaussianNLLLoss):
        if isinstance(outputs, (tuple, list)) and len(outputs) == 2 and isinstance(outputs[0], Tensor):
            return outputs[0]
        raise CompileError(f"the loss {name} needs two outputs", "Let the model return (mean, variance)")
    if not isinstance(outputs, Tensor):
        raise CompileError(
            f"the loss {name} takes one tensor, but the model's outputs are a {type(outputs).__name__}",
            "P" + _CALLABLE[1:],
        )
    return outputs


def _check_shapes(loss: Loss, outputs: Any, targets: Any) -> Tensor:
    """Tensors with the same batch, and not an empty one; returns the main output."""
    assert loss.module is not None
    main = _main(loss.module, outputs, loss.name)
    if isinstance(targets, Tensor) and targets.device.type != main.device.type:
        raise CompileError(
            f"the targets are on {targets.device}, the outputs on {main.device}", "Move them: y.to(device)"
        )
    if not isinstance(targets, Tensor):
        raise CompileError(
            f"the loss {loss.name} takes targets as a tensor, but they are {type(targets).__name__}",
            "Give step() a tensor of targets, or " + _CALLABLE,
        )
    axes = 2 if is_kind(loss.module, *_CLASS_TARGETS) else 1
    if main.dim() < axes:
        wanted = "(B, C, …)" if axes == 2 else "(B, …)"
        raise CompileError(f"the outputs have shape {tuple(main.shape)}, without a batch axis", f"Make it {wanted}")
    if not main.shape[0]:
        raise CompileError("the batch is empty", "Leave empty batches out")
    if targets.shape[:1] != main.shape[:1]:
        raise CompileError(
            f"outputs {_shape(main)} and targets {_shape(targets)} differ in batch size",
            "Give one target a sample, along the first axis",
        )
    return main


def _check_classes(loss: Loss, outputs: Tensor, targets: Tensor, ignored: int | None) -> None:
    """Class targets are integers in [0, C), or the ignored index."""
    classes = outputs.shape[1]
    if targets.is_floating_point() or targets.is_complex():
        raise CompileError(
            f"the loss {loss.name} takes class indices, or probabilities shaped as the outputs"
            f" {_shape(outputs)}; the targets are {targets.dtype} {_shape(targets)}",
            "Give targets of dtype torch.int64, or probabilities of that shape",
        )
    bad = (targets < 0) | (targets >= classes)
    if ignored is not None:
        bad &= targets != ignored
    if bad.any():
        place = bad.nonzero()[0].tolist()
        raise CompileError(
            f"the loss {loss.name} was given class target {int(targets[bad][0])} at {place}, but there are"
            f" {classes} classes",
            _classes_last(loss.module, outputs, targets)
            or f"Give targets from 0 to {classes - 1}" + ("" if ignored is None else f", or {ignored} to ignore one"),
        )


def _classes_last(module: nn.Module | None, outputs: Any, targets: Any) -> str:
    """What to do where the outputs look like (B, T, C), as a language model's; otherwise nothing."""
    if module is None or not is_kind(module, *_NEGATIVE_LOG) or not isinstance(outputs, Tensor):
        return ""
    if outputs.dim() < 3 or not isinstance(targets, Tensor) or targets.shape != outputs.shape[:-1]:
        return ""
    return (
        f"Classes lie along axis 1, (B, C, T), and the outputs are {_shape(outputs)}: return them transposed, or pass"
        " a callable, lambda o, y: F.cross_entropy(o.transpose(1, -1), y, reduction='none').flatten(1).mean(1)"
    )


def _tensors(structure: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(structure) if isinstance(leaf, Tensor)]


def largest(value: Tensor) -> float:
    """Its largest entry's size; of those alone that are finite."""
    return float(value.abs().nan_to_num(0.0, 0.0, 0.0).max()) if value.numel() else 0.0


def _listed(values: Any, what: str) -> str:
    return f"{what} {', '.join(map(_shape, tree_leaves(values))) or None}"


def _shape(value: Any) -> str:
    return f"{tuple(value.shape)}" if isinstance(value, Tensor) else f"of {type(value).__name__}"


def _name(loss: Callable[..., Any]) -> str:
    if isinstance(loss, nn.Module):
        return type(loss).__name__
    return str(getattr(loss, "__qualname__", type(loss).__name__))
