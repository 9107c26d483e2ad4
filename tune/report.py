"""The report of a search: one self-contained HTML file that says what was tried, what is best, and whether
it holds.

It is a pure function of the search and its ledger: no clock, no network, no script, so the same ledger gives
the same bytes, while the search still runs or long after. Figures are inline SVG, styles are inline CSS, and
all text goes through Jinja's autoescape.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.report import page_template, write_page
from tune.plan import Plan
from tune.report_confirmation import confirmation_tables
from tune.report_pictures import (
    front_picture,
    history_picture,
    importance_picture,
    parallel_picture,
    tasks_picture,
)
from tune.report_sharing import sharing_section
from tune.report_tables import (
    View,
    best_settings,
    header,
    no_best,
    tiles,
)
from tune.report_trials import references, trial_rows

TEMPLATE = Path(__file__).parent / "templates" / "search.html.j2"


def render_search(plan: Plan) -> str:
    """Return the report of a search as it stands, whether or not it has ended."""
    return page_template(TEMPLATE).render(**_sections(View(plan=plan)))


def write_search_report(plan: Plan, path: Path) -> Path:
    """Render and write; the file appears under its name only when it is whole. Returns `path`."""
    return write_page(render_search(plan), path)


def _sections(view: View) -> dict[str, Any]:
    return {
        "header": header(view),
        "tiles": tiles(view),
        "best": best_settings(view),
        "no_best": no_best(view),
        "confirm_asked": bool(view.search.confirm.seeds),
        "confirmation": confirmation_tables(view),
        "wanted": [{"title": one.title, "better": one.better} for one in view.wanted],
        "history": history_picture(view),
        "by_task": tasks_picture(view),
        "parallel": parallel_picture(view),
        "importance": importance_picture(view),
        "front": front_picture(view),
        "sharing": sharing_section(view.sharing),
        "references": references(view),
        "constraints": [constraint.text for constraint in view.search.constraints],
        "fields": [(field, view.names[field]) for field in view.search.space],
        "trials": trial_rows(view),
    }
