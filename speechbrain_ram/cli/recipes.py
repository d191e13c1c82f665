"""The training recipes by their short names, in a clone and in a wheel.

A name is the recipe's folder in lower case, with what its file is called
beyond ``ram_resnet34``: ``recipes/VoxCeleb/hparams/ram_resnet34_strong.yaml``
is ``voxceleb-strong``.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

#: Of the folders whose names say less than these.
_NAMES = {"yourcorpus": "own"}
_FILE = "ram_resnet34"


def home() -> Path:
    """The folder of ``hparams/`` and ``recipes/``, in a wheel or beside it."""
    package = Path(str(files("speechbrain_ram")))
    return package if (package / "recipes").is_dir() else package.parent


def recipes() -> dict[str, Path]:
    """Name -> YAML of every recipe, the simplest one first."""
    found = {"synthetic": home() / "hparams" / f"{_FILE}.yaml"}
    for path in sorted(home().glob(f"recipes/*/hparams/{_FILE}*.yaml")):
        folder = path.parent.parent.name.lower()
        kind = path.stem.removeprefix(_FILE).replace("_", "-")
        found[_NAMES.get(folder, folder) + kind] = path
    return found


def about(path: Path) -> str:
    """A recipe's first comment, up to a full stop or a colon."""
    comment = re.match(r"(#.*\n)*", path.read_text(encoding="utf-8"))[0]
    text = " ".join(line.strip("# ") for line in comment.splitlines())
    return re.split(r"[.:]\s", text)[0]


def recipe_file(name: str) -> str:
    """The YAML file that is meant by its path or by a recipe's name."""
    if name.endswith((".yaml", ".yml")) or Path(name).is_file():
        return name
    known = recipes()
    if name not in known:
        raise ValueError(
            f"'{name}' is neither a YAML file nor a recipe. The recipes are "
            f"{', '.join(known)}."
        )
    return str(known[name])
