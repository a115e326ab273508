"""Facts about the pages in a real browser: no errors, no requests, no sideways scrolling, and controls that do what they say."""

import pytest
from chromium import NAMES, Browser, find
from page_examples import make_cross_eval, make_run

from tdpo_cli.report import cross_eval_page, html
from tdpo_cli.report import report as reporting

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find() is None, reason=f"no browser found: none of {', '.join(NAMES)}")]

PHONE, DESKTOP = 390, 1280


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    try:
        started = Browser(tmp_path_factory.mktemp("profile"))
    except (RuntimeError, OSError) as error:
        pytest.skip(f"{find()} does not start: {error}")
    yield started
    started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Name -> file."""
    folder = tmp_path_factory.mktemp("pages")
    runs = {
        "run": {"run__preview_images": 4},
        "ddpo": {"algorithm__name": "ddpo", "epochs": 9},
        "one-epoch": {"epochs": 1},
        "nothing-yet": {"epochs": 0},
    }
    made = {}
    for name, settings in runs.items():
        reporting.write(make_run(folder / name, **settings), folder / f"{name}.html")
        made[name] = folder / f"{name}.html"
    for name, shape in {"eval": {}, "eval-one": {"runs": 1, "checkpoints": 1}}.items():
        made[name] = folder / f"{name}.html"
        html.save(cross_eval_page.render(make_cross_eval(folder / name, **shape), folder / name), made[name])
    return made


EVERY_PAGE = ["run", "ddpo", "one-epoch", "nothing-yet", "eval", "eval-one"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("name", EVERY_PAGE)
def test_a_page_is_silent_asks_for_nothing_and_fits_its_window(browser, pages, name, width, scheme):
    browser.open(pages[name], width, scheme=scheme, touch=width == PHONE)
    assert browser.ask("document.documentElement.scrollWidth") == width
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
    assert browser.said == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [pages[name].as_uri()]


def test_the_driver_hears_errors_and_requests(browser, tmp_path):
    file = tmp_path / "bad.html"
    file.write_text("<img src='missing.png'><script>console.log('heard'); undefined.property;</script>")
    browser.open(file, DESKTOP)
    assert "heard" in browser.said and any("TypeError" in said for said in browser.said)
    assert (tmp_path / "missing.png").as_uri() in browser.requests


def test_an_injected_script_does_not_run(browser, pages, tmp_path):
    file = tmp_path / "page.html"
    injected = "<p id=it>before</p><script>document.querySelector('#it').textContent = 'after'</script></main>"
    file.write_text(pages["nothing-yet"].read_text().replace("</main>", injected))
    browser.open(file, DESKTOP)
    assert browser.ask("document.querySelector('#it').textContent") == "before"
    assert any("Content Security Policy" in said for said in browser.said)


# --- the strip ----------------------------------------------------------------------------------------------------------------
IMAGE, LABEL = "document.querySelector('.now img').src", "document.querySelector('.strip output').textContent"


def test_the_slider_moves_the_image_by_keyboard(browser, pages):
    browser.open(pages["run"], DESKTOP)
    assert browser.ask(LABEL) == "epoch 23"
    last = browser.ask(IMAGE)
    browser.ask("document.querySelector('.strip input').focus()")
    browser.press("ArrowLeft")
    assert browser.ask(LABEL) == "epoch 22" and browser.ask(IMAGE) != last
    browser.press("Home")
    assert browser.ask(LABEL) == "before training"
    assert browser.ask(IMAGE) == browser.ask("document.querySelector('.first img').src") != last
    browser.press("End")
    assert browser.ask(LABEL) == "epoch 23" and browser.ask(IMAGE) == last


def middle(browser, selector):
    """Of an element, scrolled into view, in px of the window."""
    return browser.ask(
        f"(() => {{ const e = document.querySelector('{selector}'); e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect(); "
        "return [b.left + b.width / 2, b.top + b.height / 2]; })()"
    )


def test_the_slider_and_its_buttons_move_the_image_by_touch(browser, pages):
    browser.open(pages["run"], PHONE, touch=True)
    last = browser.ask(IMAGE)
    browser.tap(*middle(browser, ".strip input"))
    halfway = browser.ask(LABEL)
    assert halfway in ("epoch 10", "epoch 11", "epoch 12") and browser.ask(IMAGE) != last
    browser.tap(*middle(browser, ".strip .on"))
    assert browser.ask(LABEL) == f"epoch {int(halfway.split()[1]) + 1}"
    browser.tap(*middle(browser, ".strip .back"))
    assert browser.ask(LABEL) == halfway


def test_both_halves_of_the_image_change_and_stand_above_each_other_on_a_phone(browser, pages):
    sources = "[...document.querySelectorAll('.now img')].map((image) => image.src)"
    tops = "[...document.querySelectorAll('.now .halves > div')].map((half) => half.getBoundingClientRect().top)"
    for width, above in ((DESKTOP, False), (PHONE, True)):
        browser.open(pages["run"], width, touch=above)
        browser.ask("document.querySelector('.strip .back').click()")
        left, right = browser.ask(sources)
        assert left == right
        first, second = browser.ask(tops)
        assert (second > first) is above


def test_the_first_image_shows_while_its_button_is_held(browser, pages):
    browser.open(pages["run"], DESKTOP)
    last = browser.ask(IMAGE)
    browser.ask("document.querySelector('.hold').dispatchEvent(new PointerEvent('pointerdown'))")
    assert browser.ask(LABEL) == "before training" and browser.ask(IMAGE) != last
    browser.ask("document.querySelector('.hold').dispatchEvent(new PointerEvent('pointerup'))")
    assert browser.ask(LABEL) == "epoch 23" and browser.ask(IMAGE) == last


# --- charts -------------------------------------------------------------------------------------------------------------------
READ = "[...document.querySelectorAll('.readable .at')].map((at) => at.textContent)"
FIRST = "document.querySelector('.readable .legend b').textContent"


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_pointing_at_a_chart_reads_all_of_them_there(browser, pages, width):
    browser.open(pages["run"], width, touch=width == PHONE)
    assert set(browser.ask(READ)) == {"epoch 23"}
    before = browser.ask(FIRST)
    drawing = "svg.wide" if width == DESKTOP else "svg.narrow"
    x, y = middle(browser, drawing)
    browser.tap(x, y) if width == PHONE else browser.point(x, y)
    (read,) = set(browser.ask(READ))
    low, high, left, right, unit = browser.ask(
        f"(() => {{ const d = document.querySelector('{drawing}'); return [d.dataset.low, d.dataset.high, d.dataset.left, d.dataset.right, "
        "d.viewBox.baseVal.width].map(Number); })()"
    )
    assert read == f"epoch {round(low + (unit / 2 - left) / (right - left) * (high - low))}" != "epoch 23"
    assert browser.ask(FIRST) != before


def test_a_chart_is_read_by_keyboard_and_left_again(browser, pages):
    browser.open(pages["run"], DESKTOP)
    before = browser.ask(FIRST)
    browser.ask("document.querySelector('.readable').focus()")
    browser.press("ArrowLeft")
    browser.press("ArrowLeft")
    assert set(browser.ask(READ)) == {"epoch 21"} and browser.ask(FIRST) != before
    browser.press("Escape")
    assert set(browser.ask(READ)) == {"epoch 23"} and browser.ask(FIRST) == before


def test_one_of_two_drawings_shows(browser, pages):
    drawings = "[...document.querySelectorAll('svg.wide, svg.narrow')].filter((one) => one.getBoundingClientRect().width)"
    for width, kind in ((PHONE, "narrow"), (DESKTOP, "wide")):
        browser.open(pages["run"], width)
        assert browser.ask(f"{drawings}.map((one) => one.getAttribute('class'))") == [kind]


# --- side by side -------------------------------------------------------------------------------------------------------------
def test_prompt_and_checkpoint_are_chosen_with_lists_and_buttons(browser, pages):
    state = """(() => {
        const side = document.querySelector(".compare");
        const [left, right] = [".left", ".right"].map((column) => side.querySelector(column));
        const names = [left, right].map((column) => column.querySelector("figcaption").textContent);
        return [left.querySelector("img").src, right.querySelector("img").src, ...names, side.querySelector("tbody").textContent];
    })()"""
    browser.open(pages["eval"], DESKTOP)
    left, right, base, model, scores = browser.ask(state)
    assert (base, model) == ("base", "run-1/epoch_0019") and left != right
    browser.ask("document.querySelector('.compare button[data-of=prompt][data-by=\"1\"]').click()")
    other_left, other_right, base, model, other_scores = browser.ask(state)
    assert (base, model) == ("base", "run-1/epoch_0019")
    assert other_left != left and other_right != right and other_scores != scores
    browser.ask(
        "(() => { const list = document.querySelector('.compare .model'); list.selectedIndex = 0; list.dispatchEvent(new Event('change')); })()"
    )
    same_left, changed_right, base, model, _ = browser.ask(state)
    assert (base, model, same_left) == ("base", "run-0/epoch_0004", other_left) and changed_right != other_right
    assert browser.said == []
