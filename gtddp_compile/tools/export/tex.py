"""``.tex``: the derivation for this network as a document that pdflatex compiles.

Stages with the same pattern of zero, identity and dense blocks share one derivation, as they do in the compiler.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from sympy import Identity, MatAdd, MatrixExpr, MatrixSymbol, ZeroMatrix
from sympy.printing.latex import LatexPrinter

from gtddp_compile.algebra.derivation import Equation, StageDerivation
from gtddp_compile.algebra.pattern import StagePattern
from gtddp_compile.passes.p06_derive import DerivedStage
from gtddp_compile.tools.export.parts import Parts

GREEK = frozenset({"alpha", "rho", "Gamma", "Lambda", "delta", "tau", "gamma", "eta"})
LETTERS = {"l": r"\ell", "1": r"\mathbf{1}"}
NAME = re.compile(r"(?P<base>[^\W_]+)(?P<prime>'*)(?:\^(?P<above>[^\W_]+))?(?:_(?P<below>\w+))?")
UNPRINTABLE = re.compile(r"[^ -~]|[{}%#\\^]")
ROOM = 62
"""Width of a line of a formula, in letters."""

SHORT = 15
"""Rows of a table that is not broken."""

PREAMBLE = r"""\documentclass[a4paper,11pt]{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\usepackage{lmodern,amsmath,amssymb,longtable,booktabs,array,url,microtype}
\usepackage[margin=25mm]{geometry}
\allowdisplaybreaks
\newcommand{\room}{\par\vspace{0pt plus 9\baselineskip}\penalty-100\vspace{0pt plus -9\baselineskip}}
\setlength{\emergencystretch}{3em}
\Urlmuskip=0mu plus 1mu
\DeclareUrlCommand\name{\urlstyle{tt}\def\UrlBreaks{\do\.\do\_\do\/}}
\newcolumntype{L}[1]{>{\raggedright\arraybackslash}p{#1}}
\setlength{\parindent}{0pt}\setlength{\parskip}{4pt}
"""


def to_tex(parts: Parts) -> str:
    """The document's source."""
    sections = [_title(parts), _network(parts), *_patterns(parts), _collapse(parts)]
    return f"{PREAMBLE}\\begin{{document}}\n{''.join(sections)}\\end{{document}}\n"


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
    tag = rf"\tag{{{equation.source}}}" if equation.source else r"\notag"
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
    body = " \\\\\n".join(" & ".join(row) for row in rows)
    top = rf"\toprule {' & '.join(head)} \\ \midrule"
    if len(rows) > SHORT:
        begin = f"{{\\small\\begin{{longtable}}{{@{{}}{columns}@{{}}}}"
        return f"{begin}\n{top} \\endhead\n{body} \\\\ \\bottomrule\n\\end{{longtable}}}}\n"
    begin = f"\\begin{{center}}\\small\\begin{{tabular}}{{@{{}}{columns}@{{}}}}"
    return f"{begin}\n{top}\n{body} \\\\ \\bottomrule\n\\end{{tabular}}\\end{{center}}\n"


def _title(parts: Parts) -> str:
    graph, options = parts.graph, parts.options
    return rf"""\begin{{center}}\Large\bfseries The update program of {escape(graph.name)}\end{{center}}
Derived by \texttt{{gtddp\_compile}} {escape(parts.version)}: base method {escape(parts.curvature)}, coupling
{escape(str(options.coupling))}, {escape(parts.form.name)} form. {len(graph.players)} players decide in
{len(graph.stages)} stages;
{len(parts.derived.patterns)} of the stages' derivations differ. Numbers at the right
are those of the paper's
equations. A prime marks what belongs to $t+1$: the recursions run backward.

"""


def _network(parts: Parts) -> str:
    rows = [(str(s.index), names(s.players), names(s.live), names(s.merges)) for s in parts.graph.stages]
    found = _table(("", "0.27", "0.40", "0.18"), ("stage", "players", "cut before it: the state", "merges"), rows)
    shortcuts = [(names([s.fork]), names([s.merge]), escape(s.kind.replace("_", " ")), names(s.players))
                 for s in parts.graph.shortcuts]  # fmt: skip
    if shortcuts:
        found += _table(("0.25", "0.25", "0.16", "0.20"), ("fork", "merge", "shortcut", "players on it"), shortcuts)
    return "\\section{The network as a control problem}\n" + found


def _patterns(parts: Parts) -> list[str]:
    groups: dict[StagePattern, list[DerivedStage]] = {}
    for stage in parts.derived.stages:
        groups.setdefault(stage.derivation.pattern, []).append(stage)
    return [_pattern(stages) for stages in groups.values()]


def _pattern(stages: list[DerivedStage]) -> str:
    derivation = stages[0].derivation
    indices = ", ".join(str(stage.index) for stage in stages)
    plural = "s" if len(stages) > 1 else ""
    text = f"\\room\n\\section{{Stage{plural} {indices}}}\n"
    symbols = [symbol for symbol, _ in _legend(stages[0])]
    rows = [(str(stage.index), *(names(values) for _, values in _legend(stage))) for stage in stages]
    widths = [f"{(0.92 - 0.03 * len(symbols)) / len(symbols):.3f}"] * len(symbols)
    text += _table(("", *widths), ("stage", *(f"${symbol}$" for symbol in symbols)), rows)
    text += "Augmented dynamics, blocks that are zero or the identity by construction seen as such:\n"
    text += "\\[\n" + _dynamics(derivation) + "\n\\]\n"
    d = derivation
    joint = [] if len(d.pattern.controls) == 1 else [d.joint_u, d.joint_uu, *d.joint_ux.values()]
    text += "Expansion of the stage's value:\n"
    text += align([*d.q_x.values(), *d.q_u.values(), *d.q_uu.values(), *d.q_ux.values(), *d.q_xx.values()])
    if joint:
        text += "The players of the stage decide jointly:\n" + align(joint)
    text += "Gains, and the value function before the stage:\n"
    return text + align([d.k, *d.gains.values(), *d.new_value_x.values(), *d.new_value_xx.values()])


def _legend(stage: DerivedStage) -> list[tuple[str, tuple[str, ...]]]:
    rows = [(symbol_text(name), values) for name, values in stage.inputs.items()]
    rows += [(symbol_text(f"{name}'"), values) for name, values in stage.outputs.items()]
    return rows + [(symbol_text(name), (player,)) for name, player in stage.controls.items()]


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


def _collapse(parts: Parts) -> str:
    return rf"""\section{{The collapsed recursion}}
The value function stays in the span of the back-propagated gradients $G$, $V_x = G\alpha$ and
$V_{{xx}} = G P G^{{\mathsf{{T}}}}$ (checked by exact rewriting on every pattern above: {len(parts.form.claims)}
identities).
What the program runs at every stage, with $C$ the per-sample parameter gradients, one column a sample, $M$ the
curvature of the base method, $\Gamma = C^{{\mathsf{{T}}}} M^{{-1}} C$ and $c$ the change of each sample's loss that the
stages before have caused:
{align(parts.equations)}"""
