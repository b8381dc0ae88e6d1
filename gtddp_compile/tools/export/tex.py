"""``.tex``: the derivation for this network as a document that pdflatex compiles.

Stages with the same pattern of zero, identity and dense blocks share one derivation, as they do in the compiler.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from sympy import Identity, MatAdd, MatrixExpr, MatrixSymbol, ZeroMatrix
from sympy.printing.latex import LatexPrinter

from gtddp_compile.algebra.derivation import Equation, StageDerivation
from gtddp_compile.graph import grouped
from gtddp_compile.passes.p06_derive import DerivedStage
from gtddp_compile.runtime.program import VERSION, UpdateProgram
from gtddp_compile.tools.page import page

GREEK = frozenset({"alpha", "rho", "Gamma", "Lambda", "delta", "tau", "gamma", "eta"})
LETTERS = {"l": r"\ell", "1": r"\mathbf{1}"}
NAME = re.compile(r"(?P<base>[^\W_]+)(?P<prime>'*)(?:\^(?P<above>[^\W_]+))?(?:_(?P<below>\w+))?")
UNPRINTABLE = re.compile(r"[^ -~]|[{}%#\\^]")
ROOM = 62
"""Width of a line of a formula, in letters."""
SHORT = 15
"""Rows of a table that is not broken."""


def to_tex(program: UpdateProgram) -> str:
    """The document's source."""
    graph = program.graph
    groups = grouped(program.derived.stages, lambda stage: stage.derivation.pattern)
    cuts = [(str(s.index), names(s.players), names(s.live), names(s.merges)) for s in graph.stages]
    shortcuts = [(names([s.fork]), names([s.merge]), escape(s.kind.replace("_", " ")), names(s.players))
                 for s in graph.shortcuts]  # fmt: skip
    return page(
        "export/derivation.tex.j2",
        program=program,
        graph=graph,
        version=VERSION,
        escape=escape,
        stages=_table(("", "0.27", "0.40", "0.18"), ("stage", "players", "cut before it: the state", "merges"), cuts),
        shortcuts=_table(("0.25", "0.25", "0.16", "0.20"), ("fork", "merge", "shortcut", "players on it"), shortcuts),
        patterns=map(_pattern, groups.values()),
        collapsed=align(program.form.said),
    )


# --- formulas ---------------------------------------------------------------------------------------------------------


class _Printer(LatexPrinter):  # type: ignore[misc]  # sympy ships no types
    """Matrices with the notation of the field: a prime at t+1, an upright T, a hat for the coalition."""

    def _print_MatrixSymbol(self, expr: MatrixSymbol) -> str:
        return symbol_text(expr.name)

    def _print_Symbol(self, expr: MatrixSymbol, style: str = "plain") -> str:
        return symbol_text(expr.name)

    def _print_Transpose(self, expr: MatrixExpr) -> str:
        return f"{self._base(expr.arg)}^{{\\mathsf{{T}}}}"

    def _print_Inverse(self, expr: MatrixExpr) -> str:
        return f"{self._base(expr.arg)}^{{-1}}"

    def _print_DiagMatrix(self, expr: MatrixExpr) -> str:
        return rf"\operatorname{{diag}}\left({self._print(expr.args[0])}\right)"

    def _print_OneMatrix(self, expr: MatrixExpr) -> str:
        return r"\mathbf{1}"

    def _print_Identity(self, expr: MatrixExpr) -> str:
        return "I"

    def _print_ZeroMatrix(self, expr: MatrixExpr) -> str:
        return "0"

    def _base(self, expr: MatrixExpr) -> str:
        text = self._print(expr)
        if not isinstance(expr, MatrixSymbol):
            return rf"\left({text}\right)"
        return f"{{{text}}}" if "'" in text or "^" in text else text  # no second superscript


def symbol_text(name: str) -> str:
    r"""``"V'_xx"`` as ``V'_{xx}``, ``"f^y_x"`` as ``f^{y}_{x}``, ``"Q_û"`` as ``Q_{\hat u}``."""
    found = NAME.fullmatch(name)
    if found is None:
        return rf"\mathrm{{{escape(name)}}}"
    base = found["base"]
    text = rf"\{base}" if base in GREEK else LETTERS.get(base, _hatted(base))
    above = found["prime"] + (f"^{{{_hatted(found['above'])}}}" if found["above"] else "")
    return text + above + (f"_{{{_hatted(found['below'])}}}" if found["below"] else "")


def _hatted(text: str) -> str:
    return text.replace("û", r"\hat u ").strip()


def formula(expression: MatrixExpr) -> str:
    """LaTeX of an expression on one line."""
    return str(_Printer().doprint(expression))


def lines_of(equation: Equation) -> list[str]:
    """Rows of an ``align`` environment; a sum too wide for the page goes on below, indented."""
    tag = rf"\tag{{{equation.tag}}}" if equation.tag else r"\notag"
    expression = equation.expression
    terms = _terms(expression) if isinstance(expression, MatAdd) else [formula(expression)]
    rows, width = [f"{formula(equation.symbol)} &= {terms[0]}"], _width(terms[0]) + 8
    for term in terms[1:]:
        joined = f" {term}" if term.startswith("-") else f" + {term}"
        if width + _width(joined) > ROOM:
            rows, width = [*rows, rf"&\quad{joined}"], _width(joined)
        else:
            rows[-1] += joined
            width += _width(joined)
    return [*(f"{row} \\notag" for row in rows[:-1]), f"{rows[-1]} {tag}"]


def _terms(expression: MatAdd) -> list[str]:
    texts = [formula(term) for term in expression.args]
    return sorted(texts, key=lambda text: text.startswith("-"))


def _width(text: str) -> int:
    """Letters as they are set: commands, braces and small indices count less."""
    plain = re.sub(r"\\[a-zA-Z]+|[{}\\ ]", "", text)
    return len(plain) - len(re.findall(r"_", text))


def align(equations: Iterable[Equation]) -> str:
    """One ``align`` environment."""
    rows = [row for equation in equations for row in lines_of(equation)]
    return "\\begin{align}\n" + " \\\\\n".join(f"  {row}" for row in rows) + "\n\\end{align}\n" if rows else ""


# --- text -------------------------------------------------------------------------------------------------------------


def escape(text: str) -> str:
    """Plain text for LaTeX."""
    special = {c: rf"\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
    special["^"] = r"\textasciicircum{}"
    return "".join(special.get(c, c if c.isascii() else "?") for c in text)


def names(values: Iterable[str]) -> str:
    """Qualified names in typewriter letters that may break at their dots."""
    shown = [rf"\name{{{UNPRINTABLE.sub('?', value)}}}" for value in values]
    return ", ".join(shown) or "---"


def _table(widths: Iterable[str], head: Iterable[str], rows: Sequence[Iterable[str]]) -> str:
    """A table; a short one stays with the heading above it, a long one may break over pages."""
    columns = " ".join(rf"L{{{width}\linewidth}}" if width else "r" for width in widths)
    if not rows:
        return ""
    body = " \\\\\n".join(" & ".join(row) for row in rows)
    top = rf"\toprule {' & '.join(head)} \\ \midrule"
    if len(rows) > SHORT:
        begin = f"{{\\small\\begin{{longtable}}{{@{{}}{columns}@{{}}}}"
        return f"{begin}\n{top} \\endhead\n{body} \\\\ \\bottomrule\n\\end{{longtable}}}}\n"
    begin = f"\\begin{{center}}\\small\\begin{{tabular}}{{@{{}}{columns}@{{}}}}"
    return f"{begin}\n{top}\n{body} \\\\ \\bottomrule\n\\end{{tabular}}\\end{{center}}\n"


def _pattern(stages: list[DerivedStage]) -> tuple[object, ...]:
    """Stages, their bundles, dynamics, expansion, joint decision, gains and value function of one pattern."""
    d = stages[0].derivation
    symbols = [symbol_text(name) for name, _ in stages[0].legend]
    rows = [(str(stage.index), *(names(values) for _, values in stage.legend)) for stage in stages]
    widths = [f"{(0.92 - 0.03 * len(symbols)) / len(symbols):.3f}"] * len(symbols)
    joint = [] if len(d.pattern.controls) == 1 else [d.joint_u, d.joint_uu, *d.joint_ux.values()]
    return (
        [stage.index for stage in stages],
        _table(("", *widths), ("stage", *(f"${symbol}$" for symbol in symbols)), rows),
        _dynamics(d),
        align([*d.q_x.values(), *d.q_u.values(), *d.q_uu.values(), *d.q_ux.values(), *d.q_xx.values()]),
        align(joint),
        align([d.k, *d.gains.values(), *d.new_value_x.values(), *d.new_value_xx.values()]),
    )


def _dynamics(d: StageDerivation) -> str:
    state = _blocks(d.state, d.pattern.outputs, d.pattern.inputs)
    control = _blocks(d.control, d.pattern.outputs, d.pattern.controls)
    return rf"\hat f_x = {state}, \qquad \hat f_u = {control}"


def _blocks(blocks: Mapping[tuple[str, str], MatrixExpr], rows: tuple[str, ...], columns: tuple[str, ...]) -> str:
    lines = [" & ".join(_block(blocks[row, column]) for column in columns) for row in rows]
    body = r" \\ ".join(lines)
    return rf"\begin{{bmatrix}} {body} \end{{bmatrix}}"


def _block(block: MatrixExpr) -> str:
    if isinstance(block, ZeroMatrix):
        return "0"
    return "I" if isinstance(block, Identity) else formula(block)
