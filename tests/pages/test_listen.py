"""The page to listen to notes: what it shows, that only its own script may run, and that this does in a browser."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess

import pytest

from mars.pages.listen import Sound, render

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SOUNDS = (
    Sound("0000-a b#.wav", "pictures/0.png", "0: brass <script>alert(1)</script>", "brass", 48, "C3"),
    Sound("0001.wav", "pictures/1.png", "1: flute", "flute", 60),
    Sound("0002.wav", "pictures/2.png", "2: any"),
)


def page(sounds=SOUNDS, **changed) -> str:
    given = {"seconds": 4.096, "khz": 8.0, "bins": 512, "footer": "made by <mars>", **changed}
    return render("Notes & more", {"Seed": 0}, sounds, **given)


def test_names_are_quoted_and_no_script_but_its_own_may_run():
    text = page()
    assert 'src="0000-a%20b%23.wav"' in text
    assert "<script>alert" not in text
    assert "Notes &amp; more" in text
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "http:" not in text
    assert "https:" not in text


def test_the_filter_offers_what_there_is():
    text = page()
    assert re.findall(r'<option value="([^"]*)"[^>]*>([^<]*)</option>', text) == [
        ("", "all"), ("brass", "brass"), ("flute", "flute"),
        ("48", "C3 (48)"), ("60", "C4 (60)"), ("48", "C3 (48)"), ("60", "C4 (60)"),
    ]  # fmt: skip
    assert "<select" not in page(SOUNDS[2:])


def test_axes_name_seconds_and_kilohertz():
    names = re.findall(r"<text[^>]*>([^<]*)</text>", page())
    assert names == ["0", "1", "2", "3", "4 s", "0", "0.25", "0.5", "1", "2", "4", "8 kHz"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_script_runs_in_a_browser(tmp_path):
    (tmp_path / "index.html").write_text(page(), encoding="utf-8")
    done = subprocess.run(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=2000", "--dump-dom", (tmp_path / "index.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        pytest.skip(f"Chromium does not start here: {done.stderr[-200:]}")
    assert '<output id="shown">3 of 3 shown</output>' in done.stdout
