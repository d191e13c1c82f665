"""The command that measures thresholds on recordings of one's own."""

from __future__ import annotations

import os
from pathlib import Path

import click

from speechbrain_ram.cli.common import (
    command,
    device_option,
    encoder_option,
    load_encoder,
)


@click.command()
@encoder_option
@click.option(
    "-d",
    "--data",
    required=True,
    metavar="LIST|FOLDER",
    help="Trial list, or a folder that holds a folder for each speaker.",
)
@click.option(
    "--root",
    metavar="FOLDER",
    help="Where a list's paths start.  [default: the list's folder]",
)
@device_option
@command
def threshold(chosen, data, root, device):
    """Measure thresholds on your own recordings, and save them.

    \b
    speechbrain-ram threshold -e ENCODER -d SPEAKERS/
    speechbrain-ram threshold -e ENCODER -d trials.txt --root wav/

    SPEAKERS holds SPEAKER/FILE: all pairs are compared. Saved are the
    thresholds at the EER, and at false-alarm rates of 1 % and 0.1 % where
    there are different-speaker pairs enough, with all that other commands
    tell of a development list. They replace those that ENCODER had.
    """
    from speechbrain_ram.export.folder import check_replaceable, write_decision
    from speechbrain_ram.verification.calibration import ERRORS, Decision
    from speechbrain_ram.verification.embeddings import extract
    from speechbrain_ram.verification.metrics import far_of
    from speechbrain_ram.verification.scores import score_trials

    if chosen.is_onnx:
        raise ValueError(
            f"'{chosen.path}' is an ONNX file, and thresholds are written into "
            "a folder. Give the one that it was made from after --encoder, "
            "and export it again."
        )
    check_replaceable(chosen.path)
    name, trials, root, speakers = _trials(data, root)
    encoder = load_encoder(chosen, device)
    found = extract(encoder.embedder, trials.utterances, root)
    scores = score_trials(trials, found.ids, found.matrix)
    decision = Decision.fit(scores, trials.labels, name)
    fars = [far for far in map(far_of, decision.thresholds) if far is not None]
    old = encoder.decision
    facts = {
        "encoder": chosen.path,
        "list": name,
        "n_target": decision.n_target,
        "n_nontarget": decision.n_nontarget,
        **_measured(scores, trials.labels, speakers, fars),
        "not_measured": decision.not_measured(),
        "replaced": old and {"list": old.trials, "thresholds": old.thresholds},
        "card": write_decision(chosen.path, decision),
    }
    errors = min(facts["misses"]["EER"], facts["false_alarms"]["EER"])
    if errors < ERRORS:
        click.echo(
            f"Warning: {errors} errors stand behind the EER and its threshold, "
            f"{ERRORS} would measure them. Add speakers, or recordings.",
            err=True,
        )
    return facts, "\n".join(_told(facts))


def _trials(data: str, root: str | None):
    """Name, trials, where their paths start, and speakers if known."""
    from speechbrain_ram.corpora.folder import corpus_name, pair_folder
    from speechbrain_ram.verification.speakers import known_speakers
    from speechbrain_ram.verification.trials import (
        check_utterances,
        read_list_and_models,
        speakers_beside,
    )

    if os.path.isdir(data):
        if root:
            raise click.UsageError("--root belongs to a list; -d is a folder.")
        trials = pair_folder(data)
        name = f"all pairs in {corpus_name(data)}"
        return name, trials, data, known_speakers(trials)
    trials = read_list_and_models(data)
    root = root or os.path.dirname(data) or "."
    check_utterances(trials, root)
    speakers = known_speakers(trials, speaker_of=speakers_beside(data))
    return Path(data).name, trials, root, speakers


def _measured(scores, labels, speakers, fars) -> dict:
    """Rates and thresholds, with intervals where the speakers are known."""
    from speechbrain_ram.verification.bootstrap import (
        bootstrap,
        bootstrap_thresholds,
        too_few_speakers,
    )
    from speechbrain_ram.verification.metrics import error_curve, far_name

    curve = error_curve(scores, labels)
    rate, at_eer = curve.eer()
    at = {"EER": at_eer, **{far_name(f): curve.at_far(f)[0] for f in fars}}
    target = labels == 1
    above = {name: scores >= value for name, value in at.items()}
    facts = {
        "eer": rate,
        "thresholds": at,
        "misses": {k: int((target & ~a).sum()) for k, a in above.items()},
        "false_alarms": {k: int((~target & a).sum()) for k, a in above.items()},
        "intervals": None,
        "no_intervals": None,  # why not
        "speakers": None,
    }
    if speakers is not None:
        who = (scores, labels, speakers.enrol, speakers.test)
        large = {"progress": len(labels) > 1_000_000}
        facts["speakers"] = len(speakers.names)
        facts["no_intervals"] = too_few_speakers(*who[1:]) or None
        if facts["no_intervals"]:
            return facts
        spread = bootstrap_thresholds(*who, fars, **large)
        wide = {name: [each.low, each.high] for name, each in spread.items()}
        each = bootstrap(*who, (), **large)["EER"]
        facts["intervals"] = {"eer": [each.low, each.high], "thresholds": wide}
    return facts


def _told(facts: dict) -> list[str]:
    """The facts in lines."""

    def within(ends, digits):
        return f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]" if ends else ""

    n_target, n_nontarget = facts["n_target"], facts["n_nontarget"]
    who, old = facts["speakers"], facts["replaced"]
    ends = facts["intervals"] or {"eer": None, "thresholds": {}}
    lines = [
        f"{facts['list']}: {n_target:,} same-speaker and {n_nontarget:,} "
        "different-speaker pairs" + (f" of {who} speakers" if who else ""),
        f"EER {facts['eer']:.2f} %{within(ends['eer'], 2)}",
    ]
    for name, value in facts["thresholds"].items():
        was = old and old["thresholds"].get(name)
        lines.append(
            f"Threshold {name}: cosine {value:.3f}"
            f"{within(ends['thresholds'].get(name), 3)}, misses "
            f"{facts['misses'][name]:,} of {n_target:,}, accepts "
            f"{facts['false_alarms'][name]:,} of {n_nontarget:,}"
            + ("" if was is None else f"; it was {was:.3f}")
        )
    for name, needed in facts["not_measured"].items():
        lines.append(
            f"Threshold {name}: not measured, it needs {needed:,} "
            "different-speaker pairs"
        )
    if facts["no_intervals"]:
        lines.append(facts["no_intervals"])
    elif who:
        lines.append(f"In brackets: the 95 % interval over {who} speakers.")
    lines.append(
        f"Saved in {facts['encoder']}, "
        + (f"in place of those of {old['list']}." if old else "as its first.")
    )
    if not facts["card"]:
        lines.append(
            "Its README.md was changed by hand, or is missing: it does not say "
            "these numbers."
        )
    return lines
