# Every target sets up what it needs on a machine with nothing but Python 3 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Exported so that no pip of the environment asks, warns or reads a cache it cannot write.
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test lint site package release bench rivals paper-quick paper clean

help:
	@echo "make demo   train the digits network beside tuned SGD and Adam, write digits.html"
	@echo "make test   the test suite"
	@echo "make lint   ruff, and mypy --strict on the installed wheel"
	@echo "make rivals the default against tuned SGD, Adam, Muon and SOAP: six tasks, 15 minutes, nothing is kept"
	@echo "make paper-quick  small versions of the paper's tables and figures into build/paper, a quarter of an hour"
	@echo "make paper  all of them, hours; results are kept, start it again to go on"
	@echo "make site   the documentation as pages, in build/site"
	@echo "make package  wheel and sdist, built, installed and run with the packages at hand"
	@echo "make release  the same on every Python at hand and with the lowest versions; gigabytes, an hour"
	@echo "make bench  the benchmarks (minutes to hours; tables go to docs/)"

$(STAMP): pyproject.toml setup.py constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev,demo]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/digits.py

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

# Types are checked on the wheel as users get it: gtddp_compile.passes lies elsewhere in the source tree.
lint: $(STAMP)
	$(BIN)/ruff check . .ci/release
	$(BIN)/ruff format --check . .ci/release
	rm -rf $(VENV)/wheel build  # a wheel packs whatever an earlier one left in build/, deleted modules too
	$(BIN)/python -m build -q --wheel --no-isolation --outdir $(VENV)/wheel .
	$(BIN)/python -m pip install -q --no-deps --target $(VENV)/wheel/installed $(VENV)/wheel/*.whl
	cd $(VENV)/wheel && MYPYPATH=installed $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) -p gtddp_compile

# Strictly: a link or an anchor that leads nowhere fails.
site: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict -f .ci/site.yml

# What was tried is kept in benchmarks/release.json, and told by docs/install.md.
package release: $(STAMP)
	$(BIN)/python .ci/release $(if $(filter package,$@),--quick)

# coverage needs packages of its own: its docstring says which. nngeometry would install another torch without --no-deps.
SECTIONS := step_time
PAGES := compile_time alike gram_fidelity scaling ranks shards derivatives batch_norm_reading cooperation coupling robustness depth \
	first_steps floors lookahead schedules time_to_target summary
bench: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[rivals]"
	$(BIN)/python -m pip install -q --no-deps asdfghjkl==0.1a5 nngeometry==0.4
	for script in $(SECTIONS); do $(BIN)/python benchmarks/$$script.py --write || exit 1; done
	for script in $(PAGES); do $(BIN)/python benchmarks/$$script.py || exit 1; done

# The default against tuned rivals, a quarter of an hour on two cores; nothing is kept.
rivals: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[rivals]"
	$(BIN)/python benchmarks/time_to_target.py --quick

# The paper's tables and figures from runs of our own; more seeds, and data sets that need a download: examples/paper/run.py.
paper-quick paper: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[paper]"
	$(BIN)/python examples/paper/run.py $(if $(filter paper-quick,$@),--quick)

clean:
	rm -rf $(VENV) build *.egg-info digits.html
