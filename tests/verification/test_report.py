"""Reports: the numbers that they state, and pictures that are not blank."""

import builtins
import json
import re

import numpy as np
import pytest
from scipy.spatial import KDTree
from scipy.special import ndtri

from speechbrain_ram.verification import plots
from speechbrain_ram.verification.bootstrap import bootstrap, paired_bootstrap
from speechbrain_ram.verification.metrics import error_curve, evaluate
from speechbrain_ram.verification.plots import (
    _bins,
    _det_range,
    det_plot,
    histogram,
)
from speechbrain_ram.verification.report import (
    System,
    file_name,
    metrics_table,
    with_intervals,
    worst_errors,
    write_report,
)
from speechbrain_ram.verification.speakers import TrialSpeakers
from speechbrain_ram.verification.trials import TrialList

PICTURES = ("det", "histogram_good", "histogram_bad_one")


def scored_list(n=2000, shift=3.0, seed=0):
    rng = np.random.default_rng(seed)
    ids = [f"s{i % 10}/{i}" for i in range(40)]
    enrol, test = rng.integers(0, 40, (2, n))
    labels = (enrol % 10 == test % 10).astype(np.int8)
    trials = TrialList(ids, ids, enrol, test, labels)
    return trials, rng.standard_normal(n) + shift * labels


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    trials, good = scored_list()
    bad = good + np.random.default_rng(2).standard_normal(len(good))
    who = (trials.labels, trials.enrol % 10, trials.test % 10)
    systems = {
        "good": System(
            good,
            True,
            "Log-likelihood ratio",
            bootstrap(good, *who, replicates=50),
        ),
        "bad | one": System(
            bad,
            intervals=bootstrap(bad, *who, replicates=50),
            differences=paired_bootstrap(bad, good, *who, replicates=50),
        ),
    }
    groups = {"even": trials.enrol % 2 == 0, "odd": trials.enrol % 2 == 1}
    metrics = write_report(folder, "A list", trials, systems, groups)
    return folder, trials, systems, groups, metrics


def test_the_folder_holds_what_it_should(report):
    folder, _, systems, _, metrics = report
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["results.md", "results.json"]
        + [f"{name}.{end}" for name in PICTURES for end in ("png", "pdf")]
    )
    assert list(metrics) == list(systems)
    # every picture that is referred to is there
    text = (folder / "results.md").read_text()
    for picture in re.findall(r"\]\((\S+)\)", text):
        assert (folder / picture).is_file()
    assert len(re.findall(r"!\[", text)) == 3


def test_json_holds_the_exact_numbers(report):
    folder, trials, systems, groups, metrics = report
    data = json.loads((folder / "results.json").read_text())
    for name, system in systems.items():
        exact = evaluate(system.scores, trials.labels, llr=system.llr)
        assert metrics[name] == exact
        stored = data["systems"][name]
        assert stored["eer"] == exact.eer
        assert stored["min_dcf"]["0.01"] == exact.min_dcf[0.01]
        assert stored["cllr"] == exact.cllr
        low = system.intervals["EER"].low
        assert data["intervals"][name]["EER"]["low"] == low
    difference = systems["bad | one"].differences["EER"]
    stored = data["differences"]["bad | one"]["EER"]
    assert stored["p_value"] == difference.p_value
    assert list(data["differences"]) == ["bad | one"]
    assert [row["group"] for row in data["groups"]] == ["even", "odd"]


def test_groups_are_evaluated_alone_and_at_the_common_threshold(report):
    folder, trials, systems, groups, metrics = report
    rows = json.loads((folder / "results.json").read_text())["groups"]
    scores, labels = systems["good"].scores, trials.labels
    for row in rows:
        mask = groups[row["group"]]
        assert row["eer"] == evaluate(scores[mask], labels[mask]).eer
        wrong = scores < metrics["good"].eer_threshold
        assert row["fnr"] == pytest.approx(
            100 * wrong[mask & (labels == 1)].mean()
        )
        assert row["fpr"] == pytest.approx(
            100 * (~wrong)[mask & (labels == 0)].mean()
        )


def test_groups_have_intervals_where_speakers_are_enough(tmp_path):
    trials, scores = scored_list()
    enrol, test = trials.enrol % 10, trials.test % 10
    speakers = TrialSpeakers(tuple("abcdefghij"), enrol, test)
    groups = {"early": trials.enrol < 20, "few": (enrol < 5) & (test < 5)}
    systems = with_intervals(
        {"one": System(scores), "other": System(-scores)},
        trials,
        speakers,
        replicates=20,
        groups=groups,
    )
    write_report(tmp_path, "Groups", trials, systems, groups)
    part = groups["early"]
    who = trials.labels[part], enrol[part], test[part]
    expected = bootstrap(scores[part], *who, replicates=20)
    text = (tmp_path / "results.md").read_text().split("## Groups, one")[1]
    early, few = re.findall(r"^\| (?:early|few) .*", text, re.M)
    assert (
        f"| {expected['EER']:.2f} | {expected['minDCF(0.01)']:.4f} |" in early
    )
    assert "[" not in few
    assert "none where fewer than 10 speakers" in text
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["group_intervals"]["few"] == {}
    low = data["group_intervals"]["early"]["EER"]["low"]
    assert low == expected["EER"].low


def test_text_says_the_numbers(report):
    folder, trials, systems, _, metrics = report
    text = (folder / "results.md").read_text()
    assert text.startswith("# A list\n\n2,000 trials, ")
    assert f"{metrics['good'].eer:.2f} [" in text
    assert f"{metrics['good'].act_dcf[0.01]:.4f}" in text
    assert "| bad \\| one |" in text  # a bar does not break the table
    assert f"{systems['bad | one'].differences['EER']:+.2f}, p = " in text
    assert "\n\n\n" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for row, after in zip(rows, rows[1:], strict=False):
        if set(after) <= set("| -:"):
            assert row.count("|") == after.count("|")


def test_worst_errors_are_the_worst(report):
    folder, trials, systems, _, metrics = report
    worst = json.loads((folder / "results.json").read_text())["worst_errors"]
    assert len(worst) == 20
    scores, labels = systems["good"].scores, trials.labels
    misses = [w["score"] for w in worst if w["kind"] == "miss"]
    alarms = [w["score"] for w in worst if w["kind"] == "false alarm"]
    assert misses == sorted(scores[labels == 1])[: len(misses)]
    assert alarms == sorted(scores[labels == 0])[::-1][: len(alarms)]
    first = int(np.argmin(np.where(labels == 1, scores, np.inf)))
    assert worst[0]["enrol"] == trials.enrol_ids[trials.enrol[first]]
    assert worst[0]["test"] == trials.test_ids[trials.test[first]]


@pytest.mark.parametrize(
    ("scores", "kinds"),
    [
        ([0.1, 0.2, 0.3, 0.9], ["miss", "miss", "miss", "false alarm"]),
        ([0.9, 0.9, 0.9, 0.1], []),
        ([0.9, 0.9, 0.1, 0.9], ["miss", "false alarm"]),
    ],
)
def test_fewer_errors_of_a_kind_leave_room_for_the_other(scores, kinds):
    trials = TrialList(("a",), tuple("bcde"), [0] * 4, range(4), [1, 1, 1, 0])
    found = worst_errors(trials, np.array(scores), 0.5, count=4)
    assert [each["kind"] for each in found] == kinds
    assert len(worst_errors(trials, np.array(scores), 0.5, 2)) == min(
        2, len(kinds)
    )


def test_few_misses_leave_room_for_false_alarms():
    trials = TrialList(("a",), tuple("bcde"), [0] * 4, range(4), [1, 0, 0, 0])
    found = worst_errors(trials, np.array([0.1, 0.7, 0.9, 0.8]), 0.5, count=4)
    assert [each["score"] for each in found] == [0.1, 0.9, 0.8, 0.7]
    assert (
        len(worst_errors(trials, np.array([0.1, 0.7, 0.9, 0.8]), 0.5, 2)) == 2
    )


def test_infinite_thresholds_are_null_in_json(tmp_path):
    trials, scores = scored_list(shift=-3.0)
    metrics = write_report(tmp_path, "Poor", trials, {"poor": System(scores)})
    assert metrics["poor"].min_dcf_threshold[0.001] == np.inf

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "results.json").read_text()
    data = json.loads(text, parse_constant=refuse)
    assert data["systems"]["poor"]["min_dcf_threshold"]["0.001"] is None


def test_a_perfect_system_has_a_report(tmp_path):
    trials, _ = scored_list(200)
    scores = trials.labels.astype(np.float32)
    write_report(tmp_path, "Perfect", trials, {"oracle": System(scores)})
    text = (tmp_path / "results.md").read_text()
    assert "None at the EER threshold" in text
    assert "Groups" not in text
    json.loads((tmp_path / "results.json").read_text())  # no infinity in it


def test_tables_of_unlike_rows_line_up():
    plain = evaluate([0.9, 0.1], [1, 0], (0.01,))
    ratios = evaluate([2.0, -2.0], [1, 0], (0.01,), llr=True)
    lines = metrics_table({"a": plain, "b": ratios}).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| actDCF(0.01) |" in lines[0]
    assert lines[2].endswith("|  |")


def test_names_make_harmless_files():
    assert file_name("../../etc/passwd") == ".._.._etc_passwd"
    assert file_name("///") == "_"


def ink(path):
    """Share of pixels that are not white."""
    from matplotlib.image import imread

    return (imread(path)[..., :3] < 0.99).any(axis=-1).mean()


def test_pictures_show_something(report):
    folder = report[0]
    for name in PICTURES:
        assert 0.02 < ink(folder / f"{name}.png") < 0.6
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("shift", [0.0, -3.0, 12.0])
def test_det_plots_of_extreme_systems(tmp_path, shift):
    trials, scores = scored_list(shift=shift)
    det_plot(tmp_path / "det", {"x": (scores, trials.labels)})
    assert ink(tmp_path / "det.png") > 0.01


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, in place of files."""
    figures = []

    def keep(figure, path):
        figure.draw_without_rendering()
        figures.append(figure)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


LONG = "RAM-Softmax m=0.5, equation 12, as-norm1 over 300 speakers, seed 1986"


@pytest.mark.parametrize(
    "names",
    [["a", "b"], [LONG], [LONG, LONG[::-1]], [f"s{i}" for i in "12345"]],
)
def test_legends_fit_and_axes_fill_the_width(drawn, names):
    trials, scores = scored_list()
    det_plot("det", dict.fromkeys(names, (scores, trials.labels)))
    (figure,) = drawn
    (legend,) = figure.legends
    box, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 < box.x1 <= page.x1
    square = figure.axes[0].get_window_extent()
    assert box.y0 >= square.y1 - 1
    assert box.y1 <= page.y1
    assert square.width == pytest.approx(square.height)
    assert square.width > 0.78 * page.width
    # nothing but labels and the legend is above and below the axes
    labels = figure.axes[0].get_tightbbox()
    assert labels.height + box.height > 0.93 * page.height


@pytest.mark.parametrize("name", ["_mine", "a$b$c", "m_0 $ 1", "100 % \\alpha"])
def test_names_stand_in_the_legend_as_they_are(drawn, name):
    trials, scores = scored_list()
    det_plot("det", {name: (scores, trials.labels)})
    texts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert texts[0].lstrip("\u200b").startswith(name.replace("$", r"\$"))
    assert len(texts) == 3  # the system, two minDCF


def test_a_dashed_curve_is_dashed_where_it_is_pale(drawn):
    trials, scores = scored_list()
    det_plot("det", dict.fromkeys("ab", (scores, trials.labels)))
    curves = [
        line
        for line in drawn[0].axes[0].get_lines()
        if len(line.get_xdata()) > 10
    ]
    pale = [line.get_linestyle() for line in curves if line.get_alpha()]
    full = [line.get_linestyle() for line in curves if not line.get_alpha()]
    assert pale == full and len(set(pale)) == 2


def test_curves_are_thinned_but_not_moved(drawn):
    """Points are left out where nobody can see it."""
    rng = np.random.default_rng(0)
    labels = np.arange(300_000) % 10 == 0
    scores = rng.standard_normal(300_000) + 2 * labels
    det_plot("det", {"x": (scores, labels)})
    line = next(
        each
        for each in drawn[0].axes[0].get_lines()
        if str(each.get_label()).startswith("x (")
    )
    x, y = (np.asarray(values, float) for values in line.get_data())
    x, y = x[~np.isnan(x)], y[~np.isnan(x)]
    assert 200 < len(x) < 1500
    corners = error_curve(scores, labels).corners()
    fpr, fnr = ndtri(corners.fpr), ndtri(corners.fnr)
    assert len(fpr) > 20 * len(x)
    inside = (fpr > x.min()) & (fpr < x.max())
    left_out = np.stack([fpr, fnr], 1)[inside]
    distance, _ = KDTree(np.stack([x, y], 1)).query(left_out)
    assert distance.max() < 0.016  # half the width of the line


def test_the_eers_lie_within_the_det_axes():
    for shift in (0.5, 2.0, 4.0, 6.0):
        trials, scores = scored_list(20_000, shift)
        curve = error_curve(scores, trials.labels)
        low, high = _det_range([curve], (0.01,))
        assert low <= curve.eer()[0] < high <= 99
        assert low > 0


def test_bins_fit_rounded_scores():
    scores = np.random.default_rng(0).normal(0.4, 0.1, 50_000)
    rounded = scores.round(2)
    steps = np.diff(_bins(rounded)) / 0.01
    assert np.allclose(steps, steps.round())
    assert 40 < len(_bins(scores)) < 120
    for values in (scores, rounded, np.ones(30)):
        edges = _bins(values)
        assert edges[0] <= values.min()
        assert edges[-1] >= values.max()


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def importer(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importer)
    trials, scores = scored_list(100)
    with pytest.raises(ImportError, match=r"speechbrain-ram\[report\]"):
        det_plot(tmp_path / "det", {"x": (scores, trials.labels)})
    with pytest.raises(ImportError, match=r"speechbrain-ram\[report\]"):
        histogram(tmp_path / "h", scores, trials.labels, {})
    assert not list(tmp_path.iterdir())
