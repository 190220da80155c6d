# make demo     convert the checkpoint that comes with molae, and show what it cost
# make test     the whole test suite
# Each makes .venv on first use and installs what it needs. Further targets: lint, check-c (asan and
# valgrind), package, bench, docs (the pages of docs/api), soak (docs/reliability.md; hours), clean.
#
# PYTHON=python3.12       the interpreter that .venv is made with
# JOBS=4                  processes that the tests run in
# TORCH_INDEX=URL         another package index to look for torch in besides the usual one, such as
#                         https://download.pytorch.org/whl/cpu

PYTHON ?= python3
JOBS ?= 2
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := hf,train,plot,test,notebooks
PIP := $(BIN)/python -m pip --disable-pip-version-check
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo test lint asan valgrind check-c package bench docs soak clean
.PHONY: python-asan python-ubsan python-tsan

demo: $(VENV)/installed
	$(BIN)/molae demo

# The installed package is tested, not the source tree: hence -P. A file's tests share what they set
# up, so that each file stays in one process.
test: $(VENV)/installed
	$(BIN)/python -P -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks

# SOAK='kills --kills 20 --seed 3' picks parts, sizes and a seed; results go to docs/reliability.md.
SOAK ?=

soak: $(VENV)/installed
	PYTHONPATH=tests $(BIN)/python -P -m soak $(SOAK) --write docs/reliability.md

# The extension under a sanitizer, through the Python tests of ops, fits and kernels.
python-asan python-ubsan python-tsan: python-%: $(VENV)/installed
	PYTHONPATH=tests $(BIN)/python -P -m soak sanitizers --only $*

docs: $(VENV)/installed
	$(BIN)/python -P docs/make_api.py
	$(BIN)/python -P docs/make_families.py

# ------------------------------------------------------------------ the environment

SOURCES := $(shell find csrc molae -name __pycache__ -prune -o -type f ! -name '*.so' -print)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "molae needs Python 3.11 or newer; say make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Dependencies on their own, so that a change in the sources reinstalls molae alone.
define REQUIREMENTS
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = [r for e in "$(EXTRAS)".split(",") for r in project["optional-dependencies"][e]]
print(*project["dependencies"], *extras, sep="\n")
endef
export REQUIREMENTS

$(VENV)/dependencies: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -c "$$REQUIREMENTS" > $(VENV)/requirements.txt
	$(PIP) install $(INDEX) -c constraints.txt -r $(VENV)/requirements.txt
	touch $@

$(VENV)/installed: $(SOURCES) pyproject.toml setup.py $(VENV)/dependencies
	rm -rf build/lib* build/bdist*
	$(PIP) install --no-deps --force-reinstall .
	touch $@

# ------------------------------------------------------------------ style and types

$(VENV)/lint: pyproject.toml constraints.txt $(VENV)/installed
	$(PIP) install -c constraints.txt 'ruff' 'mypy' 'clang-format' 'codespell'
	touch $@

C_FILES := $(wildcard csrc/*.h csrc/*/*.[ch] tests/c/*.[ch] tests/soak/*.c)

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)
	$(BIN)/codespell csrc molae tests docs benchmarks *.md
	$(BIN)/mypy
	$(BIN)/python -P -m mypy.stubtest molae._core

# ------------------------------------------------------------------ C tests under checkers

CC ?= cc
CWARN := -Wall -Wextra -Wshadow -Wconversion -Wstrict-prototypes -Werror
CBASE := -std=c11 -g -O1 -fno-omit-frame-pointer -ffp-contract=off -fno-trapping-math -fno-math-errno -DMLI_DEBUG $(CWARN)
BLAS_PIN := $(shell sed -n 's/^ *"\(scipy-openblas32==[0-9.]*\)".*/\1/p' pyproject.toml)
BLAS_LIB := build/openblas/scipy_openblas32/lib
BLAS_DEFS := -DMLI_BLAS_PREFIX=scipy_ -DMLI_BLAS_VENDORED=1
BLAS_LINK := -L$(BLAS_LIB) -lscipy_openblas -Wl,-rpath,$(abspath $(BLAS_LIB)) -lpthread -ldl -lm

C_SOURCES := $(sort $(wildcard csrc/base/*.c csrc/kern/*.c csrc/ops/*.c csrc/fit/*.c tests/c/*.c))
C_HEADERS := $(wildcard csrc/*.h csrc/*/*.h tests/c/*.h)

ifeq ($(shell uname -m),x86_64)
AVX2 := -mavx2 -mfma -mf16c
AVX512 := $(AVX2) -mavx512f -mavx512bw -mavx512vl -mavx512dq
build/%/csrc/kern/avx2.o: ISA := $(AVX2)
build/%/csrc/kern/avx2_rows.o: ISA := $(AVX2)
build/%/csrc/kern/avx2_stream.o: ISA := $(AVX2)
build/%/csrc/kern/avx512.o: ISA := $(AVX512)
build/%/csrc/kern/avx512_rows.o: ISA := $(AVX512)
build/%/csrc/kern/avx512_stream.o: ISA := $(AVX512)
build/%/csrc/kern/avx512_pack.o: ISA := $(AVX512)
build/%/csrc/kern/avx512bf16.o: ISA := $(AVX512) -mavx512bf16
build/%/csrc/kern/amx.o: ISA := $(AVX512) -mamx-tile -mamx-bf16
build/%/csrc/kern/amx_stream.o: ISA := $(AVX512) -mamx-tile -mamx-bf16
endif

SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all
build/asan/%.o: CEXTRA := $(SANITIZE)
# As the extension is built: valgrind's CPU has no AVX-512, so this also shows that nothing compiled
# for it runs there.
build/plain/%.o: CEXTRA := -O3

$(BLAS_LIB): pyproject.toml | $(VENV)/bin/python
	$(PIP) install --quiet --upgrade --target build/openblas $(BLAS_PIN)
	touch $@

define c_tests
build/$(1)/%.o: %.c $(C_HEADERS)
	@mkdir -p $$(@D)
	$(CC) $(CBASE) $$(CEXTRA) $$(ISA) $(BLAS_DEFS) -c $$< -o $$@

build/$(1)/check: $(C_SOURCES:%.c=build/$(1)/%.o) | $(BLAS_LIB)
	$(CC) $(2) $$^ $(BLAS_LINK) -o $$@
endef
$(eval $(call c_tests,asan,$(SANITIZE)))
$(eval $(call c_tests,plain,))

# AddressSanitizer and UndefinedBehaviorSanitizer together.
asan: build/asan/check
	OPENBLAS_NUM_THREADS=1 ASAN_OPTIONS=detect_stack_use_after_return=1 build/asan/check

valgrind: build/plain/check
	@command -v valgrind > /dev/null || { echo "sudo apt install valgrind"; exit 1; }
	OPENBLAS_NUM_THREADS=1 valgrind --quiet --error-exitcode=1 --leak-check=full \
	    --errors-for-leak-kinds=definite,indirect \
	    build/plain/check

check-c: asan valgrind

# ------------------------------------------------------------------ the package

# Source archive, wheel made from it, wheel in an environment of its own.
package: $(VENV)/dependencies
	rm -rf build/package build/lib* build/bdist*
	$(BIN)/python -P -m build --outdir build/package/dist .
	$(PYTHON) -m venv build/package/venv
	build/package/venv/bin/python -m pip --disable-pip-version-check install \
	    -c constraints.txt build/package/dist/*.whl
	cd build/package && venv/bin/python -c 'import molae; molae.show_config()'
	cd build/package && venv/bin/molae --version

clean:
	rm -rf build dist *.egg-info $(VENV) molae/.libs molae/*.so
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
