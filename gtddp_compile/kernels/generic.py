"""Per-sample parameter gradients of any differentiable operation, by automatic differentiation.

``function(params, *operands) -> h`` is the operation. Choose a layer's own kernels where there are some:
these build ``γ`` (``B × parameters``) for everything but ``weighted`` and, with forward mode,
``directional``.

How the operation is called is a :class:`~gtddp_compile.kernels.Operation` (``generic_probe`` finds ``mixes``,
``vectorised`` and ``forward_mode`` by a trial at compile time):

* ``function``: the operation;
* ``batched``: for each operand whether its leading axis is the batch; ``()`` means that all are;
* ``mixes``: the operation cannot be evaluated on one sample alone, because it mixes samples, has no operand
  with a batch axis (an expanded class token) or has the batch size built in. Sample ``i`` is then told apart
  by its cotangent, operands are always those of the whole batch, and ``g`` may be rows ``first``, ``first +
  1`` … alone;
* ``vectorised``: ``torch.func.vmap`` supports the operation; otherwise a loop over samples;
* ``forward_mode``: ``torch.func.jvp`` supports the operation; otherwise ``directional`` goes through ``γ``;
* ``onednn``: whether both may take oneDNN's layers. They have no rule for its recurrent ones.
"""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from gtddp_compile.kernels.bundle import Inverses, Layer, Operation
from gtddp_compile.kernels.rows import rows_directional, rows_gram, rows_gram_diagonal

CHUNK = 2**21
"""Bound on the elements of an intermediate tensor, ``γ`` itself excepted."""
SIZES = (RuntimeError, ValueError, IndexError, AssertionError)
"""What torch raises where sizes do not fit: its operators, and the functions of ``torch.nn.functional`` before them."""
UNSUPPORTED = (RuntimeError, UserWarning)
"""What torch raises, or warns of, where ``vmap`` or ``jvp`` has no rule (``NotImplementedError`` is one of them)."""
LOOPS = "There is a performance drop"
"""How the warning begins that ``vmap`` has no rule and loops itself: no faster way than ours, and one that warns."""


def _generic_closed(layer: Layer) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The operation as a function of the wanted parameters (one tuple) and the operands, and those parameters."""
    pairs = list(zip(layer.params, layer.wants, strict=True))

    def of_wanted(wanted: tuple[Tensor, ...], *operands: Tensor) -> Tensor:
        rest = iter(wanted)
        found: Tensor = layer.how.function(tuple(next(rest) if want else param for param, want in pairs), *operands)
        return found

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


def _generic_transformed(how: Operation, call: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """``call()``, without oneDNN's layers where ``how`` says so: torch.func has no rule for all of them."""
    if how.onednn:
        return call()
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags would set, and warn of, a precision too
    try:
        return call()
    finally:
        torch._C._set_mkldnn_enabled(before)


def _generic_transforms(layer: Layer) -> bool:
    """Whether torch.func has rules: for cuDNN's recurrent layers it has none, and none for what stands for them."""
    return layer.how.onednn or not layer.g.is_cuda


def _generic_alone(layer: Layer, batched: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """``γ`` by evaluating the operation on batches of one sample."""
    operands, g = layer.operands, layer.g
    closed, wanted = _generic_closed(layer)

    def alone(sample: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pairs = zip(sample, batched, strict=True)
        return tuple(value[None] if split else value for value, split in pairs)

    def one(cotangent: Tensor, *sample: Tensor) -> tuple[Tensor, ...]:
        _, pull = torch.func.vjp(lambda values: closed(values, *alone(sample)), wanted)  # type: ignore[misc]
        return tuple(pull(cotangent[None])[0])

    if layer.how.vectorised and _generic_transforms(layer):
        axes = (0, *(0 if split else None for split in batched))
        step = max(1, CHUNK // max(1, g[0].numel()))
        mapped = torch.func.vmap(one, in_dims=axes, chunk_size=step)
        return _generic_transformed(layer.how, lambda: mapped(g, *operands))
    rows = []
    for index in range(g.shape[0]):
        pairs = zip(operands, batched, strict=True)
        sample = tuple(value[index] if split else value for value, split in pairs)
        rows.append(_generic_pull(closed, wanted, alone(sample))[1](g[index : index + 1]))
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def _generic_masked(layer: Layer) -> tuple[Tensor, ...]:
    """``γ`` by pulling back cotangents that are zero outside one sample."""
    g, how = layer.g, layer.how
    output, pull = _generic_pull(*_generic_closed(layer), layer.operands)
    step = max(1, CHUNK // max(1, output.numel())) if how.vectorised else 1
    blocks = []
    for start in range(0, g.shape[0], step):
        rows = g[start : start + step]
        count = torch.arange(rows.shape[0], device=g.device)
        cotangents = g.new_zeros(rows.shape[0], *output.shape)
        cotangents[count, how.first + start + count] = rows
        if how.vectorised:
            blocks.append(pull(cotangents, several=True))
        else:
            blocks.append(tuple(gradient[None] for gradient in pull(cotangents[0])))
    return tuple(torch.cat(column) for column in zip(*blocks, strict=True))


def generic_per_sample(layer: Layer) -> tuple[Tensor, ...]:
    """``γ``, ``(B, *shape)`` for each wanted parameter."""
    split = layer.how.batched or (True,) * len(layer.operands)
    if layer.how.mixes or not any(split):
        return _generic_masked(layer)
    return _generic_alone(layer, split)


def generic_weighted(layer: Layer) -> tuple[Tensor, ...]:
    """``γᵀ 1``, of each wanted parameter's shape; ``g`` is the whole batch's."""
    _, pull = _generic_pull(*_generic_closed(layer), layer.operands)
    return pull(layer.g)


def generic_gram(layer: Layer, metric: Inverses) -> Tensor:
    """``γ M⁻¹ γᵀ``, ``(B, B)``."""
    return rows_gram(generic_per_sample(layer), metric)


def generic_gram_diagonal(layer: Layer, metric: Inverses) -> Tensor:
    """The diagonal of ``γ M⁻¹ γᵀ``, ``(B,)``."""
    return rows_gram_diagonal(generic_per_sample(layer), metric)


def generic_directional(layer: Layer, direction: tuple[Tensor, ...]) -> Tensor:
    """``⟨γ_i, v⟩ = ⟨g_i, (∂h/∂u v)_i⟩``, ``(B,)``."""
    g, how = layer.g, layer.how
    if not (how.forward_mode and _generic_transforms(layer)):
        return rows_directional(generic_per_sample(layer), direction)
    closed, wanted = _generic_closed(layer)
    pushed = _generic_transformed(
        how, lambda: torch.func.jvp(lambda values: closed(values, *layer.operands), (wanted,), (tuple(direction),))
    )
    return (pushed[1][how.first : how.first + g.shape[0]] * g).reshape(g.shape[0], -1).sum(1)


@torch.no_grad()
def generic_probe(layer: Layer) -> dict[str, bool]:
    """Options ``mixes``, ``vectorised``, ``forward_mode`` of this operation, by a trial at compile time.

    Each faster way is taken only if it runs, without gradients as a step does, and agrees with the slow one. What torch
    says where one sample alone is no input (:data:`SIZES`), or where it has no rule for a batch of derivatives
    (:data:`UNSUPPORTED`), leaves the slow way; anything else that is raised is a defect, and passed on.
    """

    def gamma(**options: bool) -> tuple[Tensor, ...]:
        return generic_per_sample(layer._replace(how=layer.how._replace(**options)))

    expected = gamma(mixes=True, vectorised=False)
    size = max(1.0, *(float(rows.abs().max()) for rows in expected if rows.numel()))
    precision = math.sqrt(torch.finfo(layer.g.dtype).eps) * size

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

    how: Operation = layer.how
    split = how.batched or (True,) * len(layer.operands)
    alone = not how.mixes and any(split) and agrees(lambda: gamma(mixes=False, vectorised=False), expected, SIZES)
    vectorised = agrees(lambda: gamma(mixes=not alone, vectorised=True), expected, UNSUPPORTED)
    pairs = zip(layer.params, layer.wants, strict=True)
    change = tuple(torch.ones_like(param) for param, want in pairs if want and param is not None)
    slow = (rows_directional(expected, change),)

    def forward() -> tuple[Tensor, ...]:
        return (generic_directional(layer._replace(how=how._replace(forward_mode=True)), change),)

    return {"mixes": not alone, "vectorised": vectorised, "forward_mode": agrees(forward, slow, UNSUPPORTED)}
