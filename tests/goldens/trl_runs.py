"""What the scripts that run TRL's trainers share."""

import numpy as np

# One process on CPU in float32, records in order, every step logged, nothing written.
ARGUMENTS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "optim": "adamw_torch",
    "warmup_steps": 0,
    "train_sampling_strategy": "sequential",
}


def weights(model) -> dict[str, np.ndarray]:
    """Of every weight a slice and the norm."""
    arrays = {}
    for name, weight in model.named_parameters():
        flat = weight.detach().numpy().ravel()
        arrays[f"slice/{name}"] = flat[:: max(1, flat.size // 64)][:64]
        arrays[f"norm/{name}"] = np.linalg.norm(flat.astype(np.float64))
    return arrays
