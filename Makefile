# Two commands set everything up on a fresh machine: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: demo test test-slow lint types docs bench gpu clean

# Reinstalled when the dependencies change.
$(INSTALLED): setup.py constraints.txt
	@echo "Installing into $(VENV): 5.5 GiB, most of it PyTorch for GPUs"
	@echo "(1.8 GiB without: docs/install.md). pip says nothing for minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

# Train RAM-ResNet34 on a synthetic corpus, verify, report, export.
demo: $(INSTALLED)
	@echo "Making voices and training 12 epochs on them, three minutes on two"
	@echo "cores; the first bar appears when Python has loaded PyTorch."
	$(BIN)/python train_speaker_embeddings.py hparams/ram_resnet34.yaml

# Two files at a time, each with one thread: twice as fast as one with two.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: $(INSTALLED)
	@echo "Three quarters of an hour on two cores; a line a test, some take minutes."
	@echo "The tests on real speech need SPEECHOCEAN762."
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or real" -vv -n 2 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/yamllint -s hparams recipes
	$(MAKE) types

# The public names: what py.typed promises.
types: $(INSTALLED)
	@echo "Checking types; mypy says nothing until it is done."
	$(BIN)/mypy

# The pages as a site, build/site. A broken link is an error.
PAGES = README.md CHANGELOG.md CITATION.cff CONTRIBUTING.md SECURITY.md
PAGES += docs hparams recipes research
$(VENV)/.docs: $(INSTALLED)
	@echo "Installing MkDocs into $(VENV); pip says nothing meanwhile."
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	touch $@

docs: $(VENV)/.docs
	rm -rf build/pages
	mkdir -p build/pages
	ln -s $(PAGES:%=$(CURDIR)/%) build/pages
	$(BIN)/python -m mkdocs build --strict

# What moved since the committed tables; fails nothing.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/compare.py

# The first day on a GPU: tests, tables, a training; at most 20 minutes.
gpu: $(INSTALLED)
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf $(VENV) results build .pytest_cache .ruff_cache .mypy_cache
	rm -rf .hypothesis
