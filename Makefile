# Each target works on a bare Debian or Ubuntu with python3, python3-venv, g++ and make.
#   make demo       install, restore the photos in examples/, say where the results lie
#   make test       install with the tools for tests, run the tests (on one thread: they are small)
#   make native     rebuild the extension after a change in csrc/
#   make cpp-test   build and test the kernels without torch or Python (needs cmake); make asan: under sanitizers
#   make gpu-test   the tests that need a GPU, and make gpu-sanitize where compute-sanitizer is found
#   make bench      the benchmarks of a CPU, about an hour; make gpu-bench: those of a GPU, with REFERENCE=path beside the
#                   released program; both leave JSON in benchmarks/results/ and the table in benchmarks/README.md
#   make results    DATA=folder of test images (docs/evaluation.md): measures quality anew, writes docs/results.md;
#                   about four hours of one core; called again, it goes on where it was stopped
#   make lint  make wheel  make clean

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
OMP_NUM_THREADS ?= 2
PYTEST_ARGS ?=
SANITIZER ?= $(shell command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
export OMP_NUM_THREADS

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE_SOURCES := setup.py $(wildcard csrc/cpu/* csrc/torch/* csrc/cuda/* csrc/include/fastem/*)

.PHONY: demo test bench gpu-bench results native gpu-test gpu-sanitize cpp-test asan lint wheel clean
.DELETE_ON_ERROR:

demo: $(VENV)/.native
	$(BIN)/fastem deblur examples/*.jpg -o restored --kernel-size 41 --save image,kernel,sheet,json
	@echo
	@for photo in examples/*.jpg; do \
	  name=restored/$$(basename $$photo .jpg); \
	  echo "sharp picture  $$name.png"; \
	  echo "kernel         $$name.kernel.png"; \
	  echo "before, after  $$name.sheet.png"; \
	done

test: $(VENV)/.dev $(VENV)/.native
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PYTEST_ARGS)

gpu-test: $(VENV)/.dev $(VENV)/.native
	FASTEM_REQUIRE=native,cuda,triton $(BIN)/python -m pytest -q tests/test_cuda.py tests/test_cuda_runtime.py \
	  tests/test_triton.py $(PYTEST_ARGS)
	@if command -v $(SANITIZER) > /dev/null; then $(MAKE) gpu-sanitize; else echo "no $(SANITIZER): not run"; fi

# Small shapes only: a sanitizer slows kernels down by orders of magnitude. Without torch's pool every tensor has borders
# of its own; graphs cannot be recorded then.
gpu-sanitize: $(VENV)/.dev $(VENV)/.native
	for tool in memcheck initcheck synccheck; do \
	  FASTEM_SMALL=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool --error-exitcode 1 \
	    --kernel-regex kns=fastem $(BIN)/python -m pytest -q tests/test_cuda.py -k "not captured and not recorded" || exit 1; \
	done

# On one thread and in CPU seconds, which other programs on the machine hardly change.
CPU_JSON := benchmarks/results/cpu
bench: export OMP_NUM_THREADS = 1
bench: $(VENV)/.dev $(VENV)/.native
	$(BIN)/python -m pytest benchmarks -q --benchmark-only --benchmark-timer=time.process_time --device cpu \
	  --scale small --benchmark-json $(CPU_JSON)-groups.json
	$(BIN)/python benchmarks/bench_mstep.py --json $(CPU_JSON)-mstep.json
	$(BIN)/python benchmarks/bench_mstep.py --recentre --particles 1 16 --json $(CPU_JSON)-mstep-recentre.json
	$(BIN)/python benchmarks/bench_unet.py --threads 1 --cpu-time --json $(CPU_JSON)-unet.json
	$(BIN)/python benchmarks/bench_unet.py --net small-random --size 64 --threads 1 --cpu-time \
	  --json $(CPU_JSON)-unet-small.json
	$(BIN)/python benchmarks/bench_step.py --threads 1 --cpu-time --json $(CPU_JSON)-step.json
	$(BIN)/python benchmarks/scaling.py --device cpu --batch 1 2 4 --particles 1 4 --sizes 128 256 384 \
	  --json $(CPU_JSON)-scaling.json
	$(BIN)/fastem profile --device cpu --json $(CPU_JSON)-profile-native.json
	$(BIN)/fastem profile --device cpu --backend reference --json $(CPU_JSON)-profile-reference.json \
	  --compare $(CPU_JSON)-profile-native.json
	$(BIN)/python benchmarks/report.py

# Parts of protocols: the shard of public, images per source; those that are not named are run whole.
RESULTS ?= build/results
RESULTS_PUBLIC ?= 1/5
RESULTS_ROBUST ?= 8
RESULTS_TABLE1 ?= 8
RESULTS_FIG4 ?= 8
RESULTS_FIG1 ?= 8
RESULTS_FIG5 ?= 4
RESULTS_TABLE2 ?= 2
EVALUATE = $(BIN)/fastem evaluate $(1) --data "$(DATA)" -o $(RESULTS)/$(1)
results: $(VENV)/.dev $(VENV)/.native
	$(call EVALUATE,public) --shard $(RESULTS_PUBLIC) \
	  --methods "fastem,fastem, true kernel,l0 MAP,Wiener, true kernel"
	$(call EVALUATE,recorded)
	$(call EVALUATE,borders)
	$(call EVALUATE,robust) --limit $(RESULTS_ROBUST)
	$(call EVALUATE,table1) --limit $(RESULTS_TABLE1)
	$(call EVALUATE,pairs)
	$(call EVALUATE,real)
	$(call EVALUATE,noblur)
	$(call EVALUATE,fig4) --limit $(RESULTS_FIG4)
	$(call EVALUATE,fig1) --limit $(RESULTS_FIG1)
	$(call EVALUATE,fig5) --limit $(RESULTS_FIG5)
	$(call EVALUATE,table2) --limit $(RESULTS_TABLE2)
	$(BIN)/python benchmarks/results.py --data "$(DATA)" \
	  $(addprefix $(RESULTS)/,public recorded borders robust table1 pairs real noblur fig4 fig1 fig5 table2)

GPU_JSON := benchmarks/results/gpu
FFHQ := --prior ffhq-random --guidance pigdm --dtype float16 --channels-last --device cuda
gpu-bench: $(VENV)/.dev $(VENV)/.native
	$(BIN)/python -m pytest benchmarks -q --benchmark-only --device cuda --scale full \
	  --benchmark-json $(GPU_JSON)-groups.json
	$(BIN)/python benchmarks/bench_mstep.py --device cuda --recentre --json $(GPU_JSON)-mstep.json
	$(BIN)/python benchmarks/scaling.py --device cuda --net ffhq-random --guidance pigdm --dtype float16 \
	  --batch 1 4 16 64 --json $(GPU_JSON)-scaling.json
	$(BIN)/fastem profile $(FFHQ) --graphs --json $(GPU_JSON)-profile.json --trace $(GPU_JSON)-trace.json.gz
ifdef REFERENCE
	$(BIN)/python benchmarks/compare_reference.py "$(REFERENCE)" --device cuda --json $(GPU_JSON)-reference.json
endif
	$(BIN)/python benchmarks/report.py

native: $(VENV)/.torch
	rm -f $(VENV)/.native
	$(MAKE) $(VENV)/.native

cpp-test:
	cmake -S . -B build/cmake -DCMAKE_BUILD_TYPE=Release
	cmake --build build/cmake --parallel
	ctest --test-dir build/cmake --output-on-failure

asan:
	cmake -S . -B build/asan -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFASTEM_SANITIZE=ON -DFASTEM_CUDA=OFF
	cmake --build build/asan --parallel
	ctest --test-dir build/asan --output-on-failure

lint: $(VENV)/.dev
	$(BIN)/ruff check .

wheel: $(VENV)/.dev
	$(BIN)/python -m build --wheel --no-isolation
	@ls -l dist/*.whl

clean:
	rm -rf $(VENV) build dist *.egg-info fastem/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---------------------------------------------------------------- the virtual environment, one stamp per stage

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fastem needs Python 3.11 or later; choose one with make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "install python3-venv first: sudo apt install python3-venv"; exit 1; }
	touch $@

# PyPI's torch brings CUDA, several GB; where there is no GPU the CPU build is taken from its own index if it answers.
$(VENV)/.torch: $(VENV)/.venv
	if command -v nvidia-smi > /dev/null; then \
	  $(PIP) install "$(TORCH)"; \
	else \
	  $(PIP) install --index-url "$(TORCH_CPU_INDEX)" --retries 0 --timeout 5 "$(TORCH)" || $(PIP) install "$(TORCH)"; \
	fi
	$(PIP) install "setuptools>=77" wheel ninja pybind11
	touch $@

# Python code in place (editable); the extension is the next stage, because its build can then be incremental.
$(VENV)/.fastem: pyproject.toml $(VENV)/.torch
	FASTEM_NATIVE=0 $(PIP) install --no-build-isolation -e .
	touch $@

$(VENV)/.native: $(NATIVE_SOURCES) $(VENV)/.fastem
	$(BIN)/python setup.py build_ext --inplace
	touch $@

$(VENV)/.dev: $(VENV)/.fastem
	FASTEM_NATIVE=0 $(PIP) install --no-build-isolation -e ".[dev,tiff]"
	touch $@
