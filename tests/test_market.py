"The made market and the book that matches: the crowd's orders alone give its quotes, its trades and its bars, and nothing else moves"
import numpy as np
import pytest
from hftlab.data.bars import bars
from hftlab.data.patterns import plant, trades_of
from hftlab.data.schema import QUOTE, TRADE, instrument
from hftlab.data.synth import LIVELY, make_flow
from hftlab.data.world import make_world
from hftlab.core.events import Bar
from hftlab.venues.matching import RESTING, TRADE as MATCHED, Book
from hftlab.venues.sim import Sim

MARKETS = [('BTCUSDT', 60_000., 5e-4), ('SOLUSDT', 150., 3e-3), ('XRPUSDT', 2.2, 1e-3)]


def told(m, book, flow):
    "What a book makes of `flow`, in the columns of the market"
    matches, best = book.run(flow)
    matches = matches[matches['what'] == MATCHED]
    best = best[(best['bid_ticks'] > 0) & (best['ask_ticks'] > 0)]
    quotes, trades, x = np.empty(len(best), QUOTE), np.empty(len(matches), TRADE), m.instrument
    quotes['ts_ns'], trades['ts_ns'] = flow['ts_ns'][best['row']], flow['ts_ns'][matches['row']]
    quotes['seen_ns'], trades['seen_ns'] = quotes['ts_ns'], trades['ts_ns']
    for side in ('bid', 'ask'): quotes[f'{side}_px'], quotes[f'{side}_qty'] = x.px(best[f'{side}_ticks']), x.qty(best[f'{side}_lots'])
    trades['px'], trades['qty'], trades['side'] = x.px(matches['px_ticks']), x.qty(matches['qty_lots']), matches['side']
    return quotes, trades


def numbered(quotes, trades):
    quotes['update_id'], trades['trade_id'] = np.arange(1, len(quotes) + 1), np.arange(1, len(trades) + 1)
    return quotes.tobytes(), trades.tobytes()


@pytest.mark.parametrize('name,px,vol', MARKETS)
@pytest.mark.parametrize('seed', range(3))
def test_flow_alone_gives_quotes_and_trades(name, px, vol, seed):
    m = make_flow(1800, seed, instrument(name), px, vol=vol)
    assert numbered(*told(m, Book(), m.flow)) == (m.quotes.tobytes(), m.trades.tobytes())


def test_a_saved_book_goes_on():
    m, book, parts = make_flow(600, 7), Book(), []
    for flow in np.array_split(m.flow, 11):
        parts.append(told(m, book, flow))
        book = Book(np.frombuffer(book.resting().tobytes(), RESTING).copy())
    assert numbered(*(np.concatenate(p) for p in zip(*parts, strict=True))) == (m.quotes.tobytes(), m.trades.tobytes())


def test_bars_of_the_exchange_are_those_of_its_trades():
    heard, m = [], make_flow(600, 4)
    sim = Sim(heard.append, 4)
    sim.advance(sim.now_ns + 600*10**9)
    live = [(b.open_ns//10**6, b.open, b.high, b.low, b.close, b.volume, b.quote_volume, b.trades, b.taker_buy_volume, b.taker_buy_quote_volume)
            for b in heard if isinstance(b, Bar)]
    assert live == bars(m.trades, until_ns=sim.now_ns).tolist() and len(live) == 10


def test_a_lively_crowd_is_matched_the_same():
    m = make_flow(120, 3, rate=100., crowd=LIVELY)
    assert numbered(*told(m, Book(), m.flow)) == (m.quotes.tobytes(), m.trades.tobytes())


def test_an_outage_delays_and_changes_nothing():
    world = make_world(2, 300, 6, outages_a_day=20)
    m = world.flow('ETHUSDT', rate=20.)
    quotes, trades = numbered(*told(m, Book(), m.flow))
    assert len(world.common.outages) > 1 and (quotes, trades) == (m.quotes.tobytes(), m.trades.tobytes())
    for since, until in world.common.outages.tolist():
        for tape in (m.flow, m.quotes, m.trades): assert not ((tape['ts_ns'] >= since) & (tape['ts_ns'] < until)).any()


@pytest.mark.parametrize('seed', range(3))
def test_bars_of_a_world_are_those_of_its_trades(seed):
    world = make_world(6, 400, seed, outages_a_day=10)
    for symbol in world.symbols:
        ours, trades = world.bars(symbol), world.trades(symbol)
        made = bars(trades, until_ns=world.start_ns + 400*60*10**9)
        assert made.tobytes() == ours[len(ours) - len(made):].tobytes() and len(made) > 390


def test_bars_of_walked_trades_are_the_bars():
    world = make_world(4, 300, 1)
    for symbol in world.symbols:
        rules = world.listing(symbol).rules
        charted, labels = plant(world.bars(symbol), rules, 1, 4, seed=2)
        again = bars(trades_of(charted, rules), until_ns=world.start_ns + 300*60*10**9)
        for name in ('open_time', 'open', 'high', 'low', 'close', 'trades'): np.testing.assert_array_equal(again[name], charted[name])
        np.testing.assert_allclose(again['volume'], charted['volume'])
        assert len(labels)
