"""The script from its options to its reports, with a tiny encoder."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from conftest import REPOSITORY
from small_encoder import export_small, voice

from speechbrain_ram.cli import verify as cli_verify
from speechbrain_ram.data.audio import read_audio
from speechbrain_ram.data.manifest import (
    Utterance,
    build_manifest,
    read_manifest,
    write_manifest,
)
from speechbrain_ram.inference import SpeakerEncoder
from speechbrain_ram.verification import bootstrap
from speechbrain_ram.verification.metrics import evaluate
from speechbrain_ram.verification.scores import (
    read_scores,
    within_whitening,
    write_scores,
)
from speechbrain_ram.verification.trials import read_trials

SCRIPT = REPOSITORY / "verify_speakers.py"
SPEAKERS = {f"s{i}": 90 + 25 * i for i in range(6)}


@pytest.fixture(scope="module")
def verify():
    """The script as a module."""
    return cli_verify


@pytest.fixture(autouse=True)
def six_speakers_are_enough(monkeypatch):
    monkeypatch.setattr(bootstrap, "LEAST_SPEAKERS", 6)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Recordings of six voices, two lists, a manifest, a table, an encoder."""
    root = tmp_path_factory.mktemp("world")
    names = []
    for speaker, pitch in SPEAKERS.items():
        (root / "wav" / speaker).mkdir(parents=True)
        for i in range(4):
            name = f"{speaker}/{i}.wav"
            wave = voice(0.4 + 0.1 * i, pitch + 3 * i, seed=7 * i)
            soundfile.write(root / "wav" / name, wave, 16000)
            names.append(name)
    pairs = [(e, t) for e in names for t in names if e < t]
    lines = [f"{int(e[:2] == t[:2])} {e} {t}\n" for e, t in pairs]
    (root / "one.txt").write_text("".join(lines[::2]))
    (root / "two.txt").write_text("".join(lines[1::2]))
    tests = [name for name in names if name[3] in "23"]
    (root / "models.txt").write_text(
        "".join(
            f"{int(name[:2] == s)} {s} {name}\n"
            for s in SPEAKERS
            for name in tests
        )
    )
    (root / "models.models").write_text(
        "".join(f"{s} {s}/0.wav {s}/1.wav\n" for s in SPEAKERS)
    )
    (root / "speakers.tsv").write_text(
        "speaker\tgender\n"
        + "".join(f"{s}\t{'mf'[i > 2]}\n" for i, s in enumerate(SPEAKERS))
    )
    rows = build_manifest(
        root / "wav", [(name, name[:2]) for name in names], workers=1
    )
    write_manifest(rows, root / "train.csv")
    export_small(root / "run" / "inference")
    return root


def arguments(world, output, *lists, **options):
    """The command line of these options."""
    command = [
        "--encoder",
        world / "run" / "inference",
        "--data_root",
        world / "wav",
        "--output",
        output,
        "--trials",
        *[world / f"{name}.txt" for name in lists or ["one"]],
    ]
    for name, value in options.items():
        command.append(f"--{name}")
        if value is not True:
            command += value if isinstance(value, list) else [value]
    return [str(part) for part in command]


def test_lists_are_scored_by_one_embedding_a_file(
    verify, world, tmp_path, capsys, monkeypatch
):
    counted = []
    real = SpeakerEncoder.encode

    def counting(self, wavs, lens):
        counted.append(len(wavs))
        return real(self, wavs, lens)

    monkeypatch.setattr(SpeakerEncoder, "encode", counting)
    results = verify.main(arguments(world, tmp_path, "one", "two"))
    assert sum(counted) == 1 + 24  # loading tries a piece of noise
    printed = capsys.readouterr().out
    assert list(results) == ["one", "two"]
    encoder = SpeakerEncoder.from_folder(world / "run" / "inference")
    for name, metrics in results.items():
        trials, scores = read_scores(tmp_path / name / "scores.txt")
        listed = read_trials(world / f"{name}.txt")
        assert trials.labels.tolist() == listed.labels.tolist()
        assert evaluate(np.float32(scores), trials.labels).eer == metrics.eer
        assert f"| {name} | {metrics.eer:.2f} [" in printed
        assert (tmp_path / name / "det.png").is_file()
        # one trial by hand
        import torch

        pair = [
            trials.enrol_ids[trials.enrol[5]],
            trials.test_ids[trials.test[5]],
        ]
        one, other = (
            encoder.encode(
                read_audio(world / "wav" / file)[None], torch.ones(1)
            )[0]
            for file in pair
        )
        cosine = torch.nn.functional.cosine_similarity(one, other, dim=0)
        assert scores[5] == pytest.approx(float(cosine), abs=1e-4)
    summary = (tmp_path / "results.md").read_text()
    assert summary.startswith("# run\n")  # not "inference"
    assert printed.strip() in summary
    for name in results:  # with the intervals of the list's own report
        data = json.loads((tmp_path / name / "results.json").read_text())
        ends = data["intervals"]["run"]["EER"]
        interval = f"[{ends['low']:.2f}, {ends['high']:.2f}]"
        assert f"| {name} | {ends['value']:.2f} {interval} |" in summary
    assert "95 % intervals, by bootstrap over speakers" in summary

    # nothing is embedded again; what was changed by hand is not trusted
    counted.clear()
    again = verify.main(arguments(world, tmp_path, "one", "two"))
    assert counted == [1]  # the noise
    assert again == results


@pytest.mark.parametrize(
    ("options", "said"),
    [({"bootstrap": 0}, ""), ({"speaker_pattern": "x"}, "does not match 'x'")],
)
def test_without_intervals(
    verify, world, tmp_path, capsys, caplog, options, said
):
    """Not wanted, or not possible; that is said and is no error."""
    results = verify.main(arguments(world, tmp_path, "one", **options))
    printed = capsys.readouterr().out
    assert f"| one | {results['one'].eer:.2f} |" in printed
    assert "intervals" not in printed
    data = json.loads((tmp_path / "one" / "results.json").read_text())
    assert data["intervals"] == {"run": {}}
    warnings = [r for r in caplog.records if r.levelname == "WARNING"]
    assert said in caplog.text and bool(said) == bool(warnings)


def test_few_speakers_have_no_intervals(
    verify, world, tmp_path, capsys, caplog, monkeypatch
):
    monkeypatch.setattr(bootstrap, "LEAST_SPEAKERS", 10)
    verify.main(arguments(world, tmp_path, "one"))
    printed = capsys.readouterr().out
    assert "intervals" not in printed and "[" not in printed
    said = "No intervals over speakers: 6 speakers have same-speaker trials"
    assert f"one: {said}" in caplog.text
    assert f"**{said}" in (tmp_path / "one" / "results.md").read_text()


def test_everything_at_once(verify, world, tmp_path):
    results = verify.main(
        arguments(
            world,
            tmp_path,
            "two",
            name="system",
            cohort=world / "train.csv",
            cohort_per_speaker=2,
            center=True,
            normalise="as-norm1",
            top_n=3,
            calibrate_on=world / "one.txt",
            qualities=["duration", "magnitude", "cohort_mean"],
            bootstrap=30,
            speakers=world / "speakers.tsv",
            p_targets=["0.01", "0.1"],
        )
    )
    metrics = results["two"]
    assert metrics.cllr is not None
    assert list(metrics.min_dcf) == [0.01, 0.1]
    data = json.loads((tmp_path / "two" / "results.json").read_text())
    assert list(data["systems"]) == ["system", "cosine"]
    assert list(data["differences"]) == ["cosine"]
    assert data["intervals"]["system"]["EER"]["value"] == metrics.eer
    assert [row["group"] for row in data["groups"]] == [
        "gender f",
        "gender m",
        "same gender",
        "different gender",
    ]
    fitted = json.loads((tmp_path / "calibration.json").read_text())
    assert fitted["features"] == [
        "score",
        "min_duration",
        "max_duration",
        "min_magnitude",
        "max_magnitude",
        "min_cohort_mean",
        "max_cohort_mean",
    ]
    assert (tmp_path / "cohort.safetensors").is_file()
    assert not (tmp_path / "one").exists()  # the dev list is not reported


def test_whitening_is_of_lists_and_cohort(verify, world, tmp_path):
    """As scores that are computed by hand from the embeddings."""
    cohort = {"cohort": world / "train.csv", "normalise": "s-norm"}
    verify.main(arguments(world, tmp_path, "two", whiten=True, **cohort))
    rows = read_manifest(world / "train.csv")
    speakers = np.array([row.spk_id for row in rows])
    encoder = SpeakerEncoder.from_folder(world / "run" / "inference")
    known = encoder.embed([row.path(world / "wav") for row in rows])
    known = known.astype(np.float64)
    whitening = within_whitening(known, speakers)
    unit = (known - known.mean(0)) @ whitening
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    others = np.stack([unit[speakers == s].sum(0) for s in SPEAKERS])
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    place = {row.id: unit[i] for i, row in enumerate(rows)}
    trials, scores = read_scores(tmp_path / "two" / "scores.txt")
    for i in range(0, len(trials), 5):
        one = place[trials.enrol_ids[trials.enrol[i]]]
        other = place[trials.test_ids[trials.test[i]]]
        expected = [
            (one @ other - np.mean(others @ side)) / np.std(others @ side)
            for side in (one, other)
        ]
        assert scores[i] == pytest.approx(np.mean(expected), abs=1e-3)


def test_models_beside_a_list_are_used(verify, world, tmp_path):
    results = verify.main(arguments(world, tmp_path, "models"))
    trials, _ = read_scores(tmp_path / "models" / "scores.txt")
    assert trials.enrol_ids == tuple(SPEAKERS)
    assert results["models"].n_target == 12


def test_a_yaml_gives_options_and_the_command_line_wins(
    verify, world, tmp_path
):
    path = tmp_path / "verify.yaml"
    path.write_text(f"root: {world}\nencoder: !ref <root>/run/inference\n")
    with pytest.raises(SystemExit):  # `root` is no option
        verify.parse([str(path)])
    path.write_text(
        f"encoder: {world}/run/inference\n"
        f"trials: [{world}/one.txt, {world}/two.txt]\n"
        f"data_root: {world}/wav\n"
        f"output: !ref <data_root>/../not_here\n"
        "p_targets: [0.02]\n"
        "name: from yaml\n"
    )
    results = verify.main(
        [str(path), "--output", str(tmp_path / "out"), "--name", "mine"]
    )
    assert list(results) == ["one", "two"]
    assert list(results["one"].min_dcf) == [0.02]
    assert (tmp_path / "out" / "results.md").read_text().startswith("# mine\n")
    assert not (world / "not_here").exists()


#: Ten lists of ten aliases of the one before: 10^10 values.
LAUGHS = "a0: &a0 [x]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("normalise: asnorm", "--normalise: invalid choice: 'asnorm'"),
        ("qualities: [loudness]", "--qualities: invalid choice: 'loudness'"),
        ("bootstrap: many", "--bootstrap: 0 or more is needed, got many"),
        ("top_n: 0", "1 or more is needed, got 0"),
        ("center: maybe", "--center: True or False is needed, got maybe"),
        ("hparams: other.yaml", "unknown keys: ['hparams']"),
        ("- 1\n- 2", "'{path}' cannot be read: "),
        ("", "'{path}' cannot be read: "),
        ("a: [", "'{path}' is not valid YAML .*, line 1"),
        ("output: a\nname: !new:os.system [a]", "tag !new:os.system: .*line 2"),
        ("name: !apply:os.getcwd", "the tag !apply:os.getcwd: options are pl"),
        ("name: !!python/object:os.x {}", "the tag .*python/object:os.x: opt"),
        ("name: !ref <data_root>", "name refers to <data_root>, no value"),
        ("name: !ref <name>", "name refers to a reference, name"),
        ("name: !ref [output]", "not valid YAML"),
        ("name: {a: b}", "name is {'a': 'b'}; a value or a list of values"),
        ("trials: [[a]]", "trials is ['a']; a value or a list of values"),
        ("trials: [a, --device, cuda]", "trials has '--device', which wou"),
        ("name: -x\ntrials: [a, !ref <name>]", "trials has '-x', which would"),
        ("p_targets: [-0.1]", "prior lies strictly between 0 and 1, got -0"),
        ("output: [o, other.yaml]", "output is ['o', 'other.yaml']; it takes"),
        ("output: [[o, other.yaml]]", "output is [['o', 'other.yaml']]; it t"),
        ("output: []", "output is []; it takes one value"),
        ("5", "it has no OPTION: VALUE"),
        ('name: !ref "<\\e[2J>"', r"refers to <\\x1b.2J>, no value"),
        ("? [a]\n: b", "not valid YAML|unknown keys"),
        ("a: " + 60 * "[" + 60 * "]", "lists in lists, more than 40 deep"),
        (LAUGHS, "more than 10000 values"),
        (None, "'{path}' cannot be read: .*No such file"),
    ],
)
def test_what_stands_in_a_yaml_is_checked(
    verify, tmp_path, text, message, capsys
):
    path = tmp_path / "verify.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit):
        verify.parse([str(path), "--output", "o"])
    message = message.replace("{path}", str(path))
    assert re.search(message.replace("[", "\\["), capsys.readouterr().err)


def test_a_yaml_and_a_command_line_say_the_same(verify, tmp_path):
    path = tmp_path / "verify.yaml"
    path.write_text(
        "encoder: e\ntrials: one.txt\ndata_root: d\noutput: o\n"
        "strip_prefix: -x/\np_targets: 0.05\nbootstrap: 100\ncenter: True\n"
        "cohort: c.csv\nmodels: null\nmixdown: False\n"
        "calibrate_on: dev.txt\nqualities: [duration]\n"
    )
    given = vars(verify.parse([str(path)]))
    command = (
        "--encoder e --trials one.txt --data_root d --output o --strip_prefix="
        "-x/ --p_targets 0.05 --bootstrap 100 --center --cohort c.csv "
        "--calibrate_on dev.txt --qualities duration --mixdown False"
    )
    typed = vars(verify.parse(command.split()))
    assert {**given, "hparams": None} == typed
    # the file may stand before or behind options, which win
    for order in (["--seed", "3", str(path)], [str(path), "--seed", "3"]):
        assert vars(verify.parse(order)) == {**given, "seed": 3}
    # and an option may have a value that is called as the file is
    same = ["--name", str(path), "--seed", "-3", str(path)]
    assert vars(verify.parse(same)) == {
        **given,
        "name": str(path),
        "seed": -3,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speakers": "nowhere.tsv"}, "'nowhere.tsv' cannot be read"),
        ({"speakers": "TABLE", "group_by": "age"}, "no column 'age'"),
        ({"bootstrap": 9, "speaker_pattern": "x"}, "does not match 'x'"),
        ({"bootstrap": 9, "speaker_pattern": "(.)$"}, "contradict their spe"),
        ({"cohort": "TRAIN", "normalise": "as-norm1"}, "300 is more than the"),
        ({"cohort": "TRAIN", "cohort_root": "nowhere"}, "24 of 24 .* missing"),
        ({"calibrate_on": "TARGETS"}, "has 2 targets among 2 trials"),
        ({"scores": "a=nowhere.txt"}, "'nowhere.txt' does not exist"),
        ({"device": "tpu9"}, "--device 'tpu9' cannot be used"),
    ],
)
def test_what_cannot_work_is_said_before_the_work(
    verify, world, tmp_path, monkeypatch, options, message
):
    monkeypatch.setattr(verify, "embed", None)  # would fail if used
    (tmp_path / "targets.txt").write_text("1 s0/0.wav s0/1.wav\n" * 2)
    files = {
        "TABLE": world / "speakers.tsv",
        "TRAIN": world / "train.csv",
        "TARGETS": tmp_path / "targets.txt",
    }
    options = {name: files.get(value, value) for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        verify.main(arguments(world, tmp_path / "out", **options))


def test_a_kaldi_list_of_parts(verify, world, tmp_path):
    """Parts of a joined recording score as the recordings they were."""
    names = [f"{s}/{i}.wav" for s in SPEAKERS for i in range(2)]
    waves = [soundfile.read(world / "wav" / name)[0] for name in names]
    ends = [int(end) for end in np.cumsum([len(wave) for wave in waves])]
    starts = [0, *ends[:-1]]
    data = tmp_path / "data"
    data.mkdir()
    soundfile.write(data / "all.wav", np.concatenate(waves), 16000)
    ids = [name.replace("/", "-")[:-4] for name in names]
    lists = {
        "wav.scp": ["all all.wav"],
        "utt2spk": [f"{each} {each[:2]}" for each in ids],
        "segments": [
            f"{each} all {start / 16000:.6f} {end / 16000:.6f}"
            for each, start, end in zip(ids, starts, ends, strict=True)
        ],
    }
    for name, lines in lists.items():
        (data / name).write_text("\n".join(lines) + "\n")
    pairs = [(a, b) for a in range(len(ids)) for b in range(a)]
    kinds = [names[a][:2] == names[b][:2] for a, b in pairs]
    with (
        open(tmp_path / "parts.txt", "w") as parts,
        open(tmp_path / "files.txt", "w") as files,
    ):
        for (a, b), same in zip(pairs, kinds, strict=True):
            kind = "target" if same else "nontarget"
            parts.write(f"{ids[a]} {ids[b]} {kind}\n")
            files.write(f"{int(same)} {names[a]} {names[b]}\n")

    def scores(name, root, *more):
        encoder = world / "run" / "inference"
        command = ["--encoder", encoder, "--bootstrap", "0", *more]
        command += ["--trials", tmp_path / f"{name}.txt", "--data_root", root]
        verify.main([*map(str, command), "--output", str(tmp_path / name)])
        return read_scores(tmp_path / name / name / "scores.txt")[1]

    kaldi = ["--form", "kaldi", "--kaldi", data]
    whole = scores("files", world / "wav")
    assert np.abs(scores("parts", data, *kaldi) - whole).max() < 1e-3
    # The list's own names stay, and the directory knows who speaks.
    listed, _ = read_scores(tmp_path / "parts" / "parts" / "scores.txt")
    assert set(listed.utterances) == set(ids)
    command = ["--encoder", world / "run" / "inference", "--data_root", data]
    command += ["--trials", tmp_path / "parts.txt", "--bootstrap", 9, *kaldi]
    verify.main([*map(str, command), "--output", str(tmp_path / "intervals")])
    text = (tmp_path / "intervals" / "parts" / "results.md").read_text()
    assert "bootstrap over speakers" in text
    # A cohort of the parts is the cohort of the files, too.
    norm = ["--normalise", "s-norm", "--cohort"]
    rows = [
        (f"u{i}", 1.0, "$data_root/all.wav", start, end, names[i][:2])
        for i, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
    write_manifest([Utterance(*row) for row in rows], tmp_path / "parts.csv")
    rows = [
        (name, 1.0, f"$data_root/{name}", 0, len(wave), name[:2])
        for name, wave in zip(names, waves, strict=True)
    ]
    write_manifest([Utterance(*row) for row in rows], tmp_path / "files.csv")
    normed = scores("files", world / "wav", *norm, tmp_path / "files.csv")
    cohort = [*norm, tmp_path / "parts.csv"]
    assert np.abs(scores("parts", data, *kaldi, *cohort) - normed).max() < 0.01
    assert np.abs(normed - whole).max() > 0.1


def test_score_files_are_compared(verify, world, tmp_path, capsys):
    verify.main(arguments(world, tmp_path, "one"))
    trials, scores = read_scores(tmp_path / "one" / "scores.txt")
    noise = np.random.default_rng(0).standard_normal(len(scores))
    write_scores(trials, np.float32(scores + noise), tmp_path / "noisy.txt")
    capsys.readouterr()
    results = verify.main(
        [
            "--scores",
            f"plain={tmp_path}/one/scores.txt",
            f"noisy={tmp_path}/noisy.txt",
            "--output",
            f"{tmp_path}/both",
            "--bootstrap",
            "20",
        ]
    )
    assert list(results) == ["plain", "noisy"]
    assert "| noisy |" in capsys.readouterr().out
    data = json.loads((tmp_path / "both" / "results.json").read_text())
    assert list(data["differences"]) == ["noisy"]
    # beside an encoder
    verify.main(
        arguments(
            world, tmp_path, "one", scores=[f"noisy={tmp_path}/noisy.txt"]
        )
    )
    data = json.loads((tmp_path / "one" / "results.json").read_text())
    assert list(data["systems"]) == ["run", "noisy"]
    # other trials
    with pytest.raises(ValueError, match="holds other trials"):
        verify.main(
            arguments(
                world, tmp_path, "two", scores=[f"noisy={tmp_path}/noisy.txt"]
            )
        )


def test_missing_recordings_stop_it_before_any_work(
    verify, world, tmp_path, monkeypatch
):
    (tmp_path / "list.txt").write_text(
        "1 s0/0.wav s0/1.wav\n0 s0/0.wav s0/9.wav\n"
    )
    monkeypatch.setattr(verify, "open_encoder", None)  # would fail if used
    with pytest.raises(ValueError, match="1 of 3 recordings are missing"):
        verify.main(
            [*arguments(world, tmp_path), "--trials", f"{tmp_path}/list.txt"]
        )


def test_the_first_missing_recordings_are_those_of_the_list(
    verify, world, tmp_path
):
    lost = [f"s0/{i}.wav" for i in (31, 12, 58, 77, 25, 9, 64, 40, 93, 16, 82)]
    lines = ["1 s0/0.wav s0/1.wav", *(f"0 s1/0.wav {each}" for each in lost)]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    named = f"11 of 14 .*: {', '.join(lost[:10])}, and 1 more"
    with pytest.raises(ValueError, match=named):
        verify.main(
            [*arguments(world, tmp_path), "--trials", f"{tmp_path}/list.txt"]
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "o"], "--encoder is needed"),
        (["--encoder", "e"], "--output is needed"),
        (["--encoder", "e", "--output", "o"], "--trials and --data_root are"),
        (
            ["--scores", "a=b", "--trials", "t", "--output", "o"],
            "--scores with",
        ),
        (["N", "--normalise", "s-norm"], "need --cohort"),
        (["N", "--qualities", "cohort_mean"], "need --cohort"),
        (["N", "--center"], "need --cohort"),
        (["N", "--qualities", "duration"], "need --calibrate_on"),
        (["N", "--trials", "a", "b", "--scores", "c=d"], "one list of trials"),
        (["N", "--form", "vox"], "invalid choice"),
        (["N", "--p_targets", "0.01", "5"], "strictly between 0 and 1, got 5"),
        (["N", "--calibration_prior", "0"], "strictly between 0 and 1, got 0"),
        (["N", "--bootstrap", "-3"], "0 or more is needed, got -3"),
        (["N", "--calibration_prior", "0,01"], "0 and 1, got 0,01"),
        (["N", "--scores", "a=x", "a=y"], "two names, got 'a' and 'a'"),
        (["N", "--scores", "e=x"], "two names, got 'e' and 'e'"),
        (
            ["--scores", "a b=x", "a_b=y", "--output", "o"],
            "two names, got 'a b' and 'a_b'",
        ),
        (
            ["N", "--normalise", "z-norm", "--cohort", "c", "--name", "cosine"],
            "two names, got 'cosine' and 'cosine'",
        ),
    ],
)
def test_options_that_do_not_go_together(verify, options, message, capsys):
    normal = ["--encoder", "e", "--trials", "t", "--data_root", "d"]
    normal += ["--output", "o"]
    if options[0] == "N":
        options = normal + options[1:]
    with pytest.raises(SystemExit):
        verify.parse(options)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_lists_of_one_name_are_told_apart(verify):
    assert verify.list_names(["a/x.txt", "b/y.lst"]) == ["x", "y"]
    assert verify.list_names(["/a/x.txt", "/b/x.txt"]) == ["a_x", "b_x"]
    with pytest.raises(ValueError, match="both be called 'a_x'"):
        verify.list_names(["/a/x.txt", "/a/x.lst"])


def test_a_cohort_that_is_nearly_there(verify, world, tmp_path):
    (tmp_path / "S0").mkdir()
    (tmp_path / "S0" / "0.wav").touch()
    row = verify.Utterance("s0/0.wav", 1, "$data_root/s0/0.wav", 0, 16000, "s0")
    write_manifest([row], tmp_path / "cohort.csv")
    options = {"cohort": tmp_path / "cohort.csv", "cohort_root": tmp_path}
    with pytest.raises(ValueError, match="1 of 1 .*S0/0.wav' is there: it di"):
        verify.main(arguments(world, tmp_path / "out", **options))


def test_a_cohort_that_names_a_recording_twice(verify, world, tmp_path):
    rows = read_manifest(world / "train.csv")
    write_manifest(
        [*rows, *(row._replace(id=f"{row.id} again") for row in rows)],
        tmp_path / "twice.csv",
    )
    options = {"normalise": "s-norm", "center": True, "bootstrap": 0}
    found = []
    for cohort in (world / "train.csv", tmp_path / "twice.csv"):
        out = tmp_path / cohort.stem
        verify.main(arguments(world, out, cohort=cohort, **options))
        found.append(read_scores(out / "one" / "scores.txt")[1])
    np.testing.assert_allclose(*found, atol=1e-3)


def test_options_in_another_encoding(verify, tmp_path, capsys):
    path = tmp_path / "options.yaml"
    path.write_bytes("encoder: zo\u00eb\n".encode("latin-1"))
    with pytest.raises(SystemExit):
        verify.parse([str(path)])
    assert "options.yaml', line 1: not text in UTF" in capsys.readouterr().err


def test_as_a_command_its_errors_are_one_line(world, tmp_path):
    command = [sys.executable, SCRIPT, *arguments(world, tmp_path)]
    command[command.index("--encoder") + 1] = str(tmp_path / "nowhere")
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("verify_speakers.py: ")
    assert "nowhere" in line


@pytest.mark.slow
def test_two_processes_give_what_one_gives(verify, world, tmp_path):
    alone = verify.main(arguments(world, tmp_path / "alone", "one"))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            SCRIPT,
            *arguments(world, tmp_path / "shared", "one"),
        ],
        check=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    _, scores = read_scores(tmp_path / "alone" / "one" / "scores.txt")
    _, shared = read_scores(tmp_path / "shared" / "one" / "scores.txt")
    np.testing.assert_allclose(shared, scores, atol=1e-5)
    assert alone["one"].n_target == 18


def test_the_page_names_options_that_exist(verify, capsys):
    page = (SCRIPT.parent / "docs" / "evaluation.md").read_text()
    with pytest.raises(SystemExit):
        verify.parse(["--help"])
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    others = {"--nproc_per_node", "--help"}  # torchrun's, argparse's
    assert set(re.findall(r"--\w+", page)) - others <= known
    for code in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(code, {})
    assert "33.33 %, minDCF(0.01) 0.3333\n(0.8, " in capsys.readouterr().out
