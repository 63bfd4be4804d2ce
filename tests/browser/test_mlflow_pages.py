"""MLflow's own pages of a real sweep, in a real browser: the table of runs, the comparison, heatmaps and figures.

Needs Debian's packages chromium and chromium-driver. `make browser SHOTS=DIR` keeps the screenshots.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from mlflow import MlflowClient

from orchestrator.cli.app import run
from tests.s3_peer import free_port

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1900,1300"),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """MLflow's store of a sweep of three trials."""
    folder = tmp_path_factory.mktemp("swept")
    assert run(["demo", "--sweep", "--output", str(folder)]) == 0
    return f"sqlite:///{folder}/mlflow.db"


@pytest.fixture(scope="module")
def server(store: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an MLflow server on the store."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--host", "127.0.0.1"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (tmp_path_factory.mktemp("server") / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--workers", "1"], stdout=log, stderr=log, env=environment
        )
    address = f"http://127.0.0.1:{port}"
    try:
        until(lambda: answers(f"{address}/health"))
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.fail("chromium is needed: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in OPTIONS:
        options.add_argument(option)
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def until(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not appear in time"
        time.sleep(0.3)
    return found


def open_page(browser: Any, address: str) -> None:
    """Load afresh: another fragment of the page that is open would only change its state."""
    browser.get("about:blank")
    browser.get(address)


def text_of(browser: Any) -> str:
    return str(browser.execute_script("return document.body.innerText"))


def widths(browser: Any) -> list[int]:
    """Of the pictures that came from the run's artifacts."""
    script = "return [...document.images].filter(i => i.src.startsWith('blob:')).map(i => i.naturalWidth)"
    return list(browser.execute_script(script))


def keep(browser: Any, name: str) -> None:
    if folder := os.environ.get("SHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(folder, f"{name}.png")))


def runs_of(store: str) -> tuple[str, dict[str, list[Any]]]:
    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("demo_sweep")
    assert experiment is not None
    stages: dict[str, list[Any]] = {}
    for found in client.search_runs([experiment.experiment_id]):
        stages.setdefault(found.data.tags["sweep.stage"], []).append(found)
    return experiment.experiment_id, stages


def test_the_table_of_runs_shows_the_swept_parameters_and_the_scores(server: str, store: str, browser: Any):
    experiment, stages = runs_of(store)
    tags = MlflowClient(tracking_uri=store).get_experiment(experiment).tags
    (view,) = [tag.removeprefix("mlflow.sharedViewState.") for tag in tags if tag.startswith("mlflow.sharedViewState.")]
    open_page(browser, f"{server}/#/experiments/{experiment}/runs?viewStateShareKey={view}")
    trial = stages["search"][0]
    until(lambda: trial.info.run_name in text_of(browser))
    shown = text_of(browser)
    for column in ("objective.temperature", "objective.crop_grid", "objective.anchor_negatives", "eval/sga"):
        assert column in shown
    for found in stages["search"]:
        assert found.info.run_name in shown and found.data.params["objective.temperature"] in shown
    keep(browser, "runs")


def test_runs_can_be_compared(server: str, store: str, browser: Any):
    experiment, stages = runs_of(store)
    chosen = [found.info.run_id for found in stages["search"]]
    page = f"compare-runs?runs={quote(json.dumps(chosen))}&experiments={quote(json.dumps([experiment]))}"
    open_page(browser, f"{server}/#/{page}")
    until(lambda: "Comparing 3 Runs" in text_of(browser) and "objective.temperature" in text_of(browser))
    lines = until(lambda: browser.execute_script("return document.querySelectorAll('.js-plotly-plot').length"))
    assert lines >= 1
    keep(browser, "compare")


@pytest.mark.parametrize(
    ("stage", "artifact"),
    [
        ("search", "heatmaps/plain_step_0000006.png"),
        ("final", "heatmaps/photometric_step_0000012.png"),
        ("sweep", "report/parallel_coordinates.png"),
        ("sweep", "report/effects.png"),
    ],
)
def test_pictures_are_shown(server: str, store: str, browser: Any, stage: str, artifact: str):
    experiment, stages = runs_of(store)
    run_id = stages[stage][0].info.run_id
    open_page(browser, f"{server}/#/experiments/{experiment}/runs/{run_id}/artifacts/{quote(artifact)}")
    until(lambda: max(widths(browser), default=0) > 400)
    keep(browser, f"{stage}-{Path(artifact).stem}")


def test_the_leaderboard_is_a_table(server: str, store: str, browser: Any):
    experiment, stages = runs_of(store)
    run_id = stages["sweep"][0].info.run_id
    open_page(browser, f"{server}/#/experiments/{experiment}/runs/{run_id}/artifacts/report/leaderboard.csv")
    until(lambda: "Previewing the first 3 rows" in text_of(browser) and "objective.crop_grid" in text_of(browser))
    keep(browser, "leaderboard")


def test_curves_are_drawn(server: str, store: str, browser: Any):
    experiment, stages = runs_of(store)
    open_page(browser, f"{server}/#/experiments/{experiment}/runs/{stages['search'][0].info.run_id}/model-metrics")
    until(lambda: "(eval/gain)" in text_of(browser))  # the first section is open, the others wait for a click
    assert until(lambda: browser.execute_script("return document.querySelectorAll('.js-plotly-plot').length")) >= 1
    keep(browser, "curves")
