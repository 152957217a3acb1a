"The archive over a real socket: every kind of file, every fault, and a download that is killed and goes on"

import asyncio
import hashlib
import io
import multiprocessing
import os
import signal
import struct
import threading
import time
import zipfile
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv

from hftlab.core.errors import Conflict, StoreError, Unreachable
from hftlab.core.settings import Archive
from hftlab.data.archive import download, take_in
from hftlab.data.catalog import Catalog, when
from hftlab.data.files import File, Series
from hftlab.data.schema import KINDS
from hftlab.data.tables import LAYOUTS

DATA = Path(__file__).parent.parent/os.environ.get('HFTLAB_SHARED_DATA', '../shared/data')
DAY = 86_400_000
many = multiprocessing.get_context('forkserver')
many.set_forkserver_preload(['hftlab.data.archive'])


class Shelf:
    "An archive on loopback, and how it fails: a status, `cut`, `wrong` (a byte), `stall` (until released), each once"

    def __init__(self):
        self.files, self.faults, self.asked, self.stalled, self.go_on = {}, defaultdict(list), [], threading.Event(), threading.Event()
        shelf = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'
            def do_GET(self): shelf.answer(self)
            def log_message(self, *_): pass
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={'poll_interval': .01}, daemon=True).start()
        self.url = f'http://127.0.0.1:{self.server.server_port}'

    def close(self):
        self.go_on.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, h):
        path, part = h.path[1:], h.headers.get('Range', 'bytes=0-')
        at = int(part[6:-1])
        self.asked.append((path.split('/')[-1], at))
        fault = self.faults[path].pop(0) if self.faults[path] else None
        body = self.files.get(path)
        status = fault if isinstance(fault, int) else 404 if body is None else 416 if at >= len(body) else 206 if at else 200
        rest = body[at:] if status < 300 else b''
        if fault == 'wrong': rest = rest[:-1] + bytes([rest[-1] ^ 1])
        h.send_response(status)
        h.send_header('Content-Length', str(len(rest)))
        if status == 206: h.send_header('Content-Range', f'bytes {at}-{len(body) - 1}/{len(body)}')
        h.end_headers()
        half = len(rest)//2 if fault in ('cut', 'stall') else len(rest)
        h.wfile.write(rest[:half])
        if fault == 'stall':
            h.wfile.flush()
            self.stalled.set()
            self.go_on.wait(20)
        h.close_connection = fault in ('cut', 'stall')

    def publish(self, file, text, inside=None, packed=None):
        "Put a table on the shelf, with the checksum of what is really there"
        name = file.path.split('/')[-1]
        if packed is None:
            with zipfile.ZipFile(out := io.BytesIO(), 'w', zipfile.ZIP_DEFLATED) as z: z.writestr(inside or name.replace('.zip', '.csv'), text)
            packed = out.getvalue()
        self.files[file.path] = packed
        self.files[f'{file.path}.CHECKSUM'] = f'{hashlib.sha256(packed).hexdigest()}  {name}\n'.encode()


@pytest.fixture
def shelf():
    s = Shelf()
    yield s
    s.close()


def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.005)


def fetch(shelf, home, names='trades', since='20240101', to='20240104', symbols='BTCUSDT', now='20240501', **kw):
    how = {k: kw.pop(k) for k in ('workers', 'attempts', 'timeout_s', 'max_unpacked_mb') if k in kw}
    settings = Archive(base_url=shelf if isinstance(shelf, str) else shelf.url, **{'attempts': 3, 'workers': 4, 'timeout_s': 10., **how})
    return asyncio.run(download(names, symbols, since, to, Catalog(home/'catalog'), settings, home/'files', now_ns=when(now), pause_s=.01, **kw))


def held(home, kind='trades', symbol='BTCUSDT', frame=''): return Catalog(home/'catalog').array(kind, symbol, frame=frame, gaps='allow')


def trades(day, n=1000, first=1, unit=1):
    "Text of a day of trades"
    t = when(day)//10**6*unit + np.arange(n)*(DAY*unit//n)
    return ''.join(f'{first + i},{60_000 + i % 7/10:.1f},{(i % 9 + 1)/1000},{60 + i % 7},{t[i]},{"true" if i % 2 else "false"}\n' for i in range(n))


def days(*dates): return [File(Series('trades', 'BTCUSDT'), d) for d in dates]


def three(shelf, n=1000):
    for i, f in enumerate(days('2024-01-01', '2024-01-02', '2024-01-03')): shelf.publish(f, trades(f.date, n, 1 + n*i))


ms = when('20240101')//10**6
SAMPLES = { # A row of each kind, as the archive writes it and as it must be found
    'klines': (f'{ms},1,3,.5,2,10,{ms + 59_999},15,7,4,6,0', (ms, 1., 3., .5, 2., 10., 15., 7, 4., 6.)),
    'markPriceKlines': (f'{ms},1,3,.5,2,0,{ms + 59_999},0,60,0,0,0', (ms, 1., 3., .5, 2., 0., 0., 0, 0., 0.)),
    'aggTrades': (f'5,60000.1,0.5,7,9,{ms},true', (ms*10**6, 0, 60000.1, .5, -1, 5, 7, 9)),
    'trades': (f'5,60000.1,0.5,30000.05,{ms},false', (ms*10**6, 0, 60000.1, .5, 1, 5)),
    'bookTicker': (f'5,60000.1,2,60000.2,3,{ms},{ms + 1}', (ms*10**6, 0, 60000.1, 2., 60000.2, 3., 5)),
    'bookDepth': ('2024-01-01 00:00:00,-5.00,7,420000', (ms*10**6, -5., 7., 420000.)),
    'metrics': ('2024-01-01 00:00:00,BTCUSDT,80000.5,4.8e9,1.5,1.25,2,0.75', (ms*10**6, 80000.5, 4.8e9, 1.5, 1.25, 2., .75)),
    'fundingRate': (f'{ms + 3},8,0.0001', ((ms + 3)*10**6, .0001, 8.))}


@pytest.mark.parametrize('name', SAMPLES)
@pytest.mark.parametrize('header', [True, False])
def test_every_kind_of_file(shelf, tmp_path, name, header):
    layout, (line, row) = LAYOUTS[name], SAMPLES[name]
    series = Series(name, 'BTCUSDT', '1m' if layout.framed else '')
    shelf.publish(File(series, '2024-01-01' if 'daily' in layout.by else '2024-01'), (','.join(layout.columns) + '\n')*header + line + '\n')
    got = fetch(shelf, tmp_path, name, to='20240102')
    assert (got.files, got.rows, got.missing, got.refused) == (1, 1, [], {})
    assert held(tmp_path, layout.kind, frame=series.frame).tolist()[0][:len(row)] == row


def test_milliseconds_and_microseconds_are_the_same_trades(shelf, tmp_path):
    a, b, _ = days('2024-01-01', '2024-01-02', '2024-01-03')
    shelf.publish(a, trades(a.date, 10, 1))
    shelf.publish(b, trades(b.date, 10, 11, unit=1000))
    assert fetch(shelf, tmp_path, to='20240103').rows == 20
    assert set(np.diff(held(tmp_path)['ts_ns'])) == {DAY*10**5}


def test_faults_are_waited_out_and_what_is_bad_is_named(shelf, tmp_path):
    files = days(*(f'2024-01-{d:02}' for d in range(1, 11)))
    for i, f in enumerate(files): shelf.publish(f, trades(f.date, 100, 1 + 100*i))
    path = [f.path for f in files]
    shelf.faults[path[0]] = [500, 503]
    shelf.faults[path[1]] = ['cut', 'cut', 'cut', 'cut'] # More often than it is tried, but each time it gets further
    shelf.faults[path[2]] = ['wrong']
    shelf.faults[path[3]] = ['wrong']*9
    shelf.faults[path[4]] = [500]*9
    shelf.faults[f'{path[5]}.CHECKSUM'] = [429]
    shelf.publish(files[6], b'0'*(2 << 20)) # A bomb
    shelf.publish(files[7], '', packed=shelf.files[path[7]][:-30])
    shelf.publish(files[8], trades('2024-01-09'), inside='../../up.csv')
    del shelf.files[path[9]], shelf.files[f'{path[9]}.CHECKSUM']
    got = fetch(shelf, tmp_path, to='20240111')
    assert (got.files, got.rows, got.missing) == (4, 400, ['BTCUSDT-trades-2024-01-10.zip'])
    said = {name[-6:-4]: why for name, why in got.refused.items()}
    assert all(why.startswith(f'BTCUSDT-trades-2024-01-{d}.zip must ') for d, why in said.items())
    for d, word in zip(('04', '05', '07', '08', '09'), ('checksum', 'HTTP 500', 'shrink', 'whole zip', '../../up.csv'), strict=True): assert word in said.pop(d)
    assert not said and sorted({*held(tmp_path)['trade_id']}) == [*range(1, 301), *range(501, 601)]
    assert not [p for p in (tmp_path/'files').rglob('*.zip') if p.name[-6:-4] in ('07', '08', '09')]


def test_days_fill_in_what_months_lack(shelf, tmp_path):
    month, other = days('2024-01', '2024-02')
    shelf.publish(month, ''.join(trades(d.date, 10, 1 + 10*i) for i, d in enumerate(month.days())))
    for i, d in enumerate(other.days()):
        if d.date != '2024-02-11': shelf.publish(d, trades(d.date, 10, 311 + 10*i))
    got = fetch(shelf, tmp_path, since='20231101', to='20240301')
    assert got.missing == ['BTCUSDT-trades-2023-11.zip', 'BTCUSDT-trades-2023-12.zip', 'BTCUSDT-trades-2024-02-11.zip']
    assert (got.files, got.rows, len(held(tmp_path))) == (29, 590, 590)
    assert sum('2023-11' in name for name, _ in shelf.asked) == 4 # The month, and three of its days


def test_the_tail_is_asked_of_the_exchange(shelf, tmp_path):
    three(shelf)
    asked = []

    async def tail(kind, symbol, frame, since, to):
        asked.append((kind, symbol, since, to))
        rows = np.zeros(3, KINDS[kind].dtype)
        rows['ts_ns'], rows['trade_id'] = (since - 1, since, to), (3000, 3001, 3002)
        return rows
    got = fetch(shelf, tmp_path, to='20240501', now='20240105T06:00', tail=tail)
    assert asked == [('trades', 'BTCUSDT', when('20240104'), when('20240105T06:00'))] and (got.tail, got.rows, got.missing) == (1, 3001, [])


def test_a_replaced_file_is_fetched_again_and_a_cleared_catalog_too(shelf, tmp_path):
    three(shelf)
    assert fetch(shelf, tmp_path).files == 3
    shelf.publish(days('2024-01-02')[0], trades('2024-01-02', 1100, 1001))
    shelf.asked.clear()
    got = fetch(shelf, tmp_path)
    assert (got.files, got.had, got.rows, got.duplicates) == (1, 2, 100, 1000) and len(shelf.asked) == 4
    (tmp_path/'catalog').rename(tmp_path/'away')
    assert fetch(shelf, tmp_path).rows == 3100


def test_a_silent_server_is_left(shelf, tmp_path):
    three(shelf)
    shelf.faults[days('2024-01-02')[0].path] = ['stall']
    got = fetch(shelf, tmp_path, timeout_s=.3)
    assert (got.files, got.rows) == (3, 3000)


def test_without_a_server_it_ends_soon_and_says_why(tmp_path):
    with pytest.raises(Unreachable, match='must come in 3 attempts, was: Cannot connect'):
        fetch('http://127.0.0.1:1', tmp_path, since='20230101', to='20240101')


def test_a_catalog_that_cannot_take_rows_ends_it_and_nothing_is_forgotten(shelf, tmp_path):
    three(shelf)
    (tmp_path/'catalog').write_text('in the way')
    with pytest.raises(StoreError, match=r'the catalog must take BTCUSDT-trades-2024-01-0\d.zip'): fetch(shelf, tmp_path)
    (tmp_path/'catalog').unlink()
    assert fetch(shelf, tmp_path).rows == 3000


def child(url, home): fetch(url, home, workers=2)


@pytest.mark.parametrize('where', [0, 1, 2])
def test_a_killed_download_goes_on_where_it_was(shelf, tmp_path, where):
    three(shelf, 20_000)
    fetch(shelf, tmp_path/'calm')
    shelf.faults[days('2024-01-01', '2024-01-02', '2024-01-03')[where].path] = ['stall']
    p = many.Process(target=child, args=(shelf.url, tmp_path/'killed'))
    p.start()
    assert shelf.stalled.wait(20)
    part = tmp_path/'killed/files'/days(f'2024-01-0{where + 1}')[0].path
    until(lambda: part.exists() and part.stat().st_size > 0)
    with pytest.raises(Conflict, match='one download at a time'): fetch(shelf, tmp_path/'killed')
    os.kill(p.pid, signal.SIGKILL)
    p.join(10)
    shelf.go_on.set()
    assert part.exists() and 0 < part.stat().st_size < len(shelf.files[days(f'2024-01-0{where + 1}')[0].path])
    shelf.asked.clear()
    got = fetch(shelf, tmp_path/'killed')
    assert [at > 0 for name, at in shelf.asked if name == part.name] == [True] and got.files + got.had == 3
    assert held(tmp_path/'killed').tobytes() == held(tmp_path/'calm').tobytes() and len(held(tmp_path/'calm')) == 60_000
    assert fetch(shelf, tmp_path/'killed').had == 3 and not list((tmp_path/'killed/files').rglob('*.zip'))


def test_killed_at_any_moment_it_ends_equal(shelf, tmp_path):
    for i in range(12): shelf.publish(f := days(f'2024-01-{i + 1:02}')[0], trades(f.date, 5000, 1 + 5000*i))
    fetch(shelf, tmp_path/'calm', to='20240113')
    for wait in np.random.default_rng(3).uniform(0, .25, 6):
        p = many.Process(target=fetch, args=(shelf.url, tmp_path/'killed'), kwargs={'to': '20240113', 'workers': 2})
        n = len(shelf.asked)
        p.start()
        until(lambda: len(shelf.asked) > n or not p.is_alive()) # noqa: B023
        p.join(wait) # Any moment will do, so this is no waiting for something to happen
        os.kill(p.pid, signal.SIGKILL)
        p.join(10)
    got = fetch(shelf, tmp_path/'killed', to='20240113')
    assert got.files + got.had == 12 and held(tmp_path/'killed').tobytes() == held(tmp_path/'calm').tobytes()


def lying(size):
    "A zip that says it holds less than it does"
    with zipfile.ZipFile(out := io.BytesIO(), 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('BTCUSDT-trades-2024-01-01.csv', trades('2024-01-01', 5000))
    packed = bytearray(out.getvalue())
    for mark, at in ((b'PK\1\2', 24), (b'PK\3\4', 22)): struct.pack_into('<I', packed, packed.index(mark) + at, size)
    return bytes(packed)


def test_a_zip_that_lies_about_its_size_gives_no_rows(shelf, tmp_path):
    shelf.publish(days('2024-01-01')[0], '', packed=lying(40_000))
    got = fetch(shelf, tmp_path, to='20240102')
    assert got.rows == 0 and 'must be a whole zip' in got.refused['BTCUSDT-trades-2024-01-01.zip']


def memory(path, home, to):
    import resource
    n = take_in(path, Series('trades', 'BTCUSDT'), Catalog(home), most=1 << 16)
    to.put((n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def test_memory_does_not_grow_with_the_file(tmp_path):
    used = []
    for n in (500_000, 2_000_000): # Of which the second is 80 MB larger as text, and 60 MB as rows
        path, i = tmp_path/f'{n}/BTCUSDT-trades-2024-01-01.zip', np.arange(n)
        path.parent.mkdir()
        table = pa.table({'id': i + 1, 'price': 60_000 + i % 7, 'qty': i % 9 + 1, 'quote_qty': i, 'time': ms + i*DAY//n, 'is_buyer_maker': i % 2 == 0})
        csv.write_csv(table, text := io.BytesIO(), csv.WriteOptions(quoting_header='none'))
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as z: z.writestr('BTCUSDT-trades-2024-01-01.csv', text.getvalue())
        p = many.Process(target=memory, args=(path, tmp_path/f'{n}/catalog', to := many.Queue()))
        p.start()
        (new, _), kb = to.get(timeout=60)
        p.join(10)
        assert new == n
        used.append(kb)
    assert used[1] - used[0] < 40_000, used


@pytest.mark.skipif(not (DATA/'trades').is_dir(), reason='needs the official files')
def test_official_files_go_the_same_way(shelf, tmp_path):
    ape, btc = File(Series('aggTrades', 'APEUSDT'), '2024-10-18'), File(Series('klines', 'BTCUSDT', '1h'), '2024-10-28')
    shelf.publish(ape, '', packed=(DATA/'trades/futures-um-APEUSDT-aggTrades-2024-10-18.zip').read_bytes())
    shelf.publish(btc, '', packed=(DATA/'klines/official/futures-um-klines-BTCUSDT-1h-2024-10-28.zip').read_bytes())
    got = fetch(shelf, tmp_path, 'klines,aggTrades', '20241018', '20241029', 'APEUSDT,BTCUSDT', '20250101', frames=['1h'])
    assert got.rows == 45_342 + 24 and not got.refused
    rows = held(tmp_path, 'agg_trades', 'APEUSDT')
    assert (len(rows), round(rows['qty'].sum()), (rows['side'] < 0).mean().round(3)) == (45_342, 41_674_860, .49)
