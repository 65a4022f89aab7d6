"""What is trainable, and how it enters the model."""

from luthier.tuners.tuner import Bound, Tuner, bind, merge

__all__ = ["Bound", "Tuner", "bind", "merge"]
