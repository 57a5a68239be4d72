"""Chromium without a driver: its own protocol over two pipes, as much of it as tests/test_site.py asks for."""
import base64
import json
import os
import select
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--allow-file-access-from-files=false")


def found():
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    "One page of a headless Chromium. `said` holds what the console complained of, `asked` every address that was requested."
    def __init__(self, profile):
        (read, to), (back, write) = os.pipe(), os.pipe()
        line = f'exec "$@" 3<&{read} 4>&{write}'
        command = ["bash", "-c", line, "bash", found(), *QUIET, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(command, pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(read)
        os.close(write)
        self.to, self.back, self.left, self.number, self.session = to, back, b"", 0, None
        self.said, self.asked, self.events = [], [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self):
        try:
            self.call("Browser.close")
        except (OSError, TimeoutError):
            pass
        self.process.terminate()
        self.process.wait(20)
        for fd in (self.to, self.back):
            os.close(fd)

    def _read(self, until):
        while b"\0" not in self.left:
            if time.monotonic() > until or not select.select([self.back], [], [], until - time.monotonic())[0]:
                raise TimeoutError("the browser did not answer")
            part = os.read(self.back, 1 << 20)
            if not part:
                raise OSError("the browser has ended")
            self.left += part
        message, self.left = self.left.split(b"\0", 1)
        return json.loads(message)

    def _keep(self, message):
        name, what = message.get("method"), message.get("params", {})
        self.events.append(name)
        if name == "Network.requestWillBeSent":
            self.asked.append(what["request"]["url"])
        elif name == "Runtime.exceptionThrown":
            self.said.append(what["exceptionDetails"].get("exception", {}).get("description") or what["exceptionDetails"]["text"])
        elif name == "Log.entryAdded" and what["entry"]["level"] == "error":
            self.said.append(f"{what['entry']['text']} {what['entry'].get('url', '')}")
        elif name == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning"):
            self.said.append(" ".join(str(a.get("value", a.get("description"))) for a in what["args"]))

    def call(self, method, seconds=90, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | ({"sessionId": self.session} if self.session else {})
        os.write(self.to, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + seconds
        while (answer := self._read(until)).get("id") != self.number:
            self._keep(answer)
        if "error" in answer:
            raise OSError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, url, seconds=90):
        "Go to an address and wait until all that belongs to it is there."
        self.events.clear()
        self.call("Page.navigate", url=url)
        until = time.monotonic() + seconds
        while "Page.loadEventFired" not in self.events:
            self._keep(self._read(until))

    def do(self, script):
        "The value of an expression on the page; promises are waited for."
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"]["exception"].get("description"))
        return answer["result"].get("value")

    def until(self, script, seconds=60):
        "Wait until an expression is true."
        end = time.monotonic() + seconds
        while not (value := self.do(script)):
            assert time.monotonic() < end, f"still not: {script}"
            time.sleep(.1)
        return value

    def screen(self, width, height, dark=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def drag(self, start, end):
        for kind, (x, y) in (("mousePressed", start), ("mouseMoved", end), ("mouseReleased", end)):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def picture(self, path):
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
