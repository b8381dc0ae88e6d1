"""The way in: :func:`compile_optimizer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.amp import GradScaler

from gtddp_compile.algebra.derivation import Recursion
from gtddp_compile.algebra.forms import Rollout
from gtddp_compile.errors import CompileError
from gtddp_compile.methods.curvature import Curvature, resolve
from gtddp_compile.methods.losses import split
from gtddp_compile.methods.terminal import Geometric, Terminal, check_terminal
from gtddp_compile.optimizer import CompiledOptimizer
from gtddp_compile.options import Backend, Feedback, Gram, Memory, OnNonFinite, Options, Reading, Running, suggested
from gtddp_compile.passes.p07_collapse import form_name
from gtddp_compile.runtime.joined import check_shared
from gtddp_compile.runtime.precision import GradientScale
from gtddp_compile.runtime.program import UpdateProgram
from gtddp_compile.runtime.ranks import of_processes
from gtddp_compile.terms import Terms


def compile_optimizer(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Tensor] | None = None,
    *,
    loss: nn.Module | Callable[[Any, Any], Tensor] | None = None,
    curvature: str | Curvature = "foof",
    feedback: Feedback = True,
    rollout: Rollout | None = None,
    inertia: float | None = None,
    lookahead: float | None = None,
    averaging: float | None = None,
    max_step: float | None = None,
    line_search: tuple[float, ...] | None = None,
    max_grad_norm: float | None = None,
    feedback_clip: float | None = 1.0,
    schedule: str | Mapping[str, int] = "asap",
    coupling: str | int = "full",
    recursion: Recursion = "levenberg",
    terminal: Terminal | None = None,
    backend: Backend = "fast",
    mixing: Reading = "block",
    cooperative: bool | None = None,
    gram: Gram = "auto",
    memory: Memory = "keep",
    running_statistics: Running | None = None,
    compile: bool | Mapping[str, Any] = False,
    on_nonfinite: OnNonFinite = "raise",
    grad_scaler: GradScaler | None = None,
    program: UpdateProgram | None = None,
    process_group: Any = None,
    **curvature_options: Any,
) -> CompiledOptimizer:
    """Derive an optimal-control optimizer for a network.

    Args:
        model: any traceable module; it is not changed.
        example_inputs: a tensor, or a tuple or dict of them, batch on the leading axis; without it the program is
            specialised at the first step. Of ``Terms``, sets of points, as ``step`` takes them; the
            loss is then theirs, the terminal Gauss-Newton's (``Geometric(aim=2)``) and ``gram`` exact.
        loss: a torch loss module with reduction ``"mean"`` or ``"sum"``, its function, or
            ``callable(outputs, targets)`` returning one loss a sample, shape (B,).
        curvature: ``"foof"``, ``"kfac"``, ``"ekfac"``, ``"sgd"``, ``"rmsprop"``, ``"adagrad"``, ``"adam"``,
            ``"adamw"``, ``"shampoo"``, ``"soap"``, ``"muon"`` with its options as further keywords (``lr``,
            ``weight_decay``, …: torch.optim's names and defaults), or an object such as ``RMSprop(lr=1e-3)``.
        feedback: True; ``"open"``: open gains only; False: exactly the base method (Proposition 4).
        rollout: ``"linear"``: the policy is rolled out on the linearised dynamics: one joint step of all stages, the
            exact minimiser of the coupled model, without a second forward sweep. ``"nonlinear"``: on the network
            itself, stage by stage. ``None``: linear where there is a joint step, which the paper's recursions,
            ``coupling="block"`` and ``feedback="open"`` have not.
        inertia: ``μ`` of the momentum inside the model, in [0, 1): the metric regularises towards ``μ`` times the last
            step instead of zero, so that what this batch determines is not overshot; ``k / (k + 3)`` after k steps
            while that is less. A base method's own momentum is refused beside it.
            ``None``: what the curvature suggests, 0 for the first-order methods.
        lookahead: ``μ`` in inertia's place for samples whose targets have several numbers: the step before, times
            ``μ``, is taken first, and the trajectory is run from there (Nesterov's place). The loss that a step returns
            is of that place. ``None``: what the curvature suggests, 0 where inertia is given.
        averaging: parameters hold an average of what is trained, in which the newest counts for ``averaging / k`` in
            the k-th step (all while that is more than 1); 0: the newest itself. For rollout ``"linear"`` with
            ``inertia`` and without ``line_search``. ``None``: what the curvature suggests, 0 for ``Terms``.
        max_step: cap on the norm in the metric ``M`` of what the batch adds to the step (with ``inertia`` 0: of the
            step); for rollout ``"linear"``.
        line_search: step lengths, tried by forward passes on the batch: the best is taken, and none that is worse than
            no step.
        max_grad_norm: the weighted gradient is clipped as ``torch.nn.utils.clip_grad_norm_`` clips; with
            ``feedback=False`` exactly that.
        feedback_clip: (nonlinear rollout) bound on the predicted change of a sample's loss that is believed, in units
            of its aim (see ``terminal``); ``None``: none.
        schedule: ``"asap"``, ``"alap"``, ``"sequential"``, or a mapping of player names to stages.
        coupling: ``"full"``, a group size, or ``"block"`` (per sample, the paper's approximation); ``"local"`` with
            ``process_group``: a group a rank.
        recursion: ``"levenberg"``, ``"substituted"`` or ``"printed"`` (the last two with coupling ``"block"``, the
            last without cross terms).
        terminal: how a sample's loss is expanded in the outputs. ``"geometric"``: ``∇φ ∇φᵀ / φ``, as if its logarithm
            were linear there (the aim is the loss itself, so the model does not depend on the loss's scale);
            ``Geometric(aim, own)``: the same with another aim, also one that depends on the batch's size;
            ``"gradient"``: ``∇φ ∇φᵀ``, the paper's Proposition 5 (the aim is a fall by 1); ``"ggn"``: the loss's exact
            Hessian in the outputs, as many columns as outputs; ``MonteCarlo(rank)``: sampled columns of it, unbiased.
            With several columns, ``feedback_clip`` bounds the norm of a sample's predicted change of its outputs,
            measured by that Hessian: ``½ ‖c_i‖²`` is the second-order change of its loss. ``None``:
            ``"geometric"`` with recursion ``"levenberg"``, ``"gradient"`` with the paper's own.
        backend: ``"fast"`` (generated code) or ``"dense"`` (explicit matrices, small networks: the reference).
        mixing: how the dense backend reads operations that mix samples (docs/theory.md#mixing): ``"block"``, as the
            fast one does, or ``"exact"``.
        cooperative: whether coalitions use the cross terms of a curvature that has them (``"kfac"``, ``"ekfac"``:
            Theorem 3, Corollary 7). By default they do, except with ``feedback=False``, which is exactly the base
            method; True there too: the cooperative base method without feedback. Their factors are as wide as their
            layers together, 16384 at most; ``program.cost()`` says how wide.
        gram: how the Gram matrices are made. ``"auto"``: exactly, but for layers whose exact one would cost more than
            half of their own training step because the metric is diagonal: those have it separated. In the linear
            rollout a tenth is the limit, beyond which per-sample gradients are sketched to some 128 random numbers
            (so many columns times the layer's outputs). ``"exact"``.
            ``"separable"``: every diagonal metric as a product of one of outputs and one of inputs.
            ``Sketch(columns)``: random signs as well, where that is cheaper. ``Nystrom(columns,
            tolerance)``: none is formed, the weights come by conjugate gradients (docs/theory.md#nystrom).
            ``opt.program.cost()`` shows what was taken, docs/performance.md what each does to the update.
        memory: ``"keep"``: the trajectory and its gradients stay until the forward sweep has passed them;
            ``"recompute"``: only what crosses between segments of stages does, and a segment is run again in both
            sweeps (three more passes in all, the same update). ``opt.program.cost()`` shows the segments.
        running_statistics: of batch-norms in training mode. ``"corrected"``: the k-th batch counts for
            ``max(momentum, 1/k)``, so that evaluation sees nothing of the 0 and 1 they began with
            (docs/theory.md#running-statistics); ``"model"``: as the modules say. ``None``: what the curvature
            suggests, ``"corrected"`` for ``"foof"``.
        compile: True: hand the generated step to ``torch.compile`` as one graph with a batch of any size; a mapping:
            with these of its options (``backend``, ``mode``).
        on_nonfinite: what a step does whose loss, gains or update are NaN or infinite: ``"raise"`` a
            :class:`~gtddp_compile.NonFiniteError`; ``"skip"``: return the loss, with a warning the first time.
            Parameters, buffers, states and random state are as before either way.
        grad_scaler: for half (float16) models and autocast: its scale is that of the gradients between stages, and is
            made smaller (the step is made again) and greater by its rule. No ``scale``, ``step`` or ``update`` of it is
            called; its ``state_dict`` is saved as usual. Without one they are as they come, one a sample, not over B.
        program: a program from ``UpdateProgram.load``; it brings options, base method and loss with it (a loss that
            is a function has to be given again).
        process_group: ``"world"`` or a group of torch.distributed: every rank calls ``step`` with its shard, and all
            make the update of the joined batch (docs/several-processes.md). A model wrapped by
            DistributedDataParallel or divided by ``fully_shard`` brings its group.
        **curvature_options: options of the named curvature.

    Returns:
        A ``torch.optim.Optimizer``; train with ``loss = opt.step(inputs, targets)``.

    Raises:
        CompileError: with the module, operation and source line where there is one, why, and what to do.
    """
    if isinstance(model, Terms) and program is None:
        example_inputs, loss = _of_terms(model, example_inputs, loss)
        gram, terminal = "exact" if gram == "auto" else gram, terminal or Geometric(aim=2.0)
        lookahead, averaging = lookahead or 0.0, averaging or 0.0  # a sample is one equation, and has no noise
    options = Options(
        feedback=feedback, feedback_clip=feedback_clip, schedule=schedule, coupling=coupling, recursion=recursion,
        terminal=terminal, backend=backend, mixing=mixing, cooperative=cooperative, gram=gram, memory=memory,
        compile=compile, rollout=rollout, inertia=inertia, lookahead=lookahead, averaging=averaging,
        max_step=max_step, line_search=line_search, max_grad_norm=max_grad_norm, on_nonfinite=on_nonfinite,
        running_statistics=running_statistics,
    )  # fmt: skip
    model, ranks = of_processes(model, process_group)
    if ranks is not None and ranks.size == 1:
        ranks, options = None, replace(options, coupling="full" if coupling == "local" else coupling)
    check_shared(options, model, ranks)
    if ranks is not None and grad_scaler is not None:
        raise CompileError("process_group with grad_scaler: ranks would scale each for itself", "Train in bfloat16")
    if program is not None:
        if not isinstance(program, UpdateProgram):
            raise CompileError(
                f"program is a {type(program).__name__}", "Pass UpdateProgram.load(path), or opt.program"
            )
        if ranks is not None:
            raise CompileError("a loaded program is of one process", "Leave out process_group= or program=")
        return _with_program(model, example_inputs, program, loss, options, curvature, curvature_options)
    if loss is None:
        raise CompileError("no loss was given", "Pass loss=torch.nn.CrossEntropyLoss(), or another")
    base, losses = resolve(curvature, **curvature_options), split(loss)
    options, scale = suggested(options, base), GradientScale(grad_scaler)
    check_terminal(losses, options.terminal_kind)
    form_name(options.recursion, options.coupling_kind, feedback=bool(options.feedback))  # refuses before it traces
    made = CompiledOptimizer(
        model, example_inputs, loss=losses, curvature=base, options=options, scale=scale, ranks=ranks
    )
    return made.seal()


def _of_terms(model: Terms, example_inputs: Any, loss: Any) -> tuple[Any, Callable[[Any, Any], Tensor]]:
    """Points in one tensor, and the terms' own loss."""
    if loss is not None:
        raise CompileError("Terms have a loss of their own", "Leave the loss out; weights are an argument of Terms")
    return (model.batch(example_inputs)[0] if isinstance(example_inputs, Mapping) else example_inputs), model.loss


def _with_program(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Tensor] | None,
    program: UpdateProgram,
    loss: nn.Module | Callable[[Any, Any], Tensor] | None,
    options: Options,
    curvature: str | Curvature,
    curvature_options: Mapping[str, Any],
) -> CompiledOptimizer:
    """Train by a program that was loaded: everything but a function as loss comes from it."""
    if program.setting is None:
        raise CompileError("the program has no base method and loss", "Use one from UpdateProgram.load or opt.program")
    if options != Options() or curvature != "foof" or curvature_options:
        raise CompileError(
            "options were given beside the program, which was derived with its own",
            "Leave them out, or leave out program= to compile with them",
        )
    setting = program.setting
    losses = setting.loss if loss is None else split(loss)
    if losses.is_absent:
        raise CompileError(
            f"the program came from a file that has only the name of its loss, {losses.name}",
            "Give it: compile_optimizer(model, program=program, loss=...)",
        )
    if not setting.loss.is_absent and losses.reduction != setting.loss.reduction:
        raise CompileError(
            f"the loss {losses.name} is a {losses.reduction} over samples, the program's a {setting.loss.reduction}",
            "Leave the loss out, or compile without program=",
        )
    opt = CompiledOptimizer(
        model, None, loss=losses, curvature=setting.curvature, options=program.options, scale=GradientScale(None)
    )
    opt.adopt(program, example_inputs)
    return opt.seal()
