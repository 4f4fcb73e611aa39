"""report.html: one run of one method, from the summary to the single part, in a file of its own."""

import base64
import gzip
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from utils.metrics import EXACT_LIMITS, REFERENCE_LIMIT, REFERENCE_THRESHOLDS, mean_of_known
from utils.reporting.html_report.charts import Axis, Point, curve_chart, histogram
from utils.reporting.html_report.class_report import PRO_LIMIT, ClassReport
from utils.reporting.html_report.gallery import CORRECT_PASS, FALSE_ALARM, HIT, MISS, UNJUDGED, WRONG, heat_colors
from utils.reporting.html_report.markup import asset, bar_cell, data_element, escape, page, write_page
from utils.reporting.html_report.published import Published, published_figures
from utils.reporting.text_tables import UNDEFINED, number

FILE_NAME = "report.html"
OUTCOMES = (MISS, FALSE_ALARM, HIT, CORRECT_PASS)
CALIBRATED = (("precision", "Precision"), ("recall", "Recall"), ("false_alarm_rate", "False alarms"))

STAGES = {
    "extract": "features of training, validation and test parts, once for all methods of a run",
    "fuse": "fitting of decision fusion",
    "calibrate": "scores and maps of the good parts, and the thresholds from these",
}


def write_report(
    output_dir: Path | str, record: Mapping[str, Any], classes: Sequence[ClassReport], note: str | None = None
) -> None:
    """Write report.html into `output_dir`, in place of an older one.

    Args:
        output_dir: the method's folder.
        record: the content of results.json, see `utils.report.results_record`.
        classes: those of the record, in its order.
        note: a sentence on backbones and protocol.
    """
    write_page(Path(output_dir) / FILE_NAME, report_page(record, classes, note))


def report_page(record: Mapping[str, Any], classes: Sequence[ClassReport], note: str | None = None) -> str:
    """The page as text; arguments as in `write_report`."""
    method = str(record["args"].get("method_name", "?"))
    shown = [{"class": each.name, **part} for each in classes for part in each.parts]
    shown.sort(key=lambda part: part["outcome"] not in WRONG)  # those of all classes first; else as they were
    with_cloud = any(part["cloud"] for part in shown)
    body = [_header(method, record, note), _contents(classes, shown), '<main id="main">', _summary(record, classes)]
    body += [_class_section(each, f"class-{number}") for number, each in enumerate(classes)]
    body += [_timing(classes), _gallery(classes) if shown else "", "</main>", asset("viewer.html") if shown else ""]
    plot_library, script = "", ""
    if shown:
        script = asset("report.js")
        body.append(data_element("parts", {"parts": shown, "heat": heat_colors()}))
    if with_cloud:
        plot_library, packed = _plotly()
        body.append(f'<script type="text/plain" id="plotly">{packed}</script>')
    return page(f"{method}: {', '.join(each.name for each in classes)}", "\n".join(body), script, (plot_library,))


@cache
def _plotly() -> tuple[str, str]:
    """The source of plotly.js, and the same as base64 of gzip: 1.9 MB instead of 4.8, and no work before it is used."""
    from plotly.offline import get_plotlyjs  # here, because importing it takes longer than all the rest

    source = get_plotlyjs()
    return source, base64.b64encode(gzip.compress(source.encode(), mtime=0)).decode()


def _header(method: str, record: Mapping[str, Any], note: str | None) -> str:
    args = record["args"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    now = datetime.now().astimezone()
    facts = {
        "Setting": escape(note or UNDEFINED),
        "Dataset": f"{escape(args.get('dataset_type', '?'))} in <code>{escape(args.get('dataset_path', '?'))}</code>",
        "Written": f'<time datetime="{now.isoformat(timespec="seconds")}">{now:%Y-%m-%d %H:%M}</time>',
    }
    rows = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    title = escape(method).replace("+", "+<wbr>")  # where a phone may break it
    return (
        '<a class="skip" href="#main">Skip to the results</a>'
        f'<header><p class="kicker">Multi-3D-Memory · report of a run</p><h1>{title}</h1><dl>{rows}</dl>'
        f"<details><summary>Command, versions</summary><pre>{escape(shlex.join(map(str, record['command'])))}</pre>"
        f"<p>{escape(versions)}</p></details></header>"
    )


def _contents(classes: Sequence[ClassReport], shown: Sequence[object]) -> str:
    places = {"summary": "Summary", **{f"class-{number}": each.name for number, each in enumerate(classes)}}
    places |= {"timing": "Time"} | ({"gallery": "Parts"} if shown else {})
    links = "".join(f'<a href="#{place}">{escape(title)}</a>' for place, title in places.items())
    return f'<nav class="contents" aria-label="Contents">{links}</nav>'


def _summary(record: Mapping[str, Any], classes: Sequence[ClassReport]) -> str:
    published = published_figures(record["args"], record["classes"])
    curves = [f"AU-PRO {REFERENCE_LIMIT}<small>{REFERENCE_THRESHOLDS} thresholds</small>"]
    curves += [f"AU-PRO {limit}<small>exact curve</small>" for limit in EXACT_LIMITS]
    heads = ["I-AUROC", "P-AUROC", *curves, "F1<small>best</small>"]
    heads += [f"{title}<small>calibrated</small>" for _, title in CALIBRATED]
    rows = [_row(each.name, each.entry, published.classes.get(each.name) if published else None) for each in classes]
    mean = dict(record["mean"])
    for key in ("f1", *(key for key, _ in CALIBRATED)):
        mean[key] = mean_of_known(each.entry.get(key) for each in classes)
    rows.append(_row("Mean", mean, published.mean if published else None, 'class="mean"'))
    return (
        '<section aria-labeledby="summary"><h2 id="summary">Summary</h2>'
        '<div class="scroll" tabindex="0" role="region" aria-labeledby="summary"><table class="figures"><thead><tr>'
        f'<th scope="col">Class</th>{"".join(f"<th scope=col>{head}</th>" for head in heads)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{_remarks(published, UNDEFINED in ''.join(rows))}</section>"
    )


def _row(name: str, figures: Mapping[str, Any], published: Mapping[str, float] | None, attributes: str = "") -> str:
    published = published or {}

    def cell(key: str) -> str:
        return bar_cell(figures.get(key), f"published {number(published[key])}" if key in published else "")

    cells = [cell(key) for key in ("image_rocauc", "pixel_rocauc", "au_pro")]
    cells += [bar_cell(figures["au_pro_exact"][limit]) for limit in EXACT_LIMITS]
    cells += [cell(key) for key in ("f1", "precision", "recall")]
    cells.append(bar_cell(figures.get("false_alarm_rate"), kind="less"))
    return f'<tr {attributes}><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>'


def _remarks(published: Published | None, undefined: bool) -> str:
    remarks = [
        "F1: the best that any threshold gives on these very parts. Calibrated: at the threshold that each class names."
    ]
    if published is not None and (published.classes or published.mean):
        remarks.append(f"Published: {escape(published.source)}; its AU-PRO is the one of 100 thresholds.")
    if undefined:
        remarks.append(
            f"{UNDEFINED}: undefined for want of defective or of good data, precision also where no part is called "
            "defective, and calibrated figures where no threshold was calibrated; left out of the mean."
        )
    return f'<p class="remarks">{" ".join(remarks)}</p>'


def _class_section(each: ClassReport, place: str) -> str:
    counts = [
        f"<b>{escape(each.outcomes.get(name, 0))}</b> {_plural(name, each.outcomes.get(name, 0))}" for name in OUTCOMES
    ]
    if each.decision is None:
        counts = [f"<b>{each.total}</b> parts, no threshold"]
    else:
        counts[-1] += f"<br>Threshold {each.decision.threshold:.4g}: {escape(each.decision.source)}"
    figures = [_roc_figure(each), _pro_figure(each), _histogram_figure(each)]
    return (
        f'<section aria-labeledby="{place}"><h2 id="{place}">{escape(each.name)}</h2>'
        f'<p class="counts">{" · ".join(counts)}</p><div class="figures-row">{"".join(figures)}</div></section>'
    )


def _plural(name: str, count: int) -> str:
    if count == 1:
        return name
    return {MISS: "misses", CORRECT_PASS: "correct passes"}.get(name, name + "s")


def _figure(chart: str, title: str, caption: str) -> str:
    return f"<figure><figcaption><b>{title}</b> {escape(caption)}</figcaption>{chart}</figure>"


def _undefined_figure(title: str, want: str) -> str:
    return f'<figure><figcaption><b>{title}</b></figcaption><p class="undefined">{UNDEFINED}: {want}</p></figure>'


def _roc_figure(each: ClassReport) -> str:
    if each.roc is None:
        return _undefined_figure("ROC of whole parts", "it needs good and defective parts")
    point = None
    if each.decision is not None:
        good, bad = len(each.good_scores), len(each.defective_scores)
        alarms, hits = each.outcomes.get(FALSE_ALARM, 0) / good, each.outcomes.get(HIT, 0) / bad
        point = Point(alarms, hits, "threshold")
    value = number(each.entry["image_rocauc"])
    axis = Axis(0, 1, (0, 0.25, 0.5, 0.75, 1), "false-alarm rate")
    chart = curve_chart(*each.roc, axis, "share of defective parts found", f"ROC curve of {each.name}, {value}", point)
    return _figure(chart, "ROC of whole parts", f"area {value}")


def _pro_figure(each: ClassReport) -> str:
    if each.pro is None:
        return _undefined_figure("PRO of regions", "it needs defective and good pixels")
    exact = each.entry["au_pro_exact"]
    values = ", ".join(f"{number(exact[limit])} to {limit}" for limit in EXACT_LIMITS)
    axis = Axis(0, PRO_LIMIT, (0, 0.05, 0.1, 0.2, PRO_LIMIT), "false positive rate of pixels")
    chart = curve_chart(*each.pro, axis, "mean overlap with regions", f"PRO curve of {each.name}, area {values}")
    return _figure(chart, "PRO of regions", f"exact curve; area {values}")


def _histogram_figure(each: ClassReport) -> str:
    threshold = None if each.decision is None else each.decision.threshold
    good, bad = len(each.good_scores), len(each.defective_scores)
    title = f"Histogram of the scores of {each.name}: {good} good, {bad} defective parts"
    if threshold is not None:
        title += f", threshold {threshold:.4g}"
    chart = histogram(each.good_scores, each.defective_scores, threshold, title)
    legend = f'<span class="key good"></span>{good} good <span class="key defective"></span>{bad} defective'
    return f"<figure><figcaption><b>Image scores</b> {legend}</figcaption>{chart}</figure>"


def _timing(classes: Sequence[ClassReport]) -> str:
    longest = max(sum(each.entry["seconds"].values()) for each in classes) or 1.0
    stages = dict.fromkeys(chain.from_iterable(each.entry["seconds"] for each in classes))
    latencies = [each.entry.get("latency") for each in classes]
    heads = ["Class", "Seconds", *(escape(stage.capitalize()) for stage in stages)]
    heads += ["Latency of a part<small>median · 95 % · 99 %</small>"] * any(latencies) + ["Peak memory"]
    rows = []
    for each, latency in zip(classes, latencies, strict=True):
        seconds, memory = each.entry["seconds"], each.entry["peak_memory_mb"]
        bars = "".join(
            f'<i class="stage-{k}" style="width:{100 * seconds.get(stage, 0) / longest:.2f}%"></i>'
            for k, stage in enumerate(stages)
        )
        cells = [f'<td class="stages"><span>{sum(seconds.values()):.1f} s</span><div>{bars}</div></td>']
        cells += [
            f'<td><span class="key stage-{k}"></span>{seconds.get(stage, 0):.1f} s</td>'
            for k, stage in enumerate(stages)
        ]
        if any(latencies):
            values = " · ".join(f"{1000 * latency[key]:.0f}" for key in ("p50", "p95", "p99")) if latency else UNDEFINED
            cells.append(f"<td>{values} ms</td>")
        cells.append(f"<td>{memory / 1024:.2f} GiB</td>")
        rows.append(f'<tr><th scope="row">{escape(each.name)}</th>{"".join(cells)}</tr>')
    head = "".join(f"<th scope=col>{head}</th>" for head in heads)
    remarks = [f"{stage.capitalize()}: {STAGES[stage]}." for stage in stages if stage in STAGES]
    return (
        '<section aria-labeledby="timing"><h2 id="timing">Time and memory</h2>'
        '<div class="scroll" tabindex="0" role="region" aria-labeledby="timing"><table class="timing">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="remarks">{" ".join(remarks)} Peak memory: of the run so far.</p></section>'
    )


def _gallery(classes: Sequence[ClassReport]) -> str:
    parts = list(chain.from_iterable(each.parts for each in classes))
    shown = ", ".join(f"{len(each.parts)} of {each.total} of {escape(each.name)}" for each in classes)
    filters = {
        "class": [each.name for each in classes],
        "defect": sorted({part["defect"] for part in parts}),
        "outcome": [name for name in (*OUTCOMES, UNJUDGED) if any(part["outcome"] == name for part in parts)],
    }
    controls = "".join(
        f'<label>{name.capitalize()} <select data-filter="{name}"><option value="">all</option>'
        + "".join(f'<option value="{escape(value)}">{escape(value)}</option>' for value in values)
        + "</select></label>"
        for name, values in filters.items()
    )
    return (
        '<section aria-labeledby="gallery"><h2 id="gallery">Parts</h2>'
        f'<p class="remarks">Shown: {shown}. Misses and false alarms come first, class by class, the worst of each '
        "ahead, then the others, nearest to the threshold first. Arrow keys walk from part to part, Enter opens one, "
        "Esc closes it.</p>"
        f'<form class="filters">{controls}<output id="count" aria-live="polite"></output></form>'
        "<noscript><p>The pictures of the parts need JavaScript; the tables and charts above do not.</p></noscript>"
        '<ul class="cards" id="cards"></ul></section>'
    )
