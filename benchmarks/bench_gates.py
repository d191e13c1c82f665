"""What the gates of enrolment refuse: good enrolments, and bad ones.

    python benchmarks/bench_gates.py --encoder FOLDER SPEAKERS [SPEAKERS ...]

Each SPEAKERS is a folder of SPEAKER/FILE that the encoder was not trained on,
and is judged by itself. Enrolments are drawn from its recordings; a bad one
has one recording of another speaker in it.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from harness import RESULTS, Table

from speechbrain_ram.data.manifest import find_recordings
from speechbrain_ram.inference import SpeakerEncoder
from speechbrain_ram.utils import atomic_writer
from speechbrain_ram.verification.gates import misfits
from speechbrain_ram.verification.metrics import eer
from speechbrain_ram.verification.scores import unit_length

SECONDS = (0, 1.5, 3, 5, 8, 12, 20, np.inf)
MARGINS = (0, 0.5, 1, 2, 3)  # in log-likelihood ratio


class Voices(NamedTuple):
    """The recordings of each speaker of a folder."""

    units: list[np.ndarray]  # a speaker each: [N, E], rows of length 1
    seconds: list[np.ndarray]  # [N], of speech


def read(encoder: SpeakerEncoder, root: Path) -> Voices:
    """Embed a folder of speakers."""
    names = find_recordings(root)
    paths = [root / name for name in names]
    rows = unit_length(encoder.embed(paths, progress=True))
    with ThreadPoolExecutor(4) as pool:
        seconds = np.array(list(pool.map(encoder.speech_seconds, paths)))
    places = defaultdict(list)
    for i, name in enumerate(names):
        places[name.split("/")[0]].append(i)
    return Voices(
        [rows[each] for each in places.values()],
        [seconds[each] for each in places.values()],
    )


def drawn(
    voices: Voices, n: int, rounds: int, draw, spare: int = 1
) -> Iterator[tuple]:
    """(speaker, n places of its recordings, the others, `spare` or more)."""
    for _ in range(rounds):
        for who, units in enumerate(voices.units):
            if len(units) >= n + spare:
                order = draw.permutation(len(units))
                yield who, order[:n], order[n:]


def stranger(voices: Voices, who: int, draw) -> np.ndarray:
    """A recording [E] of somebody else."""
    other = draw.integers(len(voices.units) - 1)
    rows = voices.units[other + (other >= who)]
    return rows[draw.integers(len(rows))]


def percent(flags) -> str:
    """The share that is true."""
    return f"{100 * np.mean(flags):.1f}" if len(flags) else ""


def agreement(table: Table, name: str, voices: Voices, gates, draw) -> None:
    """How many good and bad enrolments each gate refuses."""
    for n in (2, 3, 5, 10):
        good, bad = [], []
        for who, places, _ in drawn(voices, n, 20, draw, spare=0):
            units = voices.units[who][places]
            good.append(units)
            wrong = stranger(voices, who, draw)
            bad.append(np.concatenate([units[:-1], wrong[None]]))
        for gate, least in gates.items() if good else ():
            refused = [bool(misfits(units, least)) for units in good]
            found = [set(misfits(units, least)) for units in bad]
            named = [each == {n - 1} for each in found if each]
            table.add(
                name,
                n,
                f"{gate} ({least:.3f})",
                percent(refused),
                percent(list(map(bool, found))),
                percent(named) if n > 2 else "",
            )


def near(table: Table, name: str, voices: Voices, gates, n, draw) -> None:
    """How many second names, and new speakers, each gate warns of."""
    twice, new = [], []
    for _ in range(20):
        first, second = [], []
        for who, places, others in drawn(voices, n, 1, draw):
            units = voices.units[who]
            first.append(units[places].sum(axis=0))
            second.append(units[others[:n]].sum(axis=0))
        scores = unit_length(np.array(second)) @ unit_length(np.array(first)).T
        twice += list(np.diag(scores))
        np.fill_diagonal(scores, -1)
        new += list(scores.max(axis=1))
    for gate, least in gates.items():
        table.add(
            name,
            f"{n}, {len(first) - 1} others",
            f"{gate} ({least:.3f})",
            percent(np.array(twice) >= least),
            percent(np.array(new) >= least),
        )


def identification(
    table: Table, name: str, voices: Voices, gates, step: float, n, draw
) -> None:
    """What a margin does to right, wrong and strangers' answers."""
    right, wrong, strangers = [], [], []
    for _ in range(20):
        chosen = list(drawn(voices, n, 1, draw))
        models = unit_length(
            np.array([voices.units[w][p].sum(axis=0) for w, p, _ in chosen])
        )
        for who, (speaker, _, others) in enumerate(chosen):
            scores = voices.units[speaker][others] @ models.T
            best = np.sort(scores)[:, -3:]
            hit = scores.argmax(axis=1) == who
            answers = np.stack([best[:, -1], best[:, -1] - best[:, -2]], 1)
            right.append(answers[hit])
            wrong.append(answers[~hit])
            best = np.sort(np.delete(scores, who, axis=1))[:, -2:]
            strangers.append(np.stack([best[:, 1], best[:, 1] - best[:, 0]], 1))
    groups = [np.concatenate(each) for each in (right, wrong, strangers)]
    total = len(groups[0]) + len(groups[1])
    for gate, least in gates.items():
        for margin in MARGINS:
            lead = margin * step
            shares = [
                ((each[:, 0] >= least) & (each[:, 1] >= lead)).sum() / count
                for each, count in zip(
                    groups, (total, total, len(groups[2])), strict=True
                )
            ]
            table.add(
                name,
                f"{gate} ({least:.3f})",
                f"{margin:g} ({lead:.3f})",
                *(f"{100 * share:.1f}" for share in shares),
            )


def length(table: Table, name: str, voices: Voices, draw) -> None:
    """EER of models of so many seconds of speech, on single recordings."""
    found = defaultdict(lambda: ([], []))
    models = defaultdict(int)
    for n in (1, 1, 1, 2, 2, 3, 5, 8):
        for who, places, others in drawn(voices, n, 2, draw):
            seconds = voices.seconds[who][places].sum()
            key = int(np.searchsorted(SECONDS, seconds, side="right"))
            model = voices.units[who][places].sum(axis=0)
            model /= np.linalg.norm(model)
            for other, units in enumerate(voices.units):
                rows = units[others] if other == who else units
                found[key][0].append(rows @ model)
                found[key][1].append(np.full(len(rows), other == who, int))
            models[key] += 1
    for key in sorted(found):
        scores, labels = map(np.concatenate, found[key])
        low, high = SECONDS[key - 1], SECONDS[key]
        rate = eer(scores, labels)
        table.add(name, f"{low:g} to {high:g}", models[key], f"{rate:.1f}")


def tables(about_encoder: str) -> dict[str, Table]:
    """One for each gate."""
    heads = {
        "Agreement": (
            "An error where a recording scores below the gate with the "
            "speaker's others. Bad: one of the recordings is of somebody else; "
            "'named' is the share of refusals that name it and no other. "
            "EER - 2 is less by what changes the log-likelihood ratio by 2.",
            [
                "recordings",
                "gate",
                "good refused %",
                "bad refused %",
                "named %",
            ],
        ),
        "Near": (
            "A warning where a new speaker's model scores the gate with "
            "another's. Second names: the same speaker is enrolled already, "
            "with other recordings.",
            ["recordings", "gate", "second names %", "new speakers %"],
        ),
        "Margin": (
            "Single recordings are identified. Of those whose speaker is "
            "enrolled, the share that is answered rightly and wrongly; of "
            "strangers, the share that is taken for somebody. The margin is in "
            "log-likelihood ratio, and in cosine.",
            [
                "enrolled",
                "threshold",
                "margin",
                "right %",
                "wrong %",
                "strangers %",
            ],
        ),
        "Seconds": (
            "EER of models, each of 1 to 8 recordings, with so many seconds of "
            "speech, on single recordings.",
            ["seconds", "models", "EER %"],
        ),
    }
    return {
        title: Table(
            "gates", title, f"{about} {about_encoder}", ["speech", *columns]
        )
        for title, (about, columns) in heads.items()
    }


def described(encoder: SpeakerEncoder) -> str:
    """What the encoder is, and where its thresholds are from."""
    decision = encoder.decision
    channels = encoder.modules["embedding_model"].channels
    return (
        f"ResNet34 of {tuple(channels)} channels, "
        f"{encoder.facts.get('objective')}, trained on "
        f"{encoder.facts.get('corpus')}; thresholds of '{decision.trials}', "
        f"EER {decision.eer:.2f} %."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", required=True, help="exported folder")
    parser.add_argument("speakers", nargs="+", help="folders SPEAKER/FILE")
    arguments = parser.parse_args()
    encoder = SpeakerEncoder.from_folder(arguments.encoder)
    gates = encoder.decision.thresholds
    step = encoder.decision.llr_step()
    made = tables(described(encoder))
    for root in map(Path, arguments.speakers):
        voices, draw = read(encoder, root), np.random.default_rng(0)
        n = min(3, max(map(len, voices.units)) - 1)
        lower = {f"EER - {k:g}": gates["EER"] - k * step for k in (3, 2, 1)}
        both = {**lower, **gates}
        agreement(made["Agreement"], root.name, voices, both, draw)
        near(made["Near"], root.name, voices, gates, n, draw)
        identification(made["Margin"], root.name, voices, gates, step, n, draw)
        length(made["Seconds"], root.name, voices, draw)
    with atomic_writer(RESULTS / "gates.md") as file:
        file.write("\n".join(table.markdown() for table in made.values()))


if __name__ == "__main__":
    main()
