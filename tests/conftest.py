"""What several test files share: a tiny corpus, a tiny trained run."""

import os
import random
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import speechbrain as sb
import torch
from speechbrain.utils.importutils import LazyModule

from speechbrain_ram.cli.train import train
from speechbrain_ram.corpora.synthetic import make_synthetic
from speechbrain_ram.verification import plots

REPOSITORY = Path(__file__).parent.parent
RECIPE = REPOSITORY / "hparams" / "ram_resnet34.yaml"


class Seeded:
    """Every test and doctest draws the same numbers in every run."""

    @pytest.hookimpl(tryfirst=True)  # before the fixtures of the test draw
    def pytest_runtest_setup(self):
        random.seed(1986)
        np.random.seed(1986)
        torch.manual_seed(1986)


def pytest_configure(config):
    """A hook of this file itself would not see the package's doctests."""
    config.pluginmanager.register(Seeded())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems():
    """Let hypothesis walk past SpeechBrain's lazy modules.

    Hypothesis asks every imported module for its ``__file__``; a lazy module
    of SpeechBrain answers by importing k2 and the like, which nobody has.
    """
    for module in list(sys.modules.values()):
        if isinstance(module, LazyModule):
            module.__file__ = None


def run_recipe(corpus, output_folder, /, *options, recipe=RECIPE, **overrides):
    """Train as the command line would, on a tiny corpus, in this process.

    `options` are SpeechBrain's, such as "--precision", "bf16"; `overrides`
    are keys of the YAML.
    """
    settings = {
        "data_root": str(corpus.train_root),
        "trials": str(corpus.trials),
        "trials_root": str(corpus.test_root),
        "output_folder": str(output_folder),
        "channels": [16, 16, 16, 16],
        "number_of_epochs": 2,
        "verify_every": 1,
        "batch_size": 8,
        "crop_seconds": 0.5,
        "num_workers": 0,
        "warmup_steps": 2,
    }
    if recipe == RECIPE:
        settings["make_corpus"] = None  # the corpus is there
    settings.update(overrides)
    arguments = [str(recipe), "--device", "cpu", "--noprogressbar", *options]
    hparams_file, run_opts, _ = sb.parse_arguments(arguments)
    # Half of a tiny run's time is spent on the output of `pip freeze` and on
    # figures, which test_recipes.py and test_report.py look at.
    with (
        mock.patch("speechbrain.utils.logger.get_environment_description", str),
        mock.patch.object(plots, "_save"),
    ):
        train(hparams_file, run_opts, settings)
    return Path(output_folder)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory):
    """Six speakers to train on, four to test, a second each."""
    return make_synthetic(
        tmp_path_factory.mktemp("corpus") / "tiny",
        n_speakers=6,
        n_utterances=5,
        n_test_speakers=4,
        n_test_utterances=4,
        min_seconds=0.8,
        max_seconds=1.2,
    )


@pytest.fixture(scope="session")
def tiny_run(tiny_corpus, tmp_path_factory):
    """The output folder of two epochs on the tiny corpus."""
    return run_recipe(tiny_corpus, tmp_path_factory.mktemp("run") / "ram")


@pytest.fixture(scope="session")
def speechocean():
    """The folder of real speech, or a loud skip."""
    folder = os.environ.get("SPEECHOCEAN762")
    if not folder:
        pytest.skip(
            "SPEECHOCEAN762 is not set: no real speech, this test did NOT run"
        )
    return Path(folder)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("no chromedriver: the page was NOT tried in a browser")
    options = webdriver.ChromeOptions()
    profile = tmp_path_factory.mktemp("profile")
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        "--window-size=960,1000",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver)
    browser = webdriver.Chrome(options, service)
    yield browser
    browser.quit()
