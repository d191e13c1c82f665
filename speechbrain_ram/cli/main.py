"""The command ``speechbrain-ram``.

Results go to stdout, as text or with ``--json`` as one JSON object; progress
and complaints go to stderr. Exit codes: 0, done (``compare``, ``identify``:
it is the same, an enrolled speaker); 1, it is another one; 2, an error.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
import numpy as np

import speechbrain_ram
from speechbrain_ram.cli.common import (
    JsonGroup,
    check_output,
    command,
    data_root_option,
    database_option,
    device_option,
    encoder_option,
    load_encoder,
    number_or_name,
    open_database,
    recordings,
    recordings_below,
    threshold_option,
)
from speechbrain_ram.utils import atomic_path, keep_freed_memory

# Of an exported graph, in float32: about 1e-6 is usual.
_LARGEST_DIFFERENCE = 1e-3


@click.group(
    cls=JsonGroup, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(speechbrain_ram.__version__)
def main() -> None:
    """Tell speakers apart with an encoder trained by speechbrain-ram.

    \b
    speechbrain-ram compare -e ENCODER a.wav b.wav
    speechbrain-ram embed -e ENCODER recordings/ -o out.npz

    ENCODER is the folder 'inference' of a training run, or one from somebody
    else: nothing that it contains is executed. Recordings are sound files of
    any rate and length, and videos where PyAV is installed. Every command
    exits with 2 on an error.
    """
    keep_freed_memory()


@main.command()
@encoder_option
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@threshold_option
@device_option
@command
def compare(folder, a, b, threshold, device):
    """Decide whether recordings A and B are of one speaker.

    Exits with 0 for the same speaker, 1 for another, 2 on an error.
    """
    result = load_encoder(folder, device).compare(
        a, b, number_or_name(threshold)
    )
    verdict = "same speaker" if result.same_speaker else "different speakers"
    text = f"{verdict}: score {result.score:.3f}, "
    text += f"threshold {result.threshold:.3f}"
    if result.llr is not None:
        text += f", log-likelihood ratio {result.llr:+.1f}"
    if result.targets_below is not None:
        text += (
            "\nOn the development list "
            f"{100 * result.targets_below:.1f} % of same-speaker pairs score "
            f"lower, {100 * result.nontargets_above:.1f} % of "
            "different-speaker pairs score higher."
        )
    return asdict(result), text, 0 if result.same_speaker else 1


@main.command()
@encoder_option
@click.argument("inputs", nargs=-1, required=True, type=click.Path())
@click.option(
    *("-o", "--output"), required=True, metavar="FILE", help="Ends with .npz."
)
@data_root_option
@click.option("--skip-bad", is_flag=True, help="Leave unusable files out.")
@device_option
@command
def embed(folder, inputs, output, data_root, skip_bad, device):
    """Embed files, folders or a manifest into one .npz.

    It holds ids [N], embeddings [N, E] and the encoder's fingerprint.
    """
    check_output(output, ".npz")
    found = recordings(inputs, data_root)
    encoder = load_encoder(folder, device)
    failures: dict[int, str] | None = {} if skip_bad else None
    rows = encoder.embed(found.values(), progress=True, failures=failures)
    failures = failures or {}
    ids = [name for i, name in enumerate(found) if i not in failures]
    for reason in failures.values():
        click.echo(f"Left out: {reason}", err=True)
    with atomic_path(output) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            ids=np.array(ids, dtype=str),
            embeddings=rows,
            fingerprint=encoder.fingerprint,
        )
    facts = {
        "output": output,
        "embedded": len(rows),
        "dimensions": encoder.embedding_dim,
        "left_out": list(failures.values()),
    }
    return facts, f"{len(rows)} embeddings in {output}"


@main.command()
@encoder_option
@database_option
@click.argument("name", required=False)
@click.argument("files", nargs=-1, type=click.Path())
@click.option(
    "--folders",
    type=click.Path(),
    help="Enrol every subfolder of this one under its name instead.",
)
@device_option
@command
def enroll(folder, database, name, files, folders, device):
    """Enrol speaker NAME with FILES, or add to what is enrolled."""
    if bool(folders) == bool(name and files):
        raise click.UsageError("Give NAME and FILES, or --folders.")
    if folders:
        parents = sorted(p for p in Path(folders).iterdir() if p.is_dir())
        if not parents:
            raise ValueError(
                f"'{folders}' holds no folders. One for each speaker is "
                "needed, with recordings in it."
            )
        found = {
            p.name: [p / file for file in recordings_below(p)] for p in parents
        }
    else:
        found = {name: [Path(file) for file in files]}
    encoder = load_encoder(folder, device)
    opened = open_database(database, encoder)
    everything = [file for group in found.values() for file in group]
    rows = encoder.embed(everything, progress=True)
    ends = np.cumsum([len(group) for group in found.values()])[:-1]
    counts = opened.enroll_many(
        dict(zip(found, np.split(rows, ends), strict=True))
    )
    text = [f"{who}: {count} recordings" for who, count in counts.items()]
    return {"speakers": counts}, "\n".join(text)


@main.command()
@encoder_option
@database_option
@click.argument("file", type=click.Path())
@click.option("--top", default=5, show_default=True, help="Candidates shown.")
@threshold_option
@device_option
@command
def identify(folder, database, file, top, threshold, device):
    """Find the enrolled speaker of FILE.

    Exits with 0 if the best score reaches the threshold, else with 1.
    """
    encoder = load_encoder(folder, device)
    least = encoder.threshold(number_or_name(threshold))
    embedding = encoder.embed(file)[0]
    matches = open_database(database, encoder).identify(embedding, top)
    known = matches[0].score >= least
    facts = {
        "speaker": matches[0].name if known else None,
        "threshold": least,
        "matches": [asdict(match) for match in matches],
    }
    lines = [facts["speaker"] or "unknown speaker", f"threshold {least:.3f}"]
    lines += [f"{match.score:6.3f}  {match.name}" for match in matches]
    return facts, "\n".join(lines), 0 if known else 1


@main.command()
@encoder_option
@database_option
@click.argument("name")
@command
def forget(folder, database, name):
    """Remove speaker NAME from the enrolled ones."""
    open_database(database, load_encoder(folder)).remove(name)
    return {"removed": name}, f"{name} removed"


@main.command()
@encoder_option
@click.argument("trials", type=click.Path())
@click.option(
    "--root",
    required=True,
    metavar="FOLDER",
    help="Where the list's paths start.",
)
@click.option(
    *("-o", "--output"), required=True, metavar="FILE", help="Of the scores."
)
@device_option
@command
def score(folder, trials, root, output, device):
    """Score a trial list.

    Lines LABEL ENROL TEST become ENROL TEST SCORE LABEL.
    """
    from speechbrain_ram.data.names import part_of
    from speechbrain_ram.inference import Segment
    from speechbrain_ram.verification.scores import score_trials, write_scores
    from speechbrain_ram.verification.trials import (
        check_utterances,
        read_trials,
    )

    check_output(output)
    listed = read_trials(trials)
    check_utterances(listed, root)
    encoder = load_encoder(folder, device)
    names = listed.utterances
    parts = [Segment(*part_of(str(Path(root) / name))) for name in names]
    rows = encoder.embed(parts, progress=True)
    write_scores(listed, score_trials(listed, names, rows), output)
    facts = {"output": output, "trials": len(listed), "files": len(names)}
    return facts, f"{len(listed)} scores in {output}"


@main.command()
@click.argument("scores", nargs=-1, required=True, type=click.Path())
@command
def evaluate(scores):
    """Print EER and detection costs of score files."""
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


@main.command()
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
def export(folder, output, client, examples):
    """Export to ONNX, checked against PyTorch."""
    from speechbrain_ram.data.recordings import split_into_pieces
    from speechbrain_ram.export import onnx as onnx_export

    check_output(output, ".onnx")
    encoder = load_encoder(folder)
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


@main.command("map")
@encoder_option
@click.argument("source", type=click.Path())
@click.option(
    *("-o", "--output"),
    required=True,
    metavar="FILE",
    help="Interactive (.html) or an image (.png, .svg, .pdf).",
)
@data_root_option
@device_option
@command
def draw(folder, source, output, data_root, device):
    """Draw a map of the voices of a folder.

    SOURCE holds SPEAKER/FILE, or is a manifest (.csv).
    """
    from speechbrain_ram.cli import demo as similarity_map
    from speechbrain_ram.data.manifest import read_manifest

    check_output(output, ".html", ".png", ".svg", ".pdf")
    found = recordings([source], data_root)
    starts = [name.removeprefix(source).lstrip("/") for name in found]
    if source.endswith(".csv"):
        speakers = [row.spk_id for row in read_manifest(source)]
    else:
        speakers = [start.split("/")[0] for start in starts]
    rows = load_encoder(folder, device).embed(found.values(), progress=True)
    points = similarity_map.project(rows)
    if output.endswith(".html"):
        similarity_map.write_html(points, speakers, starts, output)
    else:
        similarity_map.draw_map(points, speakers, output)
    facts = {"output": output, "recordings": len(rows)}
    facts["speakers"] = len(set(speakers))
    return facts, f"{len(rows)} recordings on a map in {output}"


@main.command()
@encoder_option
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True)
@device_option
@command
def demo(folder, host, port, device):
    """Serve a web page that compares two recordings."""
    from speechbrain_ram.cli.demo import serve

    encoder = load_encoder(folder, device)
    click.echo(f"http://{host}:{port}  (stop with Ctrl-C)", err=True)
    serve(encoder, host, port)
    return {"served": f"http://{host}:{port}"}, ""


@main.command()
@encoder_option
@click.option(
    "-d",
    "--database",
    metavar="FILE",
    envvar="SPEECHBRAIN_RAM_DATABASE",
    help="Also list who is enrolled.",
)
@command
def info(folder, database):
    """Show what an encoder is, and who is enrolled."""
    from speechbrain_ram.export.folder import FACTS

    encoder = load_encoder(folder)
    told = encoder.facts
    network = encoder.modules["embedding_model"]
    facts = {
        "fingerprint": encoder.fingerprint,
        "sample_rate": encoder.sample_rate,
        "embedding_dim": encoder.embedding_dim,
        "parameters": sum(p.numel() for p in network.parameters()),
        **told,
    }
    text = {
        "Fingerprint": encoder.fingerprint,
        "Sample rate": f"{encoder.sample_rate} Hz",
        "Embedding": f"{encoder.embedding_dim} numbers",
        "Parameters": f"{facts['parameters']:,}",
        **{FACTS.get(key, key): value for key, value in told.items()},
    }
    decision = encoder.decision
    if decision is not None:
        facts["EER"] = decision.eer
        facts["thresholds"] = decision.thresholds
        facts["development list"] = decision.trials
        text["Development list"] = (
            f"{decision.trials}: {decision.n_target:,} target and "
            f"{decision.n_nontarget:,} non-target trials"
        )
        text["EER on it"] = f"{decision.eer:.2f} %"
        for name, value in decision.thresholds.items():
            text[f"Threshold {name}"] = f"cosine {value:.3f}"
    if database:
        enrolled = open_database(database, encoder).speakers()
        facts["enrolled"] = enrolled
        counts = [f"{who} ({count})" for who, count in enrolled.items()]
        text["Enrolled (recordings)"] = ", ".join(counts) or "nobody"
    return facts, "\n".join(f"{key}: {value}" for key, value in text.items())
