#!/usr/bin/env bash
# Every objective with every tuner on 8 simulated devices; 15 minutes on two cores. Writes tests/matrix.json.
#
#   bash tests/run.sh && bash tests/matrix.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_backend_optimization_level=0
exec "../${LUTHIER_TEST_VENV:-.venv-tests}/bin/python" matrix.py
