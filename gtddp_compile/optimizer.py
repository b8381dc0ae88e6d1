"""The compiled optimizer: a ``torch.optim.Optimizer`` whose step runs the derived program."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from gtddp_compile.errors import CompileError
from gtddp_compile.frontends import observe, positional, withheld
from gtddp_compile.graph import ControlGraph
from gtddp_compile.graph_batches import GraphBatches
from gtddp_compile.kernels import OtherPath, random_state, restore_random_state
from gtddp_compile.methods.curvature import Curvature
from gtddp_compile.methods.losses import Loss
from gtddp_compile.methods.setting import Group, Setting, buffer_infos, options_of
from gtddp_compile.options import Options
from gtddp_compile.runtime.accumulated import Accumulated
from gtddp_compile.runtime.compiled import NotFactored
from gtddp_compile.runtime.compiler import Backend, Specialisations
from gtddp_compile.runtime.diagnostics import Diagnostics
from gtddp_compile.runtime.fast import FastBackend
from gtddp_compile.runtime.fitting import check_fit
from gtddp_compile.runtime.joined import JoinedMethod
from gtddp_compile.runtime.line_search import choose_length
from gtddp_compile.runtime.method import MATRIX, BaseMethod, GivenUp
from gtddp_compile.runtime.model import ModelView, as_batch, as_inputs, check_batch
from gtddp_compile.runtime.origin import error_of
from gtddp_compile.runtime.precision import GradientScale
from gtddp_compile.runtime.program import UpdateProgram
from gtddp_compile.runtime.ranks import Ranks
from gtddp_compile.runtime.states import check_steps, check_used
from gtddp_compile.runtime.surface import Surface, one_at_a_time
from gtddp_compile.runtime.union import Union, check_form


class CompiledOptimizer(Surface):
    """An optimizer derived for one network (use :func:`gtddp_compile.compile_optimizer` to make one).

    Unlike other torch optimizers it runs the forward and backward passes itself: ``loss = opt.step(inputs, targets)``.
    Everything else is as usual: ``param_groups`` (one for every module that owns trained parameters, with its
    ``name``), ``state_dict``, learning-rate schedulers, hooks, pickling.

    The program is specialised on what shapes the computation: which modules are in training mode, which parameters
    are trained. When one of these changes, the next step compiles again; the base method's state is kept.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, *, loss: Loss, curvature: Curvature, options: Options,
        scale: GradientScale, ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        self._view, self._ranks = ModelView(model, None if ranks is None else ranks.whole), ranks
        self._loss, self._curvature, self._options, self._scale = loss, curvature, options, scale
        self._specialisations = Specialisations(self._view, options, curvature, ranks)
        self._current: UpdateProgram | None = None
        self._diagnostics, self._checked, self._skips = Diagnostics(), False, 0
        self._pending: Accumulated | None = None
        super().__init__(self._view.groups(), curvature.defaults() | options.carried)
        for group in self.param_groups if options.paced else ():
            group["peak_lr"] = float(group["lr"])
        if example_inputs is not None:
            with self._view.shards.together():
                self._specialise(self._batch(example_inputs, None, example=True)[0])

    @one_at_a_time
    def adopt(self, program: UpdateProgram, example_inputs: Any = None) -> None:
        """Train by a program that was made elsewhere, with its options by parameter.

        Raises:
            CompileError: it is not a program of this model; the message says where they part.
        """
        check_fit(program, self._view.model)
        stored = {group.name: group for group in program.setting.groups} if program.setting else {}
        for group in self.param_groups:
            if group["name"] in stored:
                group.update(stored[group["name"]].options)
            elif any(parameter.requires_grad for parameter in group["params"]):
                raise CompileError(f"the program has no options for module {group['name']!r}", "Export it again")
        self._specialisations.adopt(program)
        self._current = program
        if example_inputs is not None:
            self._specialise(self._batch(example_inputs, None, example=True)[0])

    # --- what was compiled --------------------------------------------------------------------------------------------

    @property
    def program(self) -> UpdateProgram:
        """The program of the last specialisation.

        Raises:
            CompileError: there is none yet (no example inputs were given and no step was made).
        """
        return replace(self._specialised(), setting=self._setting())

    def _specialised(self) -> UpdateProgram:
        if self._current is None:
            raise CompileError(
                "the optimizer is not specialised yet: no example inputs were given",
                "Pass example_inputs to compile_optimizer, or make a step first",
            )
        return self._current

    def _setting(self) -> Setting:
        """What the program is used with now: learning rates and other options as they are in ``param_groups``."""
        names = {id(parameter): name for name, parameter in self._view.named.items() if parameter.requires_grad}
        trained = [
            (group, tuple(names[id(p)] for p in group["params"] if id(p) in names)) for group in self.param_groups
        ]
        groups = tuple(Group(group["name"], own, options_of(group)) for group, own in trained if own)
        view = self._view
        return Setting(self._curvature, groups, self._loss, view.constants(), buffer_infos(view.model))

    @property
    def graph(self) -> ControlGraph:
        """The control graph of the last specialisation (raises as :attr:`program` does)."""
        return self._specialised().drawn

    @property
    def diagnostics(self) -> Mapping[str, Any]:
        """Figures of the last step.

        ``loss``, ``predicted_decrease``, ``clipped_changes``, ``clipped_radicands``, ``skipped``, of all steps so far
        ``skipped_steps``; ``lifted_grams``: Gram matrices whose factor was made of raised eigenvalues, with a warning;
        ``products`` that ``gram=Nystrom()`` made; of Kronecker factors ``solve_fallbacks`` (Cholesky failed); by player
        or coalition ``open_norm`` and ``feedback_norm`` (in the metric ``M``). The decrease and norms come from the
        Gram matrices: None without (``feedback=False``, ``Nystrom``, the dense backend, the paper's recursions), and
        with ``process_group``, which adds ``sent``: bytes and calls of collectives.
        """
        return {**self._diagnostics.figures(), **({} if self._ranks is None else {"sent": dict(self._ranks.sent)})}

    # --- one step -----------------------------------------------------------------------------------------------------

    @one_at_a_time
    def accumulate(self, inputs: Any, targets: Any) -> Tensor:
        """Take in a micro-batch of the next update; nothing is updated before ``step``.

        The update is that of all micro-batches since the last one and of the step's own: their mean over samples (or
        their sum, as the loss reduces), and with feedback each micro-batch a group of samples, as ``coupling`` set to
        their size couples them (docs/theory.md#accumulation). Batch-norms see a micro-batch at a time. ``zero_grad``
        drops what was accumulated; ``state_dict`` and pickles do not have it.

        Args:
            inputs, targets: as ``step`` takes them; not to be overwritten before the step.

        Returns:
            The micro-batch's loss, detached. If it is not finite, the micro-batch was left out.

        Raises:
            CompileError: as ``step``; or the coupling is ``"block"``, the micro-batch needs another program, or
                parameters changed since the first one. On any exception nothing was taken in.
            NonFiniteError: the loss is not finite (``on_nonfinite="skip"``: it is returned).
        """
        (batch, targets), before = self._batch(inputs, targets), random_state()
        try:
            program, backend = self._specialise(batch)
            pending = self._pending or self._accumulated(program, backend)
            loss = self._take_in(pending, batch, targets, program)
        except GivenUp as stop:
            restore_random_state(before)
            return self._give_up(stop, inputs, batch, targets)
        except BaseException:
            restore_random_state(before)
            raise
        self._pending = pending
        return loss

    @one_at_a_time
    def step(  # type: ignore[override]
        self, inputs: Any = None, targets: Any = None, *, closure: Callable[[], Any] | None = None
    ) -> Tensor:
        """One update from one batch, and from the micro-batches accumulated before it; a transaction.

        Args:
            inputs: a tensor, or a tuple or dict of them, batch on the leading axis. It and the targets may be left out
                where there are accumulated micro-batches. Of ``Terms``, ``{"name": (points, right-hand sides)}``.
            targets: what the loss takes; a function as loss may do without. ``None``: a dict's ``"labels"``.
            closure: called before the step, whatever it returns: training loops (Lightning's) hang their hooks on it.

        Returns:
            The loss before the update (mean or sum over all its samples, as the loss reduces), detached; under
            look-ahead of the place that the batch was looked at from.

        Raises:
            CompileError: inputs or targets are malformed, or the model changed in a way that cannot be compiled. On any
                exception parameters, buffers, states, random state and what was accumulated are what they were, but
                for an interrupt that comes when all is written: then the whole step is made.
            NonFiniteError: the loss, a gain or the update is not finite; of ``Terms``, the points are named.
                ``on_nonfinite="skip"``: the loss is returned instead, and what was accumulated is dropped.
        """
        if inputs is None and targets is None and self._pending is None and self.begun():
            return torch.zeros(())
        sets = inputs
        inputs, targets = as_batch(self._view.model, inputs, targets)
        batch: tuple[Any, ...] = ()
        if inputs is not None or targets is not None or self._pending is None:
            batch, targets = self._batch(inputs, targets)
        before, self._committed = random_state(), []
        try:
            if closure is not None:
                closure()
            self._view.say_unread()
            pending = self._pending is not None
            loss = self._union_step(batch, targets) if pending else self._follow(batch, targets, before)
        except GivenUp as stop:
            restore_random_state(before)
            loss = self._give_up(stop, sets, batch, targets)
            self._pending = None
        except BaseException:
            if not self._committed:
                restore_random_state(before)
            raise
        return loss

    def _give_up(self, stop: GivenUp, inputs: Any, batch: tuple[Any, ...], targets: Any) -> Tensor:
        """Say that a step or micro-batch was left out; its loss, if that is what the user wants then."""
        check_used(self.param_groups, self.state, self._curvature)
        if stop.loss.isfinite() and self._scale.value > 1:  # micro-batches are not made again
            self._scale.back_off()
            if self._pending is not None:
                self._pending.again()
        self._skips += 1
        self._diagnostics = Diagnostics(stop.loss, skipped=True, skips=self._skips)
        if self._options.on_nonfinite == "raise":
            model, alone = self._view.model, self._ranks is None
            raise error_of(stop, model, self._loss, inputs, batch, targets, alone=alone) from stop
        if self._skips == 1:
            warnings.warn(f"{stop}; diagnostics['skipped_steps'] counts what is left out", stacklevel=5)
        return stop.loss

    def _batch(self, inputs: Any, targets: Any, *, example: bool = False) -> tuple[tuple[Any, ...], Any]:
        """What the model takes and what the loss takes beside it, which may be the ``"labels"`` of a mapping."""
        if isinstance(self._view.model, GraphBatches) and inputs is not None:
            inputs = self._view.model.padded(inputs)
        if isinstance(inputs, Mapping) and targets is None:
            inputs, targets = {k: v for k, v in inputs.items() if k != "labels"}, inputs.get("labels")
        missing = targets is None and self._loss.module is not None and not example  # a function may do without
        if inputs is None or missing or callable(inputs):
            raise CompileError(
                "the batch itself is needed: the program runs forward and backward passes",
                "Call opt.step(inputs, targets); a closure does not stand for it",
            )
        return check_batch(as_inputs(inputs, self._view.model), targets), targets

    def _follow(self, inputs: tuple[Any, ...], targets: Any, before: Any) -> Tensor:
        """One transaction, along the path that these inputs take through a model that decides on values."""
        left: tuple[ControlGraph, ...] = ()
        while True:
            program, backend = self._specialise(inputs, left)
            try:
                return self._transaction(program, backend, inputs, targets, before)
            except OtherPath:
                restore_random_state(before)
                left = (*left, program.graph)

    def _transaction(
        self, program: UpdateProgram, backend: Backend, inputs: tuple[Any, ...], targets: Any, before: Any, **how: bool
    ) -> Tensor:
        self._diagnostics = Diagnostics()  # the last step's figures hold its Gram matrices
        originals, buffers, advancing = self._working_copy(program)
        params, new = dict(originals), dict(originals)
        m = self._base_method(program, params, new)
        with self._in_the_model_s_words(inputs, before):
            try:
                backend.run(m, params, buffers, new, inputs, targets, **how)
                choose_length(m, self._options.line_search, self._view, self._loss, inputs, targets, before)
                return self._done(program, m, originals, {name: buffers[name] for name in advancing})
            except NotFactored:
                m.undo()
                restore_random_state(before)
                return self._transaction(program, backend, inputs, targets, before, plainly=True)
            except (GivenUp, LinAlgError) as stop:
                m.undo()
                if m.overflowed():
                    self._scale.back_off()
                    restore_random_state(before)
                    return self._transaction(program, backend, inputs, targets, before)
                if m.loss is not None and isinstance(stop, LinAlgError):
                    raise GivenUp(m.loss, MATRIX) from stop
                raise
            except BaseException:
                m.undo()
                raise

    def _done(
        self, program: UpdateProgram, m: BaseMethod, originals: dict[str, Tensor], buffers: dict[str, Tensor]
    ) -> Tensor:
        m.committed = self._committed
        advanced = [(self._view.buffer(name), value) for name, value in buffers.items()]
        m.commit(originals, advanced, self._view.named, self.state)
        self._checked = True
        self._scale.kept()
        assert m.loss is not None
        self._diagnostics = Diagnostics(m.loss, m.figures, program, skips=self._skips)
        return m.loss

    @contextmanager
    def _in_the_model_s_words(self, inputs: tuple[Any, ...], before: Any) -> Iterator[None]:
        """If it is the model that refuses the inputs, its own error says so."""
        try:
            yield
        except (CompileError, OtherPath, GivenUp, LinAlgError):
            raise
        except Exception:
            restore_random_state(before)
            observe(*positional(self._view.model, inputs))
            check_used(self.param_groups, self.state, self._curvature)
            raise

    def _working_copy(self, program: UpdateProgram) -> tuple[dict[str, Tensor], dict[str, Tensor], frozenset[str]]:
        """Parameters, buffers, and the names of those that advance: copies, as those in parameters' memory are."""
        advancing = program.graph.ops.advancing
        copied = advancing | self._view.aliases
        buffers = {name: value.clone() if name in copied else value for name, value in self._view.buffers().items()}
        return self._view.parameters(), buffers, advancing

    # --- several micro-batches ----------------------------------------------------------------------------------------

    def _accumulated(self, program: UpdateProgram, backend: Backend) -> Accumulated:
        check_form(program)
        assert isinstance(backend, FastBackend)

        def begin() -> Union:
            originals, buffers, _ = self._working_copy(program)
            params, new = dict(originals), dict(originals)
            return Union(backend, self._base_method(program, params, new), params, buffers, new)

        return Accumulated(program, begin, self._view.named, lambda: [options_of(g) for g in self.param_groups])

    def _take_in(self, pending: Accumulated, inputs: tuple[Any, ...], targets: Any, program: UpdateProgram) -> Tensor:
        with self._in_the_model_s_words(inputs, random_state()):
            try:
                return pending.add(inputs, targets, program)
            except OtherPath as other:
                raise CompileError(
                    "the path through the model depends on values, and this micro-batch takes another one",
                    "Accumulate batches that take the same path, or replace the decision by torch.where",
                    module=other.module,
                    source=other.source or None,
                ) from None

    def _union_step(self, inputs: tuple[Any, ...], targets: Any) -> Tensor:
        pending = self._pending
        assert pending is not None
        count = len(pending)
        self._diagnostics = Diagnostics()
        try:
            if inputs:
                program, _ = self._specialise(inputs)
                self._take_in(pending, inputs, targets, program)
            union = pending.finish()
            return self._done(pending.program, union.method, union.originals, union.advancing())
        except BaseException:
            pending.again(count)
            raise
        finally:
            if self._committed:
                self._pending = None

    def _base_method(self, program: UpdateProgram, params: dict[str, Tensor], new: dict[str, Tensor]) -> BaseMethod:
        check_steps(self.param_groups, self._curvature, self._options)
        group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        trained = [name for player in program.graph.players for name in player.parameters]
        owner = self._view.named
        left_out = next((name for name in trained if id(owner[name]) not in group_of), None)
        if left_out is not None:
            raise CompileError(
                f"parameter {left_out!r} is in none of param_groups",
                "Put it back, or freeze it by requires_grad_(False)",
                module=left_out.rpartition(".")[0],
            )
        states, groups = {}, {}
        for name in trained:
            groups[name] = group_of[id(owner[name])]
            known = owner[name] in self.state
            states[name] = self.state[owner[name]] if known else self.first_state(owner[name], groups[name])
        ops, loss = program.graph.ops, self._loss.after(program.graph.ops.as_returned)
        if ops.kept and loss.function is not None and not self._options.compile:
            loss = loss.within(lambda: withheld(self._view.model, ops.kept))
        taken = (self._curvature, params, new, states, groups, loss, self._options.terminal_kind)
        m = BaseMethod(*taken) if self._ranks is None else JoinedMethod(*taken).among(self._ranks)
        m.states = self._view.shards.states(m.states, owner)
        m.first, m.scale, m.apart = not self._checked, self._scale.value, ops.read_apart
        m.together = program.form.name == "joint" and self._options.line_search is None
        return m

    # --- specialisation -----------------------------------------------------------------------------------------------

    def _specialise(
        self, inputs: tuple[Any, ...], left: tuple[ControlGraph, ...] = ()
    ) -> tuple[UpdateProgram, Backend]:
        if any(group.get("maximize") for group in self.param_groups):
            check_used(self.param_groups, self.state, self._curvature)
        decay = any(group.get("weight_decay", 0) != 0 for group in self.param_groups) and self._couples_decay()
        found = self._specialisations.program_for(inputs, decay=decay, left=left)
        self._current = found[0]
        return found

    def _couples_decay(self) -> bool:
        probe = torch.ones(())
        return any(self._curvature.linear_term(probe, group) is not None for group in self.param_groups)
