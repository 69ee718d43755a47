"""A headless Chromium for tests of pages: selenium's Chrome with logs, and no network traffic of its own. Each window
has an empty profile. Left out on purpose: waiting for elements (the pages are complete when they are loaded)."""

import json
import os
import shutil
from pathlib import Path

from selenium.webdriver import ActionChains, Chrome, ChromeOptions, ChromeService

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")  # given to selenium explicitly, or it would download one
MISSING = None if CHROMIUM and DRIVER else "no chromium or chromedriver here (apt-get install chromium chromium-driver)"
os.environ.setdefault("no_proxy", "localhost")  # selenium talks to chromedriver there
FLAGS = """headless=new no-sandbox disable-gpu disable-dev-shm-usage disable-quic no-first-run disable-sync
disable-background-networking disable-component-update disable-extensions""".split()


class Browser(Chrome):
    """One window; `with` closes it. scheme: "light" or "dark", which colours its user prefers."""

    def __init__(self, width=1280, height=900, scheme="light"):
        options = ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"window-size={width},{height}"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        super().__init__(options, ChromeService(DRIVER))
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        self.get("about:blank")
        self.requests(), self.console()  # forget those of the browser's first page

    def open(self, file: Path) -> None:
        self.get(Path(file).resolve().as_uri())

    def text(self, selector: str) -> str:
        return self.execute_script("return document.querySelector(arguments[0]).textContent", selector)

    def press(self, *keys: str) -> None:
        ActionChains(self, duration=0).send_keys(*keys).perform()  # to the focused element

    def hover(self, selector: str) -> None:
        ActionChains(self, duration=0).move_to_element(self.find_element("css selector", selector)).perform()

    def click(self, selector: str) -> None:
        self.find_element("css selector", selector).click()

    def console(self) -> list[str]:
        """Errors and warnings since the last call."""
        return [entry["message"] for entry in self.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list[str]:
        """Addresses requested since the last call, with or without an answer; data: addresses left out."""
        events = [json.loads(entry["message"])["message"] for entry in self.get_log("performance")]
        sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [address for address in sent if not address.startswith("data:")]
