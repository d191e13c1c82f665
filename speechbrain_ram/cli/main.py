"""The command ``speechbrain-ram``.

Results go to stdout, as text or with ``--json`` as one JSON object; progress
and complaints go to stderr. Exit codes: 0, done (``compare``, ``identify``:
it is the same, an enrolled speaker); 1, it is another one (``convert``: some
recordings are broken); 2, an error.
"""

from __future__ import annotations

from dataclasses import asdict

import click
import numpy as np

import speechbrain_ram
from speechbrain_ram.cli import enrolment, making, thresholds
from speechbrain_ram.cli.common import (
    JsonGroup,
    check_output,
    command,
    data_root_option,
    device_option,
    encoder_option,
    load_encoder,
    number_or_name,
    open_database,
    recordings,
    threshold_option,
)
from speechbrain_ram.utils import atomic_path, keep_freed_memory, printable


@click.group(
    cls=JsonGroup, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(speechbrain_ram.__version__)
@click.pass_context
def main(context: click.Context) -> None:
    """Train speaker encoders, verify them, and tell speakers apart.

    \b
    speechbrain-ram train own --corpus DIR --output_folder OUT
    speechbrain-ram compare -e OUT/inference a.wav b.wav
    speechbrain-ram embed -e OUT/inference recordings/ -o out.npz

    ENCODER is the folder 'inference' of a training run, or one from somebody
    else: nothing that it contains is executed; or an ONNX file. Recordings are
    sound files of any rate and length, and videos where PyAV is installed.
    Every command exits with 2 on an error.
    """
    if context.invoked_subcommand != "demo":  # which lives on, mostly idle
        keep_freed_memory()


@main.command()
@encoder_option
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@threshold_option
@device_option
@command
def compare(chosen, a, b, threshold, device):
    """Decide whether recordings A and B are of one speaker.

    \b
    speechbrain-ram compare -e ENCODER a.wav b.wav --threshold FAR=1%

    Exits with 0 for the same speaker, 1 for another, 2 on an error.
    """
    result = load_encoder(chosen, device).compare(
        a, b, number_or_name(threshold)
    )
    verdict = "same speaker" if result.same_speaker else "different speakers"
    text = f"{verdict}: " + "\n".join(result.told())
    return asdict(result), text, 0 if result.same_speaker else 1


@main.command()
@encoder_option
@click.argument("inputs", nargs=-1, required=True, type=click.Path())
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    help="Ends with .npz.",
)
@data_root_option
@click.option("--skip-bad", is_flag=True, help="Leave unusable files out.")
@device_option
@command
def embed(chosen, inputs, output, data_root, skip_bad, device):
    """Embed files, folders or a manifest into one .npz.

    \b
    speechbrain-ram embed -e ENCODER recordings/ more.wav -o out.npz

    It holds ids [N], embeddings [N, E] and the encoder's fingerprint.
    """
    check_output(output, ".npz")
    found = recordings(inputs, data_root)
    encoder = load_encoder(chosen, device)
    failures: dict[int, str] | None = {} if skip_bad else None
    rows = encoder.embed(found.values(), progress=True, failures=failures)
    failures = failures or {}
    ids = [name for i, name in enumerate(found) if i not in failures]
    for reason in failures.values():
        click.echo(f"Left out: {printable(reason)}", err=True)
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
@click.argument("trials", type=click.Path())
@click.option(
    "--root",
    required=True,
    metavar="FOLDER",
    help="Where the list's paths start.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    help="Of the scores.",
)
@device_option
@command
def score(chosen, trials, root, output, device):
    """Score a trial list.

    \b
    speechbrain-ram score -e ENCODER trials.txt --root wav/ -o scores.txt

    Lines LABEL ENROL TEST become ENROL TEST SCORE LABEL. ENROL may be a model
    that TRIALS.models beside the list names: MODEL UTTERANCE [UTTERANCE ...].
    """
    from speechbrain_ram.verification.embeddings import extract
    from speechbrain_ram.verification.scores import score_trials, write_scores
    from speechbrain_ram.verification.trials import (
        check_utterances,
        read_list_and_models,
    )

    check_output(output)
    listed = read_list_and_models(trials, one_kind=True)
    check_utterances(listed, root)
    encoder = load_encoder(chosen, device)
    found = extract(encoder.embedder, listed.utterances, root)
    write_scores(listed, score_trials(listed, found.ids, found.matrix), output)
    facts = {"output": output, "trials": len(listed), "files": len(found.ids)}
    return facts, f"{len(listed)} scores in {output}"


@main.command("map")
@encoder_option
@click.argument("source", type=click.Path())
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    help="Interactive (.html) or an image (.png, .svg, .pdf).",
)
@data_root_option
@device_option
@command
def draw(chosen, source, output, data_root, device):
    """Draw a map of the voices of a folder.

    \b
    speechbrain-ram map -e ENCODER voices/ -o map.html

    SOURCE holds SPEAKER/FILE, or is a manifest (.csv).
    """
    from speechbrain_ram.cli import similarity_map
    from speechbrain_ram.data.manifest import read_manifest

    check_output(output, ".html", ".png", ".svg", ".pdf")
    found = recordings([source], data_root)
    starts = [name.removeprefix(source).lstrip("/") for name in found]
    if source.endswith(".csv"):
        speakers = [row.spk_id for row in read_manifest(source)]
    else:
        speakers = [start.split("/")[0] for start in starts]
    rows = load_encoder(chosen, device).embed(found.values(), progress=True)
    points = similarity_map.project(rows)
    facts = {"output": output, "recordings": len(rows)}
    facts["speakers"] = len(set(speakers))
    text = f"{len(rows)} recordings on a map in {output}"
    if output.endswith(".html"):
        similarity_map.write_html(points, speakers, starts, output)
    else:
        similarity_map.draw_map(points, speakers, output)
        note = similarity_map.without_legend(facts["speakers"])
        text += f"\n{note}" if note else ""
    return facts, text


@main.command()
@encoder_option
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option(
    "--port", default=8000, type=click.IntRange(0, 65535), show_default=True
)
@device_option
@command
def demo(chosen, host, port, device):
    """Serve a web page that compares two recordings.

    \b
    speechbrain-ram demo -e ENCODER --port 8000
    """
    from speechbrain_ram.cli.demo import serve

    def tell(address):
        click.echo(f"{address}  (stop with Ctrl-C)", err=True)

    served = serve(load_encoder(chosen, device), host, port, tell)
    return {"served": served}, ""


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
def info(chosen, database):
    """Show what an encoder is, and who is enrolled.

    \b
    speechbrain-ram info -e ENCODER -d people.db
    """
    from speechbrain_ram.export.card import FACTS

    encoder = load_encoder(chosen)
    told = encoder.facts
    facts = {
        "fingerprint": encoder.fingerprint,
        "sample_rate": encoder.sample_rate,
        "embedding_dim": encoder.embedding_dim,
        "parameters": encoder.parameters,
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
        facts["not_measured"] = decision.not_measured()
        for name, needed in facts["not_measured"].items():
            text[f"Threshold {name}"] = (
                f"not measured, it needs {needed:,} different-speaker pairs"
            )
    if database:
        enrolled = open_database(database, encoder).speakers()
        facts["enrolled"] = enrolled
        counts = [f"{who} ({count})" for who, count in enrolled.items()]
        text["Enrolled (recordings)"] = ", ".join(counts) or "nobody"
    return facts, "\n".join(f"{key}: {value}" for key, value in text.items())


for each in (making, enrolment, thresholds):
    for one in vars(each).values():
        if isinstance(one, click.Command):
            main.add_command(one)
