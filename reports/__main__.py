"""Write a page, or the tables of a README, from rows that were measured before.

    python -m rbe_gpu.reports ROWS.csv --out DIR [--readme README.md]

Rows of quality per byte give quality.html, rows of speed and memory index.html, and those of
`python -m rbe_gpu.reports.quality.small_good_fast` small-good-fast.html.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rbe_gpu import output

from .harness.readme import Block
from .harness.rows import Row, read_rows
from .quality import page as quality_page
from .quality import readme as quality_readme
from .quality.small_good_fast import page as choice_page
from .quality.small_good_fast.measure import OP
from .speed import page as speed_page
from .speed import readme as speed_readme


def _of(rows: list[Row]) -> tuple[Any, Block | None]:
    """The page of the rows, and the README's tables of them."""
    ops = {r.op for r in rows}
    if OP in ops:
        return choice_page, None
    return (quality_page, quality_readme.BLOCK) if "quality" in ops else (speed_page, speed_readme.BLOCK)


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rbe_gpu.reports",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", type=Path, help="a results file, such as results.csv or quality.csv")
    parser.add_argument("--out", type=Path, help="folder for the page, plots/ and the rows")
    parser.add_argument(
        "--readme",
        type=Path,
        action="append",
        default=[],
        help="a Markdown file whose tables are regenerated",
    )
    options = parser.parse_args(arguments)
    if options.out is None and not options.readme:
        parser.error("nothing to write: give --out, or --readme")
    try:
        rows = read_rows(options.rows)
        page, block = _of(rows)
        if options.out is not None:
            print(f"{page.write(rows, options.out)} written")
            copy = options.out / page.FILE
            if not (copy.exists() and copy.samefile(options.rows)):
                output.write_text(copy, options.rows.read_text(encoding="utf-8"))
        for readme in options.readme:
            if block is None:
                raise ValueError(f"no tables of a README are made from {options.rows}; give --out alone")
            changed = block.update(readme, rows, options.rows)
            print(f"{readme}: {'tables updated' if changed else 'up to date'}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
