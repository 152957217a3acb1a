"Streams and feed against an exchange on this machine that fails in the ways in which real ones do"
import asyncio
import logging
import time
from collections import Counter
from contextlib import asynccontextmanager

import pytest
from websockets.asyncio.server import broadcast, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Headers, Response

from hftlab.app.bench_chaos import day
from hftlab.core.errors import Broken
from hftlab.core.events import Bar, Depth, Snapshot, Trade
from hftlab.core.settings import Settings, Stream, Venue
from hftlab.data.book import Book
from hftlab.data.client import Client
from hftlab.data.feed import Feed, feed_state
from hftlab.data.loopback import Loopback, Tape
from hftlab.data.streams import ACCOUNT, Streams
from hftlab.data.synth import make_flow
from hftlab.data.wire import control

NAMES = 'btcusdt@aggTrade', 'btcusdt@kline_1m', 'btcusdt@depth@100ms'
QUICK = Stream(silence_depth=.4, silence_trade=.8, silence_bar=2, streams_per_connection=2)


@pytest.fixture(scope='module')
def tape(): return Tape(make_flow(1200, seed=4, rate=5.))


async def until(what, seconds=15.):
    "Wait for something to become true"
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, 'must have happened by now'
        await asyncio.sleep(.005)


class Run:
    "A feed on a played tape, and what came of it"
    def __init__(self, tape, venue, feed): self.tape, self.venue, self.feed, self.events, self.gaps, self.links = tape, venue, feed, [], [], []

    def resynced(self) -> int: return sum(g.kind == 'depth' and how == 'filled' for g, how in self.gaps)

    def check(self):
        "Everything came once and is what the exchange said; the book is the exchange's"
        trades = [e.trade_id for e in self.events if isinstance(e, Trade)]
        minutes = [e.open_ns for e in self.events if isinstance(e, Bar) and e.closed]
        assert sorted(trades) == list(range(min(trades), len(self.tape.agg) + 1))
        assert sorted(minutes) == [b.open_ns for b in self.tape.bars if b.closed and b.open_ns >= min(minutes)]
        whole = Book(self.tape.instrument)
        whole.on(Snapshot(0, 0, 'BTCUSDT', 0, (), ()))
        for d in self.tape.depth: whole.on(d)
        book = self.feed.books['BTCUSDT']
        assert book.valid and book.last_id == self.tape.depth[-1].last_id and book.checksum() == whole.checksum()


@asynccontextmanager
async def playing(tape, speed=300, stutter=0., s=QUICK):
    "The tape is being played and the book is valid"
    venue = Loopback(tape, speed=speed, stutter=stutter)
    await venue.up()
    mine = Settings(venue=Venue(rest_url=f'http://{venue.url}', ws_url=f'ws://{venue.url}', request_timeout_s=2))
    run = Run(tape, venue, None)
    async with Client(mine, measure_s=0) as c, Feed(c, s, {'BTCUSDT': tape.instrument}, run.events.append, lambda g, how: run.gaps.append((g, how)),
            on_link=lambda link, told, why: run.links.append((told, why))) as run.feed:
        run.feed.want(*NAMES)
        await until(lambda: all(map(run.feed.is_up, NAMES)))
        run.task = asyncio.create_task(venue.play())
        await until(lambda: run.feed.books['BTCUSDT'].valid)
        yield run
        await run.task
        await until(lambda: not run.feed._work)
    await venue.down()


def each_fault_once(tape, fault, n=1):
    "Play the tape, let `fault` happen, and check what came"
    async def main():
        async with playing(tape) as run:
            await fault(run)
            await until(lambda: run.resynced() >= n)
        run.check()
        return run
    return asyncio.run(main())


def test_cut(tape):
    async def fault(run):
        for seat in list(run.venue.seats): seat.ws.transport.abort()
    run = each_fault_once(tape, fault)
    assert [told for told, _ in run.links].count('up') == 4 and 'failed' not in dict(run.links)


def test_pong_but_no_data(tape):
    async def fault(run):
        for seat in list(run.venue.seats): seat.is_mute = True
    run = each_fault_once(tape, fault)
    assert any('silent' in why for told, why in run.links if told == 'down')


def test_one_silent_stream_among_others_is_subscribed_to_again(tape):
    async def fault(run):
        for seat in run.venue.seats:
            if 'btcusdt@depth@100ms' in seat.names: seat.names = seat.names - {'btcusdt@depth@100ms'}
        await until(lambda: any(told == 'silent' for told, _ in run.links))
    async def main():
        async with playing(tape, s=Stream(silence_depth=.4, silence_trade=20, silence_bar=20)) as run:
            run.feed.want('btcusdt@bookTicker') # By the same door, and it goes on
            await until(lambda: 'btcusdt@bookTicker' in {n for seat in run.venue.seats for n in seat.names})
            await fault(run)
            await until(lambda: run.resynced() == 1)
        run.check()
        assert 'down' not in dict(run.links)
    asyncio.run(main())


def test_late_and_twice(tape):
    async def main():
        async with playing(tape, stutter=.5) as run:
            for _ in range(5):
                for seat in run.venue.seats: seat.waits = []
                await asyncio.sleep(.1)
                for seat in run.venue.seats: seat.release()
                await asyncio.sleep(.1)
        run.check()
        state = feed_state(run.feed)
        assert sum(x.doubled for x in state.lines) > 500 and not run.gaps
    asyncio.run(main())


def test_the_network_is_gone_until_the_pause_is_long(tape):
    "Three failures in a row, the next pause is four seconds; the network is back before, and all is whole within a second or two"
    async def main():
        async with playing(tape, speed=150) as run:
            await run.venue.down()
            await until(lambda: sum(told == 'failed' for told, _ in run.links) >= 6)
            assert max(k.backoff.due_ns for k in run.feed.streams.links) > run.feed.client.door.now() + 3*10**9
            await run.venue.up()
            back = time.monotonic()
            await until(lambda: run.resynced() == 1 and not run.feed._work)
            assert time.monotonic() - back < 5
        run.check()
    asyncio.run(main())


def test_an_exchange_that_says_no_is_not_hurried():
    "The port is open all the time, so knocking does not cut the pauses short: 0, 1, 3 s"
    asked = []
    async def main():
        def refuse(ws, request):
            asked.append(time.monotonic())
            return Response(503, 'Service Unavailable', Headers())
        async with serve(lambda ws: ws.wait_closed(), '127.0.0.1', 0, process_request=refuse) as server:
            port = server.sockets[0].getsockname()[1]
            async with Streams(f'ws://127.0.0.1:{port}', Stream(), lambda ns, f: None) as x:
                x.want('btcusdt@aggTrade')
                await asyncio.sleep(3.5)
        assert [round(t - asked[0]) for t in asked] == [0, 1, 3]
    asyncio.run(main())


class Plain:
    "A server that takes subscriptions and sends what it is told"
    def __init__(self): self.open, self.said, self.paths = set(), [], []

    async def talk(self, ws):
        self.open.add(ws)
        self.paths.append(ws.request.path)
        try:
            async for text in ws:
                c = control(text)
                self.said.append((time.monotonic(), id(ws), c.params))
                await ws.send(b'{"result":null,"id":%d}' % c.id, text=True)
        except ConnectionClosed: pass
        finally: self.open.discard(ws)

    def send(self, frame): broadcast(self.open, frame, text=True)


@asynccontextmanager
async def plain():
    x = Plain()
    async with serve(x.talk, '127.0.0.1', 0, compression=None) as server: yield x, f'ws://127.0.0.1:{server.sockets[0].getsockname()[1]}'


def test_subscriptions_keep_to_the_limits():
    "A thousand streams: two hundred to a connection, never ten messages in a second on one"
    async def main():
        async with plain() as (venue, url), Streams(url, Stream(), lambda ns, f: None) as x:
            names = {f'coin{i}usdt@aggTrade' for i in range(500)} | {f'coin{i}usdt@bookTicker' for i in range(500)}
            x.want(*names)
            await until(lambda: sum(len(k.socket.names) for k in x.links if k.socket) == 1000)
            x.drop(*[n for n in names if n.startswith('coin1usdt')])
            await until(lambda: sum(len(k.socket.names) for k in x.links if k.socket) == 998)
        assert len(x.links) == 0 and Counter(n for _, _, names in venue.said for n in names).most_common(1)[0][1] == 2
        for ws in {w for _, w, _ in venue.said}:
            times = [t for t, w, _ in venue.said if w == ws]
            assert all(sum(0 <= u - t < 1 for u in times) <= 6 for t in times)
    asyncio.run(main())


def test_the_stream_of_an_account_and_its_key(caplog):
    "The key stands in the address and nowhere else; when the exchange says that it has died, another is asked for"
    async def main():
        keys, got = iter(['first-secret', 'second-secret', 'third-secret']), []
        async def key(): return next(keys)
        async with plain() as (venue, url), Streams(url, Stream(), lambda ns, f: got.append(f)) as x:
            x.account(key)
            await until(lambda: venue.open)
            for _ in range(2): venue.send(b'{"stream":"first-secret","data":{"e":"ACCOUNT_UPDATE","E":7,"T":7}}')
            await until(lambda: got)
            venue.send(b'{"stream":"first-secret","data":{"e":"listenKeyExpired","E":8,"listenKey":"first-secret"}}')
            await until(lambda: len(venue.paths) == 2)
            assert [len(got), x.lines[ACCOUNT].sequence.doubled] == [2, 1]
        assert venue.paths == [f'/private/stream?listenKey={k}-secret' for k in ('first', 'second')]
    with caplog.at_level(logging.DEBUG, 'hftlab'): asyncio.run(main())
    assert 'secret' not in caplog.text and 'expired' in caplog.text


@pytest.mark.parametrize('mute', ['old', 'fresh'])
def test_renewing_beside_a_connection_that_is_mute(mute, monkeypatch):
    "The one that speaks is the one that is heard, nothing is missing, and it does not take the whole time of two side by side"
    monkeypatch.setattr('hftlab.data.streams._OVERLAP_S', .6)
    async def main():
        got, told = [], []
        async with plain() as (venue, url), Streams(url, Stream(reconnect_hours=1/3600, silence_trade=.3), lambda ns, f: got.append(int(f[-4:-2])),
                told.append, lambda link, what, why: told.append(what)) as x:
            x.want('btcusdt@aggTrade')
            await until(lambda: 'up' in told)
            old = set(venue.open)
            for i in range(10, 90):
                speak = venue.open if len(venue.open) == 1 else venue.open & old if mute == 'fresh' else venue.open - old
                broadcast(speak, b'{"stream":"btcusdt@aggTrade","data":{"e":"aggTrade","E":7,"a":%d}}' % i, text=True)
                await asyncio.sleep(.03)
                if len(venue.open) == 1: old = set(venue.open)
            await until(lambda: got[-1] == 89)
        assert got == list(range(10, 90)) and 'down' not in told
        assert ('renewed' in told) == (mute == 'old')
    asyncio.run(main())


def test_what_cannot_be_read_is_counted_and_fetched(tape, caplog):
    "Broken frames among good ones: each is given to whoever records, said once, and what it should have told is asked for"
    async def main():
        raw = []
        async with playing(tape, speed=200) as run:
            run.feed.on_frame = lambda ns, f: raw.append(f)
            tell = run.venue._tell
            def spoil(f): tell(f._replace(text=f.text.replace(b'"q":"', b'"q":x"')) if 'aggTrade' in f.stream and f.ts_ms % 3 == 0 else f)
            run.venue._tell = spoil
            for odd in (b'not json', b'{"stream":"btcusdt@nonsense","data":{"e":"new"}}', b'\xff\xfe', b'[]'):
                broadcast([s.ws for s in run.venue.seats], odd, text=odd.isascii())
        run.check()
        spoilt = sum(b'"q":x' in f for f in raw)
        assert spoilt > 10 and sum(run.feed.streams.odd.counts.values()) > spoilt
        return run
    with caplog.at_level(logging.WARNING, 'hftlab'): run = asyncio.run(main())
    kinds = [r.getMessage().partition(':')[0] for r in caplog.records if r.name == 'hftlab.streams']
    assert len(kinds) == len(set(kinds)) and run.feed.counts['filled'] > 10


def test_a_listener_that_fails_is_not_swallowed(tape):
    async def main():
        def fails(e): raise Broken('an invariant must hold, did not')
        async with playing(tape) as run: run.feed.on_event = fails
    with pytest.raises(ExceptionGroup) as e: asyncio.run(main())
    assert 'an invariant must hold' in repr(e.value)


def test_a_book_that_is_lost_says_so_at_once(tape):
    "It is empty when the cut is told, and until the snapshot; from then on every difference leaves it valid"
    async def main():
        async with playing(tape) as run:
            book, seen = run.feed.books['BTCUSDT'], []
            run.feed.on_link = lambda link, told, why: seen.append((told, book.valid)) if 'public' in link.name else None
            run.feed.on_event = lambda e: (run.events.append(e), seen.append((type(e).__name__, book.valid)) if isinstance(e, Depth | Snapshot) else None)
            for seat in list(run.venue.seats): seat.ws.transport.abort()
            await until(lambda: run.resynced() == 1)
            await until(lambda: len(seen) > 100)
        run.check()
        down, back = seen.index(('down', False)), seen.index(('Snapshot', True))
        assert {v for _, v in seen[:down]} <= {True} and {v for _, v in seen[down:back]} == {False} and {v for _, v in seen[back:]} == {True}
        gap = next(g for g, how in run.gaps if g.kind == 'depth' and how == 'filled')
        assert gap.first < gap.last and gap.since_ns < gap.until_ns
    asyncio.run(main())


def test_a_day_of_faults():
    o = day(20., seed=5)
    assert (o.missing, o.doubled, o.wrong, o.unexplained, o.groundless) == (0, 0, 0, 0, 0)
    assert max(o.recovery_s) <= 5 and o.failed <= .01*o.reconnects and o.renewed > 0 and o.gaps > 3
