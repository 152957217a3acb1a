"Bars of bars are the exchange's own, bars of trades are those of pandas, and hundreds of symbols at once are each alone"
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hftlab.core.events import Trade
from hftlab.data.bars import Bars, Longer, bars, is_late, many, resample, torn
from hftlab.data.gaps import gaps
from hftlab.data.schema import BAR, FRAMES, TRADE
from hftlab.data.sized import sized
from hftlab.data.synth import make_ticks

DATA = Path(__file__).parent.parent/os.environ.get('HFTLAB_SHARED_DATA', '../shared/data')
KLINES = DATA/'klines'
real = pytest.mark.skipif(not KLINES.is_dir(), reason='needs the real bars')
# 2024-10-28: the exchange itself tells two stories of this day, see the notes on the data.
BAD_DAY = pd.Timestamp('2024-10-28').value//10**6


def kline(path: Path) -> np.ndarray:
    table, out = pd.read_parquet(path), np.zeros(0, BAR)
    out = np.zeros(len(table), BAR)
    for name in set(table) & set(BAR.names): out[name] = table[name]
    return out


def file_of(folder: str, symbol: str) -> Path|None:
    return next((KLINES/folder).glob(f'{symbol}_*.parquet'), None)


def names(folder: str) -> list[str]: return sorted(p.name.split('_')[0] for p in (KLINES/folder).glob('*.parquet'))


def compare(ours: np.ndarray, theirs: np.ndarray, columns=BAR.names) -> int:
    "Assert that bars of the same time are the same; how many there were"
    _, i, k = np.intersect1d(ours['open_time'], theirs['open_time'], return_indices=True)
    keep = abs(ours['open_time'][i] - BAD_DAY) > 86_400_000
    i, k = i[keep], k[keep]
    for name in columns:
        exact = name not in ('volume', 'quote_volume', 'taker_buy_volume', 'taker_buy_quote_volume')
        assert (ours[name][i] == theirs[name][k]).all() if exact else np.allclose(ours[name][i], theirs[name][k], rtol=1e-12), name
    return len(i)


PLAIN = 'open_time', 'open', 'high', 'low', 'close', 'volume'


@real
@pytest.mark.parametrize('folder', ['1m', '5m', '15m'])
def test_longer_bars_are_those_of_the_exchange(folder):
    counts = {s: compare(resample(kline(file_of(folder, s)), '1h', folder), kline(file_of('1h', s)), PLAIN) for s in names(folder) if s in names('1h')}
    print(counts)
    assert len(counts) >= 7 and min(counts.values()) > 400


@real
def test_every_frame_of_a_month_is_that_of_pandas():
    how = dict.fromkeys(BAR.names[5:], 'sum') | {'open_time': 'first', 'open': 'first', 'high': 'max', 'low': 'min', 'close': 'last'}
    for symbol in names('1m_full'):
        minutes = kline(file_of('1m_full', symbol))
        table = pd.DataFrame(minutes, index=pd.to_datetime(minutes['open_time'], unit='ms'))
        for frame in list(FRAMES)[1:]:
            theirs = table.resample(pd.Timedelta(FRAMES[frame])).agg(how)
            ours = resample(minutes, frame)
            assert compare(ours, theirs.to_records(index=False)) >= len(ours) - 3*86_400*10**9//FRAMES[frame] - 3 and len(ours) == len(theirs)
        step = Longer('4h')
        told = [e for row in minutes[:5000].tolist() if (e := step.on(bar_event(row)))]
        assert [e.close for e in told] == resample(minutes[:5000], '4h')['close'].tolist()


def bar_event(row):
    from hftlab.core.events import Bar
    return Bar(0, 0, 'X', '1m', row[0]*10**6, *row[1:7], row[7], *row[8:], closed=True)


def stamped(seed: int, minutes: int = 120) -> np.ndarray:
    "Trades of a made market, on the milliseconds of the exchange"
    t = make_ticks(minutes, seed)
    t['ts_ns'] -= t['ts_ns'] % 10**6
    t['seen_ns'] = t['ts_ns'] + 3_000_000
    return t


@pytest.mark.parametrize('frame', list(FRAMES))
def test_bars_of_trades_are_those_of_pandas(frame):
    t = stamped(3, 3*1440)
    end = int(t['ts_ns'][-1]) + FRAMES[frame]
    ours, table = bars(t, frame, until_ns=end), pd.DataFrame(t, index=pd.to_datetime(t['ts_ns']))
    cut = table.resample(pd.Timedelta(FRAMES[frame]))
    prices = cut['px'].ohlc()
    assert (ours['open_time'] == prices.index.view('i8')//10**6).all()
    for name in prices: assert (ours[name] == prices[name].fillna(prices['close'].ffill()).to_numpy()).all()
    assert np.allclose(ours['volume'], cut['qty'].sum()) and (ours['trades'] == cut['qty'].count()).all()


def test_two_hundred_symbols_are_each_alone():
    each = [stamped(k, 60 + k % 7) for k in range(200)]
    stream, of = np.concatenate(each), np.repeat(np.arange(200), [len(t) for t in each])
    order = np.argsort(stream['seen_ns'], kind='stable')
    stream, of, symbols, frames = stream[order], of[order], [f'S{k}' for k in range(200)], ['1m', '5m', '15m']
    found = many(stream, of, symbols, frames)
    assert list(found) == [(s, f) for s in symbols for f in frames]
    for k, t in enumerate(each):
        for frame in frames: assert found[f'S{k}', frame].tobytes() == bars(t, frame, until_ns=int(stream['ts_ns'].max())).tobytes()


def disordered(seed: int) -> np.ndarray:
    "Trades as they arrive when some are on their way for up to ninety seconds"
    t, draw = stamped(seed, 60), np.random.default_rng(seed)
    slow = draw.random(len(t)) < .05
    t['seen_ns'] += (slow*draw.exponential(20e9, len(t)).clip(max=90e9)).astype(np.int64)
    return t[np.argsort(t['seen_ns'], kind='stable')]


@pytest.mark.parametrize('seed', range(5))
def test_late_trades_are_dropped_and_counted_live_as_in_research(seed, caplog):
    t = disordered(seed)
    late = is_late(t)
    assert 0 < late.sum() < len(t)/20
    live, told = Bars('X'), []
    for row in t.tolist(): told += live.on(Trade(row[0], row[1], 'X', *row[2:]))
    ours = bars(t, late='drop')
    assert live.late == late.sum() and f'{late.sum()} of {len(t):,} trades came after' in caplog.text
    assert [(e.open_ns//10**6, *(getattr(e, k) for k in BAR.names[1:])) for e in told] == ours.tolist()
    # What is left is right: the same as the trades that were in time, in the order in which they were made.
    kept = t[~late]
    true = bars(kept[np.argsort(kept['ts_ns'], kind='stable')])
    for name in BAR.names: assert np.allclose(ours[name], true[name], rtol=1e-12)
    assert many(t, np.zeros(len(t), int), ['X'], ['1m'], late='drop')['X', '1m'].tobytes() == bars(t, until_ns=int(t['ts_ns'].max()), late='drop').tobytes()


def test_a_patient_timer_loses_nothing():
    t = disordered(1)
    for patience, lost in ((0, True), (90*10**9, False)):
        live, told, at = Bars('X', patience_ns=patience), [], int(t['seen_ns'][0])
        clock = iter(range(at - at % 10**9, int(t['seen_ns'][-1]) + 200*10**9, 10**9))
        for row in t[~is_late(t)].tolist():
            while (now := next(clock)) < row[1]: told += live.at(now)
            told += live.on(Trade(row[0], row[1], 'X', *row[2:]))
        for now in clock: told += live.at(now)
        assert (live.late > 0) == lost


@pytest.mark.parametrize('seed', range(5))
def test_what_is_not_torn_is_right(seed):
    t, draw = stamped(seed, 200), np.random.default_rng(seed)
    keep = np.ones(len(t), bool)
    for at in draw.integers(10, len(t) - 10, 6): keep[at:at + draw.integers(1, 400)] = False
    keep[[0, -1]] = True
    whole, holed = bars(t, '3m'), bars(t[keep], '3m')
    broken = torn(holed, gaps('trades', t[keep]), '3m')
    assert 0 < broken.sum() < len(holed) and holed[~broken].tobytes() == whole[~broken].tobytes()


@pytest.mark.skipif(not (DATA/'trades').is_dir(), reason='needs the real trades')
def test_a_real_day_by_size():
    table = pd.read_csv(DATA/'trades/futures-um-APEUSDT-aggTrades-2024-10-18.zip')
    t = np.zeros(len(table), TRADE)
    for name, column in (('ts_ns', table['transact_time']*10**6), ('px', table['price']), ('qty', table['quantity']), ('trade_id', table['agg_trade_id'])):
        t[name] = column
    for size in (1000, 20_000, 150_000):
        ours, ends = sized(t, f'volume:{size}')
        group = (table['quantity'].cumsum()//size).shift(fill_value=0)
        theirs = table.groupby(group).agg(open=('price', 'first'), high=('price', 'max'), low=('price', 'min'), close=('price', 'last'),
            volume=('quantity', 'sum'), trades=('price', 'count'))
        for name in theirs: assert (ours[name] == theirs[name].to_numpy()[:len(ours)]).all()
        assert len(theirs) - len(ours) <= 1 and (ours['volume'].cumsum() == t['qty'].cumsum()[ends]).all()
