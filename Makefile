# Every target works on a fresh clone: it makes .venv, installs the pinned requirements, builds the extension in place.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := out
CPP := $(shell find csrc benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: build demo pictures test published lint format bench gpu clean

# ninja decides what is out of date, so the build runs every time.
build: $(VENV)/.installed
	@$(BIN)/python setup.py -q build_ext --inplace

$(VENV)/.requirements: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements.txt
	@touch $@

# The package itself, editable, for its command and its metadata.
$(VENV)/.installed: $(VENV)/.requirements pyproject.toml setup.py
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

demo: build
	@mkdir -p $(OUT)
	$(BIN)/visattn attend --output $(OUT)/attend.png
	$(BIN)/visattn map --at 60,60 --at 120,230 --at 190,60 --output $(OUT)/map.png
	$(BIN)/visattn patterns --output $(OUT)/patterns.png
	@echo "Look at $(OUT)/attend.png, $(OUT)/map.png and $(OUT)/patterns.png"

# The pictures of the README: those of the demo, at half size in 256 colours.
pictures: demo
	@mkdir -p docs/pictures
	for name in attend map patterns; do $(BIN)/python -c "from PIL import Image; p = Image.open('$(OUT)/$$name.png').convert('RGB'); \
	  p.reduce(2).quantize(256).save('docs/pictures/$$name.png', optimize=True)"; done

test: build
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Equivalence with the modules of other libraries, which `make test` skips unless they are there.
published: build
	$(BIN)/python -m pip install -q -r requirements-published.txt -c requirements.txt
	$(BIN)/python -m pytest -n 2 tests/test_published.py

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

# On a machine with an NVIDIA GPU, with that machine's own torch, and no network: nothing is installed. A run that was cut
# short goes on where it stopped. The record is benchmarks/results/cuda.json.
gpu:
	@$(PYTHON) -c "import torch, typer, rich" || \
	  { echo "make gpu needs torch, typer and rich; name a Python that has them: make gpu PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m benchmarks gpu --resume

clean:
	rm -rf build dist $(OUT) *.egg-info visattn_kernels/*.so
