"""Coverage-guided fuzzing of one reader, for hours; needs `atheris`.

python tests/fuzz_atheris.py manifest -runs=100000
"""

import sys
import tempfile
from pathlib import Path


def main():
    # Imported here: pytest imports every file for its doctests, and atheris
    # is not among what the tests install.
    import atheris

    with atheris.instrument_imports(include=["speechbrain_ram"]):
        import fuzz_encoders  # noqa: F401
        import fuzz_lists  # noqa: F401
        import fuzz_recordings  # noqa: F401
        from fuzz_targets import targets, try_input

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
