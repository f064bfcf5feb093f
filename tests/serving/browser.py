# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium that a test drives."""

import base64
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

WAIT_S = 20


class Page:
    """A tab of its own size and colour scheme."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver
        self.errors: list[str] = []

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return str(self.driver.execute_script(f"return {self._node(selector)}.textContent"))

    def data(self, selector: str, name: str) -> str | None:
        return self.find(selector).get_attribute(f"data-{name}")

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def wait(self, what: str, condition: Callable[[], Any]) -> Any:
        """Wait until something is so; the message of a failure is what the page shows."""
        deadline = time.monotonic() + WAIT_S
        while True:
            found = condition()
            if found:
                return found
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"not within {WAIT_S} s: {what}. The page is {self.data('body', 'state')}: "
                    f"{self.text('#banner')} {self.console_errors()}"
                )
            time.sleep(0.1)

    def wait_for_polls(self, more: int = 1) -> None:
        goal = int(self.data("body", "polls") or 0) + more
        self.wait("a poll", lambda: int(self.data("body", "polls") or 0) >= goal)

    def console_errors(self) -> list[str]:
        """Messages of the console since the page was opened, from warnings up."""
        self.errors += [entry["message"] for entry in self.driver.get_log("browser")]
        return self.errors

    def screenshot(self, file: Path) -> bytes:
        """Save what is seen; returns the PNG."""
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
        png = base64.b64decode(shot["data"])
        file.write_bytes(png)
        return png

    @staticmethod
    def _node(selector: str) -> str:
        return f"document.querySelector({selector!r})"


@contextmanager
def browse(url: str, width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Page]:
    """Open an address in a browser of its own."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver_path = shutil.which("chromedriver")
    assert chromium and driver_path, (
        "the page's tests need Chromium and its driver, which are not here. "
        "apt-get install chromium chromium-driver"
    )
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_path))
    try:
        phone = width < 600
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics | {"mobile": phone})
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.get(url)
        yield Page(driver)
    finally:
        driver.quit()
