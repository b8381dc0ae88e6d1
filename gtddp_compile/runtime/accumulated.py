"""What ``opt.accumulate`` has taken in: the micro-batches of the next update, able to be run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from gtddp_compile.errors import CompileError
from gtddp_compile.kernels import random_state, restore_random_state
from gtddp_compile.methods.setting import same
from gtddp_compile.runtime.precision import Precision
from gtddp_compile.runtime.program import UpdateProgram
from gtddp_compile.runtime.union import Union, check_form

REMEDY = "Call opt.zero_grad() to drop what was accumulated, or make the step first"


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch, the random numbers it began with, and the versions of its tensors."""

    inputs: tuple[Any, ...]
    targets: Any
    random: list[Tensor]
    versions: tuple[list[int], list[int]]

    def overwritten(self) -> tuple[bool, bool]:
        """Whether inputs were, and whether targets were."""
        inputs, targets = self.versions
        return inputs != _versions(self.inputs), targets != _versions(self.targets)


class Accumulated:
    """The micro-batches of the next update.

    They are run as far as they go when they come. They are run again, with the same random numbers and under the same
    autocast, if options or state of the base method change before the update, or a step failed on the way.

    Args:
        program: of all of them.
        begin: a union without micro-batches, made of parameters, state and buffers as they are.
        named: the model's parameters.
        options: of every parameter group, as they are.
    """

    def __init__(
        self,
        program: UpdateProgram,
        begin: Callable[[], Union],
        named: Mapping[str, Tensor],
        options: Callable[[], list[dict[str, Any]]],
    ) -> None:
        check_form(program)
        self.program, self._begin, self._named, self._options = program, begin, named, options
        self._precision = Precision.around(named.values())  # of all micro-batches: another one is another program
        self._versions = self._parameter_versions()
        self._batches: list[MicroBatch] = []
        self._union: Union | None = None
        self._seen: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, inputs: tuple[Any, ...], targets: Any, program: UpdateProgram) -> Tensor:
        """Take a micro-batch in; its loss. On any exception nothing was taken in.

        Raises:
            CompileError: it needs another program, or parameters or earlier inputs were changed.
            GivenUp: its loss is not finite.
        """
        if program is not self.program:
            raise CompileError(
                "this micro-batch needs another program than those before it: modules changed mode or attributes, "
                "autocast is another, or the recording has sizes built in and this one is of another size",
                f"Give an update micro-batches of one size, between which the model does not change. {REMEDY}",
            )
        union, random = self._current(), random_state()
        inputs, targets = tree_map_only(Tensor, _with_version, (inputs, targets))
        versions = _versions(inputs), _versions(targets)
        loss = union.add(inputs, targets)
        self._batches.append(MicroBatch(inputs, targets, random, versions))
        return loss

    def finish(self) -> Union:
        """The update; the union with its results."""
        union = self._current()
        with Precision.around(self._named.values()).outside():  # the network goes on in the precision that it began in
            union.finish()
        return union

    def again(self, count: int | None = None) -> None:
        """Run the micro-batches (the first ``count``) again when they are needed next."""
        del self._batches[len(self._batches) if count is None else count :]
        if self._union is not None:
            self._union.method.undo()
        self._union = None
        self._versions = self._parameter_versions()  # a step that failed wrote parameters and put them back

    def _parameter_versions(self) -> dict[str, int]:
        return {name: _version(parameter) for name, parameter in self._named.items()}

    def _current(self) -> Union:
        for name, version in self._parameter_versions().items():
            if version != self._versions[name]:
                raise CompileError(f"parameter {name!r} changed since a micro-batch was accumulated", REMEDY)
        options = self._options()
        if self._union is None or not _same_options(options, self._seen):
            self._union, self._seen = self._run(), options
        elif self._union.reads_inputs:
            self._refuse_overwritten("they are not used up before the step")
        return self._union

    def _refuse_overwritten(self, why: str, *, targets: bool = False) -> None:
        for index, batch in enumerate(self._batches):
            changed = batch.overwritten()
            if changed[0] or (targets and changed[1]):
                raise CompileError(
                    f"the {'inputs' if changed[0] else 'targets'} of accumulated micro-batch {index} were overwritten, "
                    f"and {why}",
                    f"Leave them as they are until the step, or accumulate copies (clone()). {REMEDY}",
                )

    def _run(self) -> Union:
        self._refuse_overwritten("it has to be run again: options or state changed, or a step failed", targets=True)
        union, after = self._begin(), random_state()
        for batch in self._batches:
            restore_random_state(batch.random)
            with Precision.around(self._named.values()).outside(), self._precision.inside():
                union.add(batch.inputs, batch.targets)
        restore_random_state(after)
        return union


def _same_options(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(same(a[key], b[key]) for key in a) for a, b in zip(left, right, strict=True)
    )


def _with_version(tensor: Tensor) -> Tensor:
    """Of one without (made in inference mode), a copy, which nobody else writes."""
    return tensor.clone() if tensor.is_inference() else tensor


def _versions(structure: Any) -> list[int]:
    return [_version(leaf) for leaf in tree_leaves(structure) if isinstance(leaf, Tensor)]


def _version(tensor: Tensor) -> int:
    """The counter that an in-place change raises."""
    return 0 if tensor.is_inference() else tensor._version
