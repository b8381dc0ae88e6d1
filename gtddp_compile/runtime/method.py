"""The base method's side of one step: losses, statistics, metric, update; and how to take it all back.

States, buffers and what the dense backend computes are kept aside until the step is done. A parameter is written where
it is, so that it is read and written once, and its old value is put aside; a step that fails copies it back.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain, starmap
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gtddp_compile import kernels
from gtddp_compile.errors import CompileError, NonFiniteError
from gtddp_compile.frontends.backwards import linear_backwards
from gtddp_compile.kernels.kronecker import Rows
from gtddp_compile.methods.curvature import BlockUpdates, Curvature
from gtddp_compile.methods.curvature.blocks import Names
from gtddp_compile.methods.curvature.kronecker import BlockKind
from gtddp_compile.methods.fits import check
from gtddp_compile.methods.losses import Loss
from gtddp_compile.methods.terminal import MonteCarlo, Terminal, explicit_hessian, refuse_negative, terminal_factors
from gtddp_compile.runtime.precision import Precision, lift
from gtddp_compile.runtime.shards import is_shard, lying, own_part, shard_of


class GivenUp(Exception):
    """The step is given up and nothing has changed: its loss, or what is named, is NaN or infinite.

    Attributes:
        loss: of the step.
    """

    def __init__(self, loss: Tensor, what: str | None = None, name: str | None = None) -> None:
        super().__init__(f"{what or f'the loss ({float(loss)})'} is not finite, and nothing was changed")
        self.loss, self._name = loss, name

    def error(self) -> NonFiniteError:
        """The same for the user."""
        remedy = "Look for NaN in the batch, lower lr, or leave such batches out by on_nonfinite='skip'"
        return NonFiniteError(str(self), remedy, module=self._name and self._name.rpartition(".")[0])


def _replaced(outputs: Any, leaves: Sequence[Tensor], others: Sequence[Tensor]) -> Any:
    """The outputs' structure with other tensors for some of them, and no bfloat16 or half."""
    by_leaf = {id(leaf): other for leaf, other in zip(leaves, others, strict=True)}
    return tree_map(lambda value: by_leaf.get(id(value), lift(value)), outputs)


def _by_column(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[tuple[Tensor, ...], ...]]:
    """Arguments of one call for all pairs; none if there are no pairs."""
    return [tuple(zip(*pairs, strict=True))] if pairs else []


def _take_over(loss: Loss) -> None:
    """What was changed in the user's loss module (``label_smoothing``); another reduction is refused."""
    if loss.module is None or loss.unreduced is None:
        return
    now = loss.module.reduction
    if now not in (loss.reduction, "batchmean"):
        why = f"the reduction of the loss {loss.name} was changed to {now!r}"
        raise CompileError(why, "Call compile_optimizer again with it")
    vars(loss.unreduced).update({**vars(loss.module), "reduction": "none"})


def _alike(left: Tensor, right: Tensor) -> bool:
    """Whether one can be in the other's place."""
    same = left.shape == right.shape and left.dtype == right.dtype and left.device == right.device
    return same and is_shard(left) == is_shard(right)


MATRIX = "a matrix of gradients (a Gram matrix or a curvature's factor)"
"""What cannot be factored."""


class BaseMethod(BlockUpdates):
    """What generated programs call ``m``: the base method, losses, figures and random state of one step.

    Args:
        curvature: the base method.
        params: parameters before the step, by name; shares the model's memory. An entry is replaced by a copy as soon
            as its parameter is written.
        new: dictionary that receives the parameters after it; starts as a copy of ``params``.
        states: optimizer state of every parameter, by name; read, never written.
        groups: options of every parameter's group, by name.
        loss: the per-sample losses.
        terminal: which terminal Hessian.

    Attributes:
        first: compare them with the user's own loss (until a step has succeeded).
        together: nothing reads a parameter after its step is known: those with inertia move when the step is done.
        deferred: whether the loss is finite is looked at when the step is done.
        samples: of the batch, against which losses are counted; ``None``: unknown.
        precision: of the step.
        scale: of gradients that are half.
        committed: not empty once the step is.
        apart: parameters that are written when the step is done.
    """

    first = True
    together = False
    deferred = False
    samples: int | None = None
    precision = Precision()
    scale = 1.0
    apart: frozenset[str] = frozenset()

    def __init__(
        self, curvature: Curvature, params: dict[str, Tensor], new: dict[str, Tensor],
        states: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Mapping[str, Any]], loss: Loss,
        terminal: Terminal = "gradient",
    ) -> None:  # fmt: skip
        super().__init__(curvature, params, new, states, groups)
        _take_over(loss)
        self._before, self._loss, self._terminal = dict(states), loss, terminal
        self.reduction = loss.reduction
        self.figures: dict[int, dict[str, Any]] = {}
        self.loss: Tensor | None = None
        self._random: dict[int, list[Tensor]] = {}
        self._settled: list[Tensor] | None = None
        self._written: dict[str, tuple[Tensor, Tensor]] = {}  # with the old values
        self._steps: dict[str, tuple[Tensor, float]] = {}  # and what part of each is taken
        self._place: dict[str, Tensor] | None = None
        self.committed: list[Any] = []
        self._said = set[str]()  # by all micro-batches of an update

    # --- parameters ---------------------------------------------------------------------------------------------------

    def _writable(self, name: str) -> Tensor:
        """The parameter itself; its old value is put aside, where everybody else reads it from now on."""
        if name in self.apart:  # autograd keeps the tensor, for a derivative that is not this parameter's
            return super()._writable(name)
        param = self._params[name]
        self._params[name] = param.clone()
        self._written[name] = param, self._params[name]
        return param

    def _move(self, name: str, delta: Tensor) -> None:
        if self.together:
            self._steps[name] = self._averaged(name, delta)
        else:
            super()._move(name, delta)

    def undo(self) -> None:
        """Every parameter is what it was before the step, unless it is committed."""
        if not self.committed:
            with torch.no_grad():
                for param, old in self._written.values():
                    param.copy_(old)
            self._written.clear()

    def moved(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Every trained parameter's name, its value before the step and after."""
        for name in self.states:
            yield name, self._params[name], self._new[name]

    def lengthen(self, length: float) -> None:
        """Make the step so many times as long."""
        with torch.no_grad():
            for name, old, new in list(self.moved()):
                value = torch.lerp(old, new, length) if length else old
                if name in self._written:
                    self._written[name][0].copy_(value)
                else:
                    self._new[name] = value
                if "last_step" in self.states[name]:
                    self.states[name] = {**self.states[name], "last_step": self.states[name]["last_step"] * length}

    def commit(
        self,
        originals: Mapping[str, Tensor],
        buffers: Sequence[tuple[Tensor, Tensor]],
        owner: Mapping[str, Tensor],
        kept: MutableMapping[Tensor, Any],
    ) -> None:
        """Write what is not written yet into the model and the optimizer: all of it, or on an interrupt nothing.

        An interrupt is raised between two instructions of Python, and the writing is one: calls of C alone.

        Args:
            originals: parameters before the step.
            buffers: those that advance, and their new values.
            owner: the model's parameter of every name; of one that is divided among ranks, only its shard is written.
            kept: the optimizer's states.
        """
        apart = [name for name in self.states if name not in self._written and self._new[name] is not originals[name]]
        copies = [(originals[name], self._new[name]) for name in apart] + list(buffers)
        moves = dict[float, list[tuple[Tensor, Tensor]]]()
        for name, (step, part) in self._steps.items():
            moves.setdefault(part, []).append((originals[name], step))
        states, exchanged = dict[Tensor, Any](), list[tuple[Tensor, str, Tensor]]()
        parts = list[tuple[Tensor, Tensor]]()
        for name in self.states:
            own = owner[name]
            states[own] = self._settled_state(name, exchanged, parts)
            if is_shard(own):
                parts.append((shard_of(own), own_part(own, originals[name])))
        with torch.no_grad():
            done = chain(
                *(
                    starmap(partial(torch._foreach_add_, alpha=part), _by_column(pairs))
                    for part, pairs in moves.items()
                ),
                starmap(torch._foreach_copy_, _by_column(copies)),
                starmap(torch._foreach_copy_, _by_column(parts)),
                starmap(setattr, exchanged),
                map(kept.update, [states]),
            )
            self.committed.extend(map(type, done))  # not what they return: of shards, whole parameters

    def _settled_state(
        self, name: str, exchanged: list[tuple[Tensor, str, Tensor]], parts: list[tuple[Tensor, Tensor]]
    ) -> dict[str, Any]:
        """The state after the step, in the tensors of the state before it where they have its shape: as torch.optim,
        whoever holds one sees what it is. ``exchanged`` gets those that take another's memory, ``parts`` shards and
        their new values.
        """
        found, known = dict(lying(self.states, name)), self._before[name]
        for key, value in found.items():
            before = known.get(key)
            if before is value or not isinstance(value, Tensor) or not value.dim():
                continue
            if isinstance(before, Tensor) and _alike(before, value):
                if is_shard(value):
                    parts.append((shard_of(before), shard_of(value)))
                else:
                    exchanged.append((before, "data", value.data))
                found[key] = before
        return found

    @property
    def options(self) -> Mapping[str, Mapping[str, Any]]:
        """Of every parameter's group, by the parameter's name."""
        return {name: {k: v for k, v in group.items() if k != "params"} for name, group in self._groups.items()}

    def beside(self) -> BaseMethod:
        """For one micro-batch: losses, figures and random numbers of its own, parameters and states of the update."""
        twin = copy.copy(self)
        twin.figures, twin.loss, twin._random, twin._settled = {}, None, {}, None
        return twin

    def look_ahead(self, params: dict[str, Tensor], targets: Any) -> dict[str, Tensor]:
        """As for one step; all micro-batches of an update share what the first one made."""
        if self._place is None:
            self._place = super().look_ahead(params, targets)
        return self._place

    @property
    def looks_ahead(self) -> bool:
        """Whether the trajectory was run with other parameters than those before the step."""
        return self._ahead

    def look_alike(self, targets: Any) -> None:
        """A micro-batch looks from where those before it did.

        Raises:
            CompileError: this one does not do as they do.
        """
        if self._place is None:
            self.look_ahead(self._params, targets)
        elif self._ahead != self._leads(targets):
            raise CompileError(
                "targets of one number a sample beside targets of several in one update, which look ahead",
                "Accumulate them in updates of their own, or use lookahead=0",
            )

    # --- losses -------------------------------------------------------------------------------------------------------

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """``φ``, shape (B,); gives the step up if their total is not finite (``deferred``: when it is done)."""
        if torch.compiler.is_compiling():
            phi = self._loss.per_sample(outputs, targets)
            self.loss = self._loss.total(phi.detach())
            return phi
        given = outputs, targets
        if self.precision.mixed:
            outputs, targets = lift((outputs, targets))
        if self.first:
            self._check(outputs, targets)
        try:
            with self.precision.inside(), linear_backwards(None) if self.first else nullcontext():
                phi = self._loss.per_sample(outputs, targets)
        except CompileError:
            raise
        except (IndexError, RuntimeError, TypeError, ValueError):
            self._check(outputs, targets)  # says what is wrong with the targets, if it is they
            raise
        if self.samples is not None:
            self._loss.count(phi, outputs, self.samples)
        others = "" if self._loss.is_torchs else self._loss.depend_on_outputs_alone(phi, *given, self._new)
        if self.first and others:
            self._say(
                f"reads tensors {others} that require a gradient and are no parameters of the model: they get none "
                "here. To be trained they are to be part of forward (docs/own-loss.md)"
            )
        if self.first and self._loss.function is not None and phi.requires_grad and self._loss.mixes(phi, outputs):
            self._say("mixes samples: feedback reads it sample by sample, an approximation (docs/theory.md#mixing)")
        self.loss = self._loss.total(phi.detach())
        if not self.deferred:
            self._refuse_nonfinite()
        return phi

    def above(self, phi: Tensor, outputs: Any, targets: Any) -> Tensor:
        """What every sample's loss can fall by, (B,): ``φ`` less the least that its target leaves."""
        if self._loss.excess is None:
            return phi
        if self.precision.mixed:
            outputs, targets = lift((outputs, targets))
        with torch.no_grad(), self.precision.inside():
            return self._loss.excess(phi.detach(), outputs, targets)

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(f"the loss {self._loss.name} {what}", stacklevel=3)

    def _refuse_nonfinite(self) -> None:
        if self.loss is not None and not math.isfinite(self.loss):
            raise GivenUp(self.loss)

    def _check(self, outputs: Any, targets: Any) -> None:
        before = kernels.random_state()  # a loss may draw
        with torch.no_grad(), self.precision.inside():
            check(self._loss, outputs, targets)
        kernels.restore_random_state(before)

    def factors(self, phi: Tensor, outputs: Any, targets: Any, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        """``∇φ_i`` and after it the columns of the terminal factor, for every output: ``(1 + r, B, …)``."""
        exact = tuple(leaves)
        if self.precision.mixed:  # the Hessian in float32: outputs as other leaves, of the same values
            exact = tuple(lift(leaf.detach()).requires_grad_() for leaf in leaves)
            outputs, targets = _replaced(outputs, leaves, exact), lift(targets)
        with self.precision.inside():
            columns = terminal_factors(self._loss, outputs, targets, exact, self._terminal)
        scale = self.precision.scale
        columns = tuple((z * scale).to(leaf.dtype) for z, leaf in zip(columns, leaves, strict=True))
        gradients = kernels.loss_gradient(phi * scale, leaves)
        return tuple(torch.cat([g.unsqueeze(0), z.detach()]) for g, z in zip(gradients, columns, strict=True))

    def terminal(
        self, phi: Tensor, kind: str, aim: float = 1.0, own: float = 0.0, half: float = 0.0, group: int | None = None
    ) -> tuple[Tensor, Tensor, float]:
        """The terminal value function, see :func:`gtddp_compile.kernels.terminal`."""
        return kernels.terminal(phi, self._loss.reduction, kind, aim, own, half, group)

    def explicit_hessian(self, outputs: Any, targets: Any, leaves: tuple[Tensor, ...]) -> Tensor:
        """``H_i``, ``(B, n, n)``: the loss's own, or the product of the sampled columns."""
        if isinstance(self._terminal, MonteCarlo):
            columns = terminal_factors(self._loss, outputs, targets, leaves, self._terminal)
            side = torch.cat([z.detach().reshape(*z.shape[:2], -1) for z in columns], 2)
            return torch.einsum("rbi,rbj->bij", side, side)
        with torch.enable_grad():
            hessian = explicit_hessian(self._loss, outputs, targets, leaves)
        refuse_negative(self._loss, torch.linalg.eigvalsh(hessian))
        return hessian

    # --- figures and random state -------------------------------------------------------------------------------------

    def keep(self, stage: int, **figures: Any) -> None:
        """Figures of a stage for ``diagnostics``, evaluated only when asked for."""
        self.figures.setdefault(stage, {}).update(figures)

    def observe_block(
        self, stage: int, kind: BlockKind, names: Names, layers: Sequence[Rows], start: float, *, moments: bool = True
    ) -> None:
        """The block's factors; how many of their inversions failed is a figure of the stage."""
        first = names[0][0]
        before = self.states[first].get("fallbacks", 0)
        super().observe_block(stage, kind, names, layers, start, moments=moments)
        after = self.states[first].get("fallbacks", 0)
        self.keep(stage, **{f"fallbacks {first}": 0 if after is before else after - before})

    def overflowed(self) -> bool:
        """Whether a step whose loss is finite may succeed with a smaller scale."""
        return self.precision.scale > 1 and self.loss is not None and math.isfinite(self.loss)

    def check_finite(self) -> None:
        """Look once at every parameter's new value (where that is not made yet, at its step).

        Raises:
            GivenUp: one is NaN or infinite.
        """
        assert self.loss is not None
        if not math.isfinite(self.updates_sum()):
            for name, value in self._updates():  # a sum may overflow where no entry has
                if not bool(value.isfinite().all()):
                    raise GivenUp(self.loss, f"the update of parameter {name!r}", name)

    def updates_sum(self) -> Tensor:
        """A number that is not finite if a parameter's new value is not."""
        return torch.stack([value.sum() for _, value in self._updates()]).sum()

    def _updates(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self._steps.get(name, (self._new[name],))[0]) for name in self.states)

    def mark(self, segment: int = 0) -> None:
        """The random state at the beginning of a segment (of the first stage, where the trajectory is kept)."""
        self._random[segment] = kernels.random_state()

    def rewind(self, segment: int = 0) -> None:
        """Draw the same random numbers again."""
        if self._settled is None:
            self._settled = kernels.random_state()
        kernels.restore_random_state(self._random[segment])

    def settle(self) -> None:
        """The random state after one sweep: a step draws as much as one forward pass."""
        if self._settled is not None:
            kernels.restore_random_state(self._settled)
