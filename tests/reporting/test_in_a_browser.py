"""The page in headless Chromium, where that is installed: at three widths and in both colour schemes."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from random import Random

import pytest
from receipts import merged_entry, mixture, receipt_of, write_receipt

import lorafuse

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium, which is not installed here")
WIDTHS = (390, 820, 1280)
MEASURE = """
const said = [...document.querySelectorAll("iframe")].map(frame => {
  const page = frame.contentDocument, root = page.documentElement, style = e => getComputedStyle(e);
  const all = [...page.querySelectorAll("body *")];
  return {
    width: root.clientWidth, needed: root.scrollWidth, background: style(page.body).backgroundColor,
    ink: style(page.body).color, smallest: Math.min(...all.map(e => parseFloat(style(e).fontSize))),
    shades: [...new Set([...page.querySelectorAll("figure rect")].map(e => style(e).fill))],
    cut: all.filter(e => e.closest(".scroll, pre, .legend") === null && e.scrollWidth > e.clientWidth + 1 &&
                    style(e).display !== "inline").map(e => e.tagName + " " + e.className),
    script: page.querySelectorAll("script").length, hurt: page.defaultView.hurt === 1,
  };
});
document.body.textContent = "MEASURED" + JSON.stringify(said) + "DERUSAEM";
"""


def measured(page, path, scheme):
    """What a browser makes of the page, once for each width."""
    frames = "".join(
        f'<iframe width="{width}" height="900" srcdoc="{escape(page)}"></iframe>' for width in WIDTHS
    )
    path.write_text(f"<!DOCTYPE html><body>{frames}<script>onload = () => {{{MEASURE}}}</script>")
    scheme_setting = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000", scheme_setting]
    folder = f"--user-data-dir={path.parent / 'profile'}"
    done = subprocess.run([BROWSER, *options, folder, "--dump-dom", path.as_uri()], capture_output=True,
                          text=True, timeout=120, check=True)  # fmt: skip
    return json.loads(unescape(re.search("MEASURED(.*)DERUSAEM", done.stdout, re.S)[1]))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_is_of_its_scheme(scheme, tmp_path):
    """Nothing but tables and heat maps is wider than its page; text has at least 11 pixels; colours are those
    of the scheme, and each shade is one of its own."""
    hostile = "h.0.<script>hurt=1</script><img src=x onerror=hurt=1>.weight"
    tensors = mixture(40, 4) | {hostile: merged_entry(Random(1)), "x" * 300: merged_entry(Random(2))}
    page = lorafuse.report(write_receipt(tmp_path / ("long-name" * 12), receipt_of(tensors)))
    for width, frame in zip(WIDTHS, measured(page, tmp_path / "frames.html", scheme), strict=True):
        assert width - 20 < frame["width"] <= width  # less the scroll bar
        assert (frame["needed"], frame["cut"]) == (frame["width"], [])
        assert frame["smallest"] >= 11
        assert (frame["script"], frame["hurt"]) == (0, False)
        ink, background = (int(frame[name].split("(")[1].split(",")[0]) for name in ("ink", "background"))
        assert (ink > background) == (scheme == "dark")
        assert len(frame["shades"]) > 8
