"""report.html: one run of one method, from the summary to single samples, in one file."""

import base64
import gzip
import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from itertools import chain
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from utils.metrics import EXACT_LIMITS, PRO_LIMIT, mean_of_known
from utils.reporting.html_report.charts import Axis, curve_chart, strip_plot
from utils.reporting.html_report.class_report import ClassReport
from utils.reporting.html_report.gallery import CORRECT_PASS, FALSE_ALARM, HIT, MISS, UNDECIDED, WRONG
from utils.reporting.html_report.page import asset, render_page, write_page
from utils.reporting.html_report.published import Published, published_figures
from utils.reporting.messages import escape_controls
from utils.reporting.tables import HEADINGS, all_metrics, number
from utils.reporting.visualization import PREDICTED, TRUTH, heat_colors

FILE_NAME = "report.html"
PLURALS = {MISS: "misses", FALSE_ALARM: "false alarms", HIT: "hits", CORRECT_PASS: "correct passes"}
DECISIONS = ("f1", "precision", "recall", "false_alarm_rate")  # metrics that the means of results.json lack
AREAS = (
    ("image_rocauc", "I-AUROC", "Chance that a defective sample scores above a good one: 1 is perfect, 0.5 is random."),
    ("au_pro", "AU-PRO", "Share of the defects' area that the maps find with few false pixels: 1 is perfect."),
)
MOST_NAMES = 4  # of classes in the title
STAGES = {
    "extract": "features of training, validation and test samples, once for all methods of a run",
    "fuse": "fitting of decision fusion",
    "calibrate": "scores and maps of the good samples, and the thresholds",
}


class Tile(NamedTuple):
    """A number of the run and a sentence that explains it."""

    value: str
    detail: str  # beside the number, smaller
    name: str
    sentence: str
    kind: str = ""  # style


def write_report(
    output_dir: Path | str, record: Mapping[str, Any], classes: Sequence[ClassReport], note: str | None = None
) -> None:
    """Write report.html; arguments as in `report_page`."""
    write_page(Path(output_dir) / FILE_NAME, report_page(record, classes, note))


def report_page(record: Mapping[str, Any], classes: Sequence[ClassReport], note: str | None = None) -> str:
    """Format the report as HTML; `classes` are in the order of `record`, `note` names backbones and protocol."""
    args = record["args"]
    published = published_figures(args, record["classes"])
    summary = _summary(record, classes, published)
    stages = list(dict.fromkeys(chain.from_iterable(each.entry["seconds"] for each in classes)))
    # Stable: the order within a class stays.
    shown = sorted(_shown_samples(classes), key=lambda sample: sample["outcome"] not in WRONG)
    plotly_source, plotly = _plotly() if any(sample["cloud"] for sample in shown) else ("", "")
    heat = ["#" + bytes(color).hex() for color in heat_colors(np.linspace(0, 1, 32))]
    return render_page(
        "report.html",
        script=asset("report.js") if shown else "",
        later_scripts=[plotly_source],
        plotly=plotly,
        title=_title(args, classes),
        method=str(args.get("method_name", "?")),
        args=args,
        note=note,
        now=datetime.now().astimezone(),
        command=shlex.join(map(str, record["command"])),
        versions=", ".join(f"{name} {version}" for name, version in record["versions"].items() if version),
        classes=classes,
        tiles=_tiles(record["mean"], classes),
        published=published,
        summary=summary,
        any_undefined=any(value is None for cells in summary.values() for value, _ in cells),
        metrics=HEADINGS.values(),
        strips=[strip_plot(each.entry["samples"], each.decision and each.decision.threshold) for each in classes],
        charts=[(each.name, _roc_chart(each), _pro_chart(each)) for each in classes],
        plurals=PLURALS,
        exact_limits=EXACT_LIMITS,
        stages=stages,
        stage_remarks=[f"{stage.capitalize()}: {STAGES[stage]}." for stage in stages if stage in STAGES],
        legend={
            **{"predicted": PREDICTED, "truth": TRUTH, "heat": ", ".join(heat[::4] + heat[-1:])},
            "threshold": any(each.decision is not None and each.decision.pixel is not None for each in classes),
            "marked": any(sample["truth"] for sample in shown),
            "measured": any(sample["cloud"] for sample in shown),
        },
        data={"samples": shown, "heat": heat, "predicted": PREDICTED, "truth": TRUTH},
        filters={
            "class": list(dict.fromkeys(escape_controls(each.name) for each in classes)),
            "defect": sorted({sample["defect"] for sample in shown}),
            "outcome": [name for name in (*PLURALS, UNDECIDED) if any(each["outcome"] == name for each in shown)],
        },
    )


@cache
def _plotly() -> tuple[str, str]:
    """Source of plotly.js, and the same gzipped in base64: 1.9 MB instead of 4.8, unpacked on request."""
    from plotly.offline import get_plotlyjs

    source = get_plotlyjs()
    return source, base64.b64encode(gzip.compress(source.encode(), mtime=0)).decode()


def _title(args: Mapping[str, Any], classes: Sequence[ClassReport]) -> str:
    """The dataset's folder and the classes, or their number."""
    dataset = PurePath(str(args.get("dataset_path", ""))).name or str(args.get("dataset_type", "?"))
    names = ", ".join(each.name for each in classes)
    return f"{dataset}: {names}" if len(classes) <= MOST_NAMES else f"{dataset}: {len(classes)} classes"


def _tiles(mean: Mapping[str, Any], classes: Sequence[ClassReport]) -> list[Tile]:
    """Tiles of the most important numbers; those that were not measured are left out."""
    tested = [each for each in classes if each.entry["split"] == "test"]
    if not tested:
        splits = " and ".join(sorted({each.entry["split"] for each in classes}))
        text = f"Good samples of the {splits} split. Without a test split, nothing is measured."
        return [Tile(str(sum(each.total for each in classes)), "", "Samples", text)]
    defective = sum(each.defective for each in tested)
    good = sum(each.total for each in tested) - defective
    left_out = "" if len(tested) == len(classes) else " Classes without one are left out."
    text = f"{good} good and {defective} defective samples of the test split.{left_out}"
    tiles = [Tile(str(good + defective), "", "Samples", text)]
    for kind, total, name, text, style in (
        (MISS, defective, "Misses", "Defective samples that were called good.", "bad"),
        (FALSE_ALARM, good, "False alarms", "Good samples that were called anomalous.", "warn"),
    ):
        if total and all(each.decision for each in tested):
            count = sum(each.outcomes[kind] for each in tested)
            tiles.append(Tile(str(count), f"of {total}", name, text, style if count else "fine"))
    of_mean = "" if len(tested) == 1 else " Mean of the classes."
    for key, name, text in AREAS:
        if mean[key] is not None:
            tiles.append(Tile(number(mean[key]), "", name, text + of_mean))
    return tiles


def _shown_samples(classes: Sequence[ClassReport]) -> Iterator[dict[str, Any]]:
    """The shown samples with the names of their classes, written as in the filters of the page."""
    for each in classes:
        for sample in each.samples:
            names = {key: escape_controls(sample[key]) for key in ("path", "defect", "outcome")}
            yield {"class": escape_controls(each.name)} | sample | names


def _summary(
    record: Mapping[str, Any], classes: Sequence[ClassReport], published: Published | None
) -> dict[str, list[tuple[float | None, float | None]]]:
    """Metrics of each class, and of the mean of several under the name "", each with its published value."""
    of_classes = published.classes if published else {}
    rows = {each.name: (each.entry, of_classes.get(each.name, {})) for each in classes}
    if len(classes) > 1:
        mean = record["mean"] | {key: mean_of_known(each.entry[key] for each in classes) for key in DECISIONS}
        rows[""] = (mean, published.mean if published else {})
    return {
        name: [(value, known.get(key)) for key, value in all_metrics(entry).items()]
        for name, (entry, known) in rows.items()
    }


def _roc_chart(each: ClassReport) -> Markup | None:
    good = each.total - each.defective
    if not good or not each.defective:
        return None
    from sklearn.metrics import roc_curve

    samples, point = each.entry["samples"], None
    rates, hits, _ = roc_curve([sample["label"] for sample in samples], [sample["score"] for sample in samples])
    if each.decision:
        point = each.outcomes[FALSE_ALARM] / good, each.outcomes[HIT] / each.defective
    axis = Axis(0, 1, (0, 0.25, 0.5, 0.75, 1), "false-alarm rate")
    title = f"ROC curve of {each.name}, area {number(each.entry['image_rocauc'])}"
    return curve_chart(rates, hits, axis, "share of defective samples found", title, point)


def _pro_chart(each: ClassReport) -> Markup | None:
    if each.pro is None:
        return None
    areas = ", ".join(f"{number(each.entry['au_pro_exact'][limit])} up to {limit}" for limit in EXACT_LIMITS)
    axis = Axis(0, PRO_LIMIT, (0, 0.05, 0.1, 0.2, PRO_LIMIT), "false positive rate of pixels")
    return curve_chart(*each.pro, axis, "mean overlap with regions", f"PRO curve of {each.name}, area {areas}")
