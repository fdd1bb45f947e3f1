# `make demo` and `make test` need no other set-up: they create .venv. PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: demo test check slow bench clean

demo:  ## train on images of handwritten digits with two processes
	@PYTHON=$(PYTHON) launch/setup_env.sh
	$(BIN)/torchrun --standalone --nproc_per_node=2 -m dtrain --arch allcnn_c --dataset digits --resume none

test:  ## run all tests but the slow ones
	@PYTHON=$(PYTHON) launch/setup_env.sh dev
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

check:  ## what must pass before a commit: lint, formatting, types and `make test`
	@PYTHON=$(PYTHON) launch/setup_env.sh dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	@$(MAKE) --no-print-directory test

slow:  ## run the slow tests (pytest exits with 5 if there are none)
	@PYTHON=$(PYTHON) launch/setup_env.sh dev
	$(BIN)/python -m pytest -m slow || test $$? -eq 5

bench:  ## measure the overhead of the trainer and of its image readers
	@PYTHON=$(PYTHON) launch/setup_env.sh dev
	$(BIN)/dtrain bench overhead && $(BIN)/dtrain bench loaders

clean:  ## remove .venv, build outputs and caches of tools; runs/ stays
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
