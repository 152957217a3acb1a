"`hftlab data …` as a stranger uses it: real processes, real files, an exchange and an archive on loopback"
import asyncio
import json
import threading

import numpy as np
import pytest

from hftlab.core.sources import ini
from hftlab.data.bars import bars
from hftlab.data.files import File, Series
from hftlab.data.loopback import Loopback, Tape
from hftlab.data.schema import KINDS
from hftlab.data.synth import make_flow, make_ticks
from test_archive import DATA, Shelf
from test_cli import run


@pytest.fixture
def here(tmp_path):
    "A folder with settings, and commands that answer in JSON there"
    (tmp_path/'settings.ini').write_text(ini())

    def told(*words, code=0, **env):
        r = run(*words, '--json', cwd=tmp_path, **env)
        assert r.returncode == code, r.stderr + r.stdout
        return json.loads(r.stdout)
    told.folder = tmp_path
    return told


@pytest.fixture
def exchange():
    "A made market over real sockets, in a thread of its own"
    loop = asyncio.new_event_loop()
    venue = Loopback(Tape(make_flow(900, seed=3, rate=5.)), speed=40)
    asyncio.run_coroutine_threadsafe(venue.up(), loop) # runs as soon as the loop does
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    while not venue.port: pass
    loop.call_soon_threadsafe(lambda: loop.create_task(venue.play()))
    yield venue
    asyncio.run_coroutine_threadsafe(venue.down(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def klines(rows): return '\n'.join(f'{b[0]},{b[1]},{b[2]},{b[3]},{b[4]},{b[5]},{b[0] + 59_999},{b[6]},{b[7]},{b[8]},{b[9]},0' for b in rows.tolist())


def test_a_file_comes_in_is_found_wanting_and_is_asked(here):
    made = bars(make_ticks(2880, seed=5))
    (here.folder/'SOLUSDT-1m-2025-01.csv').write_text(klines(np.delete(made, slice(700, 705))))
    came = here('data', 'import', 'SOLUSDT-1m-2025-01.csv')
    assert [(c['kind'], c['symbol'], c['frame'], c['rows']) for c in came] == [('bars', 'SOLUSDT', '1m', len(made) - 5)]
    assert here('data', 'import', 'SOLUSDT-1m-2025-01.csv')[0]['duplicates'] == len(made) - 5
    held = here('data', 'list')
    assert [(h['symbol'], h['rows'], h['gaps']) for h in held] == [('SOLUSDT', len(made) - 5, 1)] and held[0]['bytes'] > 0
    found = here('data', 'check', '--out', 'seen')
    assert [f['rule'] for f in found['findings']] == ['gap'] and (here.folder/'seen/check.html').stat().st_size > 5000
    assert here('data', 'query', "select count(*) as n, max(high) as high from bars where frame = '1m'") == [{'n': len(made) - 5, 'high': made['high'].max()}]
    assert {k['kind'] for k in here('data', 'kinds')} == set(KINDS)


def test_the_archive_fills_the_catalog_and_goes_on(here):
    shelf, made = Shelf(), bars(make_ticks(2*1440, seed=6))
    try:
        for day in (0, 1): shelf.publish(File(Series('klines', 'BTCUSDT', '1m'), f'2025-01-0{day + 1}'), klines(made[day*1440:(day + 1)*1440]))
        words = 'data', 'download', '--symbols', 'BTCUSDT', '--timerange', '20250101-20250103', '-j', '2', '--set', f'archive.base_url={shelf.url}'
        got = here(*words)
        assert (got['files'], got['rows'], got['missing'], got['refused']) == (2, len(made), [], {})
        assert here(*words)['had'] == 2
    finally: shelf.close()
    assert [(h['rows'], h['gaps']) for h in here('data', 'list')] == [(len(made), 0)]


def test_what_was_recorded_can_be_played_measured_and_imported(here, exchange):
    at = {'HFTLAB_VENUE__REST_URL': f'http://{exchange.url}', 'HFTLAB_VENUE__WS_URL': f'ws://{exchange.url}'}
    kept = here('data', 'record', '--symbols', 'BTC/USDT:USDT', '--streams', 'agg_trades,quotes,depth', '--duration', '4', **at)
    assert kept['safe'] == kept['frames'] > 100 and kept['dropped'] == 0 and kept['gaps']['lost'] == 0
    files = sorted(str(f) for f in (here.folder/'captures').iterdir())
    played = here('data', 'replay', *files)
    assert played['frames'] == kept['frames'] and played['messages']['Snapshot'] == 1
    assert {'Trade', 'Quote', 'Depth'} <= set(played['messages'])
    assert here('data', 'latency', *files)[0]['frames'] <= kept['frames']
    came = {c['kind']: c for c in here('data', 'import', *files)}
    assert came['agg_trades']['rows'] == played['messages']['Trade'] and came['quotes']['rows'] == played['messages']['Quote']
    found = here('data', 'check', code=1) # Its market ran forty times as fast as the clock by which it was seen, and that is noticed
    assert found['rows'] == sum(c['rows'] for c in came.values()) and {f['rule'] for f in found['findings'] if f['severity'] == 'bad'} == {'stray'}


def test_a_made_market_is_there_at_once_and_only_once(here):
    made = here('data', 'make', '--symbols', '3', '--days', '0.5', '--seed', '4')
    assert [(m['symbol'], m['bars'], m['duplicates']) for m in made] == [(s, 720, 0) for s in ('BTCUSDT', 'ETHUSDT', 'SOLUSDT')]
    assert all(m['bars'] == 0 < m['duplicates'] for m in here('data', 'make', '--symbols', '3', '--days', '0.5', '--seed', '4'))
    assert {f['severity'] for f in here('data', 'check')['findings']} <= {'note'}


@pytest.mark.skipif(not DATA.exists(), reason='needs the real data')
def test_real_files_of_every_form(here):
    came = here('data', 'import', *map(str, [*sorted((DATA/'klines/official').glob('futures*.zip')), *sorted((DATA/'trades').glob('*.zip')),
        DATA/'l2/usdm_btcusdt_20240808.gz', DATA/'klines/1h/BTCUSDT_1h_20230101_20250603.parquet']))
    rows = {(c['kind'], c['symbol'], c['frame']): c['rows'] for c in came}
    assert rows['agg_trades', 'APEUSDT', ''] == 45_342 and rows['quotes', 'BTCUSDT', ''] == 66_089 and rows['trades', 'BTCUSDT', ''] == 21_313
    wrong = run('data', 'import', str(DATA/'README.md'), cwd=here.folder)
    assert wrong.returncode == 1 and 'Traceback' not in wrong.stderr


def test_wrong_words(here):
    for words, says in ((('data', 'download'), 'timerange must be like'), (('data', 'list', '--kind', 'cheese'), 'was cheese'),
                        (('data', 'record'), 'venue.rest_url must be set'), (('data', 'replay'), 'a recording to play must be named')):
        r = run(*words, cwd=here.folder)
        assert r.returncode == 2 and says in r.stderr and 'Traceback' not in r.stderr, r.stderr
