"""Headless Chromium: a page as a user sees it. `apt-get install chromium` on Debian."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in _NAMES if (path := shutil.which(name))), None)
#: tests that only a browser can do; structure is checked without one
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: the page is checked by a parser alone"
)
SECONDS = 120

_PROBE = """
<script>
addEventListener("load", () => {
  let value;
  try { value = (() => { %s })(); } catch (error) { value = { error: String(error) }; }
  const pre = document.createElement("pre");
  pre.id = "probe";
  pre.textContent = JSON.stringify(value);
  document.body.append(pre);
});
</script>
"""


class Seen:
    """What a script returned on a page, and what the page wrote to the console."""

    def __init__(self, value: Any, console: list[str]) -> None:
        self.value, self.console = value, console


def look(page: Path, script: str, scratch: Path, width: int = 1280, dark: bool = False) -> Seen:
    """Open a page and run the body of a function on it, whose value (JSON) is returned.

    A copy of the page beside it holds the script, which finds the page's window as `page`. Narrow pages are shown in
    a frame: a window has a least width.
    """
    assert CHROMIUM is not None
    source = page.read_text(encoding="utf-8")
    copy = page.with_name("probe.html")
    if width < 600:
        frame = f'<iframe src="{page.name}" style="width:{width}px;height:3000px;border:0"></iframe>'
        probe = _PROBE % f'const page = document.querySelector("iframe").contentWindow; {script}'
        copy.write_text(f"<!DOCTYPE html><body style='margin:0'>{frame}{probe}", encoding="utf-8")
    else:
        probe = _PROBE % f"const page = window; {script}"
        copy.write_text(source.replace("</body>", f"{probe}</body>"), encoding="utf-8")
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        "--enable-logging=stderr", "--log-level=0", f"--user-data-dir={scratch / 'profile'}",
        f"--window-size={max(width, 600)},1000", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--virtual-time-budget=5000", "--dump-dom", copy.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    copy.unlink()
    match = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    assert match is not None, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(json.loads(html.unescape(match[1])), console)
