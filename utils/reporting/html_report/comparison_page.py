"""The comparison of two runs as a page: what `utils.reporting.comparison.format_comparison` says, with signed bars."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.reporting.comparison import Comparison, MetricDifference, Pair, mean_label, remarks, signed
from utils.reporting.html_report.markup import escape, page, write_page
from utils.reporting.text_tables import number

LEAST_SCALE = 0.01  # the difference that fills a bar is not below this, lest rounding looks like progress


def write_comparison(path: Path | str, comparison: Comparison) -> None:
    """Write the page, in place of an older one."""
    write_page(path, comparison_page(comparison))


def comparison_page(comparison: Comparison) -> str:
    """The page as text."""
    runs = "".join(
        f'<div><dt>{run}</dt><dd class="path">{escape(name)}</dd></div>'
        for run, name in zip("AB", comparison.names, strict=True)
    )
    body = [
        '<header><p class="kicker">Multi-3D-Memory · two runs</p><h1>B against A</h1>'
        f'<dl>{runs}</dl><p class="remarks">Bars: B − A, right and green where B is better; a full one is '
        f"the largest of its metric, {LEAST_SCALE} at least. "
        f"{escape(' '.join(remarks(comparison)))}</p></header><main>"
    ]
    body.append(_overview(comparison.metrics))
    body += [_metric(metric) for metric in comparison.metrics]
    body += [_differing("Arguments", comparison.args), _differing("Versions", comparison.versions), "</main>"]
    return page("B against A", "\n".join(body))


def _overview(metrics: Sequence[MetricDifference]) -> str:
    """The differences alone, classes by metrics."""
    if not metrics:
        return ""
    heads = (re.split(", | at ", metric.title, maxsplit=1) for metric in metrics)
    head = "".join(f"<th scope=col>{escape(name)}<small>{escape(' '.join(rest))}</small></th>" for name, *rest in heads)
    rows = [_overview_row(name, metrics, [metric.classes[name] for metric in metrics]) for name in metrics[0].classes]
    rows.append(_overview_row("Mean", metrics, [metric.mean for metric in metrics], 'class="mean"'))
    return (
        '<section><h2>B − A</h2><div class="scroll" tabindex="0" role="region" aria-label="B − A">'
        f'<table class="overview"><thead><tr><th scope=col>Class</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _overview_row(name: str, metrics: Sequence[MetricDifference], pairs: Sequence[Pair], attributes: str = "") -> str:
    cells = "".join(
        f'<td class="{_kind(metric.sign, pair)}">{signed(pair.difference)}</td>'
        for metric, pair in zip(metrics, pairs, strict=True)
    )
    return f'<tr {attributes}><th scope="row">{escape(name)}</th>{cells}</tr>'


def _kind(sign: int, pair: Pair) -> str:
    """Whether B is better; nothing where that does not show in three decimals."""
    if pair.difference is None or signed(pair.difference) == "0.000":
        return ""
    return "gain" if sign * pair.difference > 0 else "loss"


def _metric(metric: MetricDifference) -> str:
    differences = [pair.difference for pair in metric.classes.values()]
    scale = max([LEAST_SCALE, *(abs(each) for each in differences if each is not None)])
    rows = [_row(name, pair, metric.sign, scale) for name, pair in metric.classes.items()]
    rows.append(_row(mean_label(metric), metric.mean, metric.sign, scale, 'class="mean"'))
    heads = "".join(f"<th scope=col>{head}</th>" for head in ("Class", "A", "B", "B − A"))
    return (
        f'<section><h2>{escape(metric.title)}</h2><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(metric.title)}"><table class="compared"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _row(name: str, pair: Pair, sign: int, scale: float, attributes: str = "") -> str:
    gain = 0.0 if pair.difference is None else sign * pair.difference
    side = "up" if gain > 0 else "down"
    bar = f'<div class="delta"><i class="{side}" style="--share:{100 * min(abs(gain) / scale, 1):.1f}%"></i></div>'
    return (
        f'<tr {attributes}><th scope="row">{escape(name)}</th><td>{number(pair.a)}</td><td>{number(pair.b)}</td>'
        f'<td class="{_kind(sign, pair)}">{signed(pair.difference)}{bar}</td></tr>'
    )


def _differing(title: str, differing: Mapping[str, tuple[str, str]]) -> str:
    if not differing:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td class="path">{escape(a)}</td><td class="path">{escape(b)}</td></tr>'
        for key, (a, b) in differing.items()
    )
    return (
        f'<section><h2>{title} that differ</h2><div class="scroll" tabindex="0" role="region" aria-label="{title}">'
        f"<table class=compared><thead><tr><th scope=col>Name</th><th scope=col>A</th><th scope=col>B</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div></section>"
    )
