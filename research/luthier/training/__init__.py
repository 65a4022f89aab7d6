"""One sharded train step, the loop around it, and everything that makes a run durable.

The public pieces for a loop of your own: `split`, `init_variables`, `init_state`, `make_step`,
`jit_step` (docs/architecture.md shows one).
"""
