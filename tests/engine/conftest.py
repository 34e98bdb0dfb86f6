"""The browser in which the pages of engine.serve are tested."""

import pytest

from scripts.base.browser import Browser, find_chromium


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A headless Chromium, one for all tests; they are skipped where there is none."""
    binary = find_chromium()
    if binary is None:
        pytest.skip("no chromium on PATH")
    with Browser(binary, tmp_path_factory.mktemp("profile")) as browser:
        yield browser
