"""A headless Chromium for the tests of HTML pages."""

import shutil
import subprocess
from pathlib import Path

WIDTHS = (1280, 400)
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def browse(url: str, profile: Path, width: int, *arguments: str) -> subprocess.CompletedProcess:
    """Open a page; stdout is what `arguments` ask for, stderr has a line with CONSOLE for all that the page logs."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},900"]
    log = ["--enable-logging=stderr", "--log-level=0", "--virtual-time-budget=3000", f"--user-data-dir={profile}"]
    return subprocess.run([BROWSER, *options, *log, *arguments, url], capture_output=True, text=True, timeout=120)
