"""What people look at, in a browser: the player and the training monitor in JupyterLab, and the player's pages without a network.

Needs Chromium (Debian: apt-get install chromium), and is skipped without it.
"""

import json
import re
import time

import pytest
from browser import CHROMIUM, FLAGS, jupyter_lab, notebook, open_notebook, shot, watch
from doubles import lake_agent

from llamagym.buffer import Episode, Turn
from llamagym.player import EpisodePlayer
from llamagym.rollout import collect

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)"),
              pytest.mark.filterwarnings("ignore:none of .* responses held an action")]  # fmt: skip

RUDE = "</script><script>document.title='hurt'</script><img src=x onerror=\"document.title='hurt'\">"
AGENT = """
import contextlib, io, sys, tempfile, warnings
sys.path.insert(0, {tests!r})
from doubles import config, lake, make_policy, shake
from llamagym import Agent, Trainer, clone, collect
from llamagym.config import TrainerConfig, WarmstartConfig
from llamagym.player import EpisodePlayer
from llamagym.task import RandomAgent, play
warnings.simplefilter("ignore")
task = lake(max_steps=10)
policy = make_policy("lora", shaken=False)
agent = Agent.for_task(task, policy, config=config(generate__max_new_tokens=8, rollout__episodes=8, rollout__num_envs=8, ppo__epochs=1))
"""
PLAYED = """
with contextlib.redirect_stdout(io.StringIO()):
    clone(agent, play(task, RandomAgent(task), 48), WarmstartConfig(epochs=4, batch_size=8, learning_rate=3e-3), progress=False)
shake(policy.value_head.parameters(), 0.3)
episodes = collect(agent, episodes=12, num_envs=12, top=3, frames=True)
agent.learner.annotate(episodes); agent.learner.assign_credit(episodes)
"""


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as p:
        yield p.chromium.launch(executable_path=CHROMIUM, args=FLAGS, headless=True)


@pytest.fixture
def page(chromium):
    page = chromium.new_page(viewport=dict(width=1200, height=900))
    page.complaints = watch(page)
    yield page
    page.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    with jupyter_lab(folder) as address:
        yield folder, address


def begin(request) -> str:
    return AGENT.format(tests=str(request.path.parent))


def test_browser_player_in_jupyterlab(page, lab, request):
    """Play, step, hover, filter, sort, compare, branch; nothing is complained of"""
    folder, address = lab
    notebook(folder / "player.ipynb", begin(request), PLAYED, "player = EpisodePlayer(episodes, agent=agent); player")
    open_notebook(page, address, "player.ipynb")
    player = page.get_by_role("region", name="Episode player")
    step, title = player.get_by_label("Step", exact=True), player.locator(".title")
    player.locator(".turn").first.wait_for(timeout=90_000)

    player.get_by_label("Step forward").click()
    assert step.input_value() == "1" and player.locator(".turn.now .no").text_content() == "turn 1"
    player.locator(".turn.now").press("End")
    last = int(step.get_attribute("max"))
    assert int(step.input_value()) == last
    player.locator(".talk").press("Home")
    player.get_by_label("Steps per second").select_option("30/s")
    player.get_by_label("Play").click()
    player.get_by_label("Play").wait_for(timeout=10_000)     # it is called Pause until the end
    assert int(step.input_value()) == last
    assert player.locator(".frame img").evaluate("img => img.naturalWidth") > 50

    player.locator(".talk").press("Home")
    player.locator(".turn.now .token").first.hover()
    tip = player.get_by_role("tooltip")
    numbers = r"log-probability−?[\d.]+ \([\d.e-]+ %\)entropy[\d.]+value−?[\d.]+advantage−?[\d.]+KL to the reference−?[\d.]+what else was likely"
    assert re.search(numbers, tip.text_content())
    assert tip.locator(".alt tr").count() == 3
    for quantity in ("entropy", "value", "advantage"):
        player.get_by_label("Colour tokens by").select_option(quantity)
        colours = player.locator(".token").evaluate_all("words => words.map((w) => getComputedStyle(w).backgroundColor)")
        assert len(set(colours)) > 2, quantity
    shot(page, "player")

    returns = player.locator("tbody tr td:nth-child(3)")
    player.get_by_label("Episodes to show").select_option("longest")
    lengths = [int(n) for n in player.locator("tbody tr td:nth-child(4)").all_text_contents()]
    assert lengths == sorted(lengths, reverse=True) and len(lengths) == 12
    player.get_by_role("button", name="return").click()
    assert [float(x.replace("−", "-")) for x in returns.all_text_contents()] == sorted(float(x.replace("−", "-")) for x in returns.all_text_contents())
    player.get_by_label("Episodes to show").select_option("with invalid turns")
    assert all(int(n) > 0 for n in player.locator("tbody tr td:nth-child(5)").all_text_contents())
    player.get_by_label("Episodes to show").select_option("all, in order")
    before = title.text_content()
    player.locator(".talk").press("j")
    page.wait_for_timeout(200)
    assert title.text_content() != before

    player.get_by_label("Branch from this turn").click()
    player.get_by_label("Previous episode").click()
    player.locator(".edit").wait_for(state="hidden")        # it was about another episode
    player.get_by_label("Step forward").click()
    player.get_by_label("Branch from this turn").click()
    player.get_by_label("how the response begins").fill("Action: right. ")
    shot(page, "branch_editor")
    player.get_by_role("button", name="sample from here").click()
    player.locator(".sides.two").wait_for(timeout=30_000)
    assert player.locator("tbody tr").count() == 13 and step.input_value() == "1"
    sides = player.locator(".side")
    assert sides.nth(1).locator(".turn.now .said").text_content().startswith("Action: right. ")
    assert sides.nth(1).locator(".turn.now .token.given").count() >= 3
    before, after = (sides.nth(i).locator(".turn").first.locator(".said").text_content() for i in (0, 1))
    assert before == after
    player.locator(".talk").first.press("ArrowRight")
    assert [sides.nth(i).locator(".turn.now .no").text_content() for i in (0, 1)][1] in ("turn 2", "then") and step.input_value() == "2"
    shot(page, "branch_compared")
    player.get_by_label("Compare with").select_option("nothing")
    player.locator(".sides:not(.two)").wait_for()
    player.get_by_label("Compare with").select_option(index=1)
    player.locator(".sides.two").wait_for()
    assert not page.complaints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Pages: one of real episodes, one of rude texts"""
    from doubles import make_policy

    folder = tmp_path_factory.mktemp("pages")
    agent = lake_agent(make_policy("lora"), max_steps=12)
    episodes = collect(agent, episodes=4, num_envs=4, top=3, frames=True)
    agent.learner.annotate(episodes)
    turns = [Turn(RUDE, RUDE, thought=RUDE, invalid_reason=RUDE, valid=False, action=RUDE, frame=RUDE), Turn(RUDE, "b", terminated=True, action=1)]
    EpisodePlayer(episodes, agent.tokenizer).save(folder / "episode.html")
    EpisodePlayer([Episode(turns, env_id=RUDE, system_prompt=RUDE, final_observation=RUDE, seed=1)] * 2, labels=[RUDE, None]).save(folder / "rude.html")
    return folder


def offline(page, requests: list[str]) -> None:
    page.context.set_offline(True)
    page.on("request", lambda request: requests.append(request.url) if not request.url.startswith(("file:", "blob:", "data:")) else None)


@pytest.mark.parametrize("scheme, width", [("light", 1000), ("dark", 700)])
def test_browser_saved_page_without_a_network(chromium, saved, scheme, width):
    """Pictures, steps and numbers are there; nothing is asked of anybody"""
    page, requests = chromium.new_page(viewport=dict(width=width, height=900), color_scheme=scheme), []
    complaints = watch(page)
    offline(page, requests)
    page.goto(f"file://{saved / 'episode.html'}")
    page.locator(".turn").first.wait_for()
    assert page.locator(".frame img").evaluate("img => img.decode().then(() => img.naturalWidth)") > 50
    page.get_by_label("Step forward").click()
    assert page.locator(".turn.now .no").text_content() == "turn 1"
    assert page.get_by_label("Branch from this turn").count() == 0
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    shot(page, f"page_{scheme}_{width}")
    assert not requests and not complaints
    page.close()


def test_browser_texts_stay_texts(page, saved):
    """Script and picture tags that a model or an environment says"""
    page.goto(f"file://{saved / 'rude.html'}")
    page.locator(".turn").first.wait_for()
    page.get_by_label("Step forward").click()
    page.locator("summary").click()
    page.wait_for_timeout(300)
    assert page.title() != "hurt"
    player = page.get_by_role("region", name="Episode player")
    assert player.locator("img, script").count() == 0
    assert player.locator(".turn .plain").first.text_content() == RUDE and RUDE in player.locator(".talk details").text_content()
    shot(page, "rude")
    assert not page.complaints


RUN = """
from llamagym.monitor import TrainingMonitor
monitor = TrainingMonitor(every=0.2, share=1.0)
output = {folder!r}
run = Trainer(agent, config=TrainerConfig(updates=400, eval_every=5, eval_episodes=8, output_dir=output), callbacks=[monitor]).fit()
"""


def test_browser_monitor_of_a_run(page, lab, request, tmp_path):
    """Curves while it goes on; pause, set, save and stop do what they say, and stand in the metrics"""
    folder, address = lab
    notebook(folder / "monitor.ipynb", begin(request), RUN.format(folder=str(tmp_path / "run")), "print(run)")
    open_notebook(page, address, "monitor.ipynb")
    monitor, player = page.get_by_role("region", name="Training monitor"), page.get_by_role("region", name="Episode player")
    monitor.wait_for(timeout=90_000)
    metrics = tmp_path / "run" / "metrics.jsonl"

    def lines():
        return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []

    def events():
        return [event for line in lines() for event in line.get("events", [])]

    monitor.get_by_role("button", name="pause").click(timeout=60_000)    # as soon as the page knows that it is heard
    monitor.locator(".phase", has_text="paused").wait_for(timeout=60_000)
    page.wait_for_timeout(300)
    held = len(lines())
    page.wait_for_timeout(700)
    assert len(lines()) == held
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
    while len(lines()) < held + 8 and time.monotonic() < deadline:
        page.wait_for_timeout(100)
    assert len(lines()) >= held + 8
    player.locator(".turn").first.wait_for(timeout=10_000)
    assert player.locator("tbody tr").count() == 8
    page.set_viewport_size(dict(width=1200, height=1700))
    player.get_by_label("Step forward").click()
    looked = player.locator(".turn.now").text_content()
    player.locator(".title", has_text="of an earlier update").wait_for(timeout=30_000)      # the list goes on, what is looked at stays
    assert player.locator(".turn.now").text_content() == looked and player.get_by_label("Step", exact=True).input_value() == "1"
    player.get_by_label("First step").click()
    player.locator(".title", has_text=re.compile(r"newest: episode \d+ — 1 of")).wait_for(timeout=30_000)
    monitor.locator(".chart svg").first.hover(position=dict(x=120, y=50))
    assert " at " in monitor.locator(".chart .now").nth(3).text_content()
    shot(page, "monitor_running")
    monitor.get_by_role("button", name="stop after this update").click()
    monitor.locator(".phase", has_text="stopped").wait_for(timeout=60_000)
    assert monitor.get_by_role("button", name="save now").is_disabled()
    page.locator(".jp-OutputArea-output pre", has_text="interrupted after").wait_for(timeout=20_000)
    shot(page, "monitor_stopped")
    told = events()
    assert told[0] == "KL coefficient 0.1 → 0.25" and told[1] == "learning rate 0.0001 → 5e-05" and told[2].startswith("saved to")
    assert told[3].startswith("paused for") and told[4:] == ["stopped by hand"]
    assert [line["kl_coef"] for line in lines()][held + 1 :] == [0.25] * (len(lines()) - held - 1)     # it was set after the update that the pause came after
    assert not page.complaints


DEAF = """
from llamagym.monitor import TrainingMonitor
run = Trainer(agent, config=TrainerConfig(updates=6, eval_every=0, output_dir={folder!r}), callbacks=[TrainingMonitor(every=0.0, share=1.0)]).fit()
"""


def test_browser_monitor_that_is_not_heard(page, lab, request, tmp_path):
    """A kernel without subshells: the buttons are off and say why, the curves and the newest episode are there while the run goes on"""
    folder, address = lab
    notebook(folder / "deaf.ipynb", begin(request), DEAF.format(folder=str(tmp_path / "run")))
    open_notebook(page, address, "deaf.ipynb", subshells=False)
    monitor, player = page.get_by_role("region", name="Training monitor"), page.get_by_role("region", name="Episode player")
    player.locator(".turn").first.wait_for(timeout=90_000)      # nobody answers its questions yet
    assert monitor.locator(".phase").text_content() == "running"
    assert monitor.get_by_role("button").evaluate_all("all => all.every((b) => b.disabled)") and "stop button" in monitor.locator(".note").text_content()
    shot(page, "monitor_deaf")
    monitor.locator(".phase", has_text="finished").wait_for(timeout=60_000)
    assert monitor.locator(".note").text_content() == ""
    player.get_by_label("Next episode").click()
    player.locator(".title", has_text="2 of 8").wait_for(timeout=10_000)     # now it is heard
    assert not page.complaints
