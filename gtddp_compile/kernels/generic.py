"""Per-sample parameter gradients of any differentiable operation, by automatic differentiation.

``function(params, *operands) -> h`` is the operation. Choose a layer's own kernels where there are some:
these build ``γ`` (``B × parameters``) for everything but ``weighted`` and, with forward mode,
``directional``.

Options, the same for every kernel (``generic_probe`` finds them by a trial at compile time):

* ``function``: the operation;
* ``batched``: for each operand whether its leading axis is the batch; ``()`` means that all are;
* ``mixes``: the operation cannot be evaluated on one sample alone, because it mixes samples, has no operand
  with a batch axis (an expanded class token) or has the batch size built in. Sample ``i`` is then told apart
  by its cotangent, operands are always those of the whole batch, and ``g`` may be rows ``first``, ``first +
  1`` … alone;
* ``vectorised``: ``torch.func.vmap`` supports the operation; otherwise a loop over samples;
* ``forward_mode``: ``torch.func.jvp`` supports the operation; otherwise ``directional`` goes through ``γ``.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**21
"""Bound on the elements of an intermediate tensor, ``γ`` itself excepted."""
SIZES = (RuntimeError, ValueError, IndexError, AssertionError)
"""What torch raises where sizes do not fit: its operators, and the functions of ``torch.nn.functional`` before them."""
UNSUPPORTED = (RuntimeError, UserWarning)
"""What torch raises, or warns of, where ``vmap`` or ``jvp`` has no rule (``NotImplementedError`` is one of them)."""
LOOPS = "There is a performance drop"
"""How the warning begins that ``vmap`` has no rule and loops itself: no faster way than ours, and one that warns."""


def _generic_closed(
    function: Callable[..., Tensor], params: tuple[Tensor | None, ...], wants: tuple[bool, ...]
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """``function`` of the wanted parameters (one tuple) and the operands, and those parameters."""

    def of_wanted(wanted: tuple[Tensor, ...], *operands: Tensor) -> Tensor:
        rest = iter(wanted)
        chosen = (next(rest) if want else param for param, want in zip(params, wants, strict=True))
        return function(tuple(chosen), *operands)

    pairs = zip(params, wants, strict=True)
    return of_wanted, tuple(param.detach() for param, want in pairs if want and param is not None)


def _generic_pull(
    closed: Callable[..., Tensor], wanted: tuple[Tensor, ...], operands: tuple[Tensor, ...]
) -> tuple[Tensor, Callable[..., tuple[Tensor, ...]]]:
    """The operation's value, and the pull-back of cotangents (one or several) to the wanted parameters.

    By ``torch.autograd``: ``torch.func`` refuses an ``autograd.Function`` that has no ``setup_context``.
    """
    with torch.enable_grad():
        leaves = tuple(param.detach().requires_grad_() for param in wanted)
        output = closed(leaves, *operands)

    def pull(cotangent: Tensor, several: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            output, leaves, cotangent, retain_graph=True, is_grads_batched=several, materialize_grads=True
        )

    return output.detach(), pull


def _generic_alone(
    operands: tuple[Tensor, ...],
    g: Tensor,
    closed: Callable[..., Tensor],
    wanted: tuple[Tensor, ...],
    batched: tuple[bool, ...],
    vectorised: bool,
) -> tuple[Tensor, ...]:
    """``γ`` by evaluating the operation on batches of one sample.

    With gradients recorded around ``torch.func`` too: layers of oneDNN (a float32 LSTM) keep what their derivative
    needs only then.
    """

    def alone(sample: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pairs = zip(sample, batched, strict=True)
        return tuple(value[None] if split else value for value, split in pairs)

    def one(cotangent: Tensor, *sample: Tensor) -> tuple[Tensor, ...]:
        _, pull = torch.func.vjp(lambda values: closed(values, *alone(sample)), wanted)  # type: ignore[misc]
        return tuple(pull(cotangent[None])[0])

    if vectorised:
        axes = (0, *(0 if split else None for split in batched))
        step = max(1, CHUNK // max(1, g[0].numel()))
        with torch.enable_grad():
            result: tuple[Tensor, ...] = torch.func.vmap(one, in_dims=axes, chunk_size=step)(g, *operands)
        return result
    rows = []
    for index in range(g.shape[0]):
        pairs = zip(operands, batched, strict=True)
        sample = tuple(value[index] if split else value for value, split in pairs)
        rows.append(_generic_pull(closed, wanted, alone(sample))[1](g[index : index + 1]))
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def _generic_masked(
    operands: tuple[Tensor, ...],
    g: Tensor,
    closed: Callable[..., Tensor],
    wanted: tuple[Tensor, ...],
    vectorised: bool,
    first: int,
) -> tuple[Tensor, ...]:
    """``γ`` by pulling back cotangents that are zero outside one sample."""
    output, pull = _generic_pull(closed, wanted, operands)
    step = max(1, CHUNK // max(1, output.numel())) if vectorised else 1
    blocks = []
    for start in range(0, g.shape[0], step):
        rows = g[start : start + step]
        count = torch.arange(rows.shape[0], device=g.device)
        cotangents = g.new_zeros(rows.shape[0], *output.shape)
        cotangents[count, first + start + count] = rows
        if vectorised:
            blocks.append(pull(cotangents, several=True))
        else:
            blocks.append(tuple(gradient[None] for gradient in pull(cotangents[0])))
    return tuple(torch.cat(column) for column in zip(*blocks, strict=True))


def generic_per_sample(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor | None, ...],
    wants: tuple[bool, ...],
    *,
    function: Callable[..., Tensor],
    batched: tuple[bool, ...] = (),
    mixes: bool = False,
    vectorised: bool = True,
    first: int = 0,
    **options: Any,
) -> tuple[Tensor, ...]:
    """``γ``, ``(B, *shape)`` for each wanted parameter."""
    closed, wanted = _generic_closed(function, params, wants)
    split = batched or tuple(True for _ in operands)
    if mixes or not any(split):
        return _generic_masked(operands, g, closed, wanted, vectorised, first)
    return _generic_alone(operands, g, closed, wanted, split, vectorised)


def generic_weighted(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor | None, ...],
    wants: tuple[bool, ...],
    *,
    function: Callable[..., Tensor],
    **options: Any,
) -> tuple[Tensor, ...]:
    """``γᵀ 1``, of each wanted parameter's shape; ``g`` is the whole batch's."""
    closed, wanted = _generic_closed(function, params, wants)
    _, pull = _generic_pull(closed, wanted, operands)
    return pull(g)


def generic_gram(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor | None, ...],
    wants: tuple[bool, ...],
    metric: tuple[Tensor | float, ...],
    **options: Any,
) -> Tensor:
    """``γ M⁻¹ γᵀ``, ``(B, B)``."""
    samples = g.shape[0]
    step = max(1, CHUNK // samples)
    gram = g.new_zeros(samples, samples)
    for gradient, entry in zip(generic_per_sample(operands, g, params, wants, **options), metric, strict=True):
        flat = gradient.reshape(samples, -1)
        scale = entry.reshape(-1) if isinstance(entry, Tensor) else None
        for start in range(0, flat.shape[1], step):
            part = flat[:, start : start + step]
            if scale is None or scale.numel() == 1:
                gram = gram + (part @ part.mT) * (entry if scale is None else scale)
            else:
                rows = part * scale[start : start + step] ** 0.5
                gram = gram + rows @ rows.mT
    return gram


def generic_gram_diagonal(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor | None, ...],
    wants: tuple[bool, ...],
    metric: tuple[Tensor | float, ...],
    **options: Any,
) -> Tensor:
    """The diagonal of ``γ M⁻¹ γᵀ``, ``(B,)``."""
    gradients = generic_per_sample(operands, g, params, wants, **options)
    pairs = zip(gradients, metric, strict=True)
    return torch.stack([(rows.square() * entry).reshape(g.shape[0], -1).sum(1) for rows, entry in pairs]).sum(0)


def generic_directional(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor | None, ...],
    wants: tuple[bool, ...],
    direction: tuple[Tensor, ...],
    *,
    function: Callable[..., Tensor],
    forward_mode: bool = True,
    first: int = 0,
    **options: Any,
) -> Tensor:
    """``⟨γ_i, v⟩ = ⟨g_i, (∂h/∂u v)_i⟩``, ``(B,)``."""
    if forward_mode:
        closed, wanted = _generic_closed(function, params, wants)
        pushed: tuple[Tensor, ...] = torch.func.jvp(
            lambda values: closed(values, *operands), (wanted,), (tuple(direction),)
        )
        return (pushed[1][first : first + g.shape[0]] * g).reshape(g.shape[0], -1).sum(1)
    gradients = generic_per_sample(operands, g, params, wants, function=function, first=first, **options)
    pairs = zip(gradients, direction, strict=True)
    return torch.stack([(rows * change).reshape(g.shape[0], -1).sum(1) for rows, change in pairs]).sum(0)


@torch.no_grad()
def generic_probe(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor | None, ...],
    wants: tuple[bool, ...],
    *,
    function: Callable[..., Tensor],
    batched: tuple[bool, ...] = (),
    mixes: bool = False,
) -> dict[str, bool]:
    """Options ``mixes``, ``vectorised``, ``forward_mode`` of this operation, by a trial at compile time.

    Each faster way is taken only if it runs, without gradients as a step does, and agrees with the slow one. What torch
    says where one sample alone is no input (:data:`SIZES`), or where it has no rule for a batch of derivatives
    (:data:`UNSUPPORTED`), leaves the slow way; anything else that is raised is a defect, and passed on.
    """
    common: dict[str, Any] = {"function": function, "batched": batched}
    plain: dict[str, Any] = {**common, "mixes": True, "vectorised": False}
    expected = generic_per_sample(operands, g, params, wants, **plain)
    size = max(1.0, *(float(rows.abs().max()) for rows in expected if rows.numel()))
    precision = math.sqrt(torch.finfo(g.dtype).eps) * size

    def agrees(
        attempt: Callable[[], tuple[Tensor, ...]], reference: tuple[Tensor, ...], refusals: tuple[type[Exception], ...]
    ) -> bool:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=LOOPS, category=UserWarning)
                found = attempt()
        except refusals:
            return False
        pairs = zip(found, reference, strict=True)
        return all(
            a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, 1e-2, precision, equal_nan=True)
            for a, b in pairs
        )  # NaN where all of a row happens to be masked

    def gamma(**options: Any) -> tuple[Tensor, ...]:
        return generic_per_sample(operands, g, params, wants, **{**common, **options})

    split = batched or tuple(True for _ in operands)
    alone = not mixes and any(split) and agrees(lambda: gamma(mixes=False, vectorised=False), expected, SIZES)
    vectorised = agrees(lambda: gamma(mixes=not alone, vectorised=True), expected, UNSUPPORTED)
    pairs = zip(params, wants, strict=True)
    change = tuple(torch.ones_like(param) for param, want in pairs if want and param is not None)

    def along(forward_mode: bool) -> tuple[Tensor, ...]:
        options = {**plain, "forward_mode": forward_mode}
        return (generic_directional(operands, g, params, wants, change, **options),)

    return {
        "mixes": not alone,
        "vectorised": vectorised,
        "forward_mode": agrees(lambda: along(True), along(False), UNSUPPORTED),
    }
