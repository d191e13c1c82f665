"""Each wing of the package imports only from those before it."""

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "speechbrain_ram"

#: A file or a folder each, in the order in which they may be imported.
WINGS = [
    "utils",
    "margins",
    "losses",
    "classifier",
    "resnet",
    "features",
    "data",
    "verification",
    "corpora",
    "training",
    "export",
    "inference",
    "cli",
]

#: In this repository, but no part of the package.
OUTSIDE = [
    "recipes",
    "research",
    "benchmarks",
    "tests",
    "examples",
    "train_speaker_embeddings",
    "verify_speakers",
]


def modules():
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            yield parts[0], file


def imports(file):
    """The wings that a file imports from, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            assert package not in OUTSIDE, f"{file} imports {name}"
            if package == "speechbrain_ram":
                yield rest.partition(".")[0]


@pytest.mark.parametrize(
    "wing, file", modules(), ids=lambda each: getattr(each, "stem", each)
)
def test_a_wing_imports_only_from_those_before_it(wing, file):
    assert wing in WINGS, f"give {wing} a place in {Path(__file__).name}"
    for other in set(imports(file)) & set(WINGS):
        assert WINGS.index(other) <= WINGS.index(wing), f"{file}: {other}"


def test_every_wing_is_there():
    assert {wing for wing, _ in modules()} == set(WINGS)


def test_the_public_names_are_cheap_to_import():
    """They load what they need when they are first asked for."""
    code = (
        "import sys, speechbrain_ram as ram; assert 'torch' not in sys.modules;"
        "print([getattr(ram, name).__module__ for name in ram.__all__[1:]])"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "speechbrain_ram.losses" in said.stdout
    assert "speechbrain_ram.inference" in said.stdout


@pytest.mark.parametrize(
    "module, heavy",
    [
        ("losses", "speechbrain, torchaudio, scipy, pandas, matplotlib"),
        ("resnet", "speechbrain, torchaudio, scipy, pandas, matplotlib"),
        ("verification.metrics", "torch, scipy, pandas, matplotlib"),
    ],
)
def test_losses_and_metrics_import_only_what_they_are_made_of(module, heavy):
    """The losses need PyTorch, the metrics NumPy, and nothing above them."""
    code = f"import sys, speechbrain_ram.{module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert f"speechbrain_ram.{module}" in loaded
    assert not set(heavy.split(", ")) & set(loaded)


def test_what_is_imported_is_declared():
    """Nothing is used only because another package happens to need it."""
    setup = (PACKAGE.parent / "setup.py").read_text(encoding="utf-8")
    lists = re.findall(
        r"EXTRAS = {.*?^}|install_requires=\[.*?\]", setup, re.S | re.M
    )
    names = re.findall(r'"([A-Za-z][\w.-]*)', "".join(lists).lower())
    declared = {re.sub("[-_.]+", "-", name) for name in names}
    providers = packages_distributions()
    for _, file in modules():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in {name.partition(".")[0] for name in names}:
                if name in sys.stdlib_module_names | {"speechbrain_ram"}:
                    continue
                found = [
                    re.sub("[-_.]+", "-", each.lower())
                    for each in providers.get(name, [name])
                ]
                assert declared.intersection(found), f"{file}: {name}"
