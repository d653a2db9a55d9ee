# Everything lives in .venv; delete it to start afresh.
PYTHON ?= python3
BIN := .venv/bin
TOY := toy

.PHONY: demo test long quick paper gpu clean

# a tiny world, MPO training on two processes, and a question to the trained model
demo: .venv/installed
	$(BIN)/python toy.py --out $(TOY) --demo --pairs 512
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=2 train.py --config $(TOY)/train.json
	$(BIN)/python generate.py --model_dir $(TOY)/run/model --image $(TOY)/images/new-00000.png \
	    --question "How many red objects are there? Answer the question using a single word or phrase." --max_new_tokens 40 --temperature 0
	@echo "above: the model's answer about a picture that it never saw, with one red object in it."
	@echo "Next: open docs/lecture.html, the way from a picture to one update;"
	@echo "      .venv/bin/python plain.py --model_dir $(TOY)/model --meta $(TOY)/meta.json, the whole paper in one file;"
	@echo "      make quick, the paper in miniature: SFT, DPO and MPO from one base, with a report."

# the paper in miniature on one seed: a base model, then SFT, DPO and MPO, and a report
quick: .venv/installed
	$(BIN)/python -m paper.story --quick --out $(TOY)

# the paper in miniature: every objective on three seeds, and a report
paper: .venv/installed
	$(BIN)/python -m paper.story --out $(TOY)

# on one GPU: is everything right there, and how fast; on a CPU the same at toy size
gpu: .venv/installed
	$(BIN)/python tools/gpu_check.py --out gpu

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# the tests that take more than 20 seconds each: the long commands of the README
long: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m long

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make PYTHON=python3.11, or a later one: $(PYTHON) is older")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

clean:
	rm -rf .venv $(TOY)
