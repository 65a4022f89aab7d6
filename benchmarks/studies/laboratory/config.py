"""Pretraining of the laboratory model, as any recipe: killed at any moment, the same command goes on.

    luthier train --config=benchmarks/studies/laboratory/config.py:DIR --workdir=DIR/run

DIR is what `laboratory.make` wrote. Targets are the answers and the words of the format, as `laboratory.episodes` marks
them.
"""

from luthier import config as c

STEPS, ROWS, LENGTH = 6600, 8, 256


def get_config(folder: str = "runs/laboratory"):
    return c.recipe(
        name="laboratory",
        model=c.model(f"{folder}/model", remat="none"),
        stages=(
            c.stage(
                name="pretrain",
                data=c.data(f"{folder}/episodes.parquet", format="tokens", train_on="assistant"),
                steps=STEPS,
                batch_size=ROWS,
                sequence_length=LENGTH,
                train=("params",),
                optimizer=c.spec("adamw", b2=0.98, weight_decay=0.05),
                schedule=c.spec("cosine", peak=1.5e-3, warmup=0.03, final=0.02),
            ),
        ),
        checkpoint=c.checkpoint(every=200),
        logging=c.logging(every=20, tensorboard=False),
    )
