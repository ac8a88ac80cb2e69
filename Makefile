# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LAB := $(VENV)/.lab
DEV := $(VENV)/.dev
# Half of the suite waits for processes that it starts: two workers, a file each at a time. Threads
# that wait sleep, for the workers share the cores.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/pytest --numprocesses 2 --dist loadfile

# An environment for each trainer whose pins do not go with those of the others.
PINS := tests/integrations/pins
PLUGINS := $(patsubst $(PINS)/%.txt,%,$(wildcard $(PINS)/*.txt))

.PHONY: demo test test-slow test-plugins lint docs kernels clean
.PRECIOUS: .venv-plugins/%/.ready

demo: $(LAB)
	$(BIN)/sinkgd compare --training.steps 220 --out runs/demo

# The first line takes two cores, too: mypy and the compiler of the loops have one thread each.
test: $(DEV)
	$(MAKE) --jobs 2 kernels lint docs
	$(PYTEST)

# What `make test` skips: whole trainings, killed and resumed, on several ranks, or compiled.
test-slow: $(DEV)
	$(PYTEST) -m slow

# `make test` skips these files, too. Here a file that skips fails, for pytest then ends with status 5.
test-plugins: $(PLUGINS:%=test-plugin-%)

test-plugin-%: .venv-plugins/%/.ready
	.venv-plugins/$*/bin/python -m pytest --timeout 1800 tests/integrations/test_$*.py

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The stamps keep a second `make` from reinstalling; a changed pin or dependency renews them.
$(LAB): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lab]'
	touch $@

$(DEV): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	touch $@ $(LAB)

# Compile the loops for the CPU, which takes a minute, or find them in the cache.
kernels: $(DEV)
	$(BIN)/python -c 'from sinkgd.kernels.cpu import launch; launch.compile_loops()'

# The pins name everything that a test imports: with the dependencies of some trainers, pip would
# replace torch.
.venv-plugins/%/.ready: $(PINS)/%.txt pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,trainers]' \
		pytest pytest-timeout triton
	$(@D)/bin/python -m pip install --quiet --no-deps --requirement $<
	touch $@

# Megatron asks for Python 3.12; what the test runs also works with 3.11.
.venv-plugins/megatron_core/.ready: export PIP_IGNORE_REQUIRES_PYTHON = 1

clean:
	rm -rf $(VENV) .venv-plugins build dist site runs
