"""A folder about a list of scored trials: tables, plots, worst errors.

``results.md`` is what a person reads, ``results.json`` holds the same numbers
unrounded; beside them are a DET plot of all systems and a histogram of each.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from speechbrain_ram.utils import atomic_writer, json_text
from speechbrain_ram.verification.bootstrap import (
    LEAST_SPEAKERS,
    Difference,
    Interval,
    bootstrap,
    paired_bootstrap,
)
from speechbrain_ram.verification.metrics import P_TARGETS, Metrics, evaluate
from speechbrain_ram.verification.plots import det_plot, histogram
from speechbrain_ram.verification.speakers import TrialSpeakers
from speechbrain_ram.verification.trials import TrialList

_WORST = 20  # errors that are listed, half of them misses


@dataclass(frozen=True, eq=False)
class System:
    """One system's scores of a trial list, and what is to be told of them."""

    scores: np.ndarray  # [N]
    llr: bool = False  # log-likelihood ratios: adds Cllr and actual DCF
    scale: str = "Score"  # what the axis of the histogram says
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    differences: Mapping[str, Difference] = field(default_factory=dict)
    of_groups: Mapping[str, Mapping[str, Interval]] = field(
        default_factory=dict
    )  # intervals by group


def with_intervals(
    systems: Mapping[str, System],
    trials: TrialList,
    speakers: TrialSpeakers,
    p_targets: Sequence[float] = P_TARGETS,
    replicates: int = 1000,
    seed: int = 0,
    groups: Mapping[str, np.ndarray] | None = None,
) -> dict[str, System]:
    """Add 95 % intervals, to the first system those of the groups too, and to
    the others the differences to it.

    1000 replicates take half a second for 40,000 trials, 6 seconds for
    600,000.
    """
    who = (trials.labels, speakers.enrol, speakers.test)
    settings = {
        "p_targets": p_targets,
        "replicates": replicates,
        "seed": seed,
        "progress": len(trials) > 1_000_000,
    }
    reference = next(iter(systems.values())).scores
    of_groups = {
        name: bootstrap(
            reference[mask], *(each[mask] for each in who), **settings
        )
        for name, mask in (groups or {}).items()
    }
    done: dict[str, System] = {}
    for name, system in systems.items():
        differences = {}
        if done:
            differences = paired_bootstrap(
                system.scores, reference, *who, **settings
            )
        intervals = bootstrap(system.scores, *who, **settings)
        done[name] = replace(
            system,
            intervals=intervals,
            differences=differences,
            of_groups={} if done else of_groups,
        )
    return done


def write_report(
    folder: str | os.PathLike,
    title: str,
    trials: TrialList,
    systems: Mapping[str, System],
    groups: Mapping[str, np.ndarray] | None = None,
    p_targets: Sequence[float] = P_TARGETS,
    notes: Sequence[str] = (),
) -> dict[str, Metrics]:
    """Write the folder; files of the same names are replaced.

    The first of the systems is broken down by `groups`, from
    :func:`speechbrain_ram.verification.speakers.trial_groups`, and has its
    worst errors listed. `notes` stand before the numbers.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    labels = trials.labels
    metrics = {
        name: evaluate(system.scores, labels, p_targets, system.llr)
        for name, system in systems.items()
    }
    _draw(folder, systems, labels, metrics, p_targets)
    first, system = next(iter(systems.items()))
    breakdown = group_metrics(
        system.scores, labels, groups or {}, metrics[first], p_targets
    )
    worst = worst_errors(trials, system.scores, metrics[first].eer_threshold)
    intervals = {name: each.intervals for name, each in systems.items()}
    differences = {
        name: each.differences
        for name, each in systems.items()
        if each.differences
    }
    parts = [
        f"# {title}",
        *(f"**{note}**" for note in notes),
        f"{len(trials):,} trials, {int(labels.sum()):,} of them targets, over "
        f"{len(trials.utterances):,} recordings.",
        metrics_table(metrics, intervals),
        _legend(intervals, differences),
    ]
    if differences:
        parts += [f"## Difference to {first}", _difference_table(differences)]
    parts += ["## Error trade-off", "![DET](det.png)", _DET_LEGEND, "## Scores"]
    parts += [
        f"![Scores of {name}](histogram_{file_name(name)}.png)"
        for name in systems
    ]
    if breakdown:
        parts += [
            f"## Groups, {first}",
            _group_table(breakdown, system.of_groups),
            _group_legend(breakdown, system.of_groups),
        ]
    parts += [f"## Worst errors, {first}", _worst_table(worst)]
    text = "\n\n".join(part.rstrip("\n") for part in parts) + "\n"
    _write(folder / "results.md", text)
    data = {
        "title": title,
        "notes": notes,
        "systems": {name: asdict(each) for name, each in metrics.items()},
        "intervals": _asdict(intervals),
        "differences": _asdict(differences),
        "groups": breakdown,
        "group_intervals": _asdict(system.of_groups),
        "worst_errors": worst,
    }
    _write(folder / "results.json", json_text(data, indent=2) + "\n")
    return metrics


def _draw(
    folder: Path,
    systems: Mapping[str, System],
    labels: np.ndarray,
    metrics: Mapping[str, Metrics],
    p_targets: Sequence[float],
) -> None:
    """A DET plot of all systems, and a histogram of each."""
    det_plot(
        folder / "det",
        {name: (system.scores, labels) for name, system in systems.items()},
        [p for p in p_targets if p != min(p_targets)] or p_targets,
    )
    for name, system in systems.items():
        thresholds = {"EER threshold": metrics[name].eer_threshold}
        for p in p_targets[:1]:
            at = metrics[name].min_dcf_threshold[p]
            thresholds[f"minDCF({p:g}) threshold"] = at
        histogram(
            folder / f"histogram_{file_name(name)}",
            system.scores,
            labels,
            thresholds,
            system.scale,
        )


def metrics_table(
    metrics: Mapping[str, Metrics],
    intervals: Mapping[str, Mapping[str, Interval]] | None = None,
) -> str:
    """A Markdown table, one system or list a row; some may lack intervals."""
    rows = [_metric_row(each) for each in metrics.values()]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = []
    for name, row in zip(metrics, rows, strict=True):
        known = (intervals or {}).get(name, {})
        cells = []
        for column in columns:
            digits = 2 if column == "EER %" else 4
            cell = f"{row[column]:.{digits}f}" if column in row else ""
            interval = known.get(column.removesuffix(" %"))
            if interval:
                cell = f"{interval:.{digits}f}"
            cells.append(cell)
        lines.append([name, *cells])
    return _markdown(["", *columns], lines)


def results_table(
    metrics: Mapping[str, Metrics],
    intervals: Mapping[str, Mapping[str, Interval]],
) -> str:
    """:func:`metrics_table`, and what its brackets are where it has some."""
    table = metrics_table(metrics, intervals)
    return table + f"\n{_INTERVALS}\n" * any(intervals.values())


def group_metrics(
    scores: np.ndarray,
    labels: np.ndarray,
    groups: Mapping[str, np.ndarray],
    overall: Metrics,
    p_targets: Sequence[float] = P_TARGETS,
) -> list[dict]:
    """Results of groups, and FNR and FPR in percent at the whole list's
    threshold.
    """
    rows = []
    for name, mask in groups.items():
        part, truth = scores[mask], labels[mask]
        accepted = part >= overall.eer_threshold
        rows.append(
            {
                "group": name,
                **asdict(evaluate(part, truth, p_targets)),
                "fnr": 100 * float((~accepted[truth == 1]).mean()),
                "fpr": 100 * float(accepted[truth == 0].mean()),
            }
        )
    return rows


def worst_errors(
    trials: TrialList, scores: np.ndarray, threshold: float, count: int = _WORST
) -> list[dict]:
    """The errors that are furthest on the wrong side of a threshold, worst
    first.

    At most `count`; half of them are misses, if there are so many.
    """
    scores = np.asarray(scores)
    target = trials.labels == 1
    missed = np.flatnonzero(target & (scores < threshold))
    alarms = np.flatnonzero(~target & (scores >= threshold))
    missed = missed[np.argsort(scores[missed], kind="stable")]
    alarms = alarms[np.argsort(-scores[alarms], kind="stable")]
    of_alarms = min(len(alarms), max(count // 2, count - len(missed)))
    return [
        {
            "kind": kind,
            "enrol": trials.enrol_ids[trials.enrol[i]],
            "test": trials.test_ids[trials.test[i]],
            "score": float(scores[i]),
        }
        for kind, chosen in (
            ("miss", missed[: count - of_alarms]),
            ("false alarm", alarms[:of_alarms]),
        )
        for i in chosen
    ]


def file_name(name: str) -> str:
    """A name with nothing in it that a file name should not have."""
    return re.sub(r"[^\w.+-]+", "_", name).strip("_") or "_"


def _metric_row(metrics: Metrics) -> dict[str, float]:
    """Columns of the main table, in their order."""
    row = {"EER %": metrics.eer}
    row |= {f"minDCF({p:g})": c for p, c in metrics.min_dcf.items()}
    if metrics.act_dcf is not None:
        row |= {f"actDCF({p:g})": c for p, c in metrics.act_dcf.items()}
    row["min Cllr"] = metrics.min_cllr
    if metrics.cllr is not None:
        row["Cllr"] = metrics.cllr
    return row


_DET_LEGEND = (
    "Circles are EERs, the other marks where minDCF is reached (left out "
    "beyond the axes). Pale parts rest on fewer than 30 errors of a kind."
)
_INTERVALS = "In brackets: 95 % intervals, by bootstrap over speakers."


def _legend(intervals: Mapping, differences: Mapping) -> str:
    """What the numbers of the first table are."""
    text = (
        "EER by linear interpolation at equal rates on the ROC over "
        "distinct scores; costs normalised, at distinct-score thresholds."
    )
    if any(intervals.values()) or differences:
        text += f" {_INTERVALS}"
    return text


def _difference_table(differences: Mapping[str, Mapping]) -> str:
    names = list(next(iter(differences.values())))
    lines = []
    for system, row in differences.items():
        cells = []
        for name in names:
            digits = 2 if name == "EER" else 4
            cells.append(
                f"{row[name]:+.{digits}f}, p = {row[name].p_value:.2g}"
            )
        lines.append([system, *cells])
    return _markdown(["", *(_with_unit(name) for name in names)], lines)


def _group_table(
    rows: Sequence[dict], intervals: Mapping[str, Mapping[str, Interval]]
) -> str:
    columns = ["group", "targets", "non-targets", "EER %"]
    priors = list(rows[0]["min_dcf"])
    columns += [f"minDCF({p:g})" for p in priors]
    columns += ["FNR %", "FPR %"]
    lines = []
    for row in rows:
        known = intervals.get(row["group"], {})
        costs = {f"minDCF({p:g})": row["min_dcf"][p] for p in priors}
        lines.append(
            [
                row["group"],
                f"{row['n_target']:,}",
                f"{row['n_nontarget']:,}",
                f"{known.get('EER', row['eer']):.2f}",
                *(f"{known.get(p, costs[p]):.4f}" for p in costs),
                f"{row['fnr']:.2f}",
                f"{row['fpr']:.2f}",
            ]
        )
    return _markdown(columns, lines)


def _group_legend(rows: Sequence[dict], intervals: Mapping) -> str:
    """What the columns of groups are, and which lack an interval."""
    text = "FNR and FPR at the one threshold of the whole list's EER."
    known = [row["group"] for row in rows if intervals.get(row["group"])]
    if known:
        text += f" {_INTERVALS}"
    if known and len(known) < len(rows):
        text += (
            f" There are none where fewer than {LEAST_SPEAKERS} speakers have "
            "trials of either kind."
        )
    return text


def _worst_table(errors: Sequence[dict]) -> str:
    if not errors:
        return "None at the EER threshold."
    lines = [
        [each["kind"], each["enrol"], each["test"], f"{each['score']:.4f}"]
        for each in errors
    ]
    return _markdown(["error", "enrolment", "test", "score"], lines)


def _with_unit(name: str) -> str:
    return "EER %" if name == "EER" else name


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; columns of numbers, with intervals or not, to the right."""
    number = re.compile(r"([-+]?[\d.,]+( \[.*)?)?")
    numeric = [
        all(number.fullmatch(line[i]) for line in lines)
        for i in range(len(header))
    ]
    rule = ["---:" if right and i else "---" for i, right in enumerate(numeric)]
    rows = [header, rule, *lines]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n"
        for row in rows
    )


def _asdict(results: Mapping[str, Mapping]) -> dict:
    return {
        name: {metric: asdict(each) for metric, each in row.items()}
        for name, row in results.items()
    }


def _write(path: Path, text: str) -> None:
    with atomic_writer(path) as file:
        file.write(text)
