"""Browser tests of the player and the training monitor in JupyterLab, and of the player's saved pages offline.

They need Chromium (Debian: apt-get install chromium) and are skipped without it.
"""

import json
import re
import time

import pytest
from browser import (
    CHROMIUM,
    FLAGS,
    jupyter_lab,
    open_notebook,
    screenshot,
    watch_errors,
    write_notebook,
)
from doubles import lake_agent

from llamagym.episodes.episode import Episode, Turn
from llamagym.rollout import collect
from llamagym.widgets.player import EpisodePlayer

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
)
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)"),
              pytest.mark.filterwarnings("ignore:none of .* responses held an action")]  # fmt: skip

HOSTILE_TEXT = (
    "</script><script>document.title='hurt'</script><img src=x onerror=\"document.title='hurt'\">"
)
AGENT = """
import contextlib, io, sys, tempfile, warnings
sys.path.insert(0, {tests!r})
from doubles import config, lake, make_policy, perturb
from llamagym import Agent
from llamagym import Trainer
from llamagym import clone
from llamagym import collect
from llamagym.config import TrainerConfig, WarmstartConfig
from llamagym.widgets.player import EpisodePlayer
from llamagym.envs.baselines import RandomAgent, play
warnings.simplefilter("ignore")
task = lake(max_steps=10)
policy = make_policy("lora", perturbed=False)
agent = Agent.for_task(task, policy, config=config(generate__max_new_tokens=8, rollout__episodes=8, rollout__num_envs=8, ppo__epochs=1))
"""
PLAYED = """
with contextlib.redirect_stdout(io.StringIO()):
    clone(agent, play(task, RandomAgent(task), 48), WarmstartConfig(epochs=4, batch_size=8, learning_rate=3e-3), progress=False)
perturb(policy.value_head.parameters(), 0.3)
episodes = collect(agent, episodes=12, num_envs=12, top_logprobs=3, frames=True)
for number, episode in enumerate(episodes):  # without differences, all advantages are 0
    episode.turns[-1].reward = float(number % 3 == 0)
agent.learner.compute_advantages(episodes)
"""


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as p:
        yield p.chromium.launch(executable_path=CHROMIUM, args=FLAGS, headless=True)


@pytest.fixture
def page(chromium):
    page = chromium.new_page(viewport=dict(width=1200, height=900))
    page.errors = watch_errors(page)
    yield page
    page.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    with jupyter_lab(folder) as address:
        yield folder, address


def begin(request) -> str:
    return AGENT.format(tests=str(request.path.parent))


def test_browser_player_works_in_jupyterlab(page, lab, request):
    """Play, step, hover, filter, sort, compare and branch work without errors on the page"""
    folder, address = lab
    write_notebook(
        folder / "player.ipynb",
        begin(request),
        PLAYED,
        "player = EpisodePlayer(episodes, agent=agent); player",
    )
    open_notebook(page, address, "player.ipynb")
    player = page.get_by_role("region", name="Episode player")
    step, title = player.get_by_label("Step", exact=True), player.locator(".title")
    player.locator(".turn").first.wait_for(timeout=90_000)

    player.get_by_label("Step forward").click()
    assert step.input_value() == "1" and player.locator(".turn.now .no").text_content() == "turn 1"
    player.locator(".turn.now").press("End")
    last = int(step.get_attribute("max"))
    assert int(step.input_value()) == last
    player.locator(".conversation").press("Home")
    player.get_by_label("Steps per second").select_option("30/s")
    player.get_by_label("Play").click()
    player.get_by_label("Play").wait_for(
        timeout=10_000
    )  # the button is labeled Pause until the end
    assert int(step.input_value()) == last
    assert player.locator(".frame img").evaluate("img => img.naturalWidth") > 50

    player.locator(".conversation").press("Home")
    player.locator(".turn.now .token").first.hover()
    tip = player.get_by_role("tooltip")
    numbers = r"log-probability−?[\d.]+ \([\d.e-]+ %\)entropy[\d.]+value−?[\d.]+advantage−?[\d.]+log-ratio to the reference−?[\d.]+alternatives"
    assert re.search(numbers, tip.text_content())
    assert tip.locator(".alt tr").count() == 3
    for quantity in ("entropy", "value", "advantage"):
        player.get_by_label("Color tokens by").select_option(quantity)
        colors = player.locator(".token").evaluate_all(
            "words => words.map((w) => getComputedStyle(w).backgroundColor)"
        )
        assert len(set(colors)) > 2, quantity
    screenshot(page, "player")

    returns = player.locator("tbody tr td:nth-child(3)")
    player.get_by_label("Episodes to show").select_option("longest")
    lengths = [int(n) for n in player.locator("tbody tr td:nth-child(4)").all_text_contents()]
    assert lengths == sorted(lengths, reverse=True) and len(lengths) == 12
    player.get_by_role("button", name="return").click()
    assert [float(x.replace("−", "-")) for x in returns.all_text_contents()] == sorted(
        float(x.replace("−", "-")) for x in returns.all_text_contents()
    )
    player.get_by_label("Episodes to show").select_option("with invalid turns")
    assert all(int(n) > 0 for n in player.locator("tbody tr td:nth-child(5)").all_text_contents())
    player.get_by_label("Episodes to show").select_option("all, in order")
    before = title.text_content()
    player.locator(".conversation").press("j")
    page.wait_for_timeout(200)
    assert title.text_content() != before

    player.get_by_label("Branch from this turn").click()
    player.get_by_label("Previous episode").click()
    player.locator(".edit").wait_for(state="hidden")  # the editor was opened for another episode
    player.get_by_label("Step forward").click()
    player.get_by_label("Branch from this turn").click()
    player.get_by_label("response prefix").fill("Action: right. ")
    screenshot(page, "branch_editor")
    player.get_by_role("button", name="sample from here").click()
    player.locator(".views.two").wait_for(timeout=30_000)
    assert player.locator("tbody tr").count() == 13 and step.input_value() == "1"
    sides = player.locator(".view")
    assert sides.nth(1).locator(".turn.now .response").text_content().startswith("Action: right. ")
    assert sides.nth(1).locator(".turn.now .token.forced").count() >= 3
    before, after = (
        sides.nth(i).locator(".turn").first.locator(".response").text_content() for i in (0, 1)
    )
    assert before == after
    player.locator(".conversation").first.press("ArrowRight")
    assert [sides.nth(i).locator(".turn.now .no").text_content() for i in (0, 1)][1] in (
        "turn 2",
        "final observation",
    ) and step.input_value() == "2"
    screenshot(page, "branch_compared")
    player.get_by_label("Compare with").select_option("nothing")
    player.locator(".views:not(.two)").wait_for()
    player.get_by_label("Compare with").select_option(index=1)
    player.locator(".views.two").wait_for()
    assert not page.errors


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save two pages: one of real episodes, one of hostile texts"""
    from doubles import make_policy

    folder = tmp_path_factory.mktemp("pages")
    agent = lake_agent(make_policy("lora"), max_steps=12)
    episodes = collect(agent, episodes=4, num_envs=4, top_logprobs=3, frames=True)
    agent.learner.compute_values_and_ref_logprobs(episodes)
    turns = [
        Turn(
            HOSTILE_TEXT,
            HOSTILE_TEXT,
            reasoning=HOSTILE_TEXT,
            invalid_reason=HOSTILE_TEXT,
            valid=False,
            action=HOSTILE_TEXT,
            frame=HOSTILE_TEXT,
        ),
        Turn(HOSTILE_TEXT, "b", terminated=True, action=1),
    ]
    EpisodePlayer(episodes, agent.tokenizer).save(folder / "episode.html")
    EpisodePlayer(
        [
            Episode(
                turns,
                env_id=HOSTILE_TEXT,
                system_prompt=HOSTILE_TEXT,
                final_observation=HOSTILE_TEXT,
                seed=1,
            )
        ]
        * 2,
        labels=[HOSTILE_TEXT, None],
    ).save(folder / "hostile.html")
    return folder


def offline(page, requests: list[str]) -> None:
    page.context.set_offline(True)
    page.on(
        "request",
        lambda request: (
            requests.append(request.url)
            if not request.url.startswith(("file:", "blob:", "data:"))
            else None
        ),
    )


@pytest.mark.parametrize("scheme, width", [("light", 1000), ("dark", 700)])
def test_browser_saved_page_works_offline(chromium, saved, scheme, width):
    """A saved page shows pictures, steps and numbers, and makes no requests"""
    page, requests = (
        chromium.new_page(viewport=dict(width=width, height=900), color_scheme=scheme),
        [],
    )
    errors = watch_errors(page)
    offline(page, requests)
    page.goto(f"file://{saved / 'episode.html'}")
    page.locator(".turn").first.wait_for()
    assert (
        page.locator(".frame img").evaluate("img => img.decode().then(() => img.naturalWidth)") > 50
    )
    page.get_by_label("Step forward").click()
    assert page.locator(".turn.now .no").text_content() == "turn 1"
    assert page.get_by_label("Branch from this turn").count() == 0
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    screenshot(page, f"page_{scheme}_{width}")
    assert not requests and not errors
    page.close()


def test_browser_shows_tags_as_text(page, saved):
    """Script and image tags in responses and observations are shown as text"""
    page.goto(f"file://{saved / 'hostile.html'}")
    page.locator(".turn").first.wait_for()
    page.get_by_label("Step forward").click()
    page.locator("summary").click()
    page.wait_for_timeout(300)
    assert page.title() != "hurt"
    player = page.get_by_role("region", name="Episode player")
    assert player.locator("img, script").count() == 0
    assert (
        player.locator(".turn .plain").first.text_content() == HOSTILE_TEXT
        and HOSTILE_TEXT in player.locator(".conversation details").text_content()
    )
    screenshot(page, "hostile_text")
    assert not page.errors


RUN = """
from llamagym.widgets.monitor import TrainingMonitor
monitor = TrainingMonitor(min_interval=0.2, max_cpu_fraction=1.0)
output = {folder!r}
run = Trainer(agent, config=TrainerConfig(updates=400, eval_every=5, eval_episodes=8, output_dir=output, stop_if_invalid=1), callbacks=[monitor]).fit()
"""


def test_browser_monitor_shows_and_controls_a_run(page, lab, request, tmp_path):
    """Curves update during the run; pause, set, save and stop take effect and are recorded in the metrics"""
    folder, address = lab
    write_notebook(
        folder / "monitor.ipynb",
        begin(request),
        RUN.format(folder=str(tmp_path / "run")),
        "print(run)",
    )
    open_notebook(page, address, "monitor.ipynb")
    monitor, player = (
        page.get_by_role("region", name="Training monitor"),
        page.get_by_role("region", name="Episode player"),
    )
    monitor.wait_for(timeout=90_000)
    metrics = tmp_path / "run" / "metrics.jsonl"

    def lines():
        return (
            [json.loads(line) for line in metrics.read_text().splitlines()]
            if metrics.exists()
            else []
        )

    def events():
        return [event for line in lines() for event in line.get("events", [])]

    # as soon as the page is connected
    monitor.get_by_role("button", name="pause").click(timeout=60_000)
    monitor.locator(".phase", has_text="paused").wait_for(timeout=60_000)
    page.wait_for_timeout(300)
    num_lines = len(lines())
    page.wait_for_timeout(700)
    assert len(lines()) == num_lines
    monitor.get_by_label("KL coefficient", exact=True).fill("0.25")
    monitor.get_by_label("set the KL coefficient").click()
    monitor.get_by_label("learning rate", exact=True).fill("-1")
    monitor.get_by_label("set the learning rate").click()
    monitor.locator(".note.warn", has_text="expected a number above 0").wait_for(timeout=10_000)
    monitor.get_by_label("learning rate", exact=True).fill("0.00005")
    monitor.get_by_label("set the learning rate").click()
    monitor.get_by_role("button", name="save now").click()
    monitor.locator(".note", has_text="saved to").wait_for(timeout=10_000)
    assert (tmp_path / "run" / "checkpoint" / "trainer.json").exists()
    monitor.get_by_role("button", name="resume").click()
    deadline = time.monotonic() + 60
    while len(lines()) < num_lines + 8 and time.monotonic() < deadline:
        page.wait_for_timeout(100)
    assert len(lines()) >= num_lines + 8
    player.locator(".turn").first.wait_for(timeout=10_000)
    assert player.locator("tbody tr").count() == 8
    page.set_viewport_size(dict(width=1200, height=1700))
    player.get_by_label("Step forward").click()
    shown_turn = player.locator(".turn.now").text_content()
    # the list changes, the open episode stays
    player.locator(".title", has_text="of an earlier update").wait_for(timeout=30_000)
    assert (
        player.locator(".turn.now").text_content() == shown_turn
        and player.get_by_label("Step", exact=True).input_value() == "1"
    )
    player.get_by_label("First step").click()
    player.locator(".title", has_text=re.compile(r"newest: episode \d+ — 1 of")).wait_for(
        timeout=30_000
    )
    monitor.locator(".chart svg").first.hover(position=dict(x=120, y=50))
    assert " at " in monitor.locator(".chart .now").nth(3).text_content()
    screenshot(page, "monitor_running")
    monitor.get_by_role("button", name="stop after this update").click()
    monitor.locator(".phase", has_text="stopped").wait_for(timeout=60_000)
    assert monitor.get_by_role("button", name="save now").is_disabled()
    page.locator(".jp-OutputArea-output pre", has_text="interrupted after").wait_for(timeout=20_000)
    screenshot(page, "monitor_stopped")
    logged = events()
    assert (
        logged[0] == "KL coefficient 0.1 → 0.25"
        and logged[1] == "learning rate 0.0001 → 5e-05"
        and logged[2].startswith("saved to")
    )
    assert logged[3].startswith("paused for") and logged[4:] == ["stopped by hand"]
    # it was set after the update before the pause
    assert [line["kl_coef"] for line in lines()][num_lines + 1 :] == [0.25] * (
        len(lines()) - num_lines - 1
    )
    assert not page.errors


NO_SUBSHELLS = """
from llamagym.widgets.monitor import TrainingMonitor
run = Trainer(agent, config=TrainerConfig(updates=6, eval_every=0, output_dir={folder!r}, stop_if_invalid=1), callbacks=[TrainingMonitor(min_interval=0.0, max_cpu_fraction=1.0)]).fit()
"""


@pytest.mark.slow
def test_browser_monitor_without_subshells_disables_its_buttons(page, lab, request, tmp_path):
    """Without subshells, buttons are disabled with a note; curves and the newest episode are shown during the run"""
    folder, address = lab
    write_notebook(
        folder / "no_subshells.ipynb",
        begin(request),
        NO_SUBSHELLS.format(folder=str(tmp_path / "run")),
    )
    open_notebook(page, address, "no_subshells.ipynb", subshells=False)
    monitor, player = (
        page.get_by_role("region", name="Training monitor"),
        page.get_by_role("region", name="Episode player"),
    )
    player.locator(".turn").first.wait_for(timeout=90_000)  # the kernel is still busy
    assert monitor.locator(".phase").text_content() == "running"
    assert (
        monitor.get_by_role("button").evaluate_all("all => all.every((b) => b.disabled)")
        and "stop button" in monitor.locator(".note").text_content()
    )
    screenshot(page, "monitor_no_subshells")
    monitor.locator(".phase", has_text="finished").wait_for(timeout=60_000)
    assert monitor.locator(".note").text_content() == ""
    player.get_by_label("Next episode").click()
    player.locator(".title", has_text="2 of 8").wait_for(timeout=10_000)  # the kernel has finished
    assert not page.errors
