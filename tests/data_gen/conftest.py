"""Hypothesis for the tests of data_gen, without a limit on time, which a slow machine would exceed; and a browser."""

import shutil
import subprocess

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """Return dump(source, width), which gives a page's DOM after its scripts and the lines of its console."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not binary:
        pytest.skip("no chromium on PATH")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --v=0 --hide-scrollbars --dump-dom"

    def dump(source, width):
        folder = tmp_path_factory.mktemp("profile")
        (folder / "page.html").write_text(source)
        if width < 500:  # the least that the window itself can be
            (folder / "inner.html").write_text(source)
            source = f'<iframe src="inner.html" width="{width}" height="900" frameborder="0"></iframe>'
            (folder / "page.html").write_text(source)
        command = [
            binary,
            *flags.split(),
            f"--window-size={width},900",
            f"--user-data-dir={folder}",
            (folder / "page.html").as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return dump
