"""What the options of a training may be, and what is said of the others."""

import re
import shutil

import pytest
import ruamel.yaml
import speechbrain as sb
from conftest import REPOSITORY
from hyperpyyaml import load_hyperpyyaml
from test_hparams import FILES, IDS, TRAINING, placeholders

from speechbrain_ram.training.options import RULES, _Plain, check_settings

SYNTHETIC = REPOSITORY / "hparams" / "ram_resnet34.yaml"


def check(command_line, file=SYNTHETIC):
    """As the training script does."""
    arguments = [str(file), *command_line.split()]
    hparams_file, run_opts, overrides = sb.parse_arguments(arguments)
    check_settings(hparams_file, overrides, run_opts)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--lr 0,1", "--lr is '0,1'; a number above 0 is needed. Decimals"),
        ("--lr 0", "--lr is 0; a number above 0 is needed."),
        ("--lr -0.1", "--lr is -0.1; a number above 0"),
        ("--lr .nan", "--lr is nan; a number above 0"),
        ("--lr True", "--lr is True; a number above 0"),
        ("--lr", "--lr has no value; a number above 0"),
        ("--margin 4", "--margin is 4; a number from 0 to 3.142"),
        ("--lr_decay foo", "--lr_decay is 'foo'; one of step, exponential, co"),
        ("--form max", "--form is 'max'; one of paper, released, hinge is ne"),
        ("--objective arcface", "--objective is 'arcface'; one of softmax, "),
        ("--objective real-ram", "--objective is 'real-ram'; one of softmax"),
        ("--objective 3", "--objective is 3; one of softmax"),
        ("--sub_centers 0", "--sub_centers is 0; a whole number, 1 or more"),
        ("--scale ten", "--scale is 'ten'; a number above 0"),
        ("--channels 16,16,32,64", "--channels is '16,16,32,64'; a list of 4"),
        ("--channels [16,16,32]", "--channels is [16, 16, 32]; a list of 4"),
        ("--channels [1,1,1,0.5]", "--channels is [1, 1, 1, 0.5]; a list of"),
        ("--speeds 0.9", "--speeds is 0.9; a list of 1 or more numbers"),
        ("--speeds []", "--speeds is []; a list of 1 or more numbers"),
        ("--synthetic [room,cave]", "--synthetic is ['room', 'cave']; a list"),
        ("--synthetic room", "--synthetic is 'room'; a list of any of room,"),
        ("--batch_size 0", "--batch_size is 0; a whole number, 1 or more,"),
        ("--number_of_epochs 1.5", "--number_of_epochs is 1.5; a whole"),
        (
            "--frozen_epochs 9 --number_of_epochs 9",
            "--frozen_epochs is 9 and --number_of_epochs 9: the encoder would",
        ),
        ("--seed -1", "--seed is -1; a whole number from 0 to 4294967295"),
        ("--max_fault_share 5", "--max_fault_share is 5; a number from 0 to 1"),
        ("--resample", "--resample has no value; True or False is needed."),
        ("--mixdown no", "--mixdown is 'no'; True or False is needed."),
        ("--max_grad_norm -1", "--max_grad_norm is -1.0; a number above 0 is"),
        ("--max_grad_norm 0", "--max_grad_norm is 0.0; a number above 0 is"),
        ("--max_hours " + 400 * "9", f"{400 * '9'}; a number, 0 or more, is"),
        ("--num_workers " + 400 * "9", f"{400 * '9'}; a whole number, 0 or"),
        ("--output_folder 26", "--output_folder is 26; a path (./7, not 7)"),
        ("--trials_root 7", "--trials_root is 7; a path"),
        ("--marign 0.2", "no option --marign in '{}'. Is --margin meant?"),
        ("--devcie cpu", "no option --devcie in '{}'. Is --device meant?"),
        ("--xyzzyq 1", "no option --xyzzyq in '{}'. The file has them."),
        ("--lr 1 --lr 2", "--lr is given twice."),
        ("stray", "The options cannot be read: 'stray' is not"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    message = message.replace("{}", str(SYNTHETIC))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        check(options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        "--lr 1e-3",
        "--lr !ref <margin>",
        "--channels [16,16,32,64]",
        "--speeds=[1,0.9]",
        "--resample True --num_workers 0 --max_hours 0.5",
        "--pretrained null --trials null",
    ],
)
def test_a_right_option_is_taken(options):
    check(options)


@pytest.mark.parametrize("file", TRAINING, ids=IDS[-len(TRAINING) :])
def test_the_recipes_as_they_stand_are_taken(file, tmp_path):
    check_settings(file, placeholders(file, tmp_path))


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_every_setting_has_a_rule(file):
    reader = ruamel.yaml.YAML(typ="safe", pure=True)
    reader.Constructor = _Plain
    choices = "facts frontend license lists precision"
    for name, value in reader.load(file).items():
        built = isinstance(value, dict) or "!" in str(value)
        if built and value not in ("!PLACEHOLDER", "!ref"):
            continue
        known = name in RULES or name in choices.split()
        assert known, f"no rule for {name}"


def test_all_that_is_needed_is_said_at_once():
    strong = REPOSITORY / "recipes/VoxCeleb/hparams/ram_resnet34_strong.yaml"
    with pytest.raises(ValueError, match="needs --voxceleb2, --musan, --rirs"):
        check("--voxceleb1 /data/voxceleb1", strong)


def test_nothing_is_built(tmp_path):
    """An override may be an object; it is built once, by the training."""
    made = tmp_path / "made"
    made_by = f"!apply:pathlib.Path.mkdir [!new:pathlib.Path [{made}]]"
    text = SYNTHETIC.read_text().replace("encoder.yaml", f"{FILES[0]}")
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{text}extra: {made_by}\n")
    load_hyperpyyaml("a: !new:collections.Counter")  # its tags are known now
    check_settings(file, {})
    assert not made.exists()


def test_a_recipe_in_latin_1_is_named(tmp_path):
    recipe = tmp_path / "x.yaml"
    recipe.write_bytes(b"name: Zo\xeb\n")
    with pytest.raises(ValueError, match="x.yaml', line 1: not text in UTF-8"):
        check_settings(recipe)


@pytest.mark.parametrize(
    "line, message",
    [
        ("x: " + 3000 * "[" + 3000 * "]", "lists in lists, more than 40 deep"),
        (
            "x0: &x0 [1]\n"
            + "".join(
                f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]\n"
                for i in range(1, 7)
            ),
            "more than 10000 values",
        ),
        ("? [a]\n: 1", "has the key ('a',), a name is needed."),
        ("1: 2", "has the key 1, a name is needed."),
        ("x: !!int abc", "is not valid YAML (invalid literal"),
        ("x: 2020-99-99", "is not valid YAML (month must be"),
        ("x: !ref <seed> / 0", "is wrong (ZeroDivisionError"),
        ("x: !ref <seed[0]>", "is wrong (TypeError"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_named(tmp_path, line, message):
    shutil.copy(SYNTHETIC.with_name("encoder.yaml"), tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{SYNTHETIC.read_text()}\n{line}\n")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        check_settings(path)
    assert str(path) in str(caught.value)


def test_another_yaml_is_no_recipe():
    with pytest.raises(ValueError, match="has no batch_size, .* Is it one"):
        check_settings(REPOSITORY / "recipes" / "VoxCeleb" / "table1.yaml")
    with pytest.raises(ValueError, match="not valid YAML .*, line"):
        check_settings(REPOSITORY / "README.md")
    with pytest.raises(FileNotFoundError):
        check_settings("nowhere.yaml")


def test_what_stands_within_the_encoder_is_checked(tmp_path):
    encoder = (SYNTHETIC.parent / "encoder.yaml").read_text()
    text = SYNTHETIC.read_text()
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "encoder.yaml").write_text(
        encoder.replace("n_mels: 80", "n_mels: 0")
    )
    with pytest.raises(ValueError, match="'encoder: n_mels' is 0; a whole"):
        check_settings(tmp_path / "recipe.yaml")


def test_a_missing_file_that_a_recipe_includes_is_named(tmp_path):
    """Not as if the recipe were missing."""
    file = tmp_path / "recipe.yaml"
    file.write_text(SYNTHETIC.read_text().replace("encoder.yaml", "none.yaml"))
    message = f"'{file}' cannot be read: a reference .* includes .*none.yaml"
    with pytest.raises(ValueError, match=message):
        check("--lr 0.1", file)
