#!/usr/bin/env bash
# Lint, types and all tests, in an environment of their own (.venv-test) made from the requirement files. No network in tests.
# Further arguments go to pytest: bash script/test.sh tests/test_loss.py -k golden
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=.venv-test

source script/environment.sh
make_environment "$VENV" requirements-test.txt

ruff check .
ruff format --check .
mypy
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile "$@"
