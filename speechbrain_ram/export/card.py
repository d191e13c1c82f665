"""What is known about an encoder: its model card, its facts, its decision.

The card is the README of an exported folder, in the form that model hubs read:
YAML facts on top, then Markdown. What others wrote is checked here, and made
printable: a terminal obeys some characters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from speechbrain_ram.export.limits import (
    TEXT,
    EncoderError,
    Rule,
    check,
    either,
    number,
    one_of,
)
from speechbrain_ram.verification.calibration import Decision

#: What a recipe may say about an encoder; what it does not say is left open.
FACTS = {
    "name": "Name",
    "corpus": "Training corpus",
    "speakers": "Training speakers",
    "objective": "Objective",
    "language": "Languages",
    "note": "Note",  # what must be read before the numbers
    "license": "Licence",  # an SPDX identifier, which hubs read in lower case
}

_CARD = Path(__file__).with_name("model_card.md")


def model_card(
    architecture: Mapping[str, Any],
    facts: Mapping[str, Any],
    decision: Decision | None = None,
) -> str:
    """The README of an encoder, in Markdown, from any of :data:`FACTS`."""
    unknown = sorted(set(facts) - set(FACTS))
    if unknown:
        raise ValueError(
            f"A model card has no {', '.join(unknown)}; it has "
            f"{', '.join(FACTS)}. Is a key misspelt in the YAML?"
        )
    front_end = architecture["compute_features"]
    rows = [
        f"| {title} | {facts.get(key, 'not stated')} |"
        for key, title in FACTS.items()
        if key not in ("name", "note")
    ]
    rows.append(f"| Front-end | `{_describe(front_end)}` |")
    rows.append(f"| Network | `{_describe(architecture['embedding_model'])}` |")
    note = [f"**{facts['note']}**"] if facts.get("note") else []
    card = Template(_CARD.read_text(encoding="utf-8"))
    return card.substitute(
        name=facts.get("name", "Speaker encoder"),
        license_id=str(facts.get("license", "unknown")).lower(),
        rate=architecture["sample_rate"],
        dim=architecture["embedding_dim"],
        facts="\n".join(rows),
        results="\n\n".join([*note, decision_text(decision)]),
    )


def decision_text(decision: Decision | None) -> str:
    """What a card says of a development list, and which thresholds it lacks."""
    absent = decision.not_measured() if decision else {}
    needs = [f"at {name} {count:,}" for name, count in absent.items()]
    told = [decision_table(decision)]
    if needs:
        told.append(
            "The list has fewer different-speaker pairs than further "
            f"thresholds need, {' and '.join(needs)}: `speechbrain-ram "
            "threshold` measures them on recordings of yours."
        )
    return "\n\n".join(told)


def decision_table(decision: Decision | None) -> str:
    """The results on a development list, and its thresholds."""
    if decision is None:
        return "No development list was scored, so no threshold is saved."
    rows = [
        f"| threshold at {name} | {value:.3f} |"
        for name, value in decision.thresholds.items()
    ]
    return "\n".join(
        [
            "| | |",
            "| --- | --- |",
            f"| EER | {decision.eer:.2f} % |",
            f"| list | {decision.trials}: {decision.n_target:,} target and "
            f"{decision.n_nontarget:,} non-target trials |",
            *rows,
        ]
    )


def _describe(call: Mapping[str, Any]) -> str:
    """A part of the architecture as a call, `Name(key=value, ...)`."""
    arguments = dict(call["arguments"])
    name = call.get("class") or call.get("function")
    listed = ", ".join(f"{key}={value}" for key, value in arguments.items())
    return f"{name.rpartition('.')[2]}({listed})"


# -- What a folder of others says: checked, and printable --------------------

_FACT = either(TEXT, number(-1e300, 1e300), one_of(True, False, None))
_NAMED = Rule("names with values", lambda table: isinstance(table, dict))


def read_facts(facts: Any, name: str) -> dict[str, Any]:
    """The facts of a folder, printable; a list becomes one text."""
    read = {}
    facts = facts or {}
    check(facts, _NAMED, "facts", name)
    for key, value in facts.items():
        check(key, one_of(*FACTS), "the name of a fact", name)
        several = value if isinstance(value, list) else [value]
        for each in several:
            check(each, _FACT, f"facts.{key}", name)
        if isinstance(value, (list, str)):
            value = printable(", ".join(map(str, several)))
        read[key] = value
    return read


def read_decision(decision: Any, name: str) -> Decision | None:
    """The decision of a folder: its numbers are ones, its names printable."""
    if decision is None:
        return None
    try:
        found = Decision.from_dict(decision)
        if found.calibration and found.calibration.features != ("score",):
            raise ValueError("the calibration needs more than a score")
    except ValueError as error:
        raise EncoderError(f"{name}: {error}") from error
    return dataclasses.replace(
        found,
        trials=printable(found.trials),
        thresholds={printable(k): v for k, v in found.thresholds.items()},
    )


def printable(text: str) -> str:
    """One line in which a terminal finds nothing to obey."""
    return "".join(
        each if each.isprintable() else ascii(each)[1:-1]
        for each in " ".join(text.split())
    )
