"""A report in a real browser: its charts are drawn, its filters filter, its colours change, and it loads nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from report_run import HOSTILE, make_run

from agpo_megatron import cli

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="no chromium here: bash launch/install.sh --dev installs it as root",
    ),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """The report of a run with hostile texts; whatever the browser complains of, or asks the network for, is in
    ``page.complaints``."""
    from playwright.sync_api import sync_playwright

    run = make_run(tmp_path_factory.mktemp("report") / "run", text=HOSTILE)
    assert cli.main(["report", str(run.path)]) == 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1366, "height": 768})
        page.complaints = []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith("file:") else page.complaints.append(request.url)
            ),
        )
        page.goto((run.path / "report.html").as_uri())
        page.wait_for_function("document.querySelectorAll('.main-svg').length > 0")
        yield page
        browser.close()


def test_every_chart_is_drawn_without_a_complaint(page) -> None:  # type: ignore[no-untyped-def]
    charts = page.evaluate("Object.keys(data.charts)")
    assert {"reward", "accuracy", "gap", "gate", "covariance", "time", "events"} <= set(charts)
    for name in charts:
        place = page.locator(f'[data-chart="{name}"]')
        drawn = place.locator(".scatterlayer .trace, .barlayer .trace, .heatmaplayer .hm")
        traces = page.evaluate(f"data.charts[{name!r}].data.length")
        assert drawn.count() == traces, name
    assert page.title() == "run: report", "nothing of a sample was run"
    assert page.evaluate("document.documentElement.scrollWidth") <= 1366
    assert page.complaints == []


def test_the_filters_leave_the_rows_that_pass(page) -> None:  # type: ignore[no-untyped-def]
    rows = page.locator("#rows tr")
    assert rows.count() == 24
    for fields, left in (
        ({"#step_min": "3"}, 12),
        ({"#step_max": "1"}, 6),
        ({"#length_min": "20", "#length_max": "23"}, 4),
        ({"#reward_min": "1"}, 1),  # (3 + 5) / 8
        ({"#group": "g000000005"}, 3),
    ):
        for field, value in fields.items():
            page.fill(field, value)
        assert rows.count() == left, fields
        assert page.inner_text("#count") == f"{left} of 24 samples"
        page.click("#reset")
    assert rows.count() == 24
    page.select_option("#source", label="words")
    assert rows.count() == 12
    page.select_option("#why", "worst gap")
    assert rows.count() == 11  # of the twenty largest: the first four samples are not among them
    page.click("#reset")
    page.select_option("#order", "largest gap")
    assert rows.first.locator("td").nth(1).inner_text() == "g000000007.2"


def test_the_tokens_take_another_colour(page) -> None:  # type: ignore[no-untyped-def]
    page.select_option("#order", "as in the run")
    page.fill("#group", "g000000007")
    page.locator("#rows tr").nth(2).click()
    tokens = page.locator("#sample .token")
    assert tokens.count() == 45
    assert page.inner_text("#sample .prompt >> nth=0") == f"{HOSTILE} 7"

    def shades() -> list[str]:
        return tokens.evaluate_all("all => all.map(t => t.style.background)")

    page.select_option("#color", "log-prob gap")
    gaps = shades()
    assert gaps[2] == "rgb(226, 84, 72)" and len(set(gaps)) == 2, "the third token has the largest"
    assert page.locator("#sample .token.worst").count() == 1
    page.select_option("#color", "weight version")
    versions = shades()
    assert len(set(versions)) == 2 and versions[0] != versions[-1], "two spans, two versions"
    page.select_option("#color", "advantage")
    assert set(shades()) == {"rgb(72, 168, 118)"}, (
        "one advantage for the whole response, the largest"
    )
    assert "2.5" in page.inner_text("#legend")
    assert page.complaints == []
