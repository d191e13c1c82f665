"""Packaging of speechbrain-ram."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = "0.1.0"  # the package reads it back from its own metadata

EXTRAS = {
    "report": ["matplotlib"],
    "tensorboard": ["tensorboard"],
    "m4a": ["av"],  # VoxCeleb2 as it is downloaded, and the sound of videos
    "onnx": ["onnx", "onnxruntime", "onnxscript"],
    "demo": ["starlette", "uvicorn", "python-multipart"],
    "map": ["scikit-learn", "matplotlib"],
}

# The recipes lie beside the package here and inside it in a wheel, so that
# what they include is found in both: hparams/encoder.yaml.
RECIPES = {
    "speechbrain_ram.hparams": "hparams",
    **{
        ".".join(["speechbrain_ram", *path.parts]): path.as_posix()
        for folder in sorted((HERE / "recipes").iterdir())
        for path in [folder.relative_to(HERE)]
        if (folder / "hparams").is_dir()
    },
}

setup(
    version=VERSION,
    license="Apache-2.0",
    packages=[
        *find_packages(include=["speechbrain_ram", "speechbrain_ram.*"]),
        *RECIPES,
    ],
    package_dir=RECIPES,
    package_data={
        "speechbrain_ram": ["py.typed", "*/*.html", "*/*.md"],
        "speechbrain_ram.hparams": ["*.yaml"],
        **{
            name: ["*.md", "*.tsv", "*.txt", "hparams/*.yaml"]
            for name in RECIPES
            if name != "speechbrain_ram.hparams"
        },
    },
    entry_points={
        "console_scripts": ["speechbrain-ram = speechbrain_ram.cli.main:main"]
    },
    # Ranges that were tried. A torch newer than torchaudio's last release
    # brings another CUDA and fails at import; constraints.txt pins one set.
    install_requires=[
        "speechbrain>=1.1,<2",
        "torch>=2.7.1,<2.15",
        "torchaudio>=2.7.1,<2.12",
        "hyperpyyaml>=1.2.2",
        "ruamel.yaml<0.19",  # hyperpyyaml does not load with 0.19
        "numpy",
        "pandas",
        "scipy",
        "click",
        "soundfile>=0.12.1",
        "safetensors",
        "filelock",
        "tqdm",
    ],
    extras_require={
        **EXTRAS,
        "dev": [
            *sorted({name for names in EXTRAS.values() for name in names}),
            "faiss-cpu",
            "hypothesis",
            "kaldi-native-fbank",
            "mypy",
            "pytest",
            "pytest-xdist",
            "ruff",
            "selenium",
            "setuptools>=70.1",  # which builds wheels by itself
            "sherpa-onnx",
            "webdataset",
            "yamllint",
        ],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
    },
)
