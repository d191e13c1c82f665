"""The commands around an encoder's making: corpora, training, error rates."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
import numpy as np

from speechbrain_ram.cli.common import (
    check_output,
    command,
    encoder_option,
    load_encoder,
    recordings,
)

# Of an exported graph, in float32: about 1e-6 is usual.
_LARGEST_DIFFERENCE = 1e-3

# Cosine from which on a client's features are those of the encoder.
_SAME_FEATURES = 0.9999

# What follows the command goes on to a parser of its own.
_PASSED_ON = {"allow_interspersed_args": False}


@click.command()
@command
def recipes():
    """List the recipes that `train` knows by name.

    \b
    speechbrain-ram recipes
    """
    from speechbrain_ram.cli import recipes as names

    found = names.recipes()
    facts = {
        name: {"file": str(path), "about": names.about(path)}
        for name, path in found.items()
    }
    wide = max(map(len, found))
    lines = [f"{name:{wide}}  {facts[name]['about']}" for name in found]
    return facts, "\n".join([*lines, f"Their files are in {names.home()}"])


@click.command(context_settings=_PASSED_ON, options_metavar="")
@click.argument("recipe")
@click.argument(
    "options", nargs=-1, type=click.UNPROCESSED, metavar="[--KEY VALUE]..."
)
def train(recipe, options):
    """Train an encoder, verify it and export it.

    \b
    speechbrain-ram train own --corpus DIR --output_folder OUT
    speechbrain-ram train my.yaml --margin 0.2 --device cuda:0
    torchrun --nproc_per_node=2 --no-python speechbrain-ram train own ...

    RECIPE is a YAML file or a name that `speechbrain-ram recipes` lists.
    Every key of the YAML is an option, and so are SpeechBrain's own, which
    `speechbrain-ram train RECIPE --help` lists. The same command continues an
    interrupted run. Exits with 75 when asked to leave by a signal or
    --max_hours.
    """
    from speechbrain_ram.training.leaving import leave_while_loading

    leave_while_loading()
    from speechbrain_ram.cli.train import run

    run([recipe, *options], "speechbrain-ram train")


@click.command(
    context_settings={**_PASSED_ON, "ignore_unknown_options": True},
    add_help_option=False,  # that parser has one
)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def verify(options):
    """Score trial lists with an encoder and report."""
    from speechbrain_ram.cli.verify import run

    run(options, "speechbrain-ram verify")


@click.command()
@click.argument("scores", nargs=-1, required=True, type=click.Path())
@command
def evaluate(scores):
    """Print EER and detection costs of score files.

    \b
    speechbrain-ram evaluate scores.txt other/scores.txt
    """
    from speechbrain_ram.verification import metrics
    from speechbrain_ram.verification.scores import read_scores

    facts, lines = {}, []
    for path in scores:
        trials, values = read_scores(path)
        result = metrics.evaluate(values, trials.labels)
        facts[path] = asdict(result)
        costs = ", ".join(
            f"minDCF({prior:g}) {cost:.4f}"
            for prior, cost in result.min_dcf.items()
        )
        lines.append(
            f"{path}: EER {result.eer:.3f} %, {costs} "
            f"({result.n_target} target, {result.n_nontarget} non-target)"
        )
    return facts, "\n".join(lines)


@click.command()
@encoder_option
@click.argument("output", type=click.Path())
@click.option(
    "--for",
    "client",
    type=click.Choice(["server", "sherpa-onnx"]),
    default="server",
    show_default=True,
    help="Waveform in, or Kaldi's features in with sherpa-onnx's metadata.",
)
@click.option(
    "--int8",
    "examples",
    metavar="FOLDER",
    help="Make it faster and smaller; speech to find the ranges of values on.",
)
@command
def export(chosen, output, client, examples):
    """Export to ONNX, checked against PyTorch.

    \b
    speechbrain-ram export -e ENCODER encoder.onnx --int8 speech/
    """
    from speechbrain_ram.data.recordings import split_into_pieces
    from speechbrain_ram.export import onnx as onnx_export

    check_output(output, ".onnx")
    if chosen.is_onnx:
        raise ValueError(
            f"'{chosen.path}' is an ONNX file already. Give the folder that "
            "it was made from after --encoder."
        )
    encoder = load_encoder(chosen)
    rate = encoder.sample_rate
    onnx_export.EXPORTS[client](encoder, output)
    noise = np.random.default_rng(0).normal(0, 0.1, 3 * rate)
    probes = [noise[:rate], noise]
    error, cosine = onnx_export.agreement(encoder, output, probes)
    if not error < _LARGEST_DIFFERENCE:
        Path(output).unlink()
        raise ValueError(
            f"The export to '{output}' differs from PyTorch by {error:.1e}, "
            f"{_LARGEST_DIFFERENCE} is allowed, so it was deleted. Is "
            "onnxruntime up to date?"
        )
    facts = {"output": output, "difference": error, "cosine": cosine}
    text = [
        onnx_export.signature(output),
        "On 1 and 3 s of noise it differs from PyTorch by "
        f"{error:.1e} at most.",
    ]
    if client == "sherpa-onnx":
        theirs = onnx_export.client_front_end(encoder)
        _, near = onnx_export.agreement(encoder, output, probes, theirs)
        facts["client_cosine"] = near
        if near < _SAME_FEATURES:
            text.append(
                "sherpa-onnx computes the features with a Povey window from "
                "20 to 7600 Hz, this encoder knows others: the client's "
                "embeddings have a cosine of "
                f"{near:.4f} or more with the encoder's on this noise. Find "
                "thresholds with the client."
            )
    if examples:
        found = list(recordings([examples], ".").values())
        some = found[:: -(-len(found) // 100)]  # at most 100, of all folders
        wavs = [
            split_into_pieces(path, 0, rate, True, True, 10.0)[0].load()
            for path in some
        ]
        fed = onnx_export.graph_inputs(encoder, output, wavs)
        onnx_export.quantise(output, output, fed)
        _, cosine = onnx_export.agreement(encoder, output, wavs)
        facts["cosine"] = cosine
        text.append(
            f"Then quantised on {len(wavs)} files; their embeddings have a "
            f"cosine of {cosine:.4f} or more with those of PyTorch."
        )
    facts["bytes"] = Path(output).stat().st_size
    size = f"{output}: {facts['bytes'] / 1e6:.1f} MB"
    return facts, "\n".join([size, *text])


@click.command()
@click.argument("source", type=click.Path())
@click.argument("destination", type=click.Path())
@click.option(
    "--to",
    type=click.Choice(["flac", "wav"]),
    default="flac",
    show_default=True,
    help="FLAC holds the same samples in about half the space.",
)
@click.option("--sample-rate", default=16000, show_default=True, help="In Hz.")
@click.option("--workers", type=int, help="Processes.  [default: CPUs]")
@command
def convert(source, destination, to, sample_rate, workers):
    """Convert all recordings below SOURCE to mono FLAC or WAV.

    \b
    speechbrain-ram convert vox2/dev/aac vox2_flac
    speechbrain-ram convert podcasts podcasts_wav --to wav

    They get the same folders and names below DESTINATION. The same command
    continues an interrupted one. What cannot be decoded is listed in
    DESTINATION/broken.txt, and the command then exits with 1.
    """
    from speechbrain_ram.corpora.convert import convert_tree

    result = convert_tree(source, destination, to, sample_rate, workers)
    text = (
        f"{result.converted} converted, {result.skipped} were there already, "
        f"{len(result.broken)} broken"
    )
    if result.broken:
        text += f"\nBroken files: {Path(destination) / 'broken.txt'}"
    return result._asdict(), text, 1 if result.broken else 0


def _switch(name, text):
    """An option that stands alone, or with True as in a training."""
    return click.option(
        f"--{name}",
        is_flag=False,
        flag_value=True,
        default=False,
        type=bool,
        metavar="[True]",
        help=text,
    )


@click.command()
@click.argument("manifest", type=click.Path())
@click.argument("data_root", type=click.Path())
@click.argument("output_dir", type=click.Path())
@click.option("--sample-rate", default=16000, show_default=True, help="In Hz.")
@_switch("resample", "Convert files of other rates.")
@_switch("mixdown", "Average several channels.")
@click.option(
    "--shard-bytes",
    default=1_000_000_000,
    show_default=True,
    help="About the size of a shard.",
)
@click.option("--seed", default=1986, show_default=True, help="Of the order.")
@command
def pack(manifest, data_root, output_dir, **settings):
    """Pack a corpus into tar shards, for network disks.

    \b
    speechbrain-ram pack train.csv CORPUS SHARDS
    speechbrain-ram pack train.csv CORPUS SHARDS --mixdown True

    DATA_ROOT is what $data_root stands for in MANIFEST. Prints the manifest
    of the packed recordings. A training reads shards where `prepare` in its
    YAML is speechbrain_ram.data.shards.prepare_shards, which packs them too.
    """
    from speechbrain_ram.data.shards import pack_shards

    packed = pack_shards(manifest, data_root, output_dir, **settings)
    return {"manifest": str(packed)}, str(packed)


@click.command("import")
@click.argument("toolkit")
@click.argument("model_dir", type=click.Path())
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FOLDER",
    help="Exported folder to write.",
)
@command
def import_(toolkit, model_dir, output):
    """Turn an encoder of another toolkit into an exported folder.

    \b
    speechbrain-ram import wespeaker MODEL_DIR -o FOLDER

    TOOLKIT is wespeaker. MODEL_DIR holds avg_model.pt or final_model.pt and
    config.yaml of its ResNet34 or ResNet18, and mean_vec.npy where a mean is
    taken off embeddings. Nothing in it is executed.
    """
    from speechbrain_ram.export.importers import import_encoder

    facts = import_encoder(toolkit, model_dir, output)
    text = (
        f"{output}: {facts['model']} from {facts['weights']}, "
        f"{facts['parameters']:,} parameters, {facts['embedding_dim']} numbers "
        f"an embedding\nMean taken off embeddings: {facts['mean'] or 'none'}"
    )
    return facts, text
