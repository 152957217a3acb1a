"What was really recorded comes out as it was: our book is the exchange's own at every message, and so are the bars"

import gzip
import os
from bisect import bisect_right
from collections import defaultdict
from pathlib import Path

import msgspec
import numpy as np
import pytest

from hftlab.core.errors import OutOfStep
from hftlab.core.events import Depth, Quote, Snapshot
from hftlab.data.bars import bars
from hftlab.data.book import Book
from hftlab.data.schema import TRADE

DATA = Path(__file__).parent.parent/os.environ.get('HFTLAB_SHARED_DATA', '../shared/data')
pytestmark = pytest.mark.skipif(not (DATA/'l2').is_dir(), reason='needs the recordings')


def levels(rows): return tuple((float(px), float(qty)) for px, qty in rows)


def event(d: dict, seen_ns: int, symbol: str):
    "Depth, quote or snapshot as the exchange wrote it, None for anything else"
    if 'lastUpdateId' in d: return Snapshot(d.get('E', 0)*10**6, seen_ns, symbol, d['lastUpdateId'], levels(d['bids']), levels(d['asks']))
    if d['e'] == 'depthUpdate': return Depth(d['E']*10**6, seen_ns, d['s'], d['U'], d['u'], d['pu'], levels(d['b']), levels(d['a']))
    if d['e'] == 'bookTicker': return Quote(d['E']*10**6, seen_ns, d['s'], *(float(d[k]) for k in 'bBaA'), d['u'])


def frames(*names: str):
    "Frames of recordings in order: time as written and message"
    for name in names:
        for line in gzip.open(DATA/'l2'/name):
            seen, text = line.split(b' ', 1)
            d = msgspec.json.decode(text)
            yield int(seen), d.get('data', d)


def four_symbols():
    "The recording of 2021: streams in one file, snapshots in the other"
    asked = {}
    for line in gzip.open(DATA/'l2/usdm_multi_20210722.http.txt.gz', 'rt'):
        if '/depth?symbol=' in line:
            url, rest = line.split(' -> ', 1)
            seen, text = rest.split(': ', 1)
            asked[float(seen)] = url.split('symbol=')[1].split('&')[0], msgspec.json.decode(text)
    told = []
    for line in gzip.open(DATA/'l2/usdm_multi_20210722.ws.txt.gz', 'rt'):
        if not line.startswith('wss'):
            seen, text = line.split(': ', 1)
            d = msgspec.json.decode(text)
            told.append((float(seen), d.get('data', d), ''))
    both = told + [(seen, d, symbol) for seen, (symbol, d) in asked.items()]
    return [event(d, int(seen*1e9), symbol) for seen, d, symbol in sorted(both, key=lambda r: r[0])]


def agreement(events) -> dict[str, tuple[int, int]]:
    "For each symbol the differences used, and those after which the best is the last quote that is not newer"
    quotes, books, found = defaultdict(list), {}, defaultdict(lambda: (0, 0))
    for e in events:
        if isinstance(e, Quote): quotes[e.symbol].append((e.update_id, e.bid_px, e.bid_qty, e.ask_px, e.ask_qty))
    for rows in quotes.values(): rows.sort()
    for e in sorted(events, key=lambda e: not isinstance(e, Snapshot)): # The snapshot first, so that no difference waits for it
        if isinstance(e, Quote): continue
        book = books.setdefault(e.symbol, Book(e.symbol))
        if not book.on(e) or isinstance(e, Snapshot): continue
        i = bisect_right(quotes[e.symbol], (book.last_id, float('inf')))
        used, same = found[e.symbol]
        found[e.symbol] = used + 1, same + (i > 0 and quotes[e.symbol][i - 1][1:] == book.best())
    return dict(found)


def all_of(name: str) -> dict[str, tuple[int, int]]:
    "What must be found: each difference that a quote came before agrees with it"
    return {s: (v['book']['messages_applied'], v['book']['bbo_vs_bookTicker']['compared']) for s, v in facts(name).items()}


@pytest.fixture(scope='module')
def main(): return [e for seen, d in frames('usdm_btcusdt_20240808.gz') if (e := event(d, seen, 'BTCUSDT'))]


def facts(name): return msgspec.json.decode((DATA/f'l2/facts/{name}.json').read_bytes())['symbols']


def test_every_message_of_2024(main): assert agreement(main) == all_of('usdm_btcusdt_20240808') == {'BTCUSDT': (6547, 6547)}


def test_every_message_of_2023_across_midnight():
    both = frames('usdm_btcusdt_20230404.dat.gz', 'usdm_btcusdt_20230405.dat.gz')
    assert agreement([e for seen, d in both if (e := event(d, seen*1000, 'BTCUSDT'))]) == all_of('usdm_btcusdt_20230404_05')


def test_four_symbols_at_once(): assert agreement([e for e in four_symbols() if e]) == all_of('usdm_multi_20210722')


def test_the_book_at_each_minute_and_at_the_end_in_order_of_arrival(main):
    truth = facts('usdm_btcusdt_20240808')['BTCUSDT']['book']
    at = {c['u']: c for c in truth['checkpoints_every_60s_local']}
    book, seen = Book('BTCUSDT'), 0
    for e in main:
        if isinstance(e, Quote): continue
        book.on(e)
        if c := at.get(book.last_id):
            assert book.best() == (c['best_bid'], c['best_bid_qty'], c['best_ask'], c['best_ask_qty'])
            assert [len(side) for side in book.levels(10_000)] == [c['bid_levels'], c['ask_levels']]
            seen += 1
    assert seen == len(at) > 0
    assert [[list(v) for v in side] for side in book.levels(20)] == [truth['end']['bids'], truth['end']['asks']]


def test_each_deleted_line_is_noticed_at_the_next(main):
    chain = [e for e in main if isinstance(e, Depth | Snapshot)]
    for gone in range(8, 1000, 40):
        book = Book('BTCUSDT')
        for e in chain[:gone]: book.on(e)
        assert book.in_step
        with pytest.raises(OutOfStep, match=f'must follow {chain[gone].previous_id}, was '): book.on(chain[gone + 1])
        assert not book.in_step and len(book) == 0 and book.best()[0] != book.best()[0]


@pytest.mark.parametrize('name, files', [('usdm_btcusdt_20240808', ['usdm_btcusdt_20240808.gz']),
                                         ('usdm_btcusdt_20230404_05', ['usdm_btcusdt_20230404.dat.gz', 'usdm_btcusdt_20230405.dat.gz'])])
def test_bars_of_recorded_trades(name, files):
    traded = [d for _, d in frames(*files) if d.get('e') == 'trade' and d['X'] == 'MARKET'] # One of 2023 is the insurance fund's
    rows = np.array([(d['T']*10**6, 0, float(d['p']), float(d['q']), -1 if d['m'] else 1, d['t']) for d in traded], TRADE)
    must = facts(name)['BTCUSDT']['trades']['minute_bars_by_T']
    ours = bars(rows, until_ns=(must[-1]['open_time'] + 60_000)*10**6)
    assert len(ours) == len(must) > 5
    for column in must[0]: np.testing.assert_allclose(ours[column], [b[column] for b in must], rtol=1e-9)
