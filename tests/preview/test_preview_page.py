# SPDX-License-Identifier: Apache-2.0
"""The page of a preview in a real browser: headless Chromium or Chrome, which need not be
installed."""

import json
import shutil
import subprocess

import pytest
from runs import arguments

from jaxllm import cli
from jaxllm.config import load_config
from jaxllm.preview import page as preview_page
from jaxllm.preview.page import PARTS, write_page
from jaxllm.preview.reading import read_preview
from jaxllm.report.page import BROWSERS, SHARED

BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
EVIL = '</script><script>document.title="taken"</script><img src=x onerror=alert(1)>'


def preview(project, verb, records, *more):
    file = project / f"page-{verb}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    args = arguments(project, verb, "previewed", "--data.train", str(file), *more)[1:]
    return args, lambda: read_preview(load_config(verb, None, args)[0])


@pytest.fixture(scope="module")
def pages(project):
    """{name: (file, what it shows)}."""
    chats = [{"prompt": f"{k} {EVIL}\nline", "completion": f"answer {k}"} for k in range(30)]
    pairs = [{"prompt": f"{k}?", "chosen": "yes " * k, "rejected": "no"} for k in range(1, 20)]
    online = ("--rl.rewards", "none:none", "--rl.group_size", "4", "--rl.max_new_tokens", "8")
    prompts = [{"prompt": f"{k}?"} for k in range(9)]
    long = ("--data.max_length", "256")
    cases = {"sft": (chats, *long), "dpo": (pairs,), "grpo": (prompts, *online)}
    made = {}
    for verb, (records, *more) in cases.items():
        found = preview(project, verb, records, *more)[1]()
        made[verb] = write_page(found, str(project / f"{verb}.html")), found
    return made


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("neither Chromium nor Chrome is installed")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def opened(browser, pages):
    """(name, options of the window) -> its page. Fails for an error on the console, for a request
    to anything but the file, and for a breach of the page's own policy."""
    contexts, seen = [], []

    def open_page(name: str, **options):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("request", lambda r: seen.append(r.url) if r.url != page.url else None)
        page.goto(pages[name][0].as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [one for one in seen if not one.startswith("file:")] == []


def texts(page, selector):
    return [text.strip() for text in page.locator(selector).all_inner_texts()]


def test_the_rows_are_shown_token_by_token(opened, pages):
    page, (_, found) = opened("sft"), pages["sft"]
    assert page.title() == "sft · jaxllm preview" and texts(page, "h1") == ["Preview of sft"]
    assert page.locator("#rows details").count() == len(found["rows"]) == 16
    row = page.locator("#rows details").first
    segment = found["rows"][0]["segments"][0]
    tokens = row.locator(".tokens").first.locator("span")
    assert tokens.count() == len(segment["texts"])
    kinds = [name.split()[0] for name in tokens.evaluate_all("all => all.map((e) => e.className)")]
    assert kinds == ["learned" if mark & 1 else "context" for mark in segment["marks"]]
    shown = row.locator(".tokens").first.inner_text().replace("↵", "")
    assert shown.strip() == "".join(segment["texts"]).strip() and EVIL in shown
    tokens.nth(1).hover()
    assert tokens.nth(1).get_attribute("title").endswith(f"= {segment['ids'][1][0]}")
    # The bar has the proportions of the row.
    padding = 1 - found["rows"][0]["tokens"] / found["rows"][0]["length"]
    bar = row.locator(".bar-of").bounding_box()["width"]
    parts = row.locator(".bar-of .padding")
    width = parts.bounding_box()["width"] if parts.count() else 0
    assert width / bar == pytest.approx(padding, abs=0.02)


def test_rows_open_with_the_keyboard(opened):
    page = opened("dpo")
    third = page.locator("#rows details").nth(2)
    assert third.locator(".tokens").count() == 0
    third.locator("summary").focus()
    page.keyboard.press("Enter")
    third.locator(".tokens").first.wait_for()  # the event comes later
    assert {"chosen", "rejected"} <= {text.split(" · ")[0] for text in texts(page, ".who")}
    page.get_by_role("button", name="Open or close all").click()
    assert page.locator("#rows details[open]").count() == 16


def test_counts_checks_and_template_are_those_of_the_data(opened, pages):
    page, (_, found) = opened("dpo"), pages["dpo"]
    tiles = dict(zip(texts(page, ".tile dt"), texts(page, ".tile .big"), strict=True))
    assert tiles["Training examples"] == str(found["sets"][0]["sources"][0]["examples"])
    names = {one["name"] for one in found["findings"] if one["count"]}
    assert set(texts(page, ".finding > p > b")) == names
    assert "Lengths: train" in page.locator("#data figure").first.inner_text()
    page.locator("#template summary").click()
    assert (
        found["template"]["source"].split("\n")[0] in page.locator("#template details").inner_text()
    )
    assert json.loads(texts(page, "#template pre")[0]) == json.loads(found["record"])


def test_prompts_have_no_learned_tokens_and_no_bars(opened, pages):
    page = opened("grpo", viewport={"width": 390, "height": 800}, color_scheme="dark")
    assert page.locator("#rows details").count() == len(pages["grpo"][1]["rows"])
    assert page.locator(".bar-of, .learned").count() == 0
    # Nothing is wider than a phone.
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_page_of_many_tokens_has_the_texts_of_the_first_rows(pages, monkeypatch):
    _, found = pages["sft"]
    limit = sum(row["tokens"] for row in found["rows"][:3])
    rows = list(preview_page._within(found["rows"], limit))
    has_texts = [all("texts" in s for s in row["segments"]) for row in rows]
    assert has_texts == [True] * 3 + [False] * 13
    for row, one in zip(rows, found["rows"], strict=True):
        assert [sum(n for _, n in s["runs"]) for s in row["segments"]] == [
            sum(map(len, s["ids"])) for s in one["segments"]
        ]


def test_the_command_writes_the_page(project, capsys, monkeypatch):
    args, _ = preview(project, "sft", [{"prompt": f"{k}?", "completion": "yes"} for k in range(9)])
    monkeypatch.chdir(project)
    assert cli.main(["preview", "--objective", "sft", *args, "--html"]) == 0
    assert capsys.readouterr().out == "preview.html\n"
    page = (project / "preview.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "<title>sft · " in page


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_is_valid(tmp_path):
    files = [*SHARED, PARTS / "preview.js"]
    script = "\n".join(file.read_text() for file in files if file.suffix == ".js")
    (tmp_path / "page.js").write_text(script)
    subprocess.run(["node", "--check", tmp_path / "page.js"], check=True)
