"""The comparison of two runs as a page: what `utils.comparison.format_comparison` says, with signed bars."""

from collections.abc import Mapping
from pathlib import Path

from utils.comparison import Comparison, MetricDifference, Pair, mean_label, remarks, signed
from utils.html_report.markup import escape, page, write_page
from utils.text_tables import number

LEAST_SCALE = 0.01  # the difference that fills a bar is not below this, lest rounding looks like progress


def write_comparison(path: Path | str, comparison: Comparison) -> None:
    """Write the page, in place of an older one."""
    write_page(path, comparison_page(comparison))


def comparison_page(comparison: Comparison) -> str:
    """The page as text."""
    differences = [pair.difference for metric in comparison.metrics for pair in metric.classes.values()]
    scale = max([LEAST_SCALE, *(abs(each) for each in differences if each is not None)])
    runs = "".join(
        f'<div><dt>{run}</dt><dd class="path">{escape(name)}</dd></div>'
        for run, name in zip("AB", comparison.names, strict=True)
    )
    body = [
        '<header><p class="kicker">Multi-3D-Memory · two runs</p><h1>B against A</h1>'
        f'<dl>{runs}</dl><p class="remarks">Bars: B − A, right and green where B is better; a full one is {scale:.3f}. '
        f"{escape(' '.join(remarks(comparison)))}</p></header><main>"
    ]
    body += [_metric(metric, scale) for metric in comparison.metrics]
    body += [_differing("Arguments", comparison.args), _differing("Versions", comparison.versions), "</main>"]
    return page("B against A", "\n".join(body))


def _metric(metric: MetricDifference, scale: float) -> str:
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
    side, kind = ("up", "gain") if gain > 0 else ("down", "loss")
    kind = kind if signed(gain) != "0.000" else ""
    bar = f'<div class="delta"><i class="{side}" style="--share:{100 * min(abs(gain) / scale, 1):.1f}%"></i></div>'
    return (
        f'<tr {attributes}><th scope="row">{escape(name)}</th><td>{number(pair.a)}</td><td>{number(pair.b)}</td>'
        f'<td class="{kind}">{signed(pair.difference)}{bar}</td></tr>'
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
