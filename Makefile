# Two commands do all the set-up: `make demo` and `make test`. PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: demo test check slow bench clean

demo:  ## train on real handwritten digits with two processes
	@PYTHON=$(PYTHON) launch/setup_env.sh
	$(BIN)/torchrun --standalone --nproc_per_node=2 -m dtrain --arch allcnn_c --dataset digits --resume none

test:  ## everything but the slow suites
	@PYTHON=$(PYTHON) launch/setup_env.sh dev
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

check:  ## what has to hold before a commit
	@PYTHON=$(PYTHON) launch/setup_env.sh dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	@$(MAKE) --no-print-directory test

slow:  ## the slow suites; pytest's 5 means that there are none
	@PYTHON=$(PYTHON) launch/setup_env.sh dev
	$(BIN)/python -m pytest -m slow || test $$? -eq 5

bench:  ## the trainer and its readers against their bare loops, in full
	@PYTHON=$(PYTHON) launch/setup_env.sh dev
	$(BIN)/dtrain bench overhead && $(BIN)/dtrain bench loaders

clean:  ## the environment and what tools leave; never runs/
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
