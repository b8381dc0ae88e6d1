"""Compare two programs, section by section, each a list of changes or of changed lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from difflib import SequenceMatcher
from itertools import groupby

from gtddp_compile.algebra.derivation import equation_text
from gtddp_compile.graph import ControlGraph, Op, Player, Stage, grouped
from gtddp_compile.lowering.instructions import Instruction, render_instruction
from gtddp_compile.passes.p06_derive import DerivedStage
from gtddp_compile.runtime.program import UpdateProgram
from gtddp_compile.tools.difference.align import Alignment
from gtddp_compile.tools.difference.report import Change, Hunk, Line, ProgramDiff, Section
from gtddp_compile.tools.draw.style import shape_text

Key = tuple[str, int]
"""A sweep and a stage in it."""


def compare(left: UpdateProgram, right: UpdateProgram) -> ProgramDiff:
    """What differs between two programs; the first one's names and stages are the words it is said in."""
    alignment = Alignment(left, right)
    sections = (
        _facts("options", "option", _settings(left), _settings(right)),
        _players(alignment),
        _operations(alignment),
        _shortcuts(alignment),
        _cuts(alignment),
        _derivations(alignment),
        _instructions(alignment),
    )
    return ProgramDiff(_name(left), _name(right), sections, (left.graph, right.graph))


def _name(program: UpdateProgram) -> str:
    graph = program.graph
    return f"{graph.name}, {program.curvature} ({len(graph.players)} players, {len(graph.stages)} stages)"


def _facts(title: str, unit: str, left: Mapping[str, str], right: Mapping[str, str]) -> Section:
    """Entries of two tables that are in one alone or have other values; and how many agree."""
    found, same = [], 0
    for key in dict.fromkeys([*left, *right]):
        if key not in right or key not in left:
            found.append(Change("-" if key in left else "+", key, left.get(key, ""), right.get(key, "")))
        elif left[key] != right[key]:
            found.append(Change("≠", key, left[key], right[key]))
        else:
            same += 1
    return Section(title, unit, tuple(found), same=same)


def _settings(program: UpdateProgram) -> dict[str, str]:
    """Everything that was asked for, by name; options of a parameter group only where they are its own."""
    options = program.options
    found = {f.name: repr(getattr(options, f.name)) for f in fields(options)}
    found["curvature"] = program.curvature
    found["form"] = program.form.name
    setting = program.setting
    if setting is None:
        return found
    found["loss"] = f"{setting.loss.name}, {setting.loss.reduction} over samples"
    shared = setting.shared
    found.update((f"{program.curvature}.{name}", repr(value)) for name, value in shared.items())
    for group in setting.groups:
        own = {name: value for name, value in group.options.items() if name not in shared}
        found.update((f"{group.name}.{name}", repr(value)) for name, value in own.items())
    return found


# --- the network ------------------------------------------------------------------------------------------------------


def _players(alignment: Alignment) -> Section:
    left, right = alignment.left, alignment.right
    ours = {player.name: _player(left, player, str(player.stage)) for player in left.graph.players}
    theirs = {player.name: _player(right, player, alignment.stage(player.stage)) for player in right.graph.players}
    return _facts("players", "player", ours, theirs)


def _player(program: UpdateProgram, player: Player, stage: str) -> str:
    info = program.graph.ops.parameter_info
    sizes = " ".join(shape_text(info[name].shape) for name in player.parameters)
    rules = ", ".join(dict.fromkeys(use.rule.name for use in program.lowered.plan.layers[player.name].uses))
    tied = f", used {len(player.uses)} times" if len(player.uses) > 1 else ""
    return f"stage {stage}: {player.kind} {sizes}, rule {rules}{tied}"


def _operations(alignment: Alignment) -> Section:
    """Operations by the first program's names: what they read, their literal arguments, the shape of their value."""
    ours = {op.name: _operation(alignment, op, translated=False) for op in alignment.left.graph.ops.ops}
    theirs = {alignment.op(op.name): _operation(alignment, op, translated=True) for op in alignment.right.graph.ops.ops}
    return _facts("operations", "operation", ours, theirs)


def _operation(alignment: Alignment, op: Op, *, translated: bool) -> str:
    return f"{op.kind}({alignment.arguments(op, translated=translated)}) {shape_text((op.shape or ())[1:])}".rstrip()


def _shortcuts(alignment: Alignment) -> Section:
    ours = {f"{s.fork} → {s.merge}": _shortcut(s.kind, s.players) for s in alignment.left.graph.shortcuts}
    theirs = {
        f"{alignment.op(s.fork)} → {alignment.op(s.merge)}": _shortcut(s.kind, s.players)
        for s in alignment.right.graph.shortcuts
    }
    return _facts("shortcuts", "fork → merge", ours, theirs)


def _shortcut(kind: str, players: Iterable[str]) -> str:
    through = ", ".join(players)
    return kind.replace("_", " ") + (f" through {through}" if through else "")


def _cuts(alignment: Alignment) -> Section:
    """Stage by stage, values that wait before it in one program alone; stages that differ alike are one entry."""
    left, right = alignment.left.graph, alignment.right.graph
    theirs = {alignment.stages[s.index]: s for s in right.stages if s.index in alignment.stages}
    changes, same = [], 0
    for stage in left.stages:
        other = theirs.get(stage.index)
        if other is None:
            changes.append(Change("-", _title(stage), ", ".join(_live(left, stage).values()), ""))
            continue
        ours, others = _live(left, stage), _live(right, other, alignment)
        gone = ", ".join(text for name, text in ours.items() if name not in others)
        new = ", ".join(text for name, text in others.items() if name not in ours)
        if gone or new:
            changes.append(Change("≠", _title(stage, other), gone, new))
        else:
            same += 1
    extra = [s for s in right.stages if s.index not in alignment.stages]
    changes += [Change("+", _title(s), "", ", ".join(_live(right, s, alignment).values())) for s in extra]
    return Section("stages and cuts: values that wait in one alone", "cut before", tuple(_merged(changes)), same=same)


def _merged(changes: Iterable[Change]) -> Iterator[Change]:
    """One entry for neighbours that say the same: ``stage 3: a … stage 9: g (7 stages)``."""
    for _, group in groupby(changes, key=lambda change: (change.sign, change.left, change.right)):
        run = list(group)
        count = len(run)
        what = run[0].what if count == 1 else f"{run[0].what} … {run[-1].what} ({count} stages)"
        yield replace(run[0], what=what, count=count)


def _live(graph: ControlGraph, stage: Stage, alignment: Alignment | None = None) -> dict[str, str]:
    """Values that wait before a stage, translated if there is an alignment, with their shapes."""
    shapes = {name: shape_text(graph.value[name].shape) for name in stage.live if name in graph.value}
    names = {name: alignment.op(name) if alignment else name for name in shapes}
    return {names[name]: f"{names[name]} {shape}" for name, shape in shapes.items()}


def _title(stage: Stage, other: Stage | None = None) -> str:
    moved = f" → {other.index}" if other is not None and other.index != stage.index else ""
    players = ", ".join(stage.players)
    if other is not None and other.players != stage.players:
        players += f" → {', '.join(other.players)}"
    return f"stage {stage.index}{moved}: {players}"


# --- derivations ------------------------------------------------------------------------------------------------------


def _derivations(alignment: Alignment) -> Section:
    """Dynamics and gains of stages whose pattern is another one; stages that changed in the same way say it once."""
    ours, theirs = alignment.left.derived.stages, alignment.right.derived.stages
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    same = 0
    for stage in theirs:
        before = _derived(ours[alignment.stages[stage.index]]) if stage.index in alignment.stages else ()
        after = _derived(stage)
        if before == after:
            same += 1
            continue
        label = f"{alignment.stage(stage.index)}" if before else f"{stage.index}, new"
        groups.setdefault((before, after), []).append(label)
    met = {alignment.stages[s.index] for s in theirs if s.index in alignment.stages}
    for stage in ours:
        if stage.index not in met:
            groups.setdefault((_derived(stage), ()), []).append(f"{stage.index}, gone")
    hunks = [
        Hunk(f"stage{'s' if len(where) > 1 else ''} {', '.join(where)}", tuple(_lines(before, after)))
        for (before, after), where in groups.items()
    ]
    formulas = [*_lines(_collapsed(alignment.left), _collapsed(alignment.right))]
    if formulas:
        hunks.append(Hunk("collapsed recursion, the same for all stages", tuple(formulas)))
    return Section("derivation: dynamics, gains and value recursion", "stage", hunks=tuple(hunks), same=same)


def _derived(stage: DerivedStage) -> tuple[str, ...]:
    pattern = [line for line in str(stage.derivation.pattern).splitlines() if line]
    return (*pattern, *(equation_text(equation) for equation in stage.derivation.equations()))


def _collapsed(program: UpdateProgram) -> tuple[str, ...]:
    form = program.form
    return tuple(equation_text(equation) for equation in (*form.backward.values(), *form.forward.values()))


# --- instructions -----------------------------------------------------------------------------------------------------


def _instructions(alignment: Alignment) -> Section:
    """Sweep by sweep, stage by stage, instructions that differ after translation, each as its own program has it."""
    ours, theirs = _blocks(alignment.left), _blocks(alignment.right)
    known = {(phase, alignment.stages[t]): block for (phase, t), block in theirs.items() if t in alignment.stages}
    hunks, same = [], 0
    for key, block in ours.items():
        other = known.get(key, ())
        texts = tuple(map(render_instruction, block))
        translated = tuple(alignment.instruction(i) for i in other)
        lines = tuple(_lines(texts, translated, _shown(block), _shown(other)))
        same += len(texts) - sum(line.sign == "-" for line in lines)
        if lines:
            hunks.append(Hunk(_heading(alignment.left.graph, *key), lines))
    for (phase, t), block in theirs.items():
        if t not in alignment.stages or (phase, alignment.stages[t]) not in ours:
            lines = tuple(Line("+", text) for text in _shown(block))
            hunks.append(Hunk(f"{_heading(alignment.right.graph, phase, t)} (new)", lines))
    return Section("instructions", "stage", hunks=tuple(hunks), same=same)


def _blocks(program: UpdateProgram) -> dict[Key, tuple[Instruction, ...]]:
    found = grouped(program.lowered.instructions, lambda instruction: (instruction.phase, instruction.stage))
    return {key: tuple(block) for key, block in found.items()}


def _shown(block: Sequence[Instruction]) -> tuple[str, ...]:
    return tuple(f"{i}  # {i.note}" if i.note else str(i) for i in block)


def _heading(graph: ControlGraph, phase: str, t: int) -> str:
    if t < 0:
        return f"{phase}, before the first stage"
    return f"{phase}, {_title(graph.stages[t])}" if t < len(graph.stages) else f"{phase}, terminal"


def _lines(
    left: Sequence[str], right: Sequence[str], shown: Sequence[str] = (), others: Sequence[str] = ()
) -> Iterator[Line]:
    """Lines of one alone, in order; compared by ``left`` and ``right``, printed as ``shown`` and ``others``.

    Lines that differ in what their names stand for, but not in how they read, are left out.
    """
    said, heard = shown or left, others or right
    for tag, i, j, k, n in SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        gone, new = [Line("-", text) for text in said[i:j]], [Line("+", text) for text in heard[k:n]]
        if len(gone) == len(new):  # each line beside what it has become
            pairs = zip(gone, new, strict=True)
            yield from (line for pair in pairs if pair[0].text != pair[1].text for line in pair)
        else:
            yield from (*gone, *new)
