"""Pages in a real browser, where one is installed: widths of a phone and of a desk, light and dark, paper."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from evidence_fakes import tuned_rows
from test_page import HOSTILE
from test_report import ARCHS, make_rows

from arena.report import render
from arena.report.document import Section

PHONE, DESK = 360, 1200
BROWSER = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
        if (path := shutil.which(name))
    ),
    None,
)
pytestmark = pytest.mark.skipif(
    BROWSER is None,
    reason="no Chromium on this machine: apt-get install chromium (Debian) has these tests run",
)

MEASURE = """<script>
addEventListener("load", () => {
  const root = document.documentElement, wide = [];
  const clipped = (element) => {
    for (let up = element.parentElement; up; up = up.parentElement)
      if (["auto", "scroll"].includes(getComputedStyle(up).overflowX)) return true;
    return false;
  };
  for (const element of document.querySelectorAll("body *"))
    if (element.getBoundingClientRect().right > innerWidth + 1 && !clipped(element))
      wide.push(element.tagName);
  const one = getComputedStyle(document.body);
  const line = document.querySelector("figure svg path[style*='stroke: var(']");
  parent.postMessage({
    width: innerWidth, scroll: root.scrollWidth, height: root.scrollHeight, wide: wide,
    ground: one.backgroundColor, ink: one.color, figures: document.querySelectorAll("figure svg").length,
    smallest: Math.min(...[...document.querySelectorAll("p, li, td, th")].map(
      (element) => parseFloat(getComputedStyle(element).fontSize))),
    boxes: [...document.querySelectorAll(".wide, figure, pre")].filter(
      (box) => box.scrollWidth > box.clientWidth).length,
    loads: performance.getEntriesByType("resource").length,
    stroke: line ? getComputedStyle(line).stroke : "",
  }, "*");
});
</script>"""
FRAME = """<!doctype html><body style="margin:0">{frames}<pre id="found"></pre><script>
const found = [];
addEventListener("message", (event) => {{
  found.push(event.data);
  document.getElementById("found").textContent = JSON.stringify(found);
}});
</script>"""


def browse(folder: Path, *arguments: str, dark: bool = False) -> str:
    """Run the browser; what it prints."""
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000"]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def measured(page: Path, folder: Path, dark: bool) -> dict[int, dict]:
    """What the browser says of a page at both widths: a window is at least 500 wide, a frame is not."""
    inner = folder / "inner.html"
    inner.write_text(
        page.read_text(encoding="utf-8").replace("</body>", f"{MEASURE}</body>"), encoding="utf-8"
    )
    frames = "".join(
        f'<iframe src="inner.html" style="border:0;width:{width}px;height:900px"></iframe>'
        for width in (PHONE, DESK)
    )
    (folder / "frame.html").write_text(FRAME.format(frames=frames), encoding="utf-8")
    text = browse(
        folder, "--dump-dom", "--window-size=1600,1000", (folder / "frame.html").as_uri(), dark=dark
    )
    found = json.loads(unescape(re.search(r'<pre id="found">(.*?)</pre>', text, re.DOTALL)[1]))
    return {entry["width"]: entry for entry in found}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A plain grid with dials and hostile names, and a tuned one."""
    names = [*ARCHS[:6], *HOSTILE, "gdn2 erase=mean write=mean coupling=complement normaliser=max_abs"]
    grid = pl.concat(
        make_rows(archs=names, tasks=("mqar",)).with_columns(
            task_params=pl.lit(json.dumps({"n_pairs": pairs})), run_id=pl.col("run_id") + f"-{pairs}"
        )
        for pairs in (4, 8)
    )
    lost = pl.col("seed") == 2
    grid = grid.with_columns(
        status=pl.when(lost).then(pl.lit("failed")).otherwise("status"),
        reason=pl.when(lost).then(pl.lit("out of memory: " + "a_very_long_word" * 20)),
    )
    tuned = tuned_rows(arms=("gdn", "gdn2", "lstm"), panel=("gdn",))
    file = 'title = "A title that is long, and has a_word_that_is_longer_than_its_own_screen_is_wide"\n'
    found = {}
    for name, rows, text in (
        ("grid", grid, file + 'archs = ["gdn"]\nclaim = "c"'),
        ("tuned", tuned, file + '[tuning]\npairs = [["gdn2", "gdn"], ["gdn", "lstm"]]\nreport_seeds = [1]'),
    ):
        folder = tmp_path_factory.mktemp(name)
        (folder / "experiment.toml").write_text(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(render, "load_results", lambda directory, rows=rows, **_: rows)
            patch.setattr("arena.report.evidence.load_results", lambda directory, rows=rows, **_: rows)
            patch.setattr("arena.report.evidence.load_curves", lambda directory: pl.DataFrame())
            patch.setattr("arena.report.evidence.halving_table", lambda *_: pl.DataFrame())
            patch.setattr(render, "load_environments", lambda directory, _: {"a": {"commit": "c" * 40}})
            found[name] = render.make_report(
                folder,
                after=[Section(heading="H", listing=("a file", "x" * 400), commands=["arena " + "y" * 300])],
            )[0]
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["grid", "tuned"])
def test_nothing_sticks_out_on_a_phone_or_a_desk(pages, tmp_path, name, dark):
    found = measured(pages[name], tmp_path, dark)
    assert set(found) == {PHONE, DESK}
    for width, page in found.items():
        assert page["scroll"] <= width and page["wide"] == [], page
        assert page["loads"] == 0, "nothing is fetched"
        assert page["smallest"] >= 11 and page["figures"] >= 3
        ground, ink = (sum(map(int, re.findall(r"\d+", page[key])[:3])) for key in ("ground", "ink"))
        assert (ground < 120 and ink > 600) if dark else (ground == 765 and ink < 120), page
    assert found[PHONE]["boxes"] > 0, "wide tables scroll in boxes of their own"
    assert found[PHONE]["height"] > found[DESK]["height"]


def test_the_measurement_sees_what_sticks_out(pages, tmp_path):
    text = pages["tuned"].read_text().replace("</main>", '<div style="width:700px">x</div></main>')
    (tmp_path / "page.html").write_text(text)
    found = measured(tmp_path / "page.html", tmp_path, dark=False)
    assert found[PHONE]["scroll"] > PHONE and found[PHONE]["wide"] == ["DIV"] and not found[DESK]["wide"]


def test_figures_change_with_the_mode(pages, tmp_path):
    strokes = {measured(pages["grid"], tmp_path, dark)[DESK]["stroke"] for dark in (False, True)}
    assert len(strokes) == 2 and all(stroke.startswith("rgb(") for stroke in strokes)


def test_screenshots_are_light_and_dark_all_over(pages, tmp_path):
    from matplotlib.image import imread

    for dark in (False, True):
        path = tmp_path / f"{dark}.png"
        browse(
            tmp_path, f"--screenshot={path}", "--window-size=1000,2400", pages["tuned"].as_uri(), dark=dark
        )
        bright = imread(path)[..., :3].mean(-1)
        assert bright.shape == (2400, 1000)
        share = float((bright > 0.7).mean())
        assert share < 0.15 if dark else share > 0.8, share
        assert np.unique(bright).size > 50


def test_it_prints_without_the_dark(pages, tmp_path):
    path = tmp_path / "page.pdf"
    browse(tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={path}", pages["tuned"].as_uri(), dark=True)
    data = path.read_bytes()
    assert data.startswith(b"%PDF") and len(data) > 20_000
    pages_of = len(re.findall(rb"/Type\s*/Page\b", data))
    assert 3 <= pages_of <= 30, pages_of
    if shutil.which("pdftoppm"):
        from matplotlib.image import imread

        subprocess.run(["pdftoppm", "-r", "30", "-png", str(path), str(tmp_path / "sheet")], check=True)
        sheets = [imread(sheet)[..., :3].mean() for sheet in sorted(tmp_path.glob("sheet*.png"))]
        assert len(sheets) == pages_of and min(sheets) > 0.75, "ink on white"
