"""How parameters move: optax by name."""
