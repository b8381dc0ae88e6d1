"""From a control graph to what its program has to compute: the symbolic passes."""

from __future__ import annotations

from gtddp_compile.errors import CompileError
from gtddp_compile.graph import LEADING, ControlGraph
from gtddp_compile.lowering.cooperation import BY_PARAMETER, MetricRules
from gtddp_compile.lowering.plan import Asked, Plan
from gtddp_compile.methods.curvature import PLAIN, Curvature, Kronecker
from gtddp_compile.methods.terminal import geometric_of, terminal_weight
from gtddp_compile.options import Nystrom, Options, Sketch
from gtddp_compile.passes import collapse, derive, simplify
from gtddp_compile.passes.p06_derive import Derived


def plan_program(
    graph: ControlGraph, options: Options, curvature: Curvature, *, decay: bool, ranks: int = 1
) -> tuple[Derived, Plan]:
    """Passes 6 to 8: derivation, collapse, plan.

    Args:
        graph, options, curvature: of the program.
        decay: whether any group has coupled weight decay.
        ranks: processes with a shard of the batch each.
    """
    if options.factored:
        _check_columns(graph, options)
    if isinstance(options.gram, Nystrom) and curvature.metric not in PLAIN:
        raise CompileError(
            f"gram={options.gram!r}: the rows of {curvature.name!r} are mapped by factors of all samples",
            "Use it with a spherical or diagonal curvature: 'sgd' for least squares",
        )
    derived = derive(graph, options.recursion, metric_rules(options, curvature))
    if options.recursion == "printed":
        _check_own(derived)
    form = collapse(derived, options.coupling_kind, feedback=bool(options.feedback), factored=options.factored,
                    rollout=options.rollout_kind, inertia=bool(options.inertia))  # fmt: skip
    asked = Asked(
        coupling=options.coupling,
        decay=decay,
        inertia=bool(options.inertia),
        max_step=options.max_step,
        reach=geometric_of(options.terminal_kind).reach,
        early=geometric_of(options.terminal_kind).early,
        max_grad_norm=options.max_grad_norm,
        clip=options.feedback_clip,
        terminal=terminal_weight(options.terminal_kind),
        metric="rescaled" if isinstance(curvature, Kronecker) and curvature.rescales else curvature.metric,
        gram=options.gram_kind,
        columns=options.gram.columns if isinstance(options.gram, Sketch | Nystrom) else Sketch().columns,
        tolerance=options.gram.tolerance if isinstance(options.gram, Nystrom) else 0.0,
        ranks=ranks,
    )
    return derived, simplify(
        derived,
        form,
        asked,
        contracts=options.feedback is True and options.rollout_kind == "nonlinear",
        statistics=curvature.needs_statistics,
        recompute=options.memory == "recompute",
    )


def _check_own(derived: Derived) -> None:
    """Eq. 23 as printed reads each player's own curvature, which a joint one does not have."""
    coupled = [block for stage in derived.stages for block in stage.blocks if len(block.players) > 1]
    if coupled:
        (block, *_) = coupled
        op = derived.graph.op(block.players[0].op)
        raise op.refusal(
            f"recursion='printed': the curvature couples {', '.join(player.name for player in block.players)}, and "
            "Eq. 23 as printed adds up the players' own",
            "Use recursion='substituted', or cooperative=False, with which every player has its own",
        )


def _check_columns(graph: ControlGraph, options: Options) -> None:
    """Outputs with several columns a sample have their samples leading: ``(r, B, …)``."""
    for name in graph.ops.output_names:
        op = graph.op(name) if name in graph.ops.position else None
        if op is not None and op.samples != LEADING:
            raise op.refusal(
                f"terminal={options.terminal!r}: the output has its {op.samples}, and the factors of the loss's Hessian"
                " are taken a sample at a time along the leading axis",
                "Move the samples to the leading axis of the output, or take terminal='geometric'",
            )


def metric_rules(options: Options, curvature: Curvature) -> MetricRules:
    """Which players are in one metric; with feedback off only where ``cooperative=True`` was said (Proposition 4)."""
    if not isinstance(curvature, Kronecker):
        return BY_PARAMETER
    return MetricRules(
        kronecker=True, small=curvature.small, cooperative=options.cooperates, shares=curvature.shares,
        inputs_alone=curvature.inputs_alone, widest=curvature.widest,
    )  # fmt: skip
