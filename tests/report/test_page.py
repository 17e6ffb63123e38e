# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser: headless Chromium or Chrome, which need not be installed."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from folders import LEDGER, run_folder, train_line, write_lines

from jaxllm.cli import main
from jaxllm.config import RlSection
from jaxllm.report.page import BROWSERS, write_report

BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
if BROWSER is None:
    pytest.skip("neither Chromium nor Chrome is installed", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Pages of one run, two runs, and an online run that trains."""
    folder = tmp_path_factory.mktemp("runs")
    first, second = (run_folder(folder / name, steps) for name, steps in (("one", 60), ("two", 40)))
    online = run_folder(folder / "online", 30, "grpo", rl=RlSection(rewards=("r.py:exact",)))
    values = {"kl": 0.1, "reward/exact": 0.5, "reward/form": 0.25, "mine": 3.0}
    lines = [train_line(s, reward=s / 100, **values) for s in range(1, 31)]
    write_lines(online / "metrics.jsonl", lines)
    return {
        "one": write_report([str(first)]),
        "two": write_report([str(first), str(second)], folder / "two.html"),
        "online": write_report([str(online)]),
    }


@pytest.fixture
def opened(browser, reports, request):
    """(report, options of the window) -> its page. Fails for an error on the console, for a request
    to anything but the file, and for a breach of the page's own policy."""
    contexts, seen = [], []

    def open_page(name: str, hash: str = "", **options):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("request", lambda r: seen.append(r.url) if r.url != page.url else None)
        page.goto(reports[name].as_uri() + hash)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [one for one in seen if not one.startswith("file:")] == []


def texts(page, selector):
    return [text.strip() for text in page.locator(selector).all_inner_texts()]


def chart(page, metric):
    return page.locator(f'figure[data-metrics~="{metric}"]')


def test_the_headline_tells_the_state_at_a_glance(opened):
    page = opened("one")
    assert page.title() == "one · jaxllm report"
    assert texts(page, "h1") == ["one"] and "done" in texts(page, ".state")[0]
    assert "Step 60 of 60 (100%)" in texts(page, ".under")[0]
    assert "1.5 B parameters · 8 × TPU v5p · 2 processes" in texts(page, ".about")[0]
    tiles = dict(zip(texts(page, ".tile dt"), texts(page, ".tile .big"), strict=True))
    assert tiles["Training loss"] == "2.299" and tiles["Evaluation loss"] == "2.700"
    assert tiles["Goodput"] == "80%" and tiles["Throughput"] == "4,060 tokens/s"
    assert "best 2.500 at step 40" in texts(page, ".tile .sub")


def test_the_charts_have_the_values_of_the_run(opened):
    page = opened("one")  # smoothed, which the values are not
    assert texts(chart(page, "loss"), ".legend b")[0] == "2.299"
    titles = texts(page, "h4, .title")
    assert titles[:3] == ["Loss", "Perplexity", "Learning rate"]
    assert "Distribution of step times" in titles and "Lengths: train" in titles
    legend = " ".join(texts(chart(page, "loss"), ".legend li"))
    assert "held-out\n2.700" in legend and "★ best at step 40\n2.500" in legend
    page.locator("#smoothing").fill("0")
    chart(page, "loss").locator("summary").click()
    rows = [row.split("\t") for row in texts(chart(page, "loss"), "tbody tr")]
    assert rows[0][:2] == ["1", "7.707"] and rows[-1][0] == "highest"
    assert rows[-2][:2] == ["lowest", "2.299 at step 60"]
    evaluated = {row[0]: row[2] for row in rows[:-2] if row[2] != "–"}
    assert evaluated == {"20": "2.700", "40": "2.500", "60": "2.700"}
    # What is on the canvas: lines in the colour of the first curve.
    blue = page.evaluate(
        """() => {
          const canvas = document.querySelector('figure[data-metrics~="loss"] canvas');
          const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          let count = 0;
          for (let i = 0; i < data.length; i += 4)
            if (data[i] === 0 && data[i + 1] === 114 && data[i + 2] === 178) count += 1;
          return count;
        }"""
    )
    assert blue > 500


def test_a_chart_is_read_and_zoomed_with_the_keyboard(opened):
    page = opened("one")
    page.locator("#smoothing").fill("0")
    plot = chart(page, "loss").locator(".plot")
    plot.focus()
    page.keyboard.press("Home")
    assert plot.get_attribute("role") == "slider"
    assert plot.get_attribute("aria-valuetext").startswith("step 1: train 7.707, held-out –")
    page.keyboard.press("ArrowRight")
    assert plot.get_attribute("aria-valuetext").startswith("step 2: train 7.429")
    for _ in range(8):
        page.keyboard.press("Shift+ArrowRight")  # to step 50
    assert plot.get_attribute("aria-valuetext").endswith("held-out 2.500 at step 40")
    assert "2.500 at step 40" in texts(chart(page, "loss"), ".legend b")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert texts(chart(page, "loss"), ".at") == ["step 2"]
    assert texts(chart(page, "grad_norm"), ".at") == ["step 2"]  # all charts at one step
    reset = page.get_by_role("button", name="Reset zoom")
    assert reset.is_disabled()
    page.keyboard.press("+")
    assert reset.is_enabled()
    page.keyboard.press("End")  # of what is shown
    low, high = page.evaluate("[plots[0].u.scales.x.min, plots[0].u.scales.x.max]")
    assert low < int(plot.get_attribute("aria-valuetext").split()[1].rstrip(":")) <= high < 60
    page.keyboard.press("Escape")
    assert reset.is_disabled()


def test_dragging_zooms_into_all_charts(opened):
    page = opened("one")
    over = chart(page, "loss").locator(".u-over")
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.25, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, y, steps=5)
    page.mouse.up()
    spans = page.evaluate("plots.map(({u}) => [u.scales.x.min, u.scales.x.max])")
    assert len(spans) > 5
    for low, high in spans:
        assert (low, high) == pytest.approx((15.75, 30.5), abs=1)
    page.get_by_role("button", name="Reset zoom").click()
    assert page.evaluate("plots[0].u.scales.x.max") == 60


def test_tab_reaches_every_control_in_order(opened):
    page = opened("one")
    seen = []
    for _ in range(70):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate(
                "(e => e.id || e.name || e.className || e.tagName)(document.activeElement)"
            )
        )
    order = ["skip", "theme", "axis", "smoothing", "plot", "scroll"]
    places = [seen.index(one) for one in order]
    assert places == sorted(places) and "SUMMARY" in seen


def test_every_control_and_table_has_a_name_and_headings_do_not_skip(opened):
    page = opened("one")
    unnamed = page.evaluate(
        """() => {
          const all = "button, input, select, [role], nav, [tabindex='0']";
          const label = (e) => e.labels && e.labels.length && e.labels[0].innerText.trim();
          const named = (e) => e.getAttribute("aria-label") || e.innerText || label(e);
          const unnamed = [...document.querySelectorAll(all)].filter((e) => !named(e));
          return unnamed.map((e) => e.outerHTML);
        }"""
    )
    assert unnamed == []
    levels = page.evaluate(
        '[...document.querySelectorAll("h1, h2, h3, h4")].map((e) => Number(e.tagName[1]))'
    )
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    assert page.evaluate("document.documentElement.lang") == "en"


CONTRAST = """() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$|transparent/.test(colour)) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const text = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  const shown = [...document.querySelectorAll("main *, header *, footer")].filter((e) =>
    e.offsetParent && !e.disabled && text(e));
  return shown.map((e) => {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), e.className + ": " + e.textContent.slice(0, 40)];
  }).filter(([ratio]) => ratio < 4.5);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_schemes(opened, scheme):
    page = opened("one", color_scheme=scheme)
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    assert page.evaluate(CONTRAST) == []


def test_the_theme_can_be_chosen(opened):
    page = opened("one", color_scheme="light")
    shade = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(shade)
    button = page.locator("#theme")
    button.click()
    button.click()
    assert button.get_attribute("aria-label") == "Theme: dark"
    assert page.evaluate(shade) != before
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


@pytest.mark.parametrize("name", ["one", "two", "online"])
@pytest.mark.parametrize("width", [390, 820])
def test_no_page_is_wider_than_a_phone(opened, name, width):
    page = opened(name, viewport={"width": width, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == width
    small = page.evaluate(
        "Math.min(...[...document.querySelectorAll('.plot')].map((e) => e.clientWidth))"
    )
    assert small > 250


def test_text_of_a_run_stays_text(opened):
    page = opened("one")
    assert page.title() == "one · jaxllm report"
    assert page.locator("main img").count() == 0
    assert texts(page, ".prompt")[0].startswith("Say </script><script>")


def test_samples_of_two_steps_stand_side_by_side(opened):
    page = opened("one")
    assert texts(page, ".answers .text") == ["text of step 20", "text of step 40"]
    page.get_by_label("Left").select_option("1")
    assert texts(page, ".answers .text") == ["text of step 40", "text of step 40"]
    boxes = [one.bounding_box() for one in page.locator(".answers > div").all()]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]


def test_the_config_shows_what_was_set_and_where(opened, reports):
    page = opened("one")
    assert [row.split("\t") for row in texts(page, "#config tbody tr")] == [
        ["output_dir", str(reports["one"].parent), "run.yaml:3"],
        ["steps", "60", "--steps"],
    ]
    page.get_by_label("only what was set").uncheck()
    page.get_by_label("Find").fill("optim.clip")
    assert [row.split("\t")[::2] for row in texts(page, "#config tbody tr")] == [
        ["optim.clip", "default"]
    ]


def test_runs_share_their_charts_and_can_be_hidden(opened):
    page = opened("two")
    assert texts(page, "h1") == ["2 runs"]
    legend = texts(chart(page, "loss"), ".legend .name")
    assert legend[:4] == ["one · train", "one · held-out", "two · train", "two · held-out"]
    page.get_by_role("checkbox", name="two").uncheck()
    legend = texts(chart(page, "loss"), ".legend .name")
    assert legend == ["one · train", "one · held-out", "★ best of one at step 40"]
    assert texts(page, "#config tbody tr")[0].startswith("output_dir")
    assert [row.split("\t") for row in texts(page, "#config tbody tr")][1] == ["steps", "60", "40"]


def test_an_online_run_begins_with_its_rewards(opened):
    page = opened("online")
    assert texts(page, ".tile dt")[0] == "Reward" and texts(page, ".tile .big")[0] == "0.3000"
    titles = texts(page, "#curves h4")
    assert titles[:2] == ["Reward", "Reward by function"] and "Mine" in titles
    assert texts(chart(page, "reward/exact"), ".legend .name") == ["exact", "form"]
    assert "ended unexpectedly" in texts(page, ".state")[0]


def test_log_scale_and_the_axis_of_tokens(opened):
    page = opened("one")
    page.get_by_label("Log scale").check()
    assert page.evaluate("plots[0].u.scales.y.distr") == 100
    assert (
        page.evaluate("plots.find((p) => p.curves[0].metric === 'learning_rate').u.scales.y.distr")
        == 3
    )
    page.get_by_label("tokens", exact=True).check()
    assert page.evaluate("plots[0].u.scales.x.max") == 512 * 60
    page.reload()
    assert page.get_by_label("Log scale").is_checked()


def test_every_share_of_the_time_is_listed(opened):
    page = opened("one")
    rows = [row.split() for row in texts(page, "#machine table >> nth=0 >> tbody >> tr")]
    shares = {row[0]: row[-1] for row in rows}
    assert shares == {
        name.removesuffix("_seconds"): f"{value:.0f}%"
        for name, value in LEDGER.items()
        if name != "goodput"
    }


def test_a_picture_has_the_curves_on_white(reports, tmp_path, capsys):
    image = tmp_path / "run.png"
    run = str(Path(reports["one"]).parent)
    assert main(["report", run, "--png", str(image)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(image)
    head = image.read_bytes()[:24]
    width, height = (int.from_bytes(head[at : at + 4], "big") for at in (16, 20))
    assert head[1:4] == b"PNG" and width == 2200 and 3000 < height < 6000


def test_a_page_opened_late_says_how_old_it_is(browser, reports, tmp_path):
    text = reports["online"].read_text()
    old = text.replace('"state":"killed"', '"state":"running"')
    written = json.loads(text.split('id="run-data">')[1].split("</script>")[0])["written"]
    old = old.replace(f'"written":{written}', f'"written":{written - 7200}')
    (tmp_path / "old.html").write_text(old)
    page = browser.new_page()
    page.goto((tmp_path / "old.html").as_uri())
    assert "This page was written 2 h 0" in page.locator(".message").inner_text()
    assert page.get_by_label("Reload").is_checked()
    (tmp_path / "old.html").write_text(old.replace('"every":null', '"every":3600'))
    page.reload()
    assert page.locator(".message").count() == 0
    page.close()


def test_a_reload_waits_for_a_control_but_not_for_a_click(opened):
    page = opened("one")
    page.locator("h2").first.click()
    assert page.evaluate("busy()") is False
    page.locator("#smoothing").focus()
    assert page.evaluate("busy()") is True
    page.evaluate("document.activeElement.blur()")
    page.locator("#theme").focus()
    assert page.evaluate("busy()") is False
