"""Compare the results.json files of runs: the arguments and decisions that differ, and the metrics of each class.

python utils/report.py A/results.json B/results.json --output compare.html
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from utils.command_line import Parser
from utils.errors import InputError
from utils.reporting.messages import exit_on_error, show, start_messages


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Print the comparison of results.json files and write it as a page."""
    parser = Parser(__doc__)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="results.json", help="results of runs, the baseline first"
    )
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="HTML page of the comparison")
    args = parser.parse_args(argv)
    start_messages("%(message)s")
    from utils.reporting.comparison import compare, comparison_page, format_comparison
    from utils.reporting.html_report.page import write_page

    if len(args.runs) < 2:
        raise InputError(f"{args.runs[0]} is the only run. Add the results.json of another run.")
    if args.output.is_dir():
        raise InputError(f"--output {args.output} is a folder. Name a file in it, such as compare.html.")
    if args.output.resolve() in [path.resolve() for path in args.runs]:
        raise InputError(f"--output {args.output} would replace one of the results.json files. Choose another file.")
    comparison = compare(args.runs)
    for line in format_comparison(comparison).split("\n"):
        show(line)
    write_page(args.output, comparison_page(comparison))
    show("")
    show(f"written to {args.output}")


if __name__ == "__main__":
    main()
