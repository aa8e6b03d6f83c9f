"""A page of Voila that acts, with a token and without: what a stranger is shown. The kernel asks its server, so that both are started as users start them."""

from urllib.request import urlopen

import pytest
from conftest import write_notebook
from test_browser import serving, write_page

pytest.importorskip("voila")
pytestmark = pytest.mark.timeout(500)


@pytest.mark.parametrize("token", [[], ["--token="], ["--token=known"]], ids=["none", "empty", "known"])
def test_a_page_without_a_token_shows_why_and_nothing_else(tmp_path, token):
    write_notebook(tmp_path / "in.ipynb", "n = 1")
    notebook = write_page(tmp_path / "page.ipynb", "from dlnb.widgets import Launcher\nLauncher('in.ipynb')", "print('after' + 'wards')")
    with serving("voila", str(notebook), *token, cwd=tmp_path) as address, urlopen(f"{address}/?token=known", timeout=120) as answer:
        page = answer.read().decode()
    is_known = token == ["--token=known"]
    assert ("without a token" in page) != is_known, page[-2000:]
    assert ("afterwards" in page) == is_known and ("widget-view" in page) == is_known
