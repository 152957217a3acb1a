"The catalog under what a notebook cannot do to it: killed and crowded writers, full disks, an object store, real klines"
import os, shutil, signal, subprocess, sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from subprocess import PIPE
import numpy as np
import pyarrow.parquet as pq
import pytest
from hftlab.core.errors import DataError
from hftlab.data.catalog import Catalog, when
from hftlab.data.schema import BAR, TRADE

KLINES = Path(__file__).parent.parent/os.environ.get('HFTLAB_SHARED_DATA', '../shared/data')/'klines/1m_full'

def ticks(a:int, b:int)->np.ndarray:
    "Trades number `a` to `b`, one a second"
    rows = np.zeros(b - a, TRADE)
    rows['trade_id'] = np.arange(a, b)
    rows['ts_ns'] = when('20240101') + rows['trade_id']*10**9
    rows['px'],rows['qty'],rows['side'] = 100 + rows['trade_id'] % 977/10,rows['trade_id']*0.6180339887498949 % 1,1
    return rows

def child(code:str, *args, before=())->subprocess.Popen:
    env = os.environ | {'PYTHONPATH': os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])}
    return subprocess.Popen([*before, sys.executable, '-c', code, *map(str, args)], stdout=PIPE, stderr=PIPE, env=env)

def kill(p:subprocess.Popen)->bytes:
    "What it had still said"
    p.send_signal(signal.SIGKILL)
    out,err = p.communicate()
    assert p.returncode == -signal.SIGKILL, err.decode()
    return out

# Adds 5,000 trades at a time until it is killed, and says after each how many are safe.
WRITER = '''
import os, sys
from hftlab.data.catalog import Catalog
from test_catalog import ticks
catalog,n = Catalog(sys.argv[1]),int(sys.argv[2])
while True:
    n += catalog.add('trades', 'BTCUSDT', ticks(n, n + 5000)).rows
    os.write(1, n.to_bytes(8, 'little'))
'''

def test_killed_writer(tmp_path):
    safe,catalog = 0,Catalog(tmp_path)
    for k in range(4):
        p = child(WRITER, tmp_path, safe)
        out = p.stdout.read(8*(k + 1))
        safe = int.from_bytes((out + kill(p))[-8:], 'little')
        rows = catalog.array('trades', 'BTCUSDT')
        assert len(rows) - safe in (0, 5000), 'what was acknowledged must stay, and the group in hand be whole or not there'
        assert np.array_equal(rows, ticks(0, len(rows)))
        safe = len(rows)

def test_draft_of_a_killed_writer_is_swept(tmp_path):
    catalog = Catalog(tmp_path)
    catalog.add('trades', 'BTCUSDT', ticks(0, 10))
    draft = next(tmp_path.rglob('*.parquet')).with_name('.0123.draft')
    draft.write_bytes(b'PAR1 half')
    assert len(catalog.array('trades', 'BTCUSDT')) == catalog.list()[0].rows == 10
    os.utime(draft, (0, 0))
    catalog.compact('trades')
    assert not draft.exists()

# Adds the same trades as the others, in pieces and in an order of its own
CROWD = '''
import sys
import numpy as np
from hftlab.data.catalog import Catalog
from test_catalog import ticks
catalog,rng = Catalog(sys.argv[1]),np.random.default_rng(int(sys.argv[2]))
for a in rng.integers(0, 190_000, 40): catalog.add('trades', 'BTCUSDT', ticks(a, a + 10_000))
for a in rng.permutation(20)*10_000: catalog.add('trades', 'BTCUSDT', ticks(a, a + 10_000))
'''
JOINER = '''
import sys
from hftlab.data.catalog import Catalog
catalog = Catalog(sys.argv[1])
while True: catalog.compact('trades')
'''

def test_a_crowd_of_writers_readers_and_joiners(tmp_path):
    catalog,writers,joiners = Catalog(tmp_path),[child(CROWD, tmp_path, i) for i in range(4)],[child(JOINER, tmp_path) for _ in range(2)]
    try:
        while any(p.poll() is None for p in writers):
            if not catalog.list(): continue
            ids = catalog.array('trades', 'BTCUSDT', gaps='allow')['trade_id']
            assert (np.diff(ids) > 0).all(), 'each row must be read once, in order'
        assert not [p.stderr.read().decode() for p in writers if p.returncode]
    finally:
        for p in (*writers, *joiners): p.kill()
        said = [p.communicate()[1].decode() for p in joiners]
    assert not any(said), 'nobody who joins parts may be disturbed by another'
    assert np.array_equal(catalog.array('trades', 'BTCUSDT'), ticks(0, 200_000))
    catalog.compact('trades')
    assert np.array_equal(catalog.array('trades', 'BTCUSDT'), ticks(0, 200_000))
    assert len(list(tmp_path.rglob('*.parquet'))) == 3, 'a part for each of the three days'

# Adds more and more until the disk says no, and looks what is there.
FULL = '''
import resource, sys
from hftlab.core.errors import DataError
from hftlab.data.catalog import Catalog
from test_catalog import ticks
if sys.argv[2]: resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),)*2)
catalog,safe = Catalog(sys.argv[1]),0
try:
    for n in (1000, 2000, 80_000, 900_000): safe += catalog.add('trades', 'BTCUSDT', ticks(safe, safe + n)).rows
except DataError as e: print(e)
rows = catalog.array('trades', 'BTCUSDT')
print(safe, len(rows), (rows==ticks(0, len(rows))).all())
'''

def full(p:subprocess.Popen)->str:
    "What it was told"
    try: out,err = p.communicate(timeout=60)
    finally: p.kill()
    assert p.returncode == 0, err.decode()
    error,last = out.decode().splitlines()
    safe,rows,right = last.split()
    assert right == 'True' and int(rows) >= int(safe) >= 3000
    return error

def test_a_file_that_may_not_grow(tmp_path):
    assert 'must be written whole, was: File too large; nothing of it is kept' in full(child(FULL, tmp_path, 100_000))
    assert not list(tmp_path.rglob('.*')), 'no draft may stay'

def test_full_disk(tmp_path):
    small = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'
    mount = ['unshare', '--user', '--map-root-user', '--mount', 'sh', '-c', small, str(tmp_path)]
    if not shutil.which('unshare') or subprocess.run([*mount, 'true'], capture_output=True).returncode:
        pytest.skip('no small disk can be mounted here')
    assert 'must be written whole, was: No space left on device; nothing of it is kept' in full(child(FULL, tmp_path, '', before=mount))

@pytest.fixture(scope='module')
def s3():
    "Address of an empty bucket in a store of our own"
    from moto.server import ThreadedMotoServer
    from pyarrow import fs
    server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
    server.start()
    patch = pytest.MonkeyPatch()
    for name,value in (('ENDPOINT_URL', 'http://{}:{}'.format(*server.get_host_and_port())), ('ACCESS_KEY_ID', 'nobody'), ('SECRET_ACCESS_KEY', 'nothing')):
        patch.setenv(f'AWS_{name}', value)
    fs.S3FileSystem(endpoint_override=os.environ['AWS_ENDPOINT_URL'], region='us-east-1', allow_bucket_creation=True).create_dir('lab')
    yield 's3://lab/catalog'
    patch.undo()
    server.stop()

def test_same_in_an_object_store(s3, tmp_path):
    "Whatever is done, both catalogs answer alike"
    def life(catalog):
        said = [catalog.add('trades', 'BTCUSDT', ticks(a, b)) for a,b in ((0, 90_000), (100_000, 200_000), (50_000, 120_000))]
        said.append(catalog.add('trades', 'ETH/USDT:USDT', ticks(0, 1000)))
        said.append([s.rows for s in [catalog.quarantine('trades', 'BTCUSDT', '2024-01-01T01:00', '2024-01-01T02:00', 'price')]])
        said.append([(h.symbol, h.since, h.until, h.rows, h.gaps, h.quarantined) for h in catalog.list()])
        said.append(catalog.sql('select symbol, count(*) n, sum(trade_id) ids from trades group by symbol order by symbol').to_pylist())
        said.append([s.rule for s in catalog.lift('trades', 'BTCUSDT', restore=True)])
        said.append(catalog.compact('trades') > 0)
        said.append(catalog.read('trades', None, '2024-01-01T00:10', '2024-01-02T12:00', columns=['px'], gaps='mark').to_pydict())
        assert np.array_equal(catalog.array('trades', 'BTCUSDT'), ticks(0, 200_000))
        return said
    assert life(Catalog(s3)) == life(Catalog(tmp_path))

def row_count(catalog:Catalog)->int: return len(catalog.array('trades', 'SOLUSDT'))

def test_a_catalog_goes_to_other_processes(s3):
    "As it does with the tasks of a cluster"
    catalog = Catalog(s3)
    catalog.add('trades', 'SOLUSDT', ticks(0, 1000))
    with ProcessPoolExecutor(1, get_context('spawn')) as pool: assert pool.submit(row_count, catalog).result() == 1000

def test_a_store_that_cannot_be_reached(monkeypatch, s3):
    with pytest.raises(DataError, match='must be written whole, was: .*NO_SUCH_BUCKET|must be written whole, was: .*bucket'):
        Catalog('s3://nowhere/x').add('trades', 'BTCUSDT', ticks(0, 10))
    monkeypatch.setenv('AWS_ENDPOINT_URL', 'http://127.0.0.1:9')
    with pytest.raises(DataError, match='a catalog must be readable') as e: Catalog(s3).list('trades')
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('file', sorted(KLINES.glob('*.parquet')) or [pytest.param(None, marks=pytest.mark.skip('no real klines here'))], ids=lambda f: f and f.stem)
def test_real_klines(tmp_path, file):
    table,catalog,symbol = pq.read_table(file),Catalog(tmp_path),file.stem.split('_')[0]
    rows = np.empty(len(table), BAR)
    for c in BAR.names: rows[c] = table[c].to_numpy()
    months = rows['open_time'].astype('M8[ms]').astype('M8[M]')
    half = len(rows)//2
    assert [catalog.add('bars', symbol, r, '1m') for r in (rows[half:], rows[:half + 100])] == [(len(rows) - half, 0), (half, 100)]
    since,until = months[0],months[-1] + 1
    assert np.array_equal(catalog.array('bars', symbol, str(since) + '-01', str(until) + '-01', '1m'), rows)
    held, = catalog.list()
    assert (held.rows, held.gaps, held.since) == (len(rows), 0, when(f'{since}-01'))
