"""Flax linen models built from a Hugging Face config; nothing here knows a tuner or a loss."""

from luthier.models.cache import KVCache, init_cache
from luthier.models.config import FAMILIES, ModelConfig
from luthier.models.transformer import Transformer

__all__ = ["FAMILIES", "KVCache", "ModelConfig", "Transformer", "init_cache"]
