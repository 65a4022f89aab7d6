"""Writes docs/methods.md from the records of `luthier.methods`:  python docs/make_methods.py"""

import pathlib

from luthier import config
from luthier.methods import METHODS

PAGE = pathlib.Path(__file__).with_name("methods.md")
TITLES = {
    "objective": "Objectives: what is minimised",
    "transform": "Transforms: what is done to a batch before the loss",
    "tuner": "Tuners: what is trainable",
    "mask": "Masks: which weights move",
    "optimizer": "Optimizers: how it moves",
    "schedule": "Schedules: how fast",
    "evaluation": "Evaluations: what is measured",
}
HEAD = """# Methods

Everything a recipe can name, from `luthier.methods` (this page is made by `docs/make_methods.py`).
`spec("name", option=value)` chooses one; the options are the keyword arguments of its function, whose docstring has
the equation and the source. The oracle is the test that holds it against something its author did not write. Ids are
those of the ledger of systems.
"""


COLUMNS = "| name | what | options | source | oracle | config |\n|---|---|---|---|---|---|\n"


def link(path: str) -> str:
    return f"[{path.rpartition('/')[2]}](../{path})" if path != "-" else "–"


def page() -> str:
    parts = [HEAD]
    for place, title in TITLES.items():
        parts.append(f"\n## {title}\n\n{COLUMNS}")
        for method in METHODS:
            if method.place == place:
                options = ", ".join(f"`{name}`" for name in config.options_of(method.target))
                source = " · ".join(word for word in (method.id, method.paper) if word != "-") or "–"
                cells = [f"`{method.name}`", method.summary, options, source, link(method.oracle), link(method.config)]
                parts.append(f"| {' | '.join(cells)} |\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
