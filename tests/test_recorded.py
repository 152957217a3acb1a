"What was really recorded comes out as it was: counts, sync points, our book after every message, and the bars"

import os
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from hftlab.core.errors import OutOfStep
from hftlab.core.events import Depth, Mark, Quote, Snapshot, Trade
from hftlab.data.bars import bars
from hftlab.data.convert import rows_of
from hftlab.data.forms import CHANGED, JOINED, MARKED, QUOTED, TOLD, TRADED
from hftlab.data.recordings import Recording, load
from hftlab.data.scan import Scan
from hftlab.data.schema import TRADE, Instrument
from hftlab.data.wire import decode

DATA = Path(__file__).parent.parent/os.environ.get('HFTLAB_SHARED_DATA', '../shared/data')/'l2'
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason='needs the recordings')

GRIDS = {('usdm', 'BTCUSDT'): (.1, .001), ('spot', 'BTCUSDT'): (.01, .00001), ('cm', 'BTCUSD_PERP'): (.1, 1.), ('usdm', 'SUSHIUSDT'): (.001, 1.),
         ('usdm', 'AKROUSDT'): (.00001, 1.), ('usdm', 'KEEPUSDT'): (.0001, 1.), ('usdm', 'CTKUSDT'): (.001, 1.)}
STREAMS = {'@depth@0ms': CHANGED, '@depth@100ms': CHANGED, '@bookTicker': QUOTED, '@trade': TRADED, '@aggTrade': JOINED, '@markPrice@1s': MARKED,
           'rest_depth_snapshot': TOLD}
FACTS = {p.stem: msgspec.json.decode(p.read_bytes()) for p in sorted((DATA/'facts').glob('*.json'))} if DATA.is_dir() else {}
EACH = pytest.mark.parametrize('name, symbol', [(name, s) for name, f in FACTS.items() for s in f['symbols']])
ALL = pytest.mark.parametrize('name', FACTS)


@cache
def recording(name: str) -> Recording: return load(*(DATA/f for f in FACTS[name]['files']))


def grid(name: str, symbol: str) -> Instrument: return Instrument(symbol, *GRIDS[name.split('_')[0], symbol], 1., 0., 0., 0.)


def some(r: Recording, at) -> Recording: return Recording(r.buffer, r.starts[at], r.ends[at], r.seen_ns[at])


@cache
def of_symbol(name: str, symbol: str) -> Recording:
    "The frames of one symbol, as they came"
    r = recording(name)
    if len(FACTS[name]['symbols']) == 1: return r
    return some(r, np.array([symbol.lower() in r[i][1][:40].decode() for i in range(len(r))]))


@cache
def lived(name: str, symbol: str) -> SimpleNamespace:
    "A recording through the scan: what each frame was, the book after each difference, and at the end"
    scan, r = Scan(grid(name, symbol)), of_symbol(name, symbol)
    kinds, quotes = scan.run(r)
    return SimpleNamespace(scan=scan, r=r, kinds=kinds, quotes=quotes, facts=FACTS[name]['symbols'][symbol])


@ALL
def test_as_many_messages_as_were_sent(name):
    counts, r = FACTS[name]['message_counts'], recording(name)
    assert len(r) == FACTS[name]['messages'] == sum(counts.values())
    assert (r.seen_ns.min(), r.seen_ns.max()) == (FACTS[name]['local_first_ns'], FACTS[name]['local_last_ns'])
    kinds = np.concatenate([lived(name, s).kinds for s in FACTS[name]['symbols']])
    odd = sum(f['trades']['excluded_from_bars'] for f in FACTS[name]['symbols'].values()) # No trades of the market
    for what in set(STREAMS.values()):
        sent = sum(n for stream, n in counts.items() if STREAMS.get(stream) == what)
        assert (kinds == what).sum() == sent - (odd if what == TRADED else 0)
    assert (kinds == 0).sum() == odd + counts.get('@kline_1m', 0)


@EACH
def test_the_two_decoders_agree_on_every_message(name, symbol):
    scan, r = Scan(grid(name, symbol)), of_symbol(name, symbol)
    for i in range(len(r)):
        seen, frame = r[i]
        scan.on(frame, seen)
        assert scan.event() == decode(frame, seen, symbol)


@EACH
def test_the_sync_point(name, symbol):
    m = lived(name, symbol)
    sync, told = m.facts['snapshot_sync'], int(np.flatnonzero(m.kinds == TOLD)[0])
    assert m.r.seen_ns[told] == sync['local_ns']
    assert (m.kinds[:told] == CHANGED).sum() == sync['depth_messages_before_snapshot']
    ids = [(e.first_id, e.last_id, e.previous_id) for i in np.flatnonzero(m.kinds == CHANGED) for e in [decode(m.r[i][1], 0)]]
    stale = [x for x in ids if x[1] < sync['lastUpdateId']]
    assert len(stale) == sync['stale_messages_dropped'] and stale == ids[:len(stale)]
    first = sync['first_applied']
    assert ids[len(stale)] == (first['U'], first['u'], first['U'] - 1 if first['pu'] is None else first['pu'])
    assert len(ids) - len(stale) == m.facts['book']['messages_applied'] and m.facts['depth']['chain_breaks'] == 0
    assert m.scan.book.valid and m.scan.book.last_id == ids[-1][1] == m.facts['depth']['last_u']


@EACH
def test_our_book_is_theirs_after_every_message(name, symbol):
    m = lived(name, symbol)
    first = np.r_[np.flatnonzero(m.kinds == TOLD), np.flatnonzero(m.kinds == CHANGED)] # The snapshot first, so that no difference waits for it
    _, ours = Scan(grid(name, symbol)).run(some(m.r, first))
    ours = ours[1:]
    quotes = rows_of(some(m.r, m.kinds == QUOTED))['quotes', symbol]
    quotes = quotes[np.argsort(quotes['update_id'], kind='stable')]
    at = np.searchsorted(quotes['update_id'], ours['update_id'], side='right') - 1
    same = np.all([ours[c] == quotes[at][c] for c in ('bid_px', 'bid_qty', 'ask_px', 'ask_qty')], axis=0) & (at >= 0)
    book = m.facts['book']
    assert (len(ours), same.sum()) == (book['messages_applied'], book['bbo_vs_bookTicker']['compared']) == (len(ours), (at >= 0).sum())


@EACH
def test_the_book_at_each_minute_and_at_the_end(name, symbol):
    m, seen = lived(name, symbol), 0
    truth, scan = m.facts['book'], Scan(grid(name, symbol))
    at = {c['u']: c for c in truth['checkpoints_every_60s_local']}
    for i in np.flatnonzero((m.kinds == CHANGED) | (m.kinds == TOLD)):
        scan.on(m.r[i][1], 0)
        if not (c := at.pop(scan.book.last_id, None)): continue
        assert scan.book.best() == (c['best_bid'], c['best_bid_qty'], c['best_ask'], c['best_ask_qty'])
        assert [len(side) for side in scan.book.levels(100_000)] == [c['bid_levels'], c['ask_levels']]
        assert [round(sum(q for _, q in side), 9) for side in scan.book.levels(5)] == [c['bid_qty_top5'], c['ask_qty_top5']]
        seen += 1
    assert not at and seen == len(truth['checkpoints_every_60s_local'])
    for book in (scan.book, m.scan.book):
        assert book.last_id == truth['end']['u'] and [len(side) for side in book.levels(100_000)] == [truth['end']['bid_levels'], truth['end']['ask_levels']]
        assert [[list(v) for v in side] for side in book.levels(20)] == [truth['end']['bids'], truth['end']['asks']]
    assert scan.book.checksum() == m.scan.book.checksum()


@EACH
def test_bars_of_recorded_trades(name, symbol):
    facts = FACTS[name]['symbols'][symbol]['trades']
    rows = rows_of(of_symbol(name, symbol))['trades' if facts['event'] == 'trade' else 'agg_trades', symbol]
    ids = rows['trade_id']
    assert (len(rows) + facts['excluded_from_bars'], ids[0], ids[-1]) == (facts['messages'], facts['first_id'], facts['last_id'])
    assert (np.diff(ids) > 1).sum() == facts['id_gaps'] + facts['excluded_from_bars']
    assert (rows['px'].min(), rows['px'].max()) == (facts['price_min'], facts['price_max'])
    np.testing.assert_allclose(rows['qty'][rows['side'] > 0].sum(), facts['taker_buy_volume'], rtol=1e-9)
    must, trades = facts['minute_bars_by_T'], np.empty(len(rows), TRADE)
    for column in TRADE.names: trades[column] = rows[column]
    ours = bars(trades, until_ns=(must[-1]['open_time'] + 60_000)*10**6)
    columns = [c for c in must[0] if c != 'trades' or facts['event'] == 'trade'] # An aggregate is several trades
    if facts['event'] != 'trade': ours = ours[np.isin(ours['open_time'], [b['open_time'] for b in must])] # Flat minutes are not in the facts
    assert len(ours) == len(must) > 0
    for column in columns: np.testing.assert_allclose(ours[column], [b[column] for b in must], rtol=1e-9)


@ALL
def test_rows_are_those_of_the_general_decoder(name):
    r, events = recording(name), {'quotes': [], 'trades': [], 'marks': [], 'depth': []}
    for i in range(len(r)):
        seen, frame = r[i]
        e = decode(frame, seen)
        if isinstance(e, Quote): events['quotes'].append((e.symbol, (e.ts_ns, seen, e.bid_px, e.bid_qty, e.ask_px, e.ask_qty, e.update_id)))
        elif isinstance(e, Trade) and b'"aggTrade"' not in frame: events['trades'].append((e.symbol, (e.ts_ns, seen, e.px, e.qty, e.side, e.trade_id)))
        elif isinstance(e, Mark): events['marks'].append((e.symbol, (e.ts_ns, seen, e.mark_px, e.index_px, e.funding_rate, e.next_funding_ns)))
        elif isinstance(e, Depth | Snapshot):
            ids = (e.first_id, e.last_id, e.previous_id) if isinstance(e, Depth) else (e.last_id, e.last_id, -1)
            symbol = e.symbol or next(iter(FACTS[name]['symbols']))
            for side, levels in ((1, e.bids), (-1, e.asks)): events['depth'] += [(symbol, (e.ts_ns, seen, *ids, side, px, qty)) for px, qty in levels]
    found = rows_of(r)
    for (kind, symbol), rows in found.items():
        if kind == 'agg_trades': continue
        must = np.array([row for s, row in events[kind] if s == symbol], rows.dtype)
        assert must.tobytes() == rows.tobytes(), f'{kind} of {symbol}'
    assert sum(len(v) for v in events.values()) == sum(len(rows) for (kind, _), rows in found.items() if kind != 'agg_trades')


def test_each_deleted_line_is_noticed_at_the_next():
    m = lived('usdm_btcusdt_20240808', 'BTCUSDT')
    chain = [m.r[i][1] for i in np.flatnonzero((m.kinds == CHANGED) | (m.kinds == TOLD))[:1000]]
    for gone in range(8, 998, 45):
        scan = Scan(grid('usdm', 'BTCUSDT'))
        for frame in chain[:gone]: scan.on(frame, 0)
        assert scan.book.valid
        with pytest.raises(OutOfStep, match=f'must follow {decode(chain[gone], 0).previous_id}, was '): scan.on(chain[gone + 1], 0)
        assert not scan.book.valid and len(scan.book) == 0 and scan.book.best()[0] != scan.book.best()[0]
        for frame in chain[gone + 2:gone + 9]: scan.on(frame, 0)
        assert len(scan.book.waiting) == 8 and not scan.book.valid # Until a snapshot spans them
