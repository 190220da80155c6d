"""Write docs/report.png, the top of a report's page: ``python docs/make_report_picture.py``.

Converts the demonstration model with the built-in text (needs the extra [hf]), or takes the
folder of a result, and lets a Chromium that is on the path take the picture; Pillow, which comes
with the extra [plot], makes it small.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from molae import cli
from molae.convert.report import PAGE
from molae.demo import CHECKPOINT

PICTURE = Path(__file__).resolve().parent / "report.png"

#: Of the window; the top of the page, down to the first charts.
WIDTH, HEIGHT = 1120, 2120

#: So many say all of it in a third of the bytes.
COLORS = 96

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")


def make(result: Path) -> None:
    """The picture of one result's page."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"none of {', '.join(BROWSERS)} is on the path; install Chromium")
    command = (
        browser,
        *OPTIONS,
        f"--window-size={WIDTH},{HEIGHT}",
        f"--screenshot={PICTURE}",
        (result / PAGE).resolve().as_uri(),
    )
    subprocess.run(command, check=True, capture_output=True)
    Image.open(PICTURE).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(
        PICTURE, optimize=True
    )
    print(f"{PICTURE}: {PICTURE.stat().st_size:,} bytes")


def main() -> None:
    if len(sys.argv) > 1:
        make(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result")
        command = ["convert", str(CHECKPOINT), str(result), "--size", "0.5", "--quiet"]
        if code := cli.main([*command, "--calibration", "builtin"]):
            raise SystemExit(code)
        make(result)


if __name__ == "__main__":
    main()
