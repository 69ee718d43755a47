"""Chromium for tests of pages: opened without a network, driven through chromedriver's plain HTTP (W3C WebDriver).

    if reason := browser.missing():
        pytest.skip(reason)
    with Browser() as page:
        page.open(file)
        page.script("return document.title")
        page.press("ArrowRight")
        assert page.requests() == [file.as_uri()] and page.console() == []

Left out on purpose: other browsers, waiting for elements (the pages here are ready when they are loaded).
"""

import base64
import json
import re
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
]  # fmt: skip
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key under which WebDriver hands elements over
KEYS = {
    "ArrowLeft": "\ue012", "ArrowUp": "\ue013", "ArrowRight": "\ue014", "ArrowDown": "\ue015", "Home": "\ue011",
    "End": "\ue010", "Enter": "\ue007", "Escape": "\ue00c", "Tab": "\ue004",
}  # fmt: skip


def missing() -> str | None:
    """Why there is no browser here; None if there is one."""
    absent = [name for name, path in (("chromium", CHROMIUM), ("chromedriver", DRIVER)) if path is None]
    return f"{' and '.join(absent)} not installed (Debian: apt install chromium chromium-driver)" if absent else None


class Browser:
    """A headless window with an empty profile. scheme: "light" or "dark", as if its user preferred it."""

    def __init__(self, width=1280, height=900, scheme="light"):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.driver = subprocess.Popen(
            [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            port = next(
                found[1]
                for line in self.driver.stdout
                if (found := re.search(r"started successfully on port (\d+)", line))
            )
            self.url = f"http://127.0.0.1:{port}/session"
            flags = FLAGS + [f"--user-data-dir={self.profile.name}", f"--window-size={width},{height}"]
            chrome = {"binary": CHROMIUM, "args": flags}
            logs = {"browser": "ALL", "performance": "ALL"}
            wanted = {"browserName": "chrome", "goog:chromeOptions": chrome, "goog:loggingPrefs": logs}
            self.url += "/" + self._call("POST", "", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
            media = [{"name": "prefers-color-scheme", "value": scheme}]
            self._devtools("Emulation.setEmulatedMedia", features=media)
            self._call("POST", "/url", {"url": "about:blank"})  # away from the browser's own first page, and forget
            self.requests(), self.console()  # what that asked for
        except BaseException:
            self._stop()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self._call("DELETE", "")
        finally:
            self._stop()

    def _stop(self):
        self.driver.kill()
        self.driver.wait()
        self.driver.stdout.close()
        self.profile.cleanup()

    def _call(self, method, path, body=None):
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=60) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from error

    def _devtools(self, command, **params):
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def open(self, file: Path) -> None:
        self._call("POST", "/url", {"url": Path(file).resolve().as_uri()})

    def script(self, source: str, *arguments):
        """Runs it as the body of a function; what it returns."""
        return self._call("POST", "/execute/sync", {"script": source, "args": arguments})

    def find(self, selector: str) -> dict:
        return self._call("POST", "/element", {"using": "css selector", "value": selector})

    def press(self, *keys: str) -> None:
        """Keys by name (KEYS) or character, to whatever has the focus."""
        actions = [
            {"type": kind, "value": KEYS.get(key, key)} for name in keys for key in _keys(name) for kind in _DOWN_UP
        ]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def hover(self, selector: str) -> None:
        self._mouse(selector)

    def click(self, selector: str) -> None:
        self._mouse(selector, {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0})

    def _mouse(self, selector, *then):
        move = {"type": "pointerMove", "origin": self.find(selector), "x": 0, "y": 0, "duration": 0}
        self._call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move, *then]}]})

    def text(self, selector: str) -> str:
        return self.script("return document.querySelector(arguments[0]).textContent", selector)

    def screenshot(self, file: Path, whole_page: bool = True) -> None:
        size = self._devtools("Page.getLayoutMetrics")["cssContentSize"]
        options = {"captureBeyondViewport": True, "clip": {**size, "scale": 1}} if whole_page else {}
        image = self._devtools("Page.captureScreenshot", format="png", **options)
        Path(file).write_bytes(base64.b64decode(image["data"]))

    def console(self) -> list[str]:
        """Errors and warnings since the last call."""
        entries = self._call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list[str]:
        """Addresses asked for since the last call, whether they answered or not."""
        entries = self._call("POST", "/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [address for address in sent if not address.startswith("data:")]


_DOWN_UP = ("keyDown", "keyUp")


def _keys(name: str) -> list[str]:
    """A named key is one key; any other text is typed."""
    return [name] if name in KEYS else list(name)
