"""A real browser without a window: what it makes of a page."""

import functools
import html
import json
import re
import shutil
import subprocess
import tempfile
from typing import NamedTuple

import pytest

NAMES = "chromium", "chromium-browser", "google-chrome", "chrome"
FLAGS = (
  "--headless=new",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-dev-shm-usage",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-extensions",
  "--disable-sync",
  "--disable-quic",
  "--hide-scrollbars",
  "--enable-logging=stderr",
  "--v=0",
)
# Set before the page is read, so that nothing that goes wrong is missed.
LISTEN = """
const errors = [];
addEventListener("error", e => errors.push(e.message || e.target.outerHTML),
  true);
addEventListener("securitypolicyviolation",
  e => errors.push(`${e.violatedDirective} ${e.blockedURI}`));
"""
MEASURE = """
const box = e => { const r = e.getBoundingClientRect();
  return [r.left, r.top, r.right, r.bottom]; };
const all = (kind, from = document) => [...from.querySelectorAll(kind)];
const color = (e, what) => getComputedStyle(e)[what];
function found() {
  document.querySelectorAll("details").forEach(e => { e.open = true; });
  const root = document.documentElement;
  return {
    window: innerWidth,
    wide: root.scrollWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    ground: color(document.body, "backgroundColor"),
    ink: color(document.body, "color"),
    errors,
    fetched: performance.getEntriesByType("resource").map(e => e.name),
    charts: all("svg[role=img]").map(e => ({
      box: box(e),
      lines: all("path.line", e).map(x => [
        x.getTotalLength(), color(x, "stroke")]),
      marks: all(".mark", e).map(box),
      words: all("text", e).map(box),
    })),
    boxes: all(".scroll").map(e => [
      e.clientWidth, e.scrollWidth, color(e, "overflowX"), box(e)[2]]),
    tables: all("table").map(box),
    cells: all("td[style]").map(e => [
      e.textContent, color(e, "backgroundColor"), color(e, "color")]),
    height: root.scrollHeight,
  };
}
addEventListener("load", () => {
  parent.postMessage(JSON.stringify(found()), "*");
});
"""
# A window on a desk is never as narrow as a phone, but a frame is.
FRAME = """<!DOCTYPE html><html style="color-scheme:light dark">
<body style="margin:0"><script>
addEventListener("message", e => {{
  document.documentElement.setAttribute("data-found", e.data);
}});
</script>
<iframe src="{name}" width="{width}" height="{height}" style="border:0">
</iframe>
</body></html>
"""
SCRIPTS = " script-src 'unsafe-inline'"


class Seen(NamedTuple):
  """What a browser made of a page.

  Attributes:
    found: measures, by the names of `MEASURE`.
    console: lines that the page wrote there, errors among them.
  """

  found: dict
  console: list[str]


@functools.cache
def program():
  """The browser's command; skips the test where there is none."""
  paths = filter(None, map(shutil.which, NAMES))
  path = next(paths, None)
  if path is None:
    pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
  return path


def look(page, folder, *, width=390, dark=False):
  """Opens a page in a window and measures it.

  Args:
    page: HTML.
    folder: where a copy goes, which holds the measuring script too.
    width: of the window.
    dark: whether the reader prefers dark.
  """
  body = page.replace("default-src 'none'", "default-src 'none';" + SCRIPTS)
  assert body != page, "the page has no policy to open for the script"
  body = body.replace("<style>", f"<script>{LISTEN}</script><style>", 1)
  body = body.replace("</body>", f"<script>{MEASURE}</script></body>")
  path = folder / "measured.html"
  path.write_text(body)
  done = start(path, "--dump-dom", width=width, dark=dark)
  told = re.search(r'data-found="([^"]*)"', done.stdout)
  assert told, done.stderr[-2000:]
  return Seen(json.loads(html.unescape(told[1])), console(done.stderr))


def shoot(path, picture, *, width=390, height=844, dark=False):
  """Opens a page as it is, takes its picture; what it wrote to the console."""
  how = {"width": width, "height": height, "dark": dark}
  return console(start(path, f"--screenshot={picture}", **how).stderr)


def start(path, *more, width, dark, height=844):
  """Shows a page in a frame of a browser, which ends when it has loaded."""
  frame = path.with_name(f"frame-{path.name}")
  frame.write_text(FRAME.format(name=path.name, width=width, height=height))
  with tempfile.TemporaryDirectory() as profile:
    return subprocess.run(
      [
        program(),
        *FLAGS,
        f"--user-data-dir={profile}",
        f"--window-size={max(width, 500)},{height}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        *more,
        frame.as_uri(),
      ],
      capture_output=True,
      text=True,
      timeout=120,
      check=True,
    )


def console(log):
  """What a page wrote, out of a browser's own log."""
  return re.findall(r"CONSOLE[:(].*", log)
