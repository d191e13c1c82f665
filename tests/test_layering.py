"""A file imports only from the floors below its own."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "speechbrain_ram"

# The rooms of the house, bottom up. A new file must be given a floor here.
FLOORS = [
    # How files are written.
    "atomic names",
    # Alone: formulas, formats, readers.
    "architecture audio calibration corpora.transcode "
    "diagnostics embedding_store enrolment "
    "features fused_torch losses memory metrics pooling schedules "
    "score_norm similarity_map trials "
    "joint_batches processes random_state stopping "
    "settings sync_batch_norm threads user_errors",
    # On one of those each.
    "advice bootstrap checkpoints corpora.headers decision embeddings "
    "fused metadata packed plots resnet "
    "scoring tally video",
    "corpora.manifest fast_audio faults folding model_card recordings report",
    # What stands on manifests, and what writes a folder.
    "corpora.find corpora.guards corpora.join corpora.split corpora.synthetic "
    "encoder_folder robust_brain",
    "augmentation corpora.convert corpora.folder corpora.shards corpora.sitw "
    "dataset loading pretrained "
    "training.run training.settings",
    # The SpeechBrain runtime, and the corpora of the paper.
    "brain corpora.cnceleb corpora.own corpora.voxceleb inference onnx_export",
    # What people type.
    "cli_common demo",
    "cli",
]
FLOOR_OF = {
    name: floor for floor, names in enumerate(FLOORS) for name in names.split()
}


def modules():
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.name != "__init__.py":
            name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
            yield name, file


def imports(file):
    """Names within the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names = [node.module] + [
                f"{node.module}.{alias.name}" for alias in node.names
            ]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            assert package not in ("recipes", "benchmarks", "tests")
            assert package not in ("train_speaker_embeddings",)
            if package == "speechbrain_ram" and rest in FLOOR_OF:
                yield rest


@pytest.mark.parametrize("name, file", modules())
def test_a_file_imports_only_from_below(name, file):
    assert name in FLOOR_OF, f"give {name} a floor in {Path(__file__).name}"
    for other in set(imports(file)):
        assert FLOOR_OF[other] < FLOOR_OF[name], (
            f"{name} (floor {FLOOR_OF[name]}) imports {other} "
            f"(floor {FLOOR_OF[other]})"
        )


def test_every_room_is_there():
    found = {name for name, _ in modules()}
    assert set(FLOOR_OF) <= found, set(FLOOR_OF) - found
