# Two commands do everything on a fresh machine with python3 (3.11 to 3.13):
#   make quickstart   prepare the default data, train a small MoE embedder, search with it
#   make test         lint, format check and the whole test suite
# and  make docs        the documentation and the API reference, as HTML in build/docs
# Another Python: make PYTHON=python3.12 quickstart
# Without PyTorch (on Linux its wheel brings CUDA, several GB): make test TEST_EXTRAS=test; the tests
# that compare with PyTorch are then skipped.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
CONSTRAINTS := constraints/python$(VERSION).txt
PIP := $(RUN) -m pip install --quiet --quiet --disable-pip-version-check
TEST_EXTRAS ?= test,pytorch,onnx,openvino,plan,beam,mteb,docs
# Test files in three processes, because they wait for children and disks a seventh of the time; each
# needs up to 4 GB: make test PYTEST_FLAGS= for one.
PYTEST_FLAGS ?= -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart=0
export JAX_PLATFORMS ?= cpu
# Python keeps its bytecode: without it each process compiles jax and orbax again, for seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-frameworks test-gpu-plans mutations campaign docs clean

quickstart: $(VENV)/base-$(VERSION)
	$(RUN) launch/train.py --config=configs/quickstart.py --workdir=runs/quickstart

test: $(VENV)/test-$(VERSION)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest $(PYTEST_FLAGS)

# The tests that import PyTorch or TensorFlow: continuous integration runs them on a second Python.
test-frameworks: $(VENV)/test-$(VERSION)
	$(RUN) -m pytest $(PYTEST_FLAGS) -m frameworks

# The tests that compile for GPUs. Their compiler is in a folder of its own, not in the environment:
# jax would load it in every process, a second each, and it writes lines to stderr.
test-gpu-plans: $(VENV)/gpu-$(VERSION)
	$(RUN) -m pytest -m gpu_aot tests/planning

# Do the tests notice single faults? About half an hour.
mutations: $(VENV)/test-$(VERSION)
	$(RUN) tests/mutations/check.py

# Is anything silent, lost or a stack trace? Kills, full disks, damage, races and fuzzing for a time:
# make campaign MINUTES=60 SEED=0
MINUTES ?= 60
SEED ?= 0
campaign: $(VENV)/test-$(VERSION)
	$(RUN) tests/campaign/check.py --minutes=$(MINUTES) --seed=$(SEED)

docs: $(VENV)/docs-$(VERSION)
	$(RUN) -m sphinx -W --keep-going --quiet -b html docs build/docs
	@echo "build/docs/index.html"

# An environment without packages. uv fills it in a quarter of pip's time. uv does not read pip's
# settings (an index or a certificate of your own): where it fails, pip does the work.
$(VENV)/empty-$(VERSION): setup.cfg pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -m venv --help > /dev/null || (echo "error: $(PYTHON) has no venv module (Debian: apt install python3-venv)"; exit 2)
	$(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV): one to three minutes"
	@$(PIP) uv || true
	@touch $@

# $(call install,EXTRAS): this project, and the packages of its extras, in the releases of constraints/.
install = $(RUN) -m uv pip install --quiet --python $(RUN) --constraint $(CONSTRAINTS) --editable .$(1) \
	|| $(PIP) --constraint $(CONSTRAINTS) --editable .$(1)

$(VENV)/base-$(VERSION): $(VENV)/empty-$(VERSION)
	$(call install,)
	@touch $@

$(VENV)/test-$(VERSION): $(VENV)/empty-$(VERSION)
	$(call install,[$(TEST_EXTRAS)])
	@touch $(VENV)/base-$(VERSION) $@

# In the releases of constraints/, and without what they depend on: a GPU's libraries.
GPU_COMPILER := jax-cuda12-pjrt jax-cuda12-plugin nvidia-cuda-nvcc-cu12
$(VENV)/gpu-$(VERSION): $(VENV)/test-$(VERSION)
	$(RUN) -m uv pip install --quiet --python $(RUN) --target $(VENV)/plan-gpu --no-deps --constraint $(CONSTRAINTS) $(GPU_COMPILER) \
		|| $(PIP) --target $(VENV)/plan-gpu --no-deps --constraint $(CONSTRAINTS) $(GPU_COMPILER)
	@touch $@

$(VENV)/docs-$(VERSION): $(VENV)/empty-$(VERSION)
	$(call install,[docs])
	@touch $(VENV)/base-$(VERSION) $@

$(CONSTRAINTS):
	@echo "error: $(PYTHON) is Python $(VERSION); supported are 3.11, 3.12 and 3.13: make PYTHON=python3.11 ..."; exit 2

clean:
	rm -rf $(VENV) runs build *.egg-info
