# Two commands: `make sweep` runs a sweep, `make test` runs the tests. Both set up what they need beside this file.
PYTHON ?= python3
GRID ?= demo
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help sweep test check golden chaos clean

help:
	@echo "make sweep   train the demo grid on this machine and report (GRID=... for another; ARGS=... for options)"
	@echo "make test    run the tests"
	@echo "make check   lint, format and types"
	@echo "make golden  write the losses that training is held to, after SCIENCE_VERSION was raised"
	@echo "make chaos   cause every fault, kill a hundred processes, and show that nothing changed (ARGS=--short for less)"
	@echo "make clean   remove the virtual environment (results in runs/ stay)"

sweep: $(VENV)/.ready
	@$(BIN)/python orchestration/sweep.py --grid $(GRID) $(ARGS)

# File by file, so that what a file starts for its tests is started once; then what starts Ray or a browser.
test: $(VENV)/.ready-dev
ifeq ($(ARGS),)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile -m "not ray and not browser" --durations 10
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "ray or browser" --durations 20
else
	@$(BIN)/python -m pytest $(ARGS)
endif

check: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

golden: $(VENV)/.ready-dev
	@$(BIN)/python -m pytest tests/helix/training/test_golden.py --rewrite-golden

chaos: $(VENV)/.ready-dev
	@$(BIN)/python -m orchestration.chaos $(ARGS)

clean:
	rm -rf $(VENV)

# A stamp is made only after its install succeeded, so an interrupted install is done again.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; make PYTHON=python3.11 names one")'
	@echo "setting up $(VENV), once; this takes a few minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# What tests compare us with. The libraries that torchaudio brings want CUDA; its mel spectrogram needs none of them.
$(VENV)/.ready-peers: $(VENV)/.ready-dev
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[peers]'
	@$(BIN)/python -c 'import torchaudio' 2>/dev/null || \
		{ rm -f $(VENV)/lib/python*/site-packages/torchaudio/lib/*.so && $(BIN)/python -c 'import torchaudio'; }
	@touch $@
