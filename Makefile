# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LAB := $(VENV)/.lab
DEV := $(VENV)/.dev
# Half of the suite waits for processes that it starts: two workers, a file each at a time. Threads
# that wait sleep, for the workers share the cores.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/pytest --numprocesses 2 --dist loadfile

.PHONY: demo test test-slow lint docs kernels clean

demo: $(LAB)
	$(BIN)/sinkgd compare --training.steps 220 --out runs/demo

# The first line takes two cores, too: mypy and the compiler of the loops have one thread each.
test: $(DEV)
	$(MAKE) --jobs 2 kernels lint docs
	$(PYTEST)

# What `make test` skips: whole trainings, killed and resumed, on several ranks, or compiled.
test-slow: $(DEV)
	$(PYTEST) -m slow

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

clean:
	rm -rf $(VENV) build dist site runs
