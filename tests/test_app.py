"Studies that were run for the record, and the page that watches a runner, in a real browser"

import os
import shutil
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest

from hftlab.app.dashboard import said, serving
from hftlab.app.reports import Manifest, manifests, report_run
from hftlab.core.bus import Bus
from hftlab.core.journal import Journal
from hftlab.core.secrets import Secret
from hftlab.core.settings import Settings
from hftlab.core.store import Store, rows, table
from hftlab.data.schema import instrument
from hftlab.engine.engine import Engine, Plan
from hftlab.engine.runner import Runner
from hftlab.indicators.features import trend_flow
from hftlab.service.api import api, serve
from hftlab.strategies.strategy import strategy
from hftlab.venues.sim import Sim

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


def until(true, seconds=20, why='waited in vain'):
    end = time.monotonic() + seconds
    while not true(): assert time.monotonic() < end, why; time.sleep(.02)


def test_a_study_repeats(tmp_path):
    with Store(f'sqlite:///{tmp_path}/lab.db') as store:
        ran = [report_run('flow_moves_price', {'seconds': '900', 'window_s': 5}, tmp_path, ROOT/'nbs/research', release=3, store=store) for _ in range(2)]
        with store.read() as c: kept = rows(c, table('report', Manifest).select(), Manifest)
    one,two = ran
    assert kept == ran and manifests(tmp_path) == [two, one]
    assert one.metrics == two.metrics and one.data == two.data and one.id[-8:] == two.id[-8:] and one.id != two.id
    assert one.exit_code == 0 and one.release == 3 and one.parameters == {'seed': 7, 'seconds': 900, 'window_s': 5., 'train': .5}
    assert one.metrics['r2_out'] > .5 > one.metrics['next_r2_out'] and one.metrics['strongest_bp'] < one.metrics['costs_bp']
    for page in tmp_path.rglob('*.html'): assert 'http://' not in page.read_text() and 'https://' not in page.read_text()
    assert (tmp_path/one.id/one.figures[0]).read_bytes().startswith(b'\x89PNG')


def test_a_study_whose_kernel_dies_leaves_a_manifest(tmp_path):
    import nbformat
    cells = [nbformat.v4.new_markdown_cell('# Gone'), nbformat.v4.new_code_cell('n = 9', metadata={'tags': ['parameters']}), nbformat.v4.new_code_cell('import os; os.kill(os.getpid(), n)')]
    kernel = {'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path/'gone.ipynb')
    m = report_run('gone', {}, tmp_path/'out', tmp_path)
    assert m.exit_code == 1 and 'died' in m.error and manifests(tmp_path/'out') == [m]
    assert 'Gone' in (tmp_path/'out'/m.id/'gone.ipynb').read_text()


@pytest.fixture
def browser():
    if not CHROMIUM: pytest.skip('needs a Chromium')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        yield p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage'])


@pytest.fixture
def runner(tmp_path):
    "A runner at work on the simulator, at sixty times the pace of the wall"
    s = strategy('ema_ofi')
    plan = Plan(7, trend_flow(2, 4, 3), s, s.params(pause=300), Settings())
    with Bus() as bus, Journal(tmp_path/'watched') as journal:
        r = Runner(lambda tell: Sim(tell, 5), Engine(instrument(), plan, 'watched'), journal, bus)
        r.reconcile()
        r.run(speed=0, until_ns=r.venue.now_ns + 300*10**9)
        work = threading.Thread(target=r.run, args=(60, 60))
        work.start()
        yield r
        r.stop()
        work.join()


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def flat(x, name=''): return {f'{name}{k}': v for k,v in x.items() if not isinstance(v, dict)} | {a: b for k,v in x.items() if isinstance(v, dict) for a,b in flat(v, f'{name}{k}.').items()}


def opened(browser, address, **how):
    "A page, and what it complained about"
    page,complaints = browser.new_page(viewport={'width': 1200, 'height': 700}, **how),[]
    page.on('console', lambda m: complaints.append(m.text) if m.type in ('error', 'warning') else None)
    page.on('pageerror', lambda e: complaints.append(str(e)))
    page.on('request', lambda r: None if r.url.startswith((address, 'blob:', 'data:')) else complaints.append(f'asked {r.url}'))
    page.goto(address)
    page.wait_for_selector('#state')
    return page,complaints


def state(page): return page.locator('#state').inner_text()


@pytest.mark.browser
def test_the_page_shows_what_the_api_says(browser, runner, tmp_path):
    pictures = Path(os.environ.get('HFTLAB_PICTURES', tmp_path))
    door = serve(api(runner.report, lambda: {'level': 'HEALTHY'}, bus=runner.bus))
    with serving(door.url, port=free_port(), refresh_ms=100) as address:
        page,complaints = opened(browser, address)
        dark,more = opened(browser, address, color_scheme='dark')
        until(lambda: page.locator('text=bought').count() + page.locator('text=sold').count() > 2, 40, 'no fill came to the page')
        assert state(page) == 'live'
        page.screenshot(path=pictures/'dashboard.png', full_page=True)
        dark.screenshot(path=tmp_path/'dark.png', full_page=True)
        runner.stop()
        def shown(): return {e.get_attribute('data-key'): (e.get_attribute('data-value'), e.inner_text()) for e in page.locator('[data-key]').all()}
        def true():
            s = flat(httpx.get(f'{door.url}/status').json())
            return {k: (str(s[k]), said(s[k], k)) for k in shown()}
        until(lambda: shown() == true(), 10, 'the page must show what the API says')
        assert {'release', 'position', 'pnl.total', 'pnl.fees', 'fills'} <= shown().keys() and shown()['release'][1] == '7'
        assert any(k.startswith('denied.') for k in shown())
        q = runner.engine.memory
        assert (page.locator('#bid').inner_text(), page.locator('#ask').inner_text()) == (f'{q.bid_px:,.2f}', f'{q.ask_px:,.2f}')
        door.close()
        gone = time.monotonic()
        until(lambda: state(page) == 'dead', 5, 'a dead runner must be shown within 5 s')
        print(f'dead after {time.monotonic() - gone:.1f} s')
        assert 'Positions may be open' in page.locator('[role=alert]').inner_text()
        door = serve(api(runner.report, lambda: {'level': 'HEALTHY'}, bus=runner.bus), port=door.port)
        until(lambda: state(page) != 'dead', 5, 'a runner that is back must be found')
        assert complaints == more == []
    door.close()


@pytest.mark.browser
def test_an_empty_page_says_what_to_do(browser):
    with serving(f'http://127.0.0.1:{free_port()}', port=free_port()) as address:
        page,complaints = opened(browser, address)
        assert state(page) == 'waiting' and 'hftlab-live' in page.locator('[role=alert]').inner_text() and not complaints


@pytest.mark.browser
def test_a_token_is_asked_for(browser):
    token = 'a-long-and-random-word'
    with serve(api(lambda: {'release': 7}, lambda: {'level': 'HEALTHY'}, bus=Bus(), token=Secret(token))) as door, serving(door.url, port=free_port(), token=token) as address:
        page,outside = browser.new_page(),[]
        page.on('request', lambda r: None if r.url.startswith((address, 'blob:', 'data:')) else outside.append(r.url))
        page.goto(address)
        assert page.locator('#state').count() == 0
        for word in ('wrong', token):
            page.fill('[name=token]', word)
            page.click('button')
            if word != token: page.wait_for_selector('text=That is not the token.')
        page.wait_for_selector('#state')
        until(lambda: page.locator('[data-key=release]').inner_text() == '7')
        assert not outside
        assert httpx.get(address).status_code == 302 and httpx.get(f'{address}ws').status_code == 403
