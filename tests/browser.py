"""A headless Chromium for tests, driven by the DevTools protocol over a pair of pipes, so that no driver is needed."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
                None)


class Page:
    """One tab. `errors` collects what the console was told of: exceptions, errors, refused requests."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._buffer = b""
        self._calls = 0
        self._session: str | None = None
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, path: Path, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Load a file, and wait until it is drawn."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self._call("Emulation.setEmulatedMedia",
                   features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self._call("Page.navigate", url=path.absolute().as_uri())
        self.until("document.readyState === 'complete' && document.title !== ''")

    def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression."""
        result = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, condition: str, seconds: float = 60) -> None:
        """Wait for a JavaScript expression to become true."""
        end = time.monotonic() + seconds
        while not self.evaluate(condition):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """One key, as a keyboard sends it."""
        codes = {"Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for kind in ("rawKeyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def point(self, x: float, y: float) -> None:
        """Move the mouse there."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Save what is to be seen, or the whole page, as PNG."""
        shot = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole,
                          **({"clip": {**self._size(), "x": 0, "y": 0, "scale": 1}} if whole else {}))
        path.write_bytes(base64.b64decode(shot["data"]))

    def _size(self) -> dict[str, float]:
        size = self._call("Page.getLayoutMetrics")["cssContentSize"]
        return {"width": size["width"], "height": size["height"]}

    def _call(self, method: str, **parameters: object) -> dict[str, Any]:
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        for answer in self._messages():
            if answer.get("id") == self._calls:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)
        raise AssertionError(f"the browser went away during {method}")

    def _messages(self) -> Iterator[dict[str, Any]]:
        while True:
            message, end, rest = self._buffer.partition(b"\0")
            if end:
                self._buffer = rest
                yield json.loads(message)
                continue
            data = os.read(self._from, 1 << 16)
            if not data:
                return
            self._buffer += data

    def _note(self, event: dict[str, Any]) -> None:
        kind, told = event.get("method"), event.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(told["exceptionDetails"]))
        elif kind == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(told["args"]))
        elif kind == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.errors.append(told["entry"]["text"])
        elif kind == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A browser with an empty profile in the folder `profile`, killed afterwards with all its processes."""
    assert CHROMIUM is not None
    (commands, to_browser), (from_browser, answers) = os.pipe(), os.pipe()
    # The browser reads descriptor 3 and writes 4. The shell puts them there, and ours may have just these numbers.
    high = [fcntl.fcntl(end, fcntl.F_DUPFD, 16) for end in (commands, answers)]
    line = f'exec "$0" "$@" 3<&{high[0]} 4>&{high[1]}'
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
             "--no-first-run", "--disable-background-networking", "--disable-component-update",
             "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(["bash", "-c", line, CHROMIUM, *flags], pass_fds=high,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    for end in (commands, answers, *high):
        os.close(end)
    try:
        yield Page(to_browser, from_browser)
    finally:
        os.killpg(process.pid, 9)
        process.wait()
        os.close(to_browser)
        os.close(from_browser)
