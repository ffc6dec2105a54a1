"""The HTML report in a real browser: sorting, charts by mouse and keyboard, light and dark, phones, no network."""

from __future__ import annotations

import json

import pytest
from chromium import Browser
from records_samples import TARGET, a_record
from test_records_page import HOSTILE, SOTU, a_hundred, seeds, two_rows

from nanorun.records.page import render_page
from nanorun.records.report import TrackView, build_table

pytestmark = pytest.mark.slow
CURVES = '[data-chart="curves-0"]'


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Two tracks, a hundred records, and hostile ones, each as the address of a file."""
    folder = tmp_path_factory.mktemp("pages")
    other = TrackView("other", TARGET, "seconds", SOTU.rule)
    records = [*two_rows(), *seeds(2, name="soap", seconds=50.0, final=1.62), *seeds(track="other")]
    hostile = [a_record(name=text, optimizer=text, config={text: text}) for text in HOSTILE]
    texts = {
        "two": render_page([build_table(SOTU, records), build_table(other, records)]),
        "hundred": render_page([build_table(SOTU, a_hundred())]),
        "hostile": render_page([build_table(SOTU, hostile)], summaries={"sotu": HOSTILE[0]}),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: (folder / f"{name}.html").as_uri() for name in texts}


@pytest.fixture
def opened(browser, pages):
    """The page of two tracks, freshly opened in a wide and light window; at the end nothing was complained of."""
    browser.prefer(prefers_color_scheme="light")
    browser.resize(1280)
    browser.open(pages["two"])
    yield browser
    assert complaints(browser) == []


def complaints(browser: Browser) -> list[dict]:
    """Errors, refusals by the policy and anything else in the console."""
    return browser.named("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")


def names(browser: Browser) -> list[str]:
    return browser.run("[...document.querySelectorAll('#t0 tbody th')].map(cell => cell.innerText.trim())")


def reading(browser: Browser, figure: str = CURVES) -> str | None:
    """What the chart's reading says, or None while it is hidden."""
    box = f"document.querySelector('{figure} .reading')"
    return browser.run(f"{box}.hidden ? null : {box}.innerText")


def drawn(browser: Browser) -> list[str]:
    """The lines that the chart of curves draws, by their number."""
    return browser.run(
        f"[...document.querySelectorAll('{CURVES} .line[data-line]')].map(line => line.dataset.line)"
    )


def sort_by(browser: Browser, column: int) -> str:
    browser.click(f"#t0 thead th:nth-child({column}) button")
    return browser.run(
        f"document.querySelector('#t0 thead th:nth-child({column})').getAttribute('aria-sort')"
    )


def test_a_click_on_a_title_sorts_by_it_and_a_second_one_backwards(opened):
    assert names(opened) == ["muon", "adamw", "soap"]
    assert sort_by(opened, 9) == "ascending"
    assert names(opened) == ["muon", "adamw", "soap"]
    assert sort_by(opened, 9) == "descending"
    assert names(opened) == ["soap", "muon", "adamw"]
    assert opened.run("document.querySelector('#t0 .said').textContent") == "Sorted by final loss, descending"
    assert sort_by(opened, 2) == "ascending"
    assert names(opened) == ["adamw", "muon", "soap"]
    assert opened.run("document.querySelectorAll('#t0 [aria-sort]').length") == 1


def test_what_has_no_value_is_last_whichever_way_a_column_is_sorted(opened):
    assert sort_by(opened, 1) == "descending"
    assert names(opened) == ["adamw", "muon", "soap"]
    assert sort_by(opened, 6) == "ascending"
    assert names(opened)[-1] == "soap"
    assert sort_by(opened, 6) == "descending"
    assert names(opened)[-1] == "soap"


def test_the_table_is_sorted_from_the_keyboard(opened):
    opened.run("document.querySelector('#t0 thead th:nth-child(2) button').focus()")
    opened.press("Enter")
    assert names(opened) == ["adamw", "muon", "soap"]


def test_the_legend_hides_and_shows_lines(opened):
    assert sorted(drawn(opened)) == ["0", "1", "2"]
    opened.click(f'{CURVES} .legend [data-line="1"]')
    assert sorted(drawn(opened)) == ["0", "2"]
    pressed = f"document.querySelector('{CURVES} .legend [data-line=\"1\"]').getAttribute('aria-pressed')"
    assert opened.run(pressed) == "false"
    opened.run(f"document.querySelector('{CURVES} .legend [data-line=\"1\"]').focus()")
    opened.press("Enter")
    assert opened.run(pressed) == "true"
    assert sorted(drawn(opened)) == ["0", "1", "2"]


def test_the_mouse_reads_the_nearest_point(opened):
    line = f"document.querySelector('{CURVES} .line[data-line=\"0\"]')"
    opened.run(
        f"document.querySelector('{CURVES} .plot').scrollIntoView({{block: 'center', behavior: 'instant'}})"
    )
    x, y = opened.run(
        f"(() => {{ const line = {line}, end = line.getPointAtLength(line.getTotalLength());"
        "const at = new DOMPoint(end.x, end.y).matrixTransform(line.getScreenCTM()); return [at.x, at.y] })()"
    )
    assert reading(opened) is None
    opened.move_to(x - 4, y + 6)
    assert (
        reading(opened)
        == "muon\nloss 1.5410 (1.5400 to 1.5420, 3 seeds)\n31.4 s · step 1,000 · 4.096M tokens"
    )
    opened.move_to(5, 5)
    assert reading(opened) is None


def test_the_arrow_keys_read_along_a_line_and_from_line_to_line(opened):
    opened.run(f"document.querySelector('{CURVES} .plot').focus()")
    opened.press("End")
    assert reading(opened).startswith("muon\nloss 1.5410")
    opened.press("ArrowLeft")
    assert "step 900" in reading(opened)
    opened.press("ArrowDown")
    assert reading(opened).startswith("adamw\n")
    opened.press("ArrowUp")
    assert reading(opened).startswith("muon\n")
    opened.press("Home")
    assert "loss 5.5000" in reading(opened)
    said = opened.run(f"document.querySelector('{CURVES} .said').textContent")
    assert said.startswith("muon, loss 5.5000")
    opened.press("Escape")
    assert reading(opened) is None


def test_the_history_and_the_profiles_are_read_too(opened):
    opened.run("document.querySelector('[data-chart=\"history-0\"] .plot').focus()")
    opened.press("Home")
    assert reading(opened, '[data-chart="history-0"]') == "adamw\n45.4 s (2026-11-20 12:00 UTC)"
    opened.run("document.querySelector('[data-chart=\"profiles\"] .plot').focus()")
    opened.press("End")
    assert reading(opened, '[data-chart="profiles"]') == "muon\n100 % within τ = 4.00"


@pytest.mark.parametrize(
    ("axis", "title"), [("steps", "steps"), ("tokens", "tokens"), ("seconds", "counted seconds")]
)
def test_the_axis_can_be_chosen(opened, axis, title):
    opened.run(f"document.querySelector('{CURVES} input[value=\"{axis}\"]').click()")
    assert opened.run(f"document.querySelector('{CURVES} .axis-name').textContent") == title
    opened.run(f"document.querySelector('{CURVES} .plot').focus()")
    opened.press("End")
    assert reading(opened).startswith("muon\nloss 1.5410")


def test_the_whole_run_shows_the_first_loss(opened):
    ticks = f"[...document.querySelectorAll('{CURVES} .tick[text-anchor=end]')].map(tick => tick.textContent)"
    assert max(map(float, opened.run(ticks))) < 2
    opened.run(f"document.querySelector('{CURVES} input[value=whole]').click()")
    assert max(map(float, opened.run(ticks))) >= 5


def test_a_card_opens_with_its_facts_its_config_and_its_curve(opened):
    assert opened.run("document.querySelectorAll('.card-body').length") == 0
    opened.click(".card summary")
    opened.wait("document.querySelectorAll('.card-body .line').length === 1")
    text = opened.run("document.querySelector('.card-body').innerText")
    for fact in ("Intel Xeon @ 2.80GHz", "training, counted", "31.0 s", "optim.matrix.lr = 0.02", "a" * 40):
        assert fact in text
    opened.click(".card summary")
    opened.click(".card summary")
    assert opened.run("document.querySelectorAll('.card-body').length") == 1


def test_the_address_of_a_record_opens_its_card(browser, pages):
    browser.open(pages["two"])
    name = browser.run("document.querySelectorAll('.card')[4].id")
    browser.run(f"location.hash = {json.dumps(name)}")
    browser.wait("document.querySelectorAll('.card')[4].querySelector('.card-body') !== null")


def test_light_and_dark_follow_the_system_and_the_button(opened):
    ground = "getComputedStyle(document.body).backgroundColor"
    pressed = "document.querySelector('.theme').getAttribute('aria-pressed')"
    assert (opened.run(ground), opened.run(pressed)) == ("rgb(255, 255, 255)", "false")
    opened.prefer(prefers_color_scheme="dark")
    opened.settle()
    assert (opened.run(ground), opened.run(pressed)) == ("rgb(19, 21, 25)", "true")
    opened.click(".theme")
    assert (opened.run(ground), opened.run(pressed)) == ("rgb(255, 255, 255)", "false")
    opened.run("try { localStorage.clear() } catch {}; delete document.documentElement.dataset.theme")


def test_nothing_moves_where_that_is_asked_for(browser, pages):
    durations = (
        "new Set([...document.querySelectorAll('*')].flatMap(node => ['::before', null].map("
        "part => getComputedStyle(node, part).transitionDuration))).size"
    )
    browser.prefer(prefers_reduced_motion="reduce")
    browser.open(pages["two"])
    assert browser.run(durations) == 1
    assert browser.run("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    browser.prefer(prefers_reduced_motion="no-preference")
    assert browser.run(durations) == 2


def test_the_skip_link_is_first_and_every_stop_of_the_keyboard_can_be_seen(opened):
    opened.run("document.activeElement.blur()")
    opened.press("Tab")
    assert opened.run("document.activeElement.className") == "skip"
    opened.wait("document.activeElement.getBoundingClientRect().top >= 0")
    unseen = []
    for _ in range(30):
        opened.press("Tab")
        outline = opened.run(
            "(() => { const node = document.activeElement; const shown = node.matches('.switch input') ? "
            "node.nextElementSibling : node; const style = getComputedStyle(shown); "
            "const seen = style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2; "
            "return seen ? '' : node.outerHTML.slice(0, 90) })()"
        )
        if outline:
            unseen.append(outline)
    assert unseen == []


@pytest.mark.parametrize("name", ["two", "hundred", "hostile"])
@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_no_page_scrolls_sideways(browser, pages, name, width):
    browser.resize(width, mobile=width < 500)
    browser.open(pages[name])
    browser.run("document.querySelectorAll('.card').forEach((card, place) => { card.open = place < 3 })")
    browser.run("document.querySelectorAll('.notes').forEach(notes => { notes.open = true })")
    browser.settle()
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.querySelector('.scroll').scrollWidth") >= 288
    assert complaints(browser) == []


@pytest.mark.parametrize("name", ["two", "hundred", "hostile"])
def test_a_page_asks_for_nothing_but_itself(browser, pages, name):
    browser.open(pages[name])
    browser.run("document.querySelectorAll('.card').forEach(card => { card.open = true })")
    browser.settle()
    requests = [event["request"]["url"] for event in browser.named("Network.requestWillBeSent")]
    assert [url for url in requests if not url.startswith("data:image/svg+xml,")] == [pages[name]]
    assert complaints(browser) == []


def test_what_hostile_records_hold_is_shown_as_text_and_never_run(browser, pages):
    browser.open(pages["hostile"])
    browser.run("document.querySelectorAll('.card').forEach(card => { card.open = true })")
    browser.settle()
    text = browser.run("document.body.innerText")
    assert "<img src=x onerror=alert(1)>" in text
    assert '<img src=x onerror=alert(1)> = "<img src=x onerror=alert(1)>"' in text
    assert browser.run("document.querySelectorAll('img, iframe, object, b > b').length") == 0
    assert browser.run("document.scripts.length") == 2
    assert browser.named("Page.javascriptDialogOpening") == []


def test_the_policy_refuses_a_script_that_got_in_and_a_load_from_elsewhere(browser, pages):
    browser.open(pages["two"])
    browser.run(
        "(() => { const [script, image] = ['script', 'img'].map(name => document.createElement(name));"
        "script.textContent = 'window.owned = 1'; image.src = 'https://example.invalid/x.png';"
        "document.body.append(script, image);"
        "document.body.setAttribute('onclick', 'window.owned = 2'); document.body.click(); })()"
    )
    browser.settle()
    assert browser.run("window.owned === undefined")
    refusals = " ".join(event["entry"]["text"] for event in browser.named("Log.entryAdded"))
    assert "img-src" in refusals
    assert "script-src" in refusals


def test_without_script_the_table_and_the_curves_can_be_seen(browser, pages):
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.events.clear()
        browser.send("Page.navigate", url=pages["two"])
        browser.wait("document.readyState === 'complete'")
        assert names(browser) == ["muon", "adamw", "soap"]
        curve = f"document.querySelector('{CURVES} path.line.k0').getBoundingClientRect()"
        box = browser.run(f"[{curve}.width, {curve}.height]")
        assert min(box) > 20
        assert browser.run("getComputedStyle(document.querySelector('.theme')).display") == "none"
        assert "record.json" in browser.run("document.querySelector('noscript').innerText")
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)


def test_a_hundred_records_begin_with_the_best_eight_lines(browser, pages):
    browser.resize(1280)
    browser.open(pages["hundred"])
    assert len(drawn(browser)) == 8
    browser.click(f'{CURVES} [data-show="all"]')
    assert len(drawn(browser)) == 34
    browser.click(f'{CURVES} [data-show="none"]')
    assert drawn(browser) == []
