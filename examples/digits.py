"""The paper's DIGITS experiment: ``python examples/digits.py`` does what ``gtddp-compile demo digits`` does.

The network, the methods that are compared and the measurements are in ``gtddp_compile/tools/demo/digits.py``.
"""

import typer

from gtddp_compile.tools.cli.commands import digits

if __name__ == "__main__":
    typer.run(digits)
