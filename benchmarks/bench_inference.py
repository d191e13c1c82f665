"""An encoder in PyTorch and in ONNX: speed, and the error rate of int8.

    OMP_NUM_THREADS=1 python benchmarks/bench_inference.py [--quick]
        [--encoder FOLDER] [--speech FOLDER]

Without --encoder an untrained one of full width is timed. With --speech, a
folder in the shape of speechocean762 (train/, dev/, dev_trials.txt), int8 is
calibrated on up to 100 training utterances and the EER of every form is
measured on the development trials.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from harness import Table, alternate

from speechbrain_ram.data.audio import read_audio
from speechbrain_ram.export.architecture import fingerprint
from speechbrain_ram.export.folder import EncoderFolder
from speechbrain_ram.export.onnx import export_waveform, quantise
from speechbrain_ram.inference import SpeakerEncoder
from speechbrain_ram.resnet import ResNet34
from speechbrain_ram.verification.metrics import eer, min_dcf
from speechbrain_ram.verification.scores import score_trials
from speechbrain_ram.verification.trials import TrialList, read_trials

RATE = 16000


def untrained() -> SpeakerEncoder:
    """The paper's encoder, before any training."""
    architecture = {
        "sample_rate": RATE,
        "embedding_dim": 512,
        "compute_features": {
            "function": "speechbrain_ram.features.make_front_end",
            "arguments": {"name": "fbank"},
        },
        "mean_var_norm": {
            "class": "speechbrain.processing.features.InputNormalization",
            "arguments": {"norm_type": "sentence", "epsilon": 1e-3},
        },
        "embedding_model": {
            "class": "speechbrain_ram.resnet.ResNet34",
            "arguments": {"n_mels": 80},
        },
    }
    weights = ResNet34(80).state_dict()
    name = fingerprint(architecture, weights)
    return SpeakerEncoder(EncoderFolder(architecture, weights, name, None, {}))


def session(path: Path):
    """A graph as a function, with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    opened = onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"]
    )
    return lambda wavs: opened.run(None, {"waveform": wavs})[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--encoder", help="exported folder, or a run")
    parser.add_argument("--speech", help="folder of speechocean762")
    parser.add_argument("--utterances", type=int, help="of dev/, at most")
    parser.add_argument("--output", help="folder of the tables")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    encoder = (
        SpeakerEncoder.from_folder(arguments.encoder)
        if arguments.encoder
        else untrained()
    )
    channels = encoder.modules["embedding_model"].channels
    with tempfile.TemporaryDirectory() as folder:
        paths = {
            "PyTorch": None,
            "ONNX float32": export_waveform(encoder, Path(folder) / "f.onnx"),
            "ONNX int8": Path(folder) / "q.onnx",
        }
        quantise(paths["ONNX float32"], paths["ONNX int8"], examples(arguments))
        forms = {
            "PyTorch": lambda wavs: encoder.encode(
                torch.from_numpy(wavs), torch.ones(len(wavs))
            ).numpy(),
            "ONNX float32": session(paths["ONNX float32"]),
            "ONNX int8": session(paths["ONNX int8"]),
        }
        time_forms(forms, channels, arguments)
        if arguments.speech:
            sizes = {
                name: path.stat().st_size / 1e6
                for name, path in paths.items()
                if path
            }
            error_rates(forms, sizes, channels, arguments)


def examples(arguments) -> list[np.ndarray]:
    """What int8 is calibrated on: training speech, or noise for timing."""
    if not arguments.speech:
        return [np.random.randn(1, RATE).astype(np.float32) for _ in range(4)]
    files = sorted(Path(arguments.speech).glob("train/*/*.ogg"))
    if not files:
        raise SystemExit(
            f"--speech is '{arguments.speech}', which has no train/*/*.ogg. Is "
            "it the folder of speechocean762?"
        )
    some = files[:: max(1, len(files) // 100)][:100]
    return [read_audio(file)[None].numpy() for file in some]


def time_forms(forms, channels, arguments) -> None:
    """Milliseconds for each form and length."""
    table = Table(
        "inference",
        "Inference",
        f"Waveform to embedding, front-end included, ResNet34 of {channels} "
        "channels. Milliseconds, median, and times the duration of the audio.",
        ["input", "form", "ms", "ms / s of audio", "x real time"],
        arguments.output,
    )
    rounds = 3 if arguments.quick else 15
    for batch, seconds in ((1, 1), (1, 3), (1, 10), (8, 3)):
        wavs = 0.1 * np.random.randn(batch, seconds * RATE).astype(np.float32)
        cases = {
            name: lambda form=form, wavs=wavs: form(wavs)
            for name, form in forms.items()
        }
        for name, measured in alternate(cases, rounds, warmup=2).items():
            median = statistics.median(measured)
            table.note(f"{name}, {batch} x {seconds} s", measured)
            table.add(
                f"{batch} x {seconds} s",
                name,
                f"{1000 * median:.1f}",
                f"{1000 * median / batch / seconds:.1f}",
                f"{batch * seconds / median:.1f}",
            )
    table.write()


def error_rates(forms, sizes, channels, arguments) -> None:
    """EER of each form on the same trials."""
    speech = Path(arguments.speech)
    trials = read_trials(speech / "dev_trials.txt")
    if arguments.utterances:
        every = sorted(trials.utterances)
        keep = every[:: max(1, len(every) // arguments.utterances)]
        trials = restrict(trials, keep)
    names = trials.utterances
    table = Table(
        "inference_eer",
        "What int8 costs in accuracy",
        f"{len(trials):,} development trials over {len(names)} utterances, "
        f"ResNet34 of {channels} channels; int8 calibrated on up to 100 "
        "training utterances. 'Cosine' is the least over all utterances with "
        "PyTorch's embedding.",
        ["form", "MB", "EER %", "minDCF(0.01)", "cosine", "largest difference"],
        arguments.output,
    )
    reference = None
    for name, form in forms.items():
        rows = np.concatenate(
            [form(read_audio(speech / "dev" / n)[None].numpy()) for n in names]
        )
        reference = rows if reference is None else reference
        scores = score_trials(trials, names, rows)
        cosines = (rows * reference).sum(axis=1)
        cosines /= np.linalg.norm(rows, axis=1)
        cosines /= np.linalg.norm(reference, axis=1)
        table.add(
            name,
            f"{sizes[name]:.1f}" if name in sizes else "",
            f"{eer(scores, trials.labels):.3f}",
            f"{min_dcf(scores, trials.labels, 0.01):.4f}",
            f"{cosines.min():.6f}",
            f"{np.abs(rows - reference).max():.1e}",
        )
    table.write()


def restrict(trials, keep):
    """Only the trials between the utterances to keep."""
    enrol = np.array(trials.enrol_ids)[trials.enrol]
    test = np.array(trials.test_ids)[trials.test]
    keep = np.array(sorted(keep))
    chosen = np.isin(enrol, keep) & np.isin(test, keep)
    enrol_ids, enrol = np.unique(enrol[chosen], return_inverse=True)
    test_ids, test = np.unique(test[chosen], return_inverse=True)
    labels = trials.labels[chosen]
    return TrialList(tuple(enrol_ids), tuple(test_ids), enrol, test, labels)


if __name__ == "__main__":
    main()
