"""The commands about who is enrolled, and the gates of enrolment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np

from speechbrain_ram.cli.common import (
    command,
    database_option,
    device_option,
    encoder_option,
    load_encoder,
    number_or_name,
    open_database,
    threshold_option,
)
from speechbrain_ram.utils import first_ten

#: How much less the log-likelihood ratio may be than at the EER threshold, for
#: a recording to agree with its speaker's others (benchmarks/bench_gates.py).
_AGREEMENT = 2.0

_THREADS = 4  # read recordings at once


@click.command()
@encoder_option
@database_option
@click.argument("name", required=False)
@click.argument("files", nargs=-1, type=click.Path())
@click.option(
    "--folders",
    type=click.Path(),
    help="Enrol every subfolder of this one under its name instead.",
)
@click.option(
    "--least-seconds",
    default=3.0,
    show_default=True,
    metavar="SECONDS",
    help="Least speech of a new speaker, in all recordings together.",
)
@click.option(
    "--agreement",
    metavar="NUMBER|NAME",
    help="Least score of a recording with the speaker's others."
    "  [default: at the EER, less what changes the log-likelihood ratio by 2]",
)
@click.option(
    "--near",
    metavar="NUMBER|NAME",
    help="Warn where a new speaker scores this with another one."
    "  [default: the highest saved, if one is at a false-alarm rate]",
)
@device_option
@command
def enroll(
    chosen, database, name, files, folders, least_seconds, device, **gates
):
    """Enrol speaker NAME with FILES, or add to what is enrolled.

    \b
    speechbrain-ram enroll -e ENCODER -d people.db ada ada1.wav ada2.wav
    speechbrain-ram enroll -e ENCODER -d people.db --folders people/

    All are enrolled, or nobody: where a new speaker has too little speech, or
    a recording does not fit the speaker's others, the error names it.
    """
    if not least_seconds >= 0:
        raise ValueError(f"--least-seconds is {least_seconds}, not 0 or more.")
    if bool(folders) == bool(name and files):
        raise click.UsageError("Give NAME and FILES, or --folders.")
    found = _of_folders(folders) if folders else {name: list(map(Path, files))}
    encoder = load_encoder(chosen, device)
    opened = open_database(database, encoder, new=True)
    gates = _scores(encoder, gates)
    known = opened.speakers()
    seconds = _seconds(encoder, found)
    _refuse_short(seconds, found, known, least_seconds)
    everything = [file for group in found.values() for file in group]
    rows = encoder.embed(everything, progress=True)
    ends = np.cumsum([len(group) for group in found.values()])[:-1]
    counts = opened.enrol_many(
        dict(zip(found, np.split(rows, ends), strict=True)),
        gates.get("agreement", -1.0),
        {who: list(map(str, group)) for who, group in found.items()},
    )
    alike = []
    if "near" in gates:
        new = [who for who in found if who not in known]
        alike = _warn_of_near(opened, new, gates["near"])
    text = [
        f"{who}: {count} recordings, {seconds[who]:.1f} s of speech added"
        for who, count in counts.items()
    ]
    facts = {"speakers": counts, "seconds": seconds, "near": alike}
    facts["gates"] = {"least_seconds": least_seconds, **gates}
    return facts, "\n".join(text)


def _of_folders(folders: str) -> dict[str, list[Path]]:
    """Recordings by the name of their folder, hidden ones passed over."""
    from speechbrain_ram.data.manifest import find_recordings

    parents = sorted(
        path
        for path in Path(folders).iterdir()
        if path.is_dir() and not path.name.startswith(".")
    )
    if not parents:
        raise ValueError(
            f"'{folders}' holds no folders. One for each speaker is "
            "needed, with recordings in it."
        )
    return {p.name: [p / file for file in find_recordings(p)] for p in parents}


def _scores(encoder, gates: Mapping[str, str | None]) -> dict[str, float]:
    """The score of each gate; none where no threshold is saved."""
    decision, defaults = encoder.decision, {}
    if decision is not None:
        at_eer = encoder.threshold()
        defaults = {"agreement": at_eer - _AGREEMENT * decision.llr_step()}
        # At the EER most new speakers are near one of twenty.
        if decision.thresholds.keys() > {"EER"}:
            defaults["near"] = max(decision.thresholds.values())
    found, without = {}, []
    for name, value in gates.items():
        score = number_or_name(value)
        if isinstance(score, float) or (decision and score):
            found[name] = encoder.threshold(score)
        elif name in defaults:
            found[name] = defaults[name]
        else:
            without.append(f"--{name}")
    if without:
        which = " at a false-alarm rate" if decision else ""
        click.echo(
            f"Warning: no threshold{which} is saved with this encoder, so "
            f"{' and '.join(without)} {'is' if which else 'are'} not checked. "
            "`speechbrain-ram threshold` measures one on recordings of yours.",
            err=True,
        )
    return found


def _seconds(encoder, found: Mapping[str, Sequence[Path]]) -> dict[str, float]:
    """Seconds of speech in each speaker's recordings together."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return {
            who: sum(pool.map(encoder.speech_seconds, group))
            for who, group in found.items()
        }


def _refuse_short(
    seconds: Mapping[str, float],
    found: Mapping[str, Sequence[Path]],
    known: Mapping[str, int],
    least: float,
) -> None:
    """Name the new speakers who have too little speech."""
    short = [
        f"'{who}' has {length:.1f} s in {len(found[who])} recordings"
        for who, length in seconds.items()
        if who not in known and length < least
    ]
    if short:
        raise ValueError(
            f"Too little speech: {first_ten(short)}; {least:g} s are needed to "
            "enrol a speaker, pauses not counted. Nobody was enrolled. Record "
            "more, or give a lower --least-seconds."
        )


def _warn_of_near(opened, new: Sequence[str], least: float) -> list[dict]:
    """Say which new speakers are nearly another one who is enrolled."""
    alike = {}
    for who in new:
        other = opened.nearest(who)
        if other is not None and other.score >= least:
            alike[frozenset((who, other.name))] = {
                "speaker": who,
                "other": other.name,
                "score": other.score,
            }
    for pair in alike.values():
        click.echo(
            f"Warning: '{pair['speaker']}' is nearly '{pair['other']}', who is "
            f"enrolled too: score {pair['score']:.3f}, {least:.3f} is near. Is "
            "it one person under two names? `speechbrain-ram forget` removes "
            "one; --near sets the score.",
            err=True,
        )
    return list(alike.values())


@click.command()
@encoder_option
@database_option
@click.argument("file", type=click.Path())
@click.option("--top", default=5, show_default=True, help="Candidates shown.")
@threshold_option
@click.option(
    "--margin",
    type=float,
    metavar="NUMBER",
    help="Least lead in score over the runner-up, else the answer is 'unsure'."
    "  [default: what raises the log-likelihood ratio by 1]",
)
@device_option
@command
def identify(chosen, database, file, top, threshold, margin, device):
    """Find the enrolled speaker of FILE.

    \b
    speechbrain-ram identify -e ENCODER -d people.db who.wav

    Exits with 0 if the best score reaches the threshold and leads by the
    margin, else with 1.
    """
    encoder = load_encoder(chosen, device)
    if margin is None:
        margin = encoder.decision.llr_step() if encoder.decision else 0.0
    if not margin >= 0:
        raise ValueError(f"--margin is {margin}, not 0 or more.")
    least = encoder.threshold(number_or_name(threshold))
    opened = open_database(database, encoder)
    embedding = encoder.embed(file)[0]
    matches = opened.identify(embedding, max(top, 2) if top > 0 else top)
    lead = matches[0].score - matches[1].score if matches[1:] else None
    verdict = "known" if matches[0].score >= least else "unknown"
    if verdict == "known" and lead is not None and lead < margin:
        verdict = "unsure"
    facts = {
        "verdict": verdict,
        "speaker": matches[0].name if verdict == "known" else None,
        "threshold": least,
        "margin": lead,
        "least_margin": margin,
        "matches": [asdict(match) for match in matches[:top]],
    }
    lines = [
        {
            "known": matches[0].name,
            "unsure": f"unsure: {' or '.join(m.name for m in matches[:2])}",
            "unknown": "unknown speaker",
        }[verdict],
        f"threshold {least:.3f}"
        + ("" if lead is None else f", margin {lead:.3f} (least {margin:.3f})"),
    ]
    lines += [f"{match.score:6.3f}  {match.name}" for match in matches[:top]]
    return facts, "\n".join(lines), 0 if verdict == "known" else 1


@click.command()
@encoder_option
@database_option
@click.argument("name")
@command
def forget(chosen, database, name):
    """Remove speaker NAME from the enrolled ones.

    \b
    speechbrain-ram forget -e ENCODER -d people.db ada
    """
    open_database(database, load_encoder(chosen)).remove(name)
    return {"removed": name}, f"{name} removed"
