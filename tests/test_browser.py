"""report.html in a real browser: what is drawn, how it is replayed, that nothing leaves the file.

Needs Chromium ($CHROMIUM, or one on the PATH) and Playwright, which drives it; skipped where either is missing.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import played
import pytest

import report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (requirements-dev.txt)")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: set CHROMIUM, or apt-get install chromium")
HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    # as root there is no sandbox of its own; the rest keeps it from looking up its maker's hosts
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = played.make_run(tmp_path_factory.mktemp("browser") / "run")
    report.write_report(path)
    return path


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """open_page(file, "#hash", width, colours) -> the page; at the end: no error on the console, no request but the file."""
    contexts, complaints = [], []

    def start(file: Path, address: str = "", width: int = 1280, colours: str = "light", before: str = "") -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=colours))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if request.url.split("#")[0] != file.as_uri() else None)
        page.add_init_script(before)
        page.goto(file.as_uri() + address)
        return page

    yield start
    for context in contexts:
        context.close()
    assert [text for text in complaints if not text.startswith("data:,")] == []


def nodes(page: Any, state: str = "") -> list[str]:
    """Ids of the nodes drawn in the trajectory browser, with this state."""
    return page.locator(f"#detail .node{state} .id").all_text_contents()


def shown_turn(page: Any) -> str:
    return page.locator("#detail .turns [aria-current]").inner_text()


def test_a_workflow_is_replayed_edit_by_edit_with_the_arrow_keys(run: Path, open_page: Any) -> None:
    page = open_page(run / "report.html", "#step=1&tau=0&turn=1")
    seen = []
    for _ in played.FULL:
        seen.append((shown_turn(page), nodes(page)))
        page.keyboard.press("ArrowRight")
    assert seen[0] == ("1", ["n1"])
    assert seen[1] == ("2", ["n1", "n2.1", "n2.2"])
    assert seen[2] == ("3 ✗", ["n1", "n2.1", "n2.2"])  # no edit: the turn is spent, the graph stays
    assert sorted(seen[-1][1]) == ["n1", "n2.1", "n2.2", "n3", "n4.1", "n4.2", "n5.1", "n5.2", "n6"]
    page.keyboard.press("Home")
    assert (shown_turn(page), page.evaluate("location.hash")) == ("1", "#step=1&tau=0&turn=1")


def test_new_run_kept_and_unreached_nodes_look_different(run: Path, open_page: Any) -> None:
    page = open_page(run / "report.html", "#step=1&tau=0&turn=6")  # Review -> Revise, twice: the first Review passes
    assert nodes(page, ".fresh") == ["n5.1", "n5.2"]
    assert nodes(page, ".ran") == ["n5.1"]
    assert nodes(page, ".idle") == ["n4.2", "n5.2"]  # n4: (Verify ? Revise : done), and Verify found nothing
    assert set(nodes(page, ".cached")) >= {"n1", "n2.1", "n2.2", "n3"}
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")  # Plan became Decompose: what reads it runs again
    assert nodes(page, ".fresh") == ["n1"]
    assert page.locator("#detail .node.ran:not(.fresh) .badge + text").first.text_content() == "re-run"


def test_the_drawing_has_a_diamond_a_stack_and_a_bracket_with_its_count(run: Path, open_page: Any) -> None:
    page = open_page(run / "report.html", "#step=0&tau=0")
    assert page.locator("#detail .node path.box").count() == 1  # the condition
    assert page.locator("#detail .loop").count() == 1
    assert "↻ up to 2 ×" in page.locator("#detail .drawing").inner_text()
    above, below = (page.locator(f'#detail [data-key="{name}"]').bounding_box() for name in ("n2.1", "n2.2"))
    assert (above["x"], above["y"] + above["height"]) == (below["x"], pytest.approx(below["y"], abs=30))


def test_a_click_on_a_node_shows_its_prompt_and_its_output(run: Path, open_page: Any) -> None:
    page = open_page(run / "report.html", "#step=1&tau=0&turn=7")
    page.locator('#detail [data-key="n6"]').click()
    assert page.locator("#node").inner_text().split("\n")[:4] == [
        "n6 Format", "ran in this turn", "Prompt, written by the policy", "Say it in one word."]
    page.locator('#detail [data-key="n2.2"]').focus()
    page.keyboard.press("Enter")
    text = page.locator("#node").inner_text()
    assert "kept from turn 2" in text
    assert "Prompt, the operator's default" in text


def test_reasoning_stands_apart_from_the_edit(run: Path, open_page: Any) -> None:
    page = open_page(run / "report.html", "#step=0&tau=0&turn=2")
    assert page.locator("#detail pre.soft").inner_text() == "I want two opinions."


@pytest.mark.parametrize(("tau", "sign", "said"), [(0, "up", "made more likely"), (2, "down", "made less likely")])
def test_tokens_are_coloured_by_mask_and_sign_of_the_advantage(tau: int, sign: str, said: str, run: Path, open_page: Any) -> None:
    page = open_page(run / "report.html", f"#step=0&tau={tau}&turn=1")
    tokens = page.locator(".pieces .trained")
    assert "".join(tokens.all_inner_texts()).removesuffix("⏎ end") == played.SCRIPTS[tau][0]
    assert page.locator(f".pieces .trained.{sign}").count() == tokens.count()
    assert page.locator(".pieces .read").count() == 1
    assert said in page.locator("#tokens").inner_text()
    assert page.locator(".strip .trained").count() == len(played.SCRIPTS[tau])


def test_the_list_is_filtered_by_step_source_and_reward(run: Path, open_page: Any) -> None:
    page = open_page(run / "report.html")
    rows = page.locator("#list a")
    assert rows.count() == 6
    page.select_option("#source", "toy_math")
    assert rows.count() == 3
    page.select_option("#step", "")
    assert rows.count() == 9
    page.select_option("#reward", "below")
    assert rows.count() == 6
    assert all(text.startswith("−") for text in page.locator("#list .reward").all_inner_texts())
    page.keyboard.press("Escape")
    page.locator("#list a").first.focus()
    before = page.evaluate("location.hash")
    page.keyboard.press("j")
    assert page.evaluate("location.hash") != before


def test_a_link_to_what_is_not_there_says_so(run: Path, open_page: Any) -> None:
    page = open_page(run / "report.html", "#step=99&tau=3")
    assert page.locator("#detail").inner_text() == "Step 99, trajectory 3 is not in this page."


def test_curves_tell_their_values_where_the_pointer_is(run: Path, open_page: Any) -> None:
    page = open_page(run / "report.html")
    assert page.locator(".panel .curve").count() > 10
    panel = page.locator(".panel", has=page.get_by_role("heading", name="grad_norm", exact=True))
    assert panel.locator(".legend").inner_text() == "grad_norm 0.14"
    panel.locator("> svg").hover()  # in the middle: the second of three steps
    assert panel.locator(".legend").inner_text() == "grad_norm 0.12"


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_at_390_pixels_nothing_is_wider_than_the_window(colours: str, run: Path, open_page: Any) -> None:
    page = open_page(run / "report.html", "#step=1&tau=0", 390, colours)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    ink, paper = page.evaluate("['color', 'background-color'].map(it => getComputedStyle(document.body).getPropertyValue(it))")
    assert (sum(map(int, ink[4:-1].split(","))) > sum(map(int, paper[4:-1].split(",")))) == (colours == "dark")


def test_hostile_text_is_shown_and_not_run(tmp_path: Path, run: Path, open_page: Any) -> None:
    path = tmp_path / "run"
    shutil.copytree(run, path)
    rows = [json.loads(line) for line in (path / "trajectories.jsonl").read_text().splitlines()]
    for row in rows:
        row["problem"] = row["task_id"] = row["answer"] = row["source"] = HOSTILE
        for turn in row["turns"]:
            turn["text"] = turn["feedback"] = turn["edit"] = HOSTILE
    (path / "trajectories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = open_page(report.write_report(path), "#step=1&tau=0&turn=2")
    assert page.title() == "run · FlowSteer run"
    assert page.locator("#detail pre").first.inner_text() == HOSTILE
    assert page.locator("img").count() == 0


def test_an_evaluation_is_browsed_by_method(tmp_path: Path, open_page: Any) -> None:
    page = open_page(report.write_report(played.make_run(tmp_path / "evaluation", steps=1, evaluation=True)))
    assert not page.locator("#learning").is_visible()
    page.select_option("#method", "random")
    assert page.locator("#list a").count() == 2
    assert "nothing is trained in an evaluation" in page.locator("#tokens").inner_text()


def test_two_thousand_trajectories_are_parsed_when_they_are_looked_at(tmp_path: Path, run: Path, open_page: Any) -> None:
    """Opening a large page must not cost what its trajectories hold: only the one that is shown is parsed."""
    path = tmp_path / "run"
    shutil.copytree(run, path)
    lines = (path / "trajectories.jsonl").read_text().splitlines()
    rows = [json.loads(lines[i % len(lines)]) | {"step": i // 50} for i in range(2000)]
    (path / "trajectories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = open_page(report.write_report(path), before="const parse = JSON.parse; window.parsed = 0; "
                     "JSON.parse = text => { window.parsed += 1; return parse(text); }")
    assert page.locator("#count").inner_text() == "50 of 2000 trajectories"
    assert page.evaluate("window.parsed") == 2  # about the run, and one trajectory
