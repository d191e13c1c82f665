"""Coverage-guided fuzzing of one reader, for hours; needs `atheris`.

python tests/fuzz_atheris.py manifest -runs=100000
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["speechbrain_ram"]):
    from fuzz_targets import targets, try_input


def main():
    with tempfile.TemporaryDirectory() as folder:
        target = targets(Path(folder))[sys.argv.pop(1)]
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        (corpus / "good").write_bytes(target.good)
        atheris.Setup(
            [*sys.argv, str(corpus)], lambda data: try_input(target, data)
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
