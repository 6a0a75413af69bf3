# Each target alone, on a machine with Python and make, creates .venv, installs and runs.
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.installed

.PHONY: quickstart test check bench evidence docs clean

$(STAMP): pyproject.toml constraints.txt
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@echo "installing into .venv (some minutes the first time)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

quickstart: $(STAMP)
	@.venv/bin/tunesmith quickstart

test: $(STAMP)
	$(PY) -m ruff check src tests examples benchmarks evidence
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

check: $(STAMP)
	$(PY) -m ruff check src tests examples benchmarks evidence
	$(PY) -m pyright

# PART=sft_lora for one part; without it, all of them. PEERS="litgpt llamafactory" installs these too. DEVICE=cuda: on a
# GPU. ROUNDS=5: turns of each.
bench: $(STAMP)
	$(PY) benchmarks/run.py $(addprefix --part ,$(PART)) $(addprefix --peers ,$(PEERS)) $(addprefix --device ,$(DEVICE)) \
		$(addprefix --rounds ,$(ROUNDS))

evidence: $(STAMP)
	$(PY) evidence/run.py

# Writes the generated pages, then runs every command, script and recipe that the pages show.
docs: $(STAMP)
	$(PY) docs/make_reference.py
	OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/docs

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
