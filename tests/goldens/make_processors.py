"""Writes processors.npz: what transformers' logits processors keep of random logits."""

import pathlib

import numpy as np
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

logits = np.random.default_rng(0).normal(0, 3, (16, 50)).astype(np.float32)
one = {"top_k": TopKLogitsWarper(7), "top_p": TopPLogitsWarper(0.8), "min_p": MinPLogitsWarper(0.1)}
chain = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)]
arrays = {"logits": logits}
for name, steps in {**{name: [step] for name, step in one.items()}, "all": chain}.items():
    scores = torch.tensor(logits)
    for step in steps:
        scores = step(None, scores)
    arrays[name] = scores.numpy()
    arrays[f"{name}_probabilities"] = torch.softmax(scores, -1).numpy()
np.savez_compressed(pathlib.Path(__file__).parent / "processors.npz", **arrays)
