"""A headless Chromium for tests, driven by its DevTools protocol: what a page says, asks for and looks like."""

import asyncio
import base64
import contextlib
import json
import pathlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import aiohttp

NAMES = "chromium", "chromium-browser", "google-chrome", "chrome"
START_SECONDS, PAGE_SECONDS = 60.0, 60.0


class Look(NamedTuple):
    """complaints: what the console said, and exceptions. requests: the addresses that the page asked for, its own among
    them. found: what the script gave. picture: a PNG of the whole page."""

    complaints: list[str]
    requests: list[str]
    found: Any
    picture: bytes


def installed() -> str:
    """The path of a browser, "" for none."""
    return next(filter(None, map(shutil.which, NAMES)), "")


@contextlib.contextmanager
def browser(folder: pathlib.Path) -> Iterator["Browser"]:
    """A running one, with a folder for its profile."""
    words = [
        installed(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0",
        "--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={folder}", "about:blank",
    ]  # fmt: skip
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield Browser(_address(folder / "DevToolsActivePort", process))
    finally:
        process.terminate()
        process.wait(30)


def _address(path: pathlib.Path, process: subprocess.Popen) -> str:
    """Where the browser listens, once it has written it down."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            port, place = path.read_text("utf-8").split()
            return f"ws://127.0.0.1:{port}{place}"
        time.sleep(0.05)
    raise RuntimeError("the browser did not start")


class Browser:
    def __init__(self, address: str) -> None:
        self._address = address

    def look(self, page: pathlib.Path, script: str, width: int = 1280, dark: bool = False) -> Look:
        """Open a file in a window of a width, and evaluate an expression of JavaScript in it."""
        with contextlib.suppress(TimeoutError):  # a tab that never answers was seen once in hundreds
            return self._look_once(page, script, width, dark)
        return self._look_once(page, script, width, dark)

    def _look_once(self, page: pathlib.Path, script: str, width: int, dark: bool) -> Look:
        return asyncio.run(asyncio.wait_for(self._look(page, script, width, dark), PAGE_SECONDS))

    async def _look(self, page: pathlib.Path, script: str, width: int, dark: bool) -> Look:
        async with aiohttp.ClientSession() as session, session.ws_connect(self._address, max_msg_size=0) as socket:
            talk = _Talk(socket)
            target = (await talk.ask("Target.createTarget", url="about:blank"))["targetId"]
            opened = await talk.ask("Target.attachToTarget", targetId=target, flatten=True)
            talk.session = opened["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                await talk.ask(f"{domain}.enable")
            screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
            await talk.ask("Emulation.setDeviceMetricsOverride", **screen)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            await talk.ask("Emulation.setEmulatedMedia", features=[scheme])
            arrived = await talk.ask("Page.navigate", url=page.resolve().as_uri())
            if "errorText" in arrived:
                raise RuntimeError(f"{page}: {arrived['errorText']}")
            await talk.until("Page.loadEventFired")
            answer = await talk.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
            shot = await talk.ask("Page.captureScreenshot", captureBeyondViewport=True)
            await talk.ask("Target.closeTarget", targetId=target)
            if "exceptionDetails" in answer:
                raise RuntimeError(json.dumps(answer["exceptionDetails"])[:1000])
            return Look(*talk.seen(), answer["result"].get("value"), base64.b64decode(shot["data"]))


class _Talk:
    """Questions and answers, and what happens in between."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.session = ""
        self._socket, self._number, self._events = socket, 0, list[dict[str, Any]]()

    async def ask(self, method: str, **parameters: object) -> dict[str, Any]:
        self._number += 1
        own = {"sessionId": self.session} if self.session else {}
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters, **own})
        while (said := await self._socket.receive_json()).get("id") != self._number:
            self._events.append(said)
        if "error" in said:
            raise RuntimeError(f"{method}: {said['error']}")
        return said["result"]

    async def until(self, name: str) -> None:
        while not any(event.get("method") == name for event in self._events):
            self._events.append(await self._socket.receive_json())

    def seen(self) -> tuple[list[str], list[str]]:
        """Complaints and requests."""
        complaints = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        said = [json.dumps(event["params"]) for event in self._events if event.get("method") in complaints]
        asked = [event for event in self._events if event.get("method") == "Network.requestWillBeSent"]
        return said, [event["params"]["request"]["url"] for event in asked]
