"""The page in a real browser: it works from a file, sorts, filters, compares, and asks nobody for anything."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from leaderboard_runs import row, run_of, trials

from metabench.leaderboard import leaderboard

api = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright, which is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("the page is tested in chromium, which is not installed", allow_module_level=True)
HOSTILE = "</script><b>x"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    rng = np.random.default_rng(0)
    tables = {"protonet": (0.9, "5w1s1q*10"), "maml": (0.7, "5w1s1q*10"), "chance": (0.2, "")}
    rows = [row(name, s, x, train=t) for name, (m, t) in tables.items() for s, x in enumerate(trials(rng, m))]
    for name, slow in (("protonet", 1.0), ("maml", 4.0)):
        rows.append(row(name, 0, list(0.01 * slow * rng.uniform(0.9, 1.1, 5)), measure="adapt_time"))
    rows.append(row("reptile", 0, [], status="diverged"))
    path = run_of(out, rows)
    (path / "submission.json").write_text(json.dumps({"submitter": HOSTILE}))
    return leaderboard([path], out / "site").page


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, site):
    """The page, opened; at the end nothing was complained of, and nothing but the file was asked for."""
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    opened = context.new_page()
    said, asked = [], []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(site.as_uri())
    yield opened
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [site.as_uri()]
    context.close()


def column(page, number):
    return page.locator(f".standings tbody tr:visible > :nth-child({number})").all_inner_texts()


def names(page):
    return [text.split("\n")[0] for text in column(page, 2)]


def test_it_sorts_by_a_column_both_ways_with_missing_values_last(page):
    assert names(page) == ["protonet", "maml", "chance", "reptile"]
    head = page.locator(".standings thead th", has_text="accuracy")
    assert head.get_attribute("aria-sort") == "descending", "so do the rows come"
    for wanted in ("ascending", "descending"):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == wanted
    assert names(page) == ["protonet", "maml", "chance", "reptile"]
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert names(page) == ["chance", "maml", "protonet", "reptile"]
    assert page.locator(".standings th[aria-sort]").count() == 1


def test_it_filters_and_says_how_many_rows_are_left(page):
    page.get_by_label("Filter", exact=True).fill("MAML")
    assert names(page) == ["maml"]
    assert page.locator(".count").inner_text() == "1 of 4 rows"
    page.get_by_label("Filter", exact=True).fill("")
    page.get_by_label("controls").uncheck()
    assert "chance" not in names(page)
    page.get_by_label("Trust").select_option("recomputed")
    assert names(page) == []


def test_it_compares_two_methods_with_an_interval_and_a_histogram(page):
    outcome = page.locator(".outcome")
    text = outcome.inner_text()
    assert "protonet" in text and "over 3 shared seeds and 40 episodes" in text and "Told apart" in text
    assert page.locator(".histogram rect").count() > 1
    forward = float(text.split(": ")[1].split(" ")[0].replace("−", "-"))
    page.get_by_label("first").select_option(index=1)
    assert "Choose two different methods" in outcome.inner_text()
    page.get_by_label("second").select_option(index=0)
    backward = float(outcome.inner_text().split(": ")[1].split(" ")[0].replace("−", "-"))
    assert forward == pytest.approx(-backward) and forward > 10
    bars = page.locator(".histogram rect").evaluate_all("rs => rs.map(r => Number(r.getAttribute('height')))")
    assert all(height > 0 for height in bars)


def test_a_row_opens_its_protocol_and_closes_by_keyboard(page):
    card = page.locator("[popover]").first
    assert not card.is_visible()
    page.locator(".standings .name").first.click()
    assert card.is_visible() and "episodes hash" in card.inner_text()
    focused = "name => document.activeElement.className === name"
    page.wait_for_function(focused, arg="close")  # a reader without eyes is in it
    page.keyboard.press("Escape")
    assert not card.is_visible()
    page.wait_for_function(focused, arg="name")  # and back where it was opened


def test_it_fits_a_phone_and_follows_the_dark_scheme(browser, site):
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme="dark")
    opened = context.new_page()
    opened.goto(site.as_uri())
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360
    assert opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 20, 25)"
    context.close()


def test_text_of_pictures_is_as_large_on_a_phone_as_it_was_laid_out_for(browser, site):
    context = browser.new_context(viewport={"width": 360, "height": 740})
    opened = context.new_page()
    opened.goto(site.as_uri())
    for name in (".plot", ".histogram svg"):
        scale = "s => s.getBoundingClientRect().width / s.viewBox.baseVal.width"
        assert opened.locator(name).first.evaluate(scale) == pytest.approx(1), name
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360, "they scroll in their own boxes"
    context.close()


def test_pairs_of_too_few_and_of_unshared_seeds_say_so(browser, tmp_path):
    rng = np.random.default_rng(1)
    rows = [row("protonet", s, x) for s, x in enumerate(trials(rng, 0.9))]
    rows += [row("maml", 7 + s, x) for s, x in enumerate(trials(rng, 0.7))]
    rows += [row("anil", s, x) for s, x in enumerate(trials(rng, 0.6, seeds=2))]
    context = browser.new_context()
    opened = context.new_page()
    opened.goto(leaderboard([run_of(tmp_path, rows)], tmp_path / "site").page.as_uri())
    outcome = opened.locator(".outcome")
    assert "over the seeds of each and 40 episodes. Told apart" in outcome.inner_text()
    opened.get_by_label("second").select_option(index=2)
    assert "over 2 shared seeds and 40 episodes. Too few seeds to test." in outcome.inner_text()
    opened.get_by_label("first").select_option(index=1)
    assert "there is no difference to tell" in outcome.inner_text() and "told apart" not in outcome.inner_text().lower()
    context.close()


def test_a_reader_without_eyes_finds_tables_labels_and_names(page):
    assert page.locator("table:not(:has(caption))").count() == 0
    assert page.locator("table thead th:not([scope])").count() == 0
    assert page.locator("svg[role=img]:not([aria-label])").count() == 0
    unnamed = "els => els.filter(e => !e.labels?.length && !e.ariaLabel).length"
    assert page.locator("input, select").evaluate_all(unnamed) == 0
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_text_of_others_stays_text(page):
    assert page.locator("b", has_text="x").count() == 0
    assert page.get_by_text(HOSTILE).count() > 0
