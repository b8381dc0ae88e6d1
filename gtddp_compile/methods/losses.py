"""The loss as one number a sample (docs/theory.md#value-function).

The recursions need ``φ_i`` with ``J = (1/B) Σ φ_i`` or ``J = Σ φ_i``. A torch loss module of reduction "mean"
or "sum" is evaluated through a copy with reduction "none", whose elements are summed over all axes but the
batch and scaled so that ``J`` is exactly the module's own value.
"""

from __future__ import annotations

import copy
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
from gtddp_compile.methods.least import KNOWN, excess_of

Reduction = Literal["mean", "sum"]

NEGATIVE_LOG = (nn.CrossEntropyLoss, nn.NLLLoss)
_OTHER_INPUTS = {
    nn.CosineEmbeddingLoss: "input1, input2, target",
    nn.MarginRankingLoss: "input1, input2, target",
    nn.TripletMarginLoss: "anchor, positive, negative",
    nn.TripletMarginWithDistanceLoss: "anchor, positive, negative",
    nn.CTCLoss: "log_probs, targets, input_lengths, target_lengths",
}
CALLABLE = "pass a callable (outputs, targets) -> one loss a sample, shape (B,)"


@dataclass(frozen=True)
class Loss:
    """A loss, split by samples.

    Attributes:
        name: as the user knows it, ``"CrossEntropyLoss"``.
        reduction: how ``φ`` makes the user's loss: ``J = (1/B) Σ φ_i`` ("mean") or ``J = Σ φ_i`` ("sum").
        per_sample: ``(outputs, targets) -> φ``, shape (B,), differentiable in the outputs: a tensor (B, …) for a torch
            loss module, any structure for a callable. Raises CompileError where outputs do not fit the loss, or what
            comes back is not one loss a sample.
        module: the user's loss module, where :func:`gtddp_compile.methods.fits.check` can compare with its value; else
            ``None``.
        function: the user's own callable; ``None`` where ``module`` is given.
        unreduced: a copy of ``module`` with reduction "none", which ``per_sample`` calls.
        excess: ``(φ, outputs, targets)`` -> what every ``φ`` is above the least that its target leaves, (B,); ``None``:
            that is 0, or not known.
    """

    name: str
    reduction: Reduction
    per_sample: Callable[[Any, Any], Tensor]
    module: nn.Module | None = None
    function: Callable[[Any, Any], Any] | None = None
    unreduced: nn.Module | None = None
    excess: Callable[[Tensor, Any, Any], Tensor] | None = None

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
        excess = self.excess
        return replace(
            self,
            per_sample=lambda outputs, targets: self.per_sample(change(outputs), targets),
            excess=None if excess is None else lambda phi, outputs, targets: excess(phi, change(outputs), targets),
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
            shapes = ", ".join(shape_of(value) for value in tensors_in(outputs))
            raise CompileError(
                f"the loss {self.name} makes {phi.shape[0]} losses of outputs {shapes}, but the batch has {samples}"
                " samples",
                "Let the model return samples along the leading axis (tokens in sequences: (B, C, T)), or " + CALLABLE,
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
        ends = {id(leaf) for leaf in tensors_in((outputs, targets))}
        seen, todo, read = {leaf.grad_fn for leaf in tensors_in(outputs)}, [phi.grad_fn], list[Tensor]()
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
        return ", ".join(sorted({str(shape_of(leaf)) for leaf in read}))

    def mixes(self, phi: Tensor, outputs: Any) -> bool:
        """Whether a sample's loss depends on the outputs of others, as far as gradients tell."""
        leaves = [leaf for leaf in tensors_in(outputs) if leaf.requires_grad and leaf.shape[:1] == phi.shape]
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
        if self.module is None or self.reduction != "mean" or not is_kind(self.module, *NEGATIVE_LOG):
            return None
        main, module = main_of(self.module, outputs, self.name), _unreduced(self.module)
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
            raise CompileError(f"the loss {name} takes ({inputs}), not (outputs, targets)", "P" + CALLABLE[1:])
    if loss.reduction not in ("mean", "sum") and not (is_kind(loss, nn.KLDivLoss) and loss.reduction == "batchmean"):
        why = f"the loss {name} has reduction={loss.reduction!r}, so the loss to minimise is not defined"
        raise CompileError(why, "Use reduction='mean' or 'sum', or " + CALLABLE)
    elements = partial(_of_elements, unreduced := _unreduced(loss), str(loss.reduction), name)
    known = next((known for kind, known in KNOWN.items() if is_kind(loss, kind)), None)
    added = partial(_by_samples, unreduced, str(loss.reduction))
    excess = None if known is None else partial(excess_of, known, unreduced, added)
    return Loss(name, "sum" if loss.reduction == "sum" else "mean", elements, loss, unreduced=unreduced, excess=excess)


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
    leaves = [leaf for leaf in tensors_in(outputs) if leaf.dim()]
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
    main = main_of(unreduced, outputs, name)
    elements = unreduced(*arguments_of(unreduced, outputs, targets))
    if not isinstance(elements, Tensor) or not _by_sample(elements, main, targets):
        raise CompileError(
            f"the loss {name} makes elements {shape_of(elements)} of outputs {shape_of(main)} and"
            f" targets {shape_of(targets)}: they mix samples",
            "Give outputs and targets the same batch axis and number of axes, or " + CALLABLE,
        )
    return _by_samples(unreduced, reduction, elements, main, targets)


def _by_samples(unreduced: Any, reduction: str, elements: Tensor, main: Tensor, targets: Tensor) -> Tensor:
    if reduction != "mean":
        return kernels.sample_sums(elements)
    if not is_kind(unreduced, *NEGATIVE_LOG):
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


def arguments_of(module: nn.Module, outputs: Any, targets: Any) -> tuple[Any, ...]:
    """What the loss module's ``forward`` takes: GaussianNLLLoss has ``outputs = (mean, variance)``."""
    return (outputs[0], targets, outputs[1]) if is_kind(module, nn.GaussianNLLLoss) else (outputs, targets)


def main_of(module: nn.Module, outputs: Any, name: str) -> Tensor:
    """The tensor among the outputs that carries the batch."""
    if is_kind(module, nn.GaussianNLLLoss):
        if isinstance(outputs, (tuple, list)) and len(outputs) == 2 and isinstance(outputs[0], Tensor):
            return outputs[0]
        raise CompileError(f"the loss {name} needs two outputs", "Let the model return (mean, variance)")
    if not isinstance(outputs, Tensor):
        raise CompileError(
            f"the loss {name} takes one tensor, but the model's outputs are a {type(outputs).__name__}",
            "P" + CALLABLE[1:],
        )
    return outputs


def tensors_in(structure: Any) -> list[Tensor]:
    """Of outputs or targets."""
    return [leaf for leaf in tree_leaves(structure) if isinstance(leaf, Tensor)]


def largest(value: Tensor) -> float:
    """Its largest entry's size; of those alone that are finite."""
    return float(value.abs().nan_to_num(0.0, 0.0, 0.0).max()) if value.numel() else 0.0


def _listed(values: Any, what: str) -> str:
    return f"{what} {', '.join(map(shape_of, tree_leaves(values))) or None}"


def shape_of(value: Any) -> str:
    """A tensor's shape, or what it is instead, in words."""
    return f"{tuple(value.shape)}" if isinstance(value, Tensor) else f"of {type(value).__name__}"


def _name(loss: Callable[..., Any]) -> str:
    if isinstance(loss, nn.Module):
        return type(loss).__name__
    return str(getattr(loss, "__qualname__", type(loss).__name__))
