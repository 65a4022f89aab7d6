"""The laboratory model: a small decoder that learns in context, and everything that it was made of.

PYTHONPATH=benchmarks/studies python -m laboratory.make runs/laboratory
luthier train --config=benchmarks/studies/laboratory/config.py --workdir=runs/laboratory/run
PYTHONPATH=benchmarks/studies python -m laboratory.gate runs/laboratory/run/final
"""
