"""What is trainable, and how it enters the model."""

from luthier.tuners.tuner import Bound, Reparameterisation, Tuner, bind, merge, plain

__all__ = ["Bound", "Reparameterisation", "Tuner", "bind", "merge", "plain"]
