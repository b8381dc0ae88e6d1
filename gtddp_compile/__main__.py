"""``python -m gtddp_compile`` is ``gtddp-compile``."""

from gtddp_compile.tools.cli import app

if __name__ == "__main__":
    app(prog_name="gtddp-compile")
