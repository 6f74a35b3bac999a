# Every target works on a fresh clone: it makes .venv, installs the pinned requirements, builds the extension in place.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PICTURES := out
CPP := $(shell find csrc benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: build demo pictures test-fast test test-full published lint format bench gpu cuda-check cuda-link clean

# ninja decides what is out of date, so the build runs every time.
build: $(VENV)/.installed
	@$(BIN)/python setup.py -q build_ext --inplace

$(VENV)/.requirements: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements.txt
	@touch $@

# The package itself, editable, for its command and its metadata. Without the extension, which pip would compile in a
# folder of its own, only to throw its objects away: `build` makes it in place.
$(VENV)/.installed: $(VENV)/.requirements pyproject.toml setup.py
	VISATTN_NO_EXT=1 $(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

demo: build
	@mkdir -p $(PICTURES)
	$(BIN)/visattn attend --output $(PICTURES)/attend.png
	$(BIN)/visattn map --at 60,60 --at 120,230 --at 190,60 --output $(PICTURES)/map.png
	$(BIN)/visattn patterns --output $(PICTURES)/patterns.png
	@echo "Look at $(PICTURES)/attend.png, $(PICTURES)/map.png and $(PICTURES)/patterns.png"

# The pictures of the README: those of the demo, at half size in 256 colours.
pictures: demo
	@mkdir -p docs/pictures
	for name in attend map patterns; do $(BIN)/python -c "from PIL import Image; p = Image.open('$(PICTURES)/$$name.png').convert('RGB'); \
	  p.reduce(2).quantize(256).save('docs/pictures/$$name.png', optimize=True)"; done

# The tiers of the tests, each with what the one before has: tests/tiers.py says how they are chosen.
PYTEST = $(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: build
	VISATTN_TIER=fast $(PYTEST)

test: build
	$(PYTEST)

# Before a release. It takes hours, and goes on where it was interrupted.
test-full: build
	VISATTN_TIER=full $(PYTEST)
	$(BIN)/python -m benchmarks releases
	$(MAKE) published cuda-check cuda-link

# Equivalence with the modules of other libraries, which `make test` skips unless they are there.
published: build
	$(BIN)/python -m pip install -q -r requirements-published.txt -c requirements.txt
	$(BIN)/python -m pytest -n 2 tests/test_published.py tests/test_published_global.py tests/test_published_local.py tests/test_example_swap_in.py

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format -q .
	$(BIN)/clang-format -i $(CPP)

bench: build
	$(BIN)/python -m benchmarks run
	$(BIN)/python -m benchmarks products
	$(BIN)/python -m benchmarks table --update README.md --update docs/performance.md

# Every CUDA kernel by nvcc for four architectures, with budgets of registers; no GPU is needed. It takes long: 40 minutes
# on two cores.
cuda-check: build
	$(BIN)/python -m benchmarks cells
	$(BIN)/python -m benchmarks table --update docs/cuda.md

# A real build of the CUDA part, with a few kernels, against CUDA builds of torch: it compiles, links, imports. No GPU is
# needed. It installs these torches and an nvcc under build/torch: gigabytes.
cuda-link: build
	$(BIN)/python -m benchmarks releases --cuda --no-tests --release 2.11.0 --release 2.15.0
	$(BIN)/python -m benchmarks table --update docs/installing.md

# On a machine with an NVIDIA GPU, with that machine's own torch and Triton, and no network: nothing is installed. It takes
# less than ten minutes; what is left is done by the next call. The records are benchmarks/results/gpu.json and cuda.json,
# copied to the folder OUT if the environment names one. Options: make gpu GPU_OPTIONS="--tests 500 --benchmark 0".
gpu:
	@$(PYTHON) -c "import torch, setuptools, typer, rich, pytest, xdist" || { \
	  echo "make gpu needs torch, setuptools, typer, rich, pytest, pytest-xdist; name a Python that has them: make gpu PYTHON=..."; exit 1; }
	@$(PYTHON) -m benchmarks gpu $(GPU_OPTIONS)

clean:
	rm -rf build dist $(PICTURES) *.egg-info visattn_kernels/*.so
