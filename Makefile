# `make train` and `make test` work on a machine with Python 3.11+ and make: everything else is installed here.
PYTHON ?= python3
# `make test TORCH=2.11` runs the suite on another release of torch, in an environment of its own.
TORCH  ?=
VENV   ?= .venv$(if $(TORCH),-torch-$(TORCH))
PIP    := install --quiet --disable-pip-version-check
PINNED := $(if $(TORCH),"torch==$(TORCH).*" -c $(VENV)/constraints.txt,-c constraints.txt)
BIN    := $(VENV)/bin
GPUS   := $(shell nvidia-smi -L 2>/dev/null | wc -l)
RANKS  ?= $(if $(filter-out 0,$(GPUS)),$(GPUS),2)
OUT    ?= outputs/starter
# Settings of the three runs of `make train`, e.g. `make train OVERRIDES='tracking.wandb=disabled seed=1'`.
OVERRIDES ?=
# Test files that `make test` runs side by side.
WORKERS ?= 2

.PHONY: install train test test-slow test-commands test-slurm test-vllm test-llamacpp test-gpu docs lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	grep -v -E '^(torch|triton)==' constraints.txt >$(VENV)/constraints.txt
	$(BIN)/python -m pip $(PIP) -e '.[test]' $(PINNED)
	touch $@

train: install
	test -e $(OUT)/pair/COMPLETE || $(BIN)/python -m joint_train.starter $(OUT)/pair
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --standalone --nproc-per-node $(RANKS) -m joint_train \
		+experiment=starter pair=$(OUT)/pair output_dir=$(OUT)/run $(OVERRIDES)
	test -e $(OUT)/code/val.jsonl || $(BIN)/python -m benchmarks.shift $(OUT) data
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --standalone --nproc-per-node $(RANKS) -m joint_train \
		+experiment=starter_shift pair=$(OUT)/run/export drafter.base_grad_scale=0 output_dir=$(OUT)/detached $(OVERRIDES)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --standalone --nproc-per-node $(RANKS) -m joint_train \
		+experiment=starter_shift pair=$(OUT)/run/export output_dir=$(OUT)/shifted $(OVERRIDES)
	$(BIN)/python -m benchmarks.shift $(OUT) report

# The linters read the code as it is with the pinned torch. Files run in the order of their folders, of which the last have
# short ones: in xdist's own order, by their number of tests, a file with few and long ones comes last and alone.
test: install $(if $(TORCH),,lint)
	$(BIN)/python -m pytest --durations=20 -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: install
	$(BIN)/python -m pytest -m slow

# Every command of the documentation; a part of test-slow.
test-commands: install
	$(BIN)/python -m pytest -m slow -s tests/project/test_commands_run.py

test-slurm: install
	tests/slurm/run.sh

test-vllm: install
	tests/vllm/run.sh

test-llamacpp: install
	tests/llamacpp/run.sh

# Installs nothing: `make test-gpu BIN=/folder/of/a/python/with/torch` takes another Python than this project's.
test-gpu:
	PYTHON=$(or $(wildcard $(BIN)/python),$(PYTHON)) tests/gpu/run.sh

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo made: build/docs/index.html

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-vllm .venv-llamacpp .venv-torch-* build *.egg-info
