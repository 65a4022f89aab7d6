"""Makes `trl_losses.npz`: TRL's losses on random logits, with torch's gradients.

Run with the extra `parity`:  python tests/goldens/make_trl_losses.py

`gkd/BETA/TEMPERATURE/{loss,gradient}`: `GKDTrainer.generalized_jsd_loss` a target token and its gradient in the
student's logits.
"""

import pathlib

import numpy as np
import torch
from trl.experimental.gkd import GKDTrainer

HERE = pathlib.Path(__file__).parent
TOKENS, VOCABULARY = 12, 9

if __name__ == "__main__":
    rng = np.random.default_rng(11)
    student, teacher = (2 * rng.standard_normal((TOKENS, VOCABULARY)).astype(np.float32) for _ in range(2))
    saved = {"student": student, "teacher": teacher}
    for beta, temperature in [(0.0, 1.0), (0.3, 1.0), (0.5, 2.0), (1.0, 0.9)]:
        logits = torch.tensor(student, requires_grad=True)
        loss = GKDTrainer.generalized_jsd_loss(
            logits[None], torch.tensor(teacher)[None], beta=beta, temperature=temperature, reduction="none"
        ).sum(-1)
        loss.sum().backward()
        saved[f"gkd/{beta}/{temperature}/loss"] = loss[0].detach().numpy()
        saved[f"gkd/{beta}/{temperature}/gradient"] = logits.grad.numpy()
    np.savez_compressed(HERE / "trl_losses.npz", **saved)
