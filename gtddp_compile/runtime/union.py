"""Micro-batches of one update, side by side: that of their union, each a group (docs/theory.md#accumulation).

A group of b of the union's B samples stands for the whole: ``P_t⁻¹ = P_{t+1}⁻¹ + (B/b) Γ_t`` from ``P_T⁻¹ = B
diag(aim)``. That is B/b times what the group has as a batch of its own, so ``w`` and ``α`` are b/B times its own: a
micro-batch can make its matrices before anybody knows B, and all that is shared is sums over micro-batches with the
weights b/B. They are taken where the program hands a gradient to the base method, and every micro-batch goes on with
the same answer. For a loss that is a sum, a group that stands for the batch starts from ``α_T = B/b``: it waits for B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from torch.utils._pytree import tree_map, tree_map_only

from gtddp_compile.algebra.collapsed import COUPLED
from gtddp_compile.errors import CompileError
from gtddp_compile.kernels import Layer, random_state, restore_random_state
from gtddp_compile.options import Nystrom
from gtddp_compile.passes.p12_emit import draws
from gtddp_compile.runtime.diagnostics import by_stage
from gtddp_compile.runtime.fast import FastBackend, Micro, Request
from gtddp_compile.runtime.method import MATRIX, BaseMethod, GivenUp
from gtddp_compile.runtime.program import UpdateProgram

FORMS = ("base", *COUPLED)
WITH_ROWS = ("observe_block", "observe_factors", "observe_alike")
"""Requests whose argument is rows of layers."""
OF_CHANNELS = "observe_channels"
"""The request whose argument is a convolution's input."""


def check_form(program: UpdateProgram) -> None:
    """Refuse what cannot be made of groups.

    Raises:
        CompileError: one sample's part in the update depends on every other's.
    """
    options, leave_out = program.options, "Leave one of them out"
    if program.lowered.plan.ranks > 1:
        raise CompileError("accumulate() with process_group: a rank's step is one shard of one batch", leave_out)
    refused = (
        ("backend", options.backend == "dense", "it keeps one matrix over all samples", "Use the fast backend"),
        ("coupling", program.form.name not in FORMS, "its recursions add over all samples of the batch",
         "Use coupling='full' or a group size"),
        ("gram", isinstance(options.gram, Nystrom), "its columns are drawn among the samples of one batch", leave_out),
        ("max_grad_norm", options.max_grad_norm is not None, "the norm is that of the union's gradients, and every "
         "micro-batch would clip its own", leave_out),
        ("line_search", options.line_search is not None, "a length is chosen on one batch", leave_out),
    )  # fmt: skip
    for option, is_refused, why, remedy in refused:
        if is_refused:
            raise CompileError(f"accumulate() with {option}={getattr(options, option)!r}: {why}", remedy)


@dataclass
class Part:
    """One micro-batch on its way through the program.

    Attributes:
        method: its losses, figures and random numbers.
        run: the generator of its instructions.
        samples: b.
        request: what it waits for; ``None`` when it has come to the end.
        collected: with feedback off, everything it asked for: no answer is needed to go on.
        draws: whether its random numbers have to be kept apart from the others'.
    """

    method: BaseMethod
    run: Micro
    samples: int = 0
    request: Request | None = None
    collected: list[Request] = field(default_factory=list)
    draws: bool = False
    _grad: bool = False
    _random: list[Tensor] | None = None

    def resume(self, answer: Any = None) -> None:
        """Go on to the next request, with the grad mode and the random numbers that it left with."""
        if self._random is not None:
            restore_random_state(self._random)
        with torch.set_grad_enabled(self._grad):
            try:
                self.request = self.run.send(answer)
            except StopIteration:
                self.request = None
            self._grad = torch.is_grad_enabled()
        if self.draws:
            self._random = random_state()


class Union:
    """The micro-batches of an update so far.

    Args:
        backend: the program.
        method: the base method of the update; receives the sums.
        params, new: parameters before and after, as a step has them; ``originals`` stay those before.
        buffers: before the update; the attribute holds them as the last micro-batch left them.
    """

    def __init__(
        self,
        backend: FastBackend,
        method: BaseMethod,
        params: dict[str, Tensor],
        buffers: dict[str, Tensor],
        new: dict[str, Tensor],
    ) -> None:
        self.method, self.buffers, self.originals = method, buffers, dict(params)
        self._backend, self._params, self._new, self._parts = backend, params, new, list[Part]()
        self._base = backend.program.form.name == "base"
        self._sums: list[Request] = []

    def add(self, inputs: tuple[Any, ...], targets: Any) -> Tensor:
        """Run a micro-batch as far as it goes by itself; its loss.

        Raises:
            GivenUp: its loss is not finite. On any exception nothing of it was added.
        """
        self.method.look_alike(targets)
        method = self.method.beside()
        # Of its own: what autograd holds of the micro-batches before must not be written to.
        buffers = {**self.buffers, **{name: value.clone() for name, value in self.advancing().items()}}
        run = self._backend.micro(method, self._params, buffers, self._new, inputs, targets)
        part = Part(method, run, draws=draws(self._backend.program.lowered))
        with method.precision.outside():
            part.resume()
            assert part.request is not None and method.loss is not None
            part.samples = len(part.request[1][0])  # m.terminal(phi, kind) comes first
            after = random_state()
            if self.method.reduction == "mean" or self._base:
                self._guarded(lambda: self._terminal(part, 1.0), [part])
            restore_random_state(after)
        if self._base:
            self._sums = _added(self._sums, part)
        self._parts.append(part)
        self.buffers = buffers
        return method.loss

    def finish(self) -> Tensor:
        """The update of the union, into ``new`` and the states of ``method``; its loss.

        Raises:
            GivenUp: a Gram matrix or the update is not finite. On any exception ``method.undo()`` takes it back.
        """
        after, shares = random_state(), self._shares()
        mean = self.method.reduction == "mean"
        losses = [part.method.loss * (share if mean else 1.0) for part, share in zip(self._parts, shares, strict=True)
                  if part.method.loss is not None]  # fmt: skip
        self.method.loss = torch.stack(losses).sum()
        if self._base:
            total = sum(part.samples for part in self._parts) if mean else 1
            with torch.no_grad():
                for name, arguments in self._sums:
                    getattr(self.method, name)(*scaled(name, arguments, 1 / total))
        else:
            self._guarded(lambda: self._together(shares), self._parts)
        self.method.check_finite()
        restore_random_state(after)
        own, self.method.figures = self.method.figures, merged([part.method.figures for part in self._parts], shares)
        for stage, figures in own.items():
            self.method.figures.setdefault(stage, {}).update(figures)
        return self.method.loss

    def _together(self, shares: list[float]) -> None:
        if self.method.reduction == "sum":
            for part, share in zip(self._parts, shares, strict=True):
                self._terminal(part, 1 / share)
        while requests := [part.request for part in self._parts if part.request is not None]:
            name, arguments = combined(requests, shares)
            with torch.no_grad():
                answer = getattr(self.method, name)(*arguments)
            for part in self._parts:
                part.resume(answer)
                self._alone(part)

    def _guarded(self, run: Callable[[], None], parts: list[Part]) -> None:
        """A factorisation that failed because the numbers overflowed gives the update up, as a loss would."""
        try:
            run()
        except LinAlgError as error:
            loss = self.method.loss if self.method.loss is not None else parts[0].method.loss
            if loss is None:
                raise
            raise GivenUp(loss, MATRIX) from error

    @property
    def reads_inputs(self) -> bool:
        """Whether inputs of micro-batches are read when the update is made: by the second sweep, or as rows."""
        return not self._base or any(name in (*WITH_ROWS, OF_CHANNELS) for name, _ in self._sums)

    def advancing(self) -> dict[str, Tensor]:
        """Buffers that the forward pass writes."""
        return {name: self.buffers[name] for name in self._backend.program.graph.ops.advancing}

    def _shares(self) -> list[float]:
        total = sum(part.samples for part in self._parts)
        return [part.samples / total for part in self._parts]

    def _terminal(self, part: Part, scale: float) -> None:
        assert part.request is not None
        ones, aim, start = part.method.terminal(*part.request[1])
        part.resume((ones, aim, start * scale))
        self._alone(part)

    def _alone(self, part: Part) -> None:
        """What needs no other micro-batch: statistics that only count, once for all; everything with feedback off."""
        while part.request is not None:
            name, arguments = part.request
            if self._base:
                part.collected.append(part.request)
            elif name == "observe_uniform" or (name == "observe" and arguments[1] is None):
                if not self._parts or part is self._parts[0]:
                    getattr(self.method, name)(*arguments)
            else:
                return
            part.resume()


# --- sums over micro-batches ------------------------------------------------------------------------------------------


def scaled(name: str, arguments: tuple[Any, ...], weight: float) -> tuple[Any, ...]:
    """A request's gradients times a weight; names and kinds as they are."""
    if name == OF_CHANNELS:  # a mean over samples, whatever they weigh
        return arguments
    if name not in WITH_ROWS:
        return (*arguments[:-1], tree_map_only(Tensor, lambda value: value * weight, arguments[-1]))
    stage, kind, names, layers, start = arguments
    found = []
    for rows in layers:
        # An exact block's rows are V_u, its operands; another layer's are its input and V_h, which is g.
        own: Layer = rows.layer
        xs = tuple(x * weight for x in own.operands) if kind == "exact" else own.operands
        found.append(rows._replace(layer=own._replace(operands=xs, g=own.g * weight)))
    return stage, kind, names, tuple(found), start * weight


def combined(requests: list[Request], shares: list[float]) -> Request:
    """The union's request: weighted sums; rows of layers one micro-batch after the other.

    Raises:
        CompileError: the micro-batches do not ask for the same.
    """
    name = requests[0][0]
    if len(requests) != len(shares) or any(other != name for other, _ in requests):
        raise CompileError(
            "the micro-batches of an update went through different instructions", "Give them the same kind of inputs"
        )
    parts = [scaled(name, arguments, share) for (_, arguments), share in zip(requests, shares, strict=True)]
    total = parts[0]
    for other in parts[1:]:
        total = _joined(name, total, other)
    return name, total


def _added(sums: list[Request], part: Part) -> list[Request]:
    """Running sums with feedback off, where a micro-batch is nothing but its gradients (a mean counts by samples)."""
    weight = float(part.samples) if part.method.reduction == "mean" else 1.0
    own = [(name, scaled(name, arguments, weight)) for name, arguments in part.collected]
    part.collected = []
    if not sums:
        return own
    return [(name, _joined(name, before, new)) for (name, before), (_, new) in zip(sums, own, strict=True)]


def _joined(name: str, left: tuple[Any, ...], right: tuple[Any, ...]) -> tuple[Any, ...]:
    if name == OF_CHANNELS:
        names, layer, *rest = left
        return names, _inputs_beside(layer, right[1]), *rest
    if name not in WITH_ROWS:
        return (*left[:-1], tree_map(lambda a, b: a + b if isinstance(a, Tensor) else a, left[-1], right[-1]))
    layers = []
    for rows, other in zip(left[3], right[3], strict=True):
        moment = rows.moment and (rows.moment[0], _inputs_beside(rows.moment[1], other.moment[1]))
        layers.append(rows._replace(layer=_beside(rows.layer, other.layer), moment=moment))
    return (*left[:3], tuple(layers), left[4])


def _beside(left: Layer, right: Layer) -> Layer:
    """Two micro-batches' samples, one after the other."""
    return _inputs_beside(left, right)._replace(g=torch.cat([left.g, right.g]))


def _inputs_beside(left: Layer, right: Layer) -> Layer:
    """The same of what reads inputs alone, moments and channels: their ``g`` may have several columns a sample."""
    return left._replace(operands=tuple(torch.cat(pair) for pair in zip(left.operands, right.operands, strict=True)))


# --- figures ----------------------------------------------------------------------------------------------------------


def merged(figures: list[dict[int, dict[str, Any]]], shares: list[float]) -> dict[int, dict[str, Any]]:
    """Figures of the union, a group a micro-batch: what diagnostics computes from them is that of one step."""
    figures, found = [by_stage(figure) for figure in figures], dict[int, dict[str, Any]]()
    for stage in figures[0]:
        parts = [figure[stage] for figure in figures]
        found[stage] = {key: _merged(key, [part[key] for part in parts], shares) for key in parts[0]}
    return found


def _merged(key: str, parts: list[Any], shares: list[float]) -> Any:
    pairs = list(zip(parts, shares, strict=True))
    if key == "gammas":
        return {player: tuple(block for part in parts for block in part[player]) for player in parts[0]}
    if key == "factor":  # of P⁻¹, which is 1 / share times a micro-batch's own
        return tuple(block * share**-0.5 for blocks, share in pairs for block in blocks)
    if key == "lifted":
        return tuple(failed for part in parts for failed in part)
    if key == "information":  # of P_T⁻¹, likewise
        return torch.cat([part / share for part, share in pairs])
    if key in ("alpha", "weights"):
        return torch.cat([part * share for part, share in pairs])
    if key == "start":
        return parts[0] * shares[0]
    if isinstance(parts[0], Tensor) and parts[0].dim():
        return torch.cat(parts)
    return sum(parts)
