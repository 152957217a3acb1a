"The compiled reader never crashes, never reads beyond a frame, and never says anything but what the general decoder says"

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hftlab.core.errors import HftlabError
from hftlab.core.kernel import kernel
from hftlab.data.forms import QUOTED, SCAN_SEEN, SCAN_WORD, scan_event, scan_init, scan_read
from hftlab.data.scan import Scan
from hftlab.data.schema import Instrument, instrument
from hftlab.data.wire import decode

FRAMES = [
    b'{"stream":"btcusdt@bookTicker","data":{"e":"bookTicker","u":5123107839020,"s":"BTCUSDT","b":"61800.20","B":"2.507","a":"61800.30","A":"2.510",'
    b'"T":1723161256313,"E":1723161256313}}',
    b'{"u":1007198632021,"e":"bookTicker","s":"BTCUSD_PERP","ps":"BTCUSD","b":"61804.7","B":"35","a":"61804.8","A":"1645","T":1723161257465,"E":1723161257476}',
    b'{"stream":"btcusdt@bookTicker","data":{"u":50093239212,"s":"BTCUSDT","b":"61837.63000000","B":"3.78826000","a":"61837.64000000","A":"1.54698000"}}',
    b'{"stream":"btcusdt@trade","data":{"e":"trade","E":1723161256322,"T":1723161256322,"s":"BTCUSDT","t":5266583935,"p":"61800.30","q":"0.006",'
    b'"X":"MARKET","m":false}}',
    b'{"e":"aggTrade","E":1626992741575,"a":16599292,"s":"CTKUSDT","p":"1.01100","q":"10","f":23961322,"l":23961322,"T":1626992741421,"m":false}',
    b'{"e":"markPriceUpdate","E":1680652701000,"s":"BTCUSDT","p":"28147.27373413","P":"28142.15563565","i":"28159.75642857","r":"-0.00002754",'
    b'"T":1680652800000}',
    b'{"stream":"btcusdt@depth@0ms","data":{"e":"depthUpdate","E":1723161256299,"T":1723161256298,"s":"BTCUSDT","U":5123107832006,"u":5123107837557,'
    b'"pu":5123107831937,"b":[["58710.20","0.014"],["61496.50","0.010"],["61510.90","0.000"],["61641.50","1.211"]],"a":[["61800.30","12.507"]]}}',
    b'{"lastUpdateId":5123107852948,"E":1723161256501,"T":1723161256493,"bids":[["61800.20","2.909"],["61800.10","0.696"]],"asks":[["61800.30","20.004"]]}']


def mutants(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "Frames with bytes changed, cut out, put in, taken from another, or all random, one after the other, without a byte between them"
    rng, made = np.random.default_rng(seed), []
    like = np.frombuffer(b'0123456789.-"{}[]:,etfnull\\ \x00\xff', np.uint8)
    for frame, how, at, size, many in zip(rng.integers(0, len(FRAMES), n), rng.integers(0, 7, n), rng.random(n), rng.integers(0, 40, n), rng.integers(1, 5, n), strict=True):
        f = bytearray(FRAMES[frame])
        i = int(at*len(f))
        if how == 0: del f[i:]
        elif how == 1: del f[i:i + size % 9]
        elif how == 2: f[i:i] = rng.choice(like, many).tobytes()
        elif how == 3: f[i:] = FRAMES[(frame + many) % len(FRAMES)][i - size:]
        elif how == 4: f = bytearray(rng.bytes(size))
        else:
            for j in rng.integers(0, len(f), many): f[j] = int(rng.choice(like))
        made.append(bytes(f))
    ends = np.cumsum([len(f) for f in made])
    return np.frombuffer(b''.join(made), np.uint8), np.r_[0, ends[:-1]], ends


@kernel
def read_all(s, b, starts, ends, kinds):
    for i in range(len(starts)): kinds[i] = scan_read(s, b[starts[i]:ends[i]])


def fuzz(n: int, seed: int) -> int:
    "Read `n` mutants; what was taken is what the general decoder says, and no frame changes what the next one is"
    s, (b, starts, ends), kinds = scan_init(), mutants(n, seed), np.zeros(n, np.int64)
    read_all(s, b, starts, ends, kinds)
    for i in np.flatnonzero(kinds).tolist():
        frame = b[starts[i]:ends[i]].tobytes()
        assert scan_read(s, frame) == kinds[i]
        s[SCAN_SEEN] = 9
        at, end = s[SCAN_WORD:SCAN_WORD + 2]
        assert scan_event(s, int(kinds[i]), frame[at:end].decode()) == decode(frame, 9), frame
    return int((kinds > 0).sum())


def test_what_is_taken_is_what_the_general_decoder_says(): assert fuzz(60_000, 1) > 3000


def test_a_million_frames_with_every_access_watched():
    "In a process whose kernels check each index; a read beyond the end of a frame would raise"
    code = 'import test_scan as t; print(t.watch(1_000_000, 45.))'
    env = os.environ | {'NUMBA_BOUNDSCHECK': '1', 'PYTHONPATH': os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 1_000_000


@kernel
def _turn(raw, starts, ends, x, out): # Mutants of mutants, made in place, since making them in Python is what takes the time
    for i in range(len(starts)):
        n = ends[i] - starts[i]
        if n == 0: continue
        for _ in range(2):
            x ^= x << 13
            x ^= (x >> 7) & 0x1ffffffffffffff
            x ^= x << 17
            at = starts[i] + (x >> 20 & 0xffff) % n
            other = starts[(x >> 8 & 0xffff) % len(starts)] + (x >> 24 & 0xff)
            out[at] = raw[min(other, len(raw) - 1)]
    return x


def watch(least: int, seconds: float) -> int:
    "Read random frames for as long, at least so many"
    s, (raw, starts, ends), kinds, n, x = scan_init(instrument()), mutants(20_000, 2), np.zeros(20_000, np.int64), 0, 88_172_645_463_325_252
    until = time.monotonic() + seconds
    read_all(s, raw, starts, ends, kinds)
    with pytest.raises(IndexError): _beyond(raw, len(raw)) # It is really watched
    while n < least and time.monotonic() < until:
        out = raw.copy()
        for _ in range(5):
            x = _turn(raw, starts, ends, x, out)
            fixed = np.frombuffer(out.tobytes(), np.uint8)
            read_all(s, fixed, starts, ends, kinds)
            n += len(starts)
    return n


@kernel
def _beyond(b, i): return b[i]


@pytest.mark.parametrize('x', [instrument(), Instrument('BTCUSDT', 2.5, .02, .02, 0., 0., 0.)], ids=['decimal grid', 'odd grid'])
def test_the_book_is_the_same_by_both_ways(x):
    "Differences with odd numbers of all kinds, put into a book by compiled code and by the general decoder: same levels, or same error"
    rng, outcomes = np.random.default_rng(5), set()
    odd = ['0', '0.0', '61800', '61800.5', '61800.50', '61800.123', '61800.1234567', '7', '1e3', '-1', '01', '1.', '99999999999', '900000000000.5', '12345678.12', '61800.02', '']
    for _ in range(3000):
        bids, asks = ([f'["{rng.choice(odd)}","{rng.choice(odd)}"]' for _ in range(rng.integers(0, 3))] for _ in range(2))
        asks = [a.replace('"61', '"62') for a in asks]
        many = ','.join(f'["{60_000 + 5*i}.00","1.00"]' for i in range(rng.integers(0, 4)*20))
        levels = f'"b":[{",".join(bids + [many]*bool(many))}],"a":[{",".join(asks)}]'
        frame = f'{{"e":"depthUpdate","E":1,"T":1,"s":"BTCUSDT","U":5,"u":6,"pu":{rng.choice([4, 4, 4, 3])},{levels}}}'.encode()
        ways = []
        for through in ('step', 'general'):
            scan = Scan(x)
            scan.on(b'{"lastUpdateId":4,"bids":[["60000","0.02"]],"asks":[["63000","0.02"]]}', 0)
            try: scan.on(frame, 0) if through == 'step' else scan.general(0, frame, 0)
            except HftlabError as e: ways.append((str(e), scan.book.valid, len(scan.book)))
            else: ways.append((scan.book.levels(1000), scan.book.best(), scan.book.checksum(), scan.book.last_id))
        assert ways[0] == ways[1], frame
        outcomes.add(len(ways[0]))
    assert outcomes == {3, 4}


def test_a_stream_of_rubbish_breaks_nothing_but_the_book():
    "One by one from Python, as it would come from a socket: errors are ours, and a good snapshot puts everything right"
    scan, errors = Scan(instrument()), 0
    b, starts, ends = mutants(20_000, 3)
    for at, end in zip(starts, ends, strict=True):
        try: scan.on(b[at:end].tobytes(), 0)
        except HftlabError: errors += 1
    assert 10_000 < errors < 20_000
    scan.book.lose()
    for frame in FRAMES[-1:] + [FRAMES[6].replace(b'5123107832006', b'5123107852900').replace(b'5123107837557', b'5123107852999')]: scan.on(frame, 0)
    assert scan.book.valid and scan.book.best() == (61800.2, 2.909, 61800.3, 12.507)


def test_what_is_no_frame_is_refused():
    scan = Scan(instrument())
    for wrong in (None, 5, 'text', ['a']):
        with pytest.raises((TypeError, HftlabError)): scan.on(wrong, 0)
    with pytest.raises(ValueError): scan.on(FRAMES[0], 'now')
    backwards = memoryview(FRAMES[0][::-1])[::-1]
    assert scan.on(backwards, 0) == scan.on(bytearray(FRAMES[0]), 0) == scan.on(FRAMES[0], 0) == QUOTED
