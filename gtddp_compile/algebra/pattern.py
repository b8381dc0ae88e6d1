"""The shape of a stage: which blocks of its augmented Jacobians are zero, identity or dense.

Two stages with the same pattern have the same derivation; that is why deriving costs the same for 10 layers as for
1000.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """One block of an augmented Jacobian: ``identity · I + J`` (``J`` present if ``dense``)."""

    identity: int = 0
    dense: bool = False

    @property
    def is_zero(self) -> bool:
        """Whether the block is zero by construction."""
        return not self.identity and not self.dense

    def __str__(self) -> str:
        signs = {0: "", 1: "I", -1: "-I"}
        parts = [signs.get(self.identity, f"{self.identity}I"), "J" if self.dense else ""]
        return "+".join(part for part in parts if part) or "0"


ZERO, IDENTITY, DENSE = Entry(), Entry(identity=1), Entry(dense=True)


@dataclass(frozen=True)
class StagePattern:
    """A stage's augmented dynamics up to sizes (paper: Eq. 13, 26 and their generalisation).

    Values of the same role are one (block) symbol: all that merely wait are ``r``.

    Attributes:
        inputs: symbols of the value bundles in the cut before the stage, ``("x", "r")``.
        outputs: symbols of those in the cut after it.
        controls: symbols of the players, ``("u",)`` or ``("u", "v")`` in a coalition.
        state: ``state[o][i]``: block of ``f̂_x``.
        control: ``control[o][p]``: block of ``f̂_u``.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    controls: tuple[str, ...]
    state: tuple[tuple[Entry, ...], ...]
    control: tuple[tuple[Entry, ...], ...]

    def __str__(self) -> str:
        rows = []
        for o, output in enumerate(self.outputs):
            cells = [str(entry) for entry in self.state[o]] + [
                str(entry).replace("J", "F") for entry in self.control[o]
            ]
            rows.append(f"{output}' <- [{'  '.join(cells)}]")
        return f"({', '.join(self.inputs)}; {', '.join(self.controls)})\n" + "\n".join(rows)
