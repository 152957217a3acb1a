"The chain as a whole: a session that is killed again and again, releases under a session that trades, and bad input"
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
import msgspec
import numpy as np
import pytest
from hftlab.app.build import GATE, features_of, open_runner, plan_of
from hftlab.app.desk import Here
from hftlab.app.live import open_session
from hftlab.app.train import train_gate
from hftlab.core.errors import Broken
from hftlab.core.events import Command, Fill, Holding, Submit
from hftlab.core.sources import ini
from hftlab.engine.parity import parity
from hftlab.engine.replay import OUT, replay, session_events
from hftlab.strategies.strategy import strategy
from hftlab.trade.recorder import Sent, recorded
from hftlab.venues.sim import Sim

COMMAND = str(Path(sys.executable).parent/'hftlab')
EAGER = {'ema_ofi.trend': .01, 'ema_ofi.flow': 1., 'ema_ofi.horizon_s': 2., 'ema_ofi.pause': 20} # Trades every few seconds of the market
many = multiprocessing.get_context('forkserver')
many.set_forkserver_preload(['hftlab.app.live', 'hftlab.app.desk', 'hftlab.strategies.ema_ofi'])


def until(true, seconds=30, why='waited in vain'):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, why
        time.sleep(.01)
    return found


@pytest.fixture
def desk(tmp_path, monkeypatch):
    "A folder with settings and a store, whose release 2 trades often; its center"
    monkeypatch.chdir(tmp_path)
    Path('settings.ini').write_text(ini())
    with Here().center() as c:
        c.promote(c.paper.candidate(thresholds=EAGER, by='test', why='trade often'), by='test', why='begin')
        yield c


def hftlab(*words): return subprocess.run([COMMAND, *map(str, words)], capture_output=True, text=True, timeout=120)


def free_port():
    import socket
    with socket.create_server(('127.0.0.1', 0)) as s: return s.getsockname()[1]


class Living:
    "The real command in a process of its own"
    def __init__(self, session, duration=90, speed=60):
        self.port = free_port()
        words = ['live', '--json', '--session', session, '--duration', duration, '--speed', speed, '--port', self.port]
        self.process = subprocess.Popen([COMMAND, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def status(self):
        assert self.process.poll() is None, self.process.communicate()
        try: return json.loads(urllib.request.urlopen(f'http://127.0.0.1:{self.port}/status', timeout=5).read())
        except OSError: return None

    def came_to(self, what, n): return until(lambda: (s := self.status()) and s[what] >= n and s, why=f'{what} never came to {n}')

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        out,err = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, err
        return json.loads(out)


@contextmanager
def living(session, **kwargs):
    it = Living(session, **kwargs)
    try: yield it
    finally:
        if it.process.poll() is None: it.process.kill()
        it.process.communicate()


def at_venue(session):
    "The account of a session's venue, from its file"
    sim = Sim.load(Path(f'journal/{session}/venue').read_bytes(), lambda e: None)
    return sum(e.qty for e in sim.state() if isinstance(e, Holding)),sim.life.ledger


# Killed

def life(folder, told):
    "What `hftlab live` does, and a word as soon as it has come back"
    os.chdir(folder)
    here = Here()
    with here.center() as c, open_session(c, here.under, 'x') as s:
        held = sum(e.qty for e in s.runner.venue.state() if isinstance(e, Holding))
        told.send((s.report(), held))
        s.runner.run(60, 60)


def killed(folder, at, waits):
    "One life; what it said when it had come back, None when it was killed before"
    hear,tell = many.Pipe(duplex=False)
    p = many.Process(target=life, args=(folder, tell), daemon=True)
    p.start()
    tell.close()
    said = None
    try:
        if waits and hear.poll(60): said = hear.recv()
        time.sleep(at)
    finally:
        p.kill()
        p.join()
    assert not waits or said
    return said


@pytest.mark.timeout(240)
def test_a_session_that_is_killed_twenty_times(desk):
    draw,back = random.Random(7),[]
    for n in range(20):
        if n % 5 == 0: # the command itself
            with living('x') as it:
                it.came_to('events', 100)
                time.sleep(draw.uniform(0, 1))
                it.process.kill()
        elif n % 5 == 3: killed(os.getcwd(), draw.uniform(.3, 1.5), waits=False) # perhaps while it is coming back
        else: back.append(killed(os.getcwd(), draw.uniform(0, 1.2), waits=True))
    for report,held in back: assert report['reconciled'] and report['position'] == held

    last = hftlab('live', '--session', 'x', '--duration', 1, '--json')
    report,(held,ledger) = json.loads(last.stdout),at_venue('x')
    assert last.returncode == 0 and report['reconciled'] and report['position'] == held
    assert (again := hftlab('replay', '--session', 'x')).returncode == 0, again.stdout + again.stderr
    assert (three := hftlab('parity', '--session', 'x')).returncode == 0, three.stdout + three.stderr

    journal = [e for _,_,e in session_events('journal/x')]
    asked,filled = [e.client_id for e in journal if isinstance(e, Submit)],{e.trade_id for e in journal if isinstance(e, Fill)}
    stored = [o.client_id for o in recorded(desk.store, Sent)]
    fills = [(f.client_id, f.trade_id) for f in recorded(desk.store, Fill)]
    assert len(ledger.fills) > 20 and filled == {f.trade_id for f in ledger.fills}
    assert len(set(asked)) == len(asked) and len(set(stored)) == len(stored) and len(set(fills)) == len(fills)
    assert set(stored) <= set(ledger.orders)
    most = max(np.abs(np.cumsum([f.side*f.qty for f in ledger.fills])))
    assert most < 1.5*max(o.submit.qty for o in ledger.orders.values()), 'one at a time, so nothing held may ever be two orders large'
    print(f'{len(ledger.orders)} orders, {len(asked)} of them in the journal, {len(stored)} in the store; {len(ledger.fills)} fills, {len(fills)} in the store')


# Another release

def test_a_release_goes_through_a_session_that_trades(desk):
    new = desk.paper.candidate(thresholds=EAGER | {'ema_ofi.flow': 2.}, by='test', why='another')
    def orders(release): return recorded(desk.store, Sent, release=release)
    with living('x') as it:
        until(lambda: orders(2))
        there = desk.promote(new, by='test', why='another')
        until(lambda: orders(new))
        home = json.loads(hftlab('release', 'rollback', '--why', 'back', '--json').stdout)
        n = len(orders(2))
        until(lambda: len(orders(2)) > n)
        report = it.end()
    assert (there.state, home['state'], home['release'], report['release']) == ('complete', 'complete', 2, 2)
    assert there.max_ms < 1000 and home['max_ms'] < 1000
    ran,said = 2,[]
    for _,kind,e in session_events('journal/x'):
        if isinstance(e, Command): ran = e.value
        if kind == OUT: said.append((ran, e.release))
    assert all(a == b for a,b in said) and {a for a,_ in said} == {2, new}
    assert hftlab('replay').returncode == hftlab('parity').returncode == 0
    print(f'acknowledged after {there.max_ms:.0f} and {home["max_ms"]:.0f} ms')


# Bad input

def one_line(done, code, *words):
    *logged,said = done.stderr.splitlines()
    assert done.returncode == code and said.startswith('hftlab: ') and not any('Traceback' in w for w in logged), done.stderr
    for w in words: assert w in said, done.stderr


@contextmanager
def locked(file):
    "Another process writes to the store and does not finish"
    code = "import sqlite3,sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('begin immediate'); print(1, flush=True); sys.stdin.readline()"
    p = subprocess.Popen([sys.executable, '-c', code, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    p.stdout.readline()
    try: yield
    finally: p.communicate('\n')


def test_a_locked_store_stops_no_session_and_starts_none(desk):
    file = Here().loaded.settings.store.url.reveal().removeprefix('sqlite:///')
    with living('x', speed=10) as it:
        it.came_to('fills', 2)
        with locked(file):
            late = hftlab('live', '--session', 'y', '--duration', 1)
            before = it.status()
            after = it.came_to('fills', before['fills'] + 2)
        report = it.end()
    one_line(late, 1, 'must be free within')
    assert after['events'] > before['events'] and report['reconciled']
    assert len(recorded(desk.store, Fill)) == report['fills'] and len(recorded(desk.store, Sent)) == report['orders'], 'nothing may be missing after a lock'


def test_a_model_that_is_missing_or_cut_changes_nothing(desk):
    settings = Here().loaded.settings
    t = train_gate(settings, features_of(settings, strategy('ema_ofi')))
    file = Path(settings.models.registry_dir)/GATE/t.version/'model.onnx'
    file.write_bytes(file.read_bytes()[:file.stat().st_size//2])
    cut,missing = (desk.paper.candidate(models={GATE: v}, by='test', why='a gate') for v in (t.version, 'v0009'))
    with living('x') as it:
        it.came_to('orders', 1)
        for number,words in ((missing, 'v0009 must exist'), (cut, 'cut or changed')):
            done = hftlab('release', 'promote', number, '--strict', '--why', 'a gate', '--json')
            d = json.loads(done.stdout)
            assert (done.returncode, d['state'], desk.promoted().release) == (1, 'rolled back', 2)
            assert any('DataError' in e and words in e for e in d['failed'].values()), d
            it.came_to('orders', it.status()['orders'] + 1)
        report = it.end()
    assert report['release'] == 2 and report['reconciled'] and {o.release for o in recorded(desk.store, Sent)} == {2}
    desk.promote(cut, by='test', why='nobody is there to object')
    one_line(hftlab('live', '--session', 'y', '--duration', 1), 1, 'cut or changed')


def test_a_venue_that_refuses_every_order(desk):
    with open_runner(desk, Here().under, 'x') as r:
        with r.venue.faulty('refuse'):
            r.run(speed=0, until_ns=r.venue.now_ns + 60*10**9)
            refused = r.report()
        r.run(speed=0, until_ns=r.venue.now_ns + 60*10**9)
        assert r.agrees()
        after = r.report()
    assert refused['orders'] > 1 and refused['fills'] == refused['position'] == 0 and after['fills'] > 0
    assert agree(desk)


def raises(plan, at_first):
    "The same plan with a strategy that raises, at once or at its first quote"
    def step(s, mid, row, p, out):
        if at_first or mid > 0: raise ZeroDivisionError('a strategy that raises')
    return msgspec.structs.replace(plan, strategy=msgspec.structs.replace(plan.strategy, step=step))


def agree(desk):
    "Do replay and parity hold, in this process?"
    def plan(n): return plan_of(desk.paper.release(n))
    return replay('journal/x', plan).equal and parity('journal/x', plan).equal


def test_a_strategy_that_raises_ends_the_session_and_loses_nothing(desk):
    with open_runner(desk, Here().under, 'x') as r:
        r.run(speed=0, until_ns=r.venue.now_ns + 20*10**9)
        r.engine._install(raises(r.engine.plan, at_first=False), r.engine.plan)
        with pytest.raises(Broken, match='raised ZeroDivisionError on Quote: a strategy that raises'): r.run(speed=0, until_ns=r.venue.now_ns + 20*10**9)
    with open_runner(desk, Here().under, 'x') as r:
        assert r.agrees()
        r.run(speed=0, until_ns=r.venue.now_ns + 20*10**9)
        assert r.agrees()
    assert agree(desk)


def refuse_a_release(desk):
    with open_runner(desk, Here().under, 'x') as r:
        r.run(speed=0, until_ns=r.venue.now_ns + 20*10**9)
        before,new = r.engine.plan,desk.paper.release(desk.paper.candidate(by='test', why='a strategy that raises'))
        def wrong(release): return msgspec.structs.replace(raises(before, at_first=True), release=release.number)
        with pytest.raises(ZeroDivisionError): r.apply(new, wrong)
        r.run(speed=0, until_ns=r.venue.now_ns + 20*10**9)
        return r.engine.plan is before and r.agrees(),{d.release for _,kind,d in session_events('journal/x') if kind == OUT}


def test_a_release_whose_strategy_raises_is_refused(desk): assert refuse_a_release(desk) == (True, {2})


def test_a_refused_release_leaves_a_session_that_replays(desk):
    refuse_a_release(desk)
    assert agree(desk)


def test_nothing_is_sent_before_venue_and_engine_agree(desk):
    sent = 0
    for _ in range(5):
        with open_runner(desk, Here().under, 'x') as r:
            sent += r.tally.counts['submit']
            r.run(speed=0, until_ns=r.venue.now_ns + 10*10**9)
    assert sent == 0
