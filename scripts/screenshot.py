"""Picture of a report.html, as README shows it: python scripts/screenshot.py PAGE.html[#step=40&tau=3] OUT.png

Needs what tests/test_browser.py needs: Playwright, and Chromium on the PATH or in $CHROMIUM.
"""

import io
import os
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

name, _, address = sys.argv[1].partition("#")
with sync_playwright() as driver:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1280, "height": 1080})
    page.goto(f"{Path(name).resolve().as_uri()}#{address}")
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256).save(sys.argv[2], optimize=True)
