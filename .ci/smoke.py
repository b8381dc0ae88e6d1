"""What `.ci/release` runs where the package was installed: derive, train, draw, export, run what was exported.

Prints one line of JSON: versions, the loss before and after, the megabytes that a `pip install` brings beside torch.
"""

import importlib.util
import json
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from gtddp_compile import compile_optimizer

STEPS = 20


class Net(torch.nn.Module):
    """Two layers and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = torch.nn.Linear(6, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        h = torch.tanh(self.first(x))
        return self.last(h + torch.tanh(self.second(h)))


def brought(name: str, found: dict[str, metadata.Distribution]) -> dict[str, metadata.Distribution]:
    """The distributions that installing ``name`` brings, but for torch and what torch alone needs."""
    for requirement in metadata.requires(name) or ():
        needed = re.match(r"[\w.-]+", requirement).group().lower()
        if "extra ==" in requirement or needed == "torch" or needed in found:
            continue
        try:
            found[needed] = metadata.distribution(needed)
        except metadata.PackageNotFoundError:  # a marker rules it out here
            continue
        brought(needed, found)
    return found


def megabytes(distribution: metadata.Distribution) -> float:
    """What its files take, bytecode aside."""
    files = [Path(distribution.locate_file(file)) for file in distribution.files or () if file.suffix != ".pyc"]
    return sum(file.stat().st_size for file in files if file.exists()) / 1e6


def exported(opt: object, model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """A step of the exported program is a step of the optimizer, to 1e-9."""
    opt.program.export("step.py")
    spec = importlib.util.spec_from_file_location("exported_step", "step.py")
    step = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(step)
    params = {name: value.detach().clone() for name, value in model.named_parameters()}
    for _ in range(3):
        opt.step(x, y)
    state = step.init_state(params)
    for _ in range(3):
        params, _, state, _ = step.step(params, {}, state, (x,), y)
    for name, value in model.named_parameters():
        torch.testing.assert_close(params[name], value.detach(), rtol=1e-9, atol=1e-9)


def main() -> None:
    """All of it."""
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(64, 6, dtype=torch.float64)
    y = x[:, :3].argmax(1)
    exported(compile_optimizer(model, x, loss=torch.nn.CrossEntropyLoss()), model, x, y)
    opt = compile_optimizer(Net().double(), x, loss=torch.nn.CrossEntropyLoss())
    losses = [float(opt.step(x, y)) for _ in range(STEPS)]
    assert losses[-1] < 0.2 * losses[0], losses
    tops = {name.partition(".")[0] for name in sys.modules}
    installed = brought("gtddp-compile", {"gtddp-compile": metadata.distribution("gtddp-compile")})
    owners = metadata.packages_distributions()
    used = {owner.lower() for top in tops for owner in owners.get(top, ())}
    assert "<svg" in opt.graph.to_svg() and "<html" in opt.graph.to_html()
    command = [Path(sys.executable).with_name("gtddp-compile"), "inspect", f"{__file__}:Net", "--input", "4,6"]
    assert "shortcut" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(json.dumps({
        "python": platform.python_version(), "torch": torch.__version__, "losses": [losses[0], losses[-1]],
        "packages": {name: [one.version, round(megabytes(one), 1)] for name, one in sorted(installed.items())},
        "imported": sorted(used & installed.keys()),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
