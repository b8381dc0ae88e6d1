"""docs/errors.md: what may be done wrong and what is said then, each row run; nothing has changed afterwards.

Written by ``PYTHONPATH=tests python tests/docs/test_errors_page.py``.
"""

import random
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import rich.style  # noqa: F401  # draws a random number when it is first imported, which a drawing does
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gtddp_compile import CompileError, compile_optimizer
from support import bad
from support.networks import make
from support.recorded import batch
from support.refused import LOSS, TARGETS, compiled, model

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
HEAD = """# What is refused, and in which words

Each row is run by `tests/docs/test_errors_page.py`, which also writes this page: `CompileError`, or its subclass
`NonFiniteError`, with this text; parameters, buffers, optimizer state and random state are what they were. Words of
torch's own are left out ("…"). The model is `Linear(4, 4)`, tanh, `Linear(4, 3)` in float64, the batch has 6 samples,
the loss is cross-entropy, unless the row says otherwise. What a closure of yours raises comes through as it is.

What one might look for here, and works: attributes changed after compilation (`tests/frontends/test_changes.py`),
tables with `sparse=True` and paths by torch's random numbers (`tests/frontends/test_refusals.py`), random paths of
single samples (`tests/frontends/test_layouts.py`), a tokenizer's dict (`tests/frontends/test_inputs_by_name.py`),
torch.optim's checkpoints (`tests/optimizer/test_optimizer.py`), and a `p.grad` that is there, with a warning
(`tests/optimizer/test_like_torch.py`).
"""


class Wrong(NamedTuple):
    """A model, its optimizer if there is one already, and what is done then."""

    net: Any
    opt: Any
    act: Callable[[], Any]


def of_forward(forward: Callable[..., Any]) -> Wrong:
    net = model(forward)
    net.block[0].last = None
    return Wrong(net, None, partial(compiled, net))


def of_end(forward: Callable[..., Any]) -> Wrong:
    net = make(forward, a=(4, 3))
    return Wrong(net, None, partial(compiled, net))


def of_model(title: str, found: Any) -> Wrong:
    inputs = batch(1) if title.endswith("one") else batch(6)
    return Wrong(found, None, partial(compile_optimizer, found, inputs, loss=LOSS))


def of_step(inputs: Callable[[], Any] | None = None, targets: Callable[[], Any] | None = None) -> Wrong:
    net = model()
    opt = compiled(net, curvature="adam")
    opt.step(batch(6), TARGETS)
    x, y = bad.X if inputs is None else inputs(), TARGETS if targets is None else targets()
    return Wrong(net, opt, partial(opt.step, x, y))


def of_loss(loss: Any) -> Wrong:
    net = model()
    return Wrong(net, None, lambda: compile_optimizer(net, batch(6), loss=loss, curvature="sgd").step(bad.X, TARGETS))


def of_penalty() -> Wrong:
    def leaves(layer: Any, x: Tensor) -> Tensor:
        y: Tensor = layer.fc(x)
        layer.state = y.square().mean(1)
        return y

    net = model(leaves)

    def loss(y: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(y, t, reduction="none") + net.block[0].state  # type: ignore[no-any-return]

    return of_loss(loss)._replace(
        net=net, act=lambda: compile_optimizer(net, bad.X, loss=loss, curvature="sgd").step(bad.X, TARGETS)
    )


def of_later(change: bad.Act | None, act: bad.Act) -> Wrong:
    found = of_step()
    if change is not None:
        change(found.opt, found.net)
    return found._replace(act=partial(act, found.opt, found.net))


def of_options(options: dict[str, Any]) -> Wrong:
    net = model()
    return Wrong(net, None, partial(compiled, net, **options))


def shown(options: dict[str, Any]) -> str:
    text = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return re.sub(r"<class '[\w.]+\.(\w+)'>", r"\1", re.sub(r"SGD\(lr=1.0.*?\)", "SGD(lr=1.0)", text))


def cases() -> Iterator[tuple[str, str, Callable[[], Wrong]]]:
    """Section, title, and how to come to where it is done."""
    for title, forward in bad.FORWARDS.items():
        yield "In forward", title, partial(of_forward, forward)
    for title, forward in bad.ENDS.items():
        yield "What forward returns", title, partial(of_end, forward)
    for title, build in bad.MODELS.items():
        yield "The model is", title, lambda title=title, build=build: of_model(title, build())  # type: ignore[misc]
    for title, inputs in bad.INPUTS.items():
        yield "Inputs of a step are", title, partial(of_step, inputs)
    for title, targets in bad.TARGET.items():
        yield "Targets are", title, partial(of_step, None, targets)
    for title, loss in bad.LOSSES.items():
        yield "The loss is", title, partial(of_loss, loss)
    yield "The loss is", "one that reads what forward leaves in an attribute", of_penalty
    for options in bad.OPTIONS:
        yield "Options", f"`{shown(options)}`", partial(of_options, options)
    for title, build in bad.OBJECTS.items():
        yield "Options", f"`{title}`", lambda build=build: Wrong(None, None, build)  # type: ignore[misc]
    for title, (change, act) in bad.LATER.items():
        yield "After a step of Adam", title, partial(of_later, change, act)


CASES = {f"{section}: {title}": (section, title, build) for section, title, build in cases()}


def everything(wrong: Wrong) -> str:
    """Values of whatever a step or a compilation might write."""
    drawn = torch.get_rng_state().sum(), hash(random.getstate()), str(np.random.get_state())
    written = isinstance(wrong.net, nn.Module) and "lazy" not in str(wrong.net).lower()
    values = dict(wrong.net.state_dict()) if written else {}
    states = {} if wrong.opt is None else wrong.opt.state
    return f"{drawn} {values} {states} {wrong.opt and wrong.opt.param_groups}"


TORCHS = r"(Error: |export: |refuses [^:]*: |differentiated: |numbers are needed: |invalid |take compile=\{[^}]*\}: )"


def said(error: CompileError) -> str:
    """The text of the page: the user's line is anybody's, and torch's own words change with it."""
    text = re.sub(r"at \w+\.py:\d+", "at model.py:12", str(error)).replace("\n", " ")
    text = re.sub(r" \(then: .*\)\.", ".", text)
    text = re.sub(TORCHS + r".*?(?=\. (Pass|Give|Make|Replace|Leave))", r"\1…", text)
    return text.replace("|", "\\|")


def outcome(build: Callable[[], Wrong]) -> CompileError:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = build()
        before = everything(wrong)
        with pytest.raises(CompileError) as caught:
            wrong.act()
    assert everything(wrong) == before
    return caught.value


def row(title: str, error: CompileError) -> str:
    kind = "" if type(error) is CompileError else f"`{type(error).__name__}` "
    return f"| {title.replace('|', chr(92) + '|')} | {kind}{said(error)} |"


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_in_these_words_and_nothing_has_changed(name: str) -> None:
    _, title, build = CASES[name]
    error = outcome(build)
    assert error.why and error.remedy
    assert row(title, error) in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_has_these_rows_and_no_others() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    titles = [title for _, title, _ in CASES.values()]
    heads = 2 * len({section for section, _, _ in CASES.values()})
    assert len(rows) == len(titles) + heads and len(titles) > 80


def write() -> None:
    lines, last = [HEAD], ""
    for section, title, build in CASES.values():
        if section != last:
            lines += [f"\n## {section}\n", "| what | said |", "| --- | --- |"]
            last = section
        lines.append(row(title, outcome(build)))
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
