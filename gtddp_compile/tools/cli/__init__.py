"""The command line, ``gtddp-compile``: inspect, derive, export, diff and demo.

Exit codes: 0, 1 (failed: the reason is on stderr, without a traceback), 2 (usage). What a command prints that is not
its result (progress, where a file was written) goes to stderr, so that stdout can be piped.
"""

from gtddp_compile.tools.cli.commands import app

__all__ = ["app"]
