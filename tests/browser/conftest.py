"""A server of the page, and Chromium without a window that looks at it."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

HERE = Path(__file__).parent
START_SECONDS = 300  # two cores that do other things too


@pytest.fixture(scope="session", autouse=True)
def _programs():
    """Skips, and says what is missing."""
    for module in ("gradio", "selenium"):
        pytest.importorskip(module, reason=f"the tests in a browser need {module}")
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            pytest.skip(
                f"the tests in a browser need {program}: apt-get install chromium chromium-driver"
            )


class Server:
    """`keras-uvit app` in a process of its own, which reaches this machine alone."""

    def __init__(self, folder, environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.tried, self.log = folder / "tried.txt", folder / "log.txt"
        words = [self.tried, "app", "--port", port]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, HERE / "loopback.py", *map(str, words)],
                env={**environment, "TF_CPP_MIN_LOG_LEVEL": "3"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self):
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and self.process.poll() is None:
            try:
                urllib.request.urlopen(self.url)
                return
            except OSError:
                time.sleep(0.5)
        pytest.fail(f"The server did not start:\n{self.log.read_text()}")


@pytest.fixture(scope="session")
def server(tmp_path_factory, alone):
    server = Server(tmp_path_factory.mktemp("server"), {**os.environ, **alone})
    server.wait()
    yield server
    server.process.terminate()
    server.process.wait()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    # Without a sandbox, which root cannot have, and without shared memory, which containers lack.
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1200,950"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    folder = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    browser = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    browser.folder = folder
    yield browser
    browser.quit()
