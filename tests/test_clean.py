"Real data with its known defects: each is found at its place, and nothing is found anywhere else"

import csv
import gzip
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from hftlab.data.clean import check, mend
from hftlab.data.compare import compare
from hftlab.data.schema import AGG, BAR, FRAMES, LEVEL, QUOTE, TRADE

SHARED = Path(os.environ.get('HFTLAB_SHARED_DATA', Path(__file__).parents[2]/'shared'/'data'))
pytestmark = pytest.mark.skipif(not SHARED.exists(), reason='the shared data is not at hand')

LOST = {'2023-11-10', '2024-10-28'} # Days on which the exchange lost trades of its own
NOTES = {'early', 'wandering'} # The clocks of those who recorded


def table(name: str, clock: str) -> tuple[str, np.ndarray]:
    "One of the CSV dumps, with its own idea of when a row was"
    with gzip.open(SHARED/'l2'/'csv'/name, 'rt') as f: lines = list(csv.DictReader(f))
    times = [(int(x[clock])*10**6, int(x['TimestampOfReceive'])*10**6) for x in lines]
    if 'trade_stream' in name:
        rows = [(float(x['Price']), float(x['Quantity']), 1 - 2*int(x['IsBuyerMarketMaker']), int(x['TradeId'])) for x in lines]
        return 'trades', np.array([t + r for t, r in zip(times, rows, strict=True)], TRADE)
    ids = [tuple(int(x[n]) for n in ('FirstUpdateId', 'FinalUpdateId', 'FinalUpdateIdInLastStream')) for x in lines]
    rows = [(1 - 2*int(x['IsAsk']), float(x['Price']), float(x['Quantity'])) for x in lines]
    return 'depth', np.array([t + i + r for t, i, r in zip(times, ids, rows, strict=True)], LEVEL)


def found(name: str, clock: str = 'EventTime') -> set[tuple[str, int]]:
    "Rules, and the numbers of the rows that break them; the first line of the file is line 1, so row 0 is line 2"
    kind, rows = table(name, clock)
    return {(f.rule, int(i)) for f in check(kind, rows) for i in f.rows}


def test_nothing_is_found_in_the_clean_depth():
    assert found('usdm_trxusdt_difference_depth_stream_20250304.csv.gz') == set()
    assert found('usdm_trxusdt_difference_depth_stream_20250304.csv.gz', 'TransactionTime') == set()


def test_the_trade_outside_of_the_market_is_dropped():
    name = 'usdm_trxusdt_trade_stream_20250304.csv.gz'
    kind, rows = table(name, 'EventTime')
    assert found(name) == {('outside', 9326)} and rows['trade_id'][9326] == 548331095
    good, bad = mend(kind, rows, check(kind, rows))
    assert len(good) == len(rows) - 1 and not len(bad)


def test_the_negative_price_is_found():
    name = 'usdm_trxusdt_trade_stream_20250304.broken.csv.gz'
    assert found(name) == {('outside', 9326), ('worthless', 0)}
    kind, rows = table(name, 'EventTime')
    good, bad = mend(kind, rows, check(kind, rows))
    assert not len(good) and bad.tobytes() == rows.tobytes(), 'the day must be set aside as it was'


def test_the_last_row_of_another_day_is_found():
    name = 'cm_trxusd_perp_difference_depth_stream_20250304.csv.gz'
    last = {('torn', 9998), ('torn', 9999)} # Both rows of that message: it has two times
    assert found(name) == last
    assert found(name, 'TransactionTime') == last | {('stray', 9999)}


def test_every_broken_line_of_the_broken_twin_is_found():
    by_event = found('cm_trxusd_perp_difference_depth_stream_20250304.broken.csv.gz')
    by_match = found('cm_trxusd_perp_difference_depth_stream_20250304.broken.csv.gz', 'TransactionTime')
    assert ('worthless', 0) in by_event # Line 2: price 0
    assert {('disorder', 1), ('stray', 1), ('torn', 1)} <= by_event # Line 3: event time in 2020
    assert ('foreign-unit', 1) in by_match # And transaction time 0
    assert {('sideless', 2), ('stray', 2), ('torn', 2)} <= by_event # Line 4: side 2, event time in 2023
    assert ('remote', 6) in by_event # Line 8: price 11.23102
    assert {('disorder', 8), ('torn', 8)} <= by_event # Line 10: ids step back
    assert {('stray', 9999), ('torn', 9999)} <= by_event # Line 10001: receive time moved
    messages = {*range(5), 5, 6, 8, 9998, 9999} # Nothing outside of the messages that these lines are part of
    assert {i for _, i in by_event | by_match} <= messages


def klines():
    "All real bars: symbol, frame, rows"
    for f in sorted((SHARED/'klines').glob('*/*.parquet')):
        t, frame = pq.read_table(f), next(x for x in f.stem.split('_') if x in FRAMES)
        rows = np.zeros(len(t), BAR)
        for n in BAR.names: rows[n] = t[n].to_numpy() if n in t.column_names else np.nan if BAR[n].kind == 'f' else 0
        symbol = t['symbol'].to_numpy() if 'symbol' in t.column_names else np.full(len(t), f.stem.split('_')[0])
        yield from ((s, frame, rows[symbol == s]) for s in np.unique(symbol))


def test_no_real_bar_is_called_wrong_but_those_that_are():
    bad, dead, n = set(), set(), 0
    for symbol, frame, rows in klines():
        n += len(rows)
        for f in check('bars', rows, frame):
            assert f.rule in ('seam', 'dead'), f'{symbol} {frame}: {f.rule} {f.what}'
            if f.severity == 'bad': bad.add(f.place[:10])
            else: dead.add((symbol, f.place[:10]))
    assert n > 1_300_000 and bad == LOST
    assert {s for s, day in dead if day not in LOST} == {'MATICUSDT'}, 'and that contract had ended'
    assert ('FILUSDT', '2024-10-28') in dead and ('RENDERUSDT', '2024-10-28') in dead


def one(symbol, frame):
    return next(rows for s, f, rows in klines() if (s, f) == (symbol, frame))


def test_sources_that_differ_are_told_apart():
    for symbol in ('BTCUSDT', 'SOLUSDT'):
        days = {f.place[:10] for f in compare(one(symbol, '30m'), one(symbol, '1h'), '30m', '1h')}
        assert days == LOST, symbol
    eth = {f.place[:10] for f in compare(one('ETHUSDT', '30m'), one('ETHUSDT', '1h'), '30m', '1h')}
    assert eth <= LOST
    hours = one('LINKUSDT', '1h')
    assert compare(one('LINKUSDT', '5m'), hours, '5m', '1h') == []
    assert compare(one('LINKUSDT', '1m'), hours, '1m', '1h') == []


def test_the_archive_and_the_api_tell_two_stories_of_one_evening():
    path = SHARED/'klines'/'official'/'futures-um-klines-BTCUSDT-1h-2024-10-28.zip'
    with zipfile.ZipFile(path) as z: lines = z.read(z.namelist()[0]).decode().splitlines()[1:]
    cells = [x.split(',') for x in lines]
    official = np.zeros(len(cells), BAR)
    for n, i in zip(BAR.names, (0, 1, 2, 3, 4, 5, 7, 8, 9, 10), strict=True): official[n] = [float(c[i]) for c in cells]
    [f] = compare(official, one('BTCUSDT', '1h'), '1h')
    assert f.rows.tolist() == [20, 21] and f.place == '2024-10-28T20:00 to 2024-10-28T21:00'
    # The flat bar of the archive is a dead hour, and what follows does not fit it
    assert {(g.rule, int(i)) for g in check('bars', official, '1h') for i in g.rows} >= {('dead', 20)}


def recorded(name: str) -> dict[str, list]:
    "What a recording says, read the plain way"
    out: dict[str, list] = {'trades': [], 'quotes': [], 'depth': []}
    with gzip.open(SHARED/'l2'/name, 'rt') as f:
        for line in f:
            at, _, frame = line.partition(' ')
            m, seen = json.loads(frame), int(at)*(1 if len(at) == 19 else 1000)
            d = m.get('data', {})
            if '@trade' in m.get('stream', ''):
                out['trades'].append((d['T']*10**6, seen, float(d['p']), float(d['q']), -1 if d['m'] else 1, d['t']))
            elif '@bookTicker' in m.get('stream', ''):
                out['quotes'].append((d['T']*10**6, seen, *(float(d[k]) for k in 'bBaA'), d['u']))
            elif '@depth' in m.get('stream', ''):
                for side, k in ((1, 'b'), (-1, 'a')):
                    out['depth'] += [(d['T']*10**6, seen, d['U'], d['u'], d['pu'], side, float(p), float(q)) for p, q in d[k]]
    return out


@pytest.mark.parametrize('name', ['usdm_btcusdt_20240808.gz', 'usdm_btcusdt_20230405.dat.gz', 'cm_btcusd_perp_20240808.gz'])
def test_recordings_have_nothing_but_wrong_clocks(name):
    rows = recorded(name)
    wrong = [f for kind, dtype in (('trades', TRADE), ('quotes', QUOTE), ('depth', LEVEL))
             for f in check(kind, np.array(rows[kind], dtype)) if f.rule not in NOTES]
    if '2023' not in name: assert wrong == []
    else: # One trade, of the insurance fund, at 28722.5
        assert [(f.rule, len(f.rows)) for f in wrong] == [('spike', 1)]


def test_aggregated_trades_of_a_real_day_are_clean():
    with zipfile.ZipFile(SHARED/'trades'/'futures-um-APEUSDT-aggTrades-2024-10-18.zip') as z:
        lines = list(csv.DictReader(io.TextIOWrapper(z.open(z.namelist()[0]))))
    rows = np.array([(int(x['transact_time'])*10**6, 0, float(x['price']), float(x['quantity']), -1 if x['is_buyer_maker'] == 'true' else 1,
        int(x['agg_trade_id']), int(x['first_trade_id']), int(x['last_trade_id'])) for x in lines], AGG)
    [note] = check('agg_trades', rows)
    assert note.rule == 'left-out' and note.severity == 'note' and len(note.rows) == 1


def test_the_last_price_of_a_real_quarter_stays_near_the_mark():
    t = pq.read_table(SHARED/'funding'/'mark_price_8h_9symbols_20250306_20250603.parquet')
    for symbol in ('BTCUSDT', 'BNBUSDT', 'ETHUSDT'):
        mark = np.zeros(int((t['symbol'].to_numpy() == symbol).sum()), BAR)
        for n in ('open_time', 'open', 'high', 'low', 'close'): mark[n] = t[n].to_numpy()[t['symbol'].to_numpy() == symbol]
        hours = one(symbol, '1h')
        eight = hours['open_time'] - hours['open_time'] % 28_800_000 # An hour is held against its eight
        at = np.searchsorted(mark['open_time'], eight)
        known = (at < len(mark)) & (mark['open_time'][np.minimum(at, len(mark) - 1)] == eight)
        rows, near = hours[known], mark[at[known]].copy()
        near['open_time'] = rows['open_time']
        assert not [f for f in check('bars', rows, '1h', mark=near) if f.rule == 'astray']
        rows['high'][100] *= 1.2
        assert [f.rows.tolist() for f in check('bars', rows, '1h', mark=near) if f.rule == 'astray'] == [[100]]
