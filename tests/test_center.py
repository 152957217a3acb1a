"The center across processes, on both databases, and when components fail, hang or die"
import multiprocessing
import os
import signal
import time
from contextlib import contextmanager
from threading import Event, Thread
import psycopg
import pytest
from sqlalchemy import text
from hftlab.core.center import Center
from hftlab.core.errors import Conflict, SettingsError
from hftlab.core.paper import Paper
from hftlab.core.store import Store

many = multiprocessing.get_context('forkserver')
many.set_forkserver_preload(['hftlab.core.center'])


def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.005)


@pytest.fixture
def center(url):
    with Store(url) as s: yield Center(s)


def component(url, name, begin, stay, refuses, beat_s):
    begin.wait()
    def apply(r):
        if r.settings.trading.max_signals == refuses: raise ValueError(f'not {refuses} signals')
    with Store(url, wait_s=30) as s, Center(s).join(name, apply, beat_s): stay.poll(None)


@contextmanager
def components(url, names, refuses=None, beat_s=3.):
    begin,pipes = many.Barrier(len(names) + 1, timeout=60),[many.Pipe(duplex=False) for _ in names]
    parts = [many.Process(target=component, args=(url, n, begin, stay, (refuses or {}).get(n), beat_s)) for n,(stay,_) in zip(names, pipes, strict=True)]
    for p in parts: p.start()
    begin.wait()
    try: yield parts
    finally:
        for stay,leave in pipes:
            leave.close() # which ends its poll
            stay.close()
        for p in parts: p.join()


def propose(center, by='ada', **changes):
    return center.paper.propose({n.replace('__', '.'): v for n,v in changes.items()}, by=by, why='a test')


def test_twenty_processes_start_together_and_all_acknowledge(url):
    with components(url, [f'part{i}' for i in range(20)]) as parts, Store(url, wait_s=30) as s:
        center = Center(s)
        until(lambda: center.status().acknowledged == 20)
        assert len(center.promotions()) == len(center.paper.history()) == len(center.paper.releases()) == 1
        for leverage in (10, 11):
            got = center.promote(propose(center, risk__max_leverage=leverage).release, by='ada', why='a test')
            assert (got.state, got.running, got.acknowledged, got.failed) == ('complete', 20, 20, {})
        assert {c.pid for c in center.status().components} == {p.pid for p in parts}
        assert {(c.release, c.version, c.state) for c in center.status().components} == {(3, 3, 'running')}
    with Store(url) as s: assert Center(s).status().components == [] # all of them said goodbye


def test_one_refuses(url, center):
    with components(url, 'abc', refuses={'b': 4}):
        until(lambda: center.status().acknowledged == 3)
        bad = propose(center, trading__max_signals=4).release
        got = center.promote(bad, by='ada', why='a test')
        assert (got.state, got.acknowledged, list(got.failed.values())) == ('partial', 2, ['ValueError: not 4 signals'])
        assert [(c.name, c.release, c.state) for c in center.status().components] == [('a', 2, 'running'), ('b', 1, 'failed'), ('c', 2, 'running')]
        assert center.promote(1, by='ada', why='back').state == 'complete'
        got = center.promote(bad, by='ada', why='all or nothing', strict=True)
        assert got.state == 'rolled back' and center.promoted().release == 1 and 'not 4 signals' in center.promoted().why
        until(lambda: center.status().rate == 1)
        assert {c.release for c in center.status().components} == {1}


def test_killed_is_lost_and_not_waited_for(url, center):
    with components(url, 'abc', beat_s=.3) as parts:
        until(lambda: center.status().acknowledged == 3)
        os.kill(parts[0].pid, signal.SIGKILL)
        got = center.promote(propose(center, risk__max_leverage=9).release, by='ada', why='a test', strict=True)
        assert (got.state, got.running, got.acknowledged) == ('complete', 2, 2)
        assert [(c.name, c.release, c.state) for c in center.status().components] == [('a', 1, 'lost'), ('b', 2, 'running'), ('c', 2, 'running')]
        with center.join('a', lambda r: None): # a restart takes its place
            assert [c.state for c in center.status().components] == ['running']*3


def test_stopped_for_a_while_catches_up(url, center):
    with components(url, 'ab', beat_s=.3) as parts:
        until(lambda: center.status().acknowledged == 2)
        os.kill(parts[0].pid, signal.SIGSTOP)
        until(lambda: center.status().components[0].state == 'lost')
        with center.store.write() as c: c.execute(text("delete from component where name = 'a'")) # as a day later
        center.promote(propose(center, risk__max_leverage=9).release, by='ada', why='a test')
        os.kill(parts[0].pid, signal.SIGCONT)
        until(lambda: [c.release for c in center.status().components if c.state == 'running'] == [2, 2])


def test_silent_is_partial_and_strict_goes_back(center):
    go_on = Event()
    with center.join('slow', lambda r: r.number == 2 and go_on.wait(20)):
        got = center.promote(propose(center, risk__max_leverage=9).release, by='ada', why='a test', strict=True, wait_s=.2)
        assert (got.state, list(got.failed.values())) == ('rolled back', ['no answer within 0.2 s'])
        go_on.set()
        until(lambda: center.status().rate == 1)
        assert center.status().components[0].release == 1


def test_superseded(url, center):
    began,go_on,got = Event(),Event(),[]
    def slow(r):
        if r.number == 2:
            began.set()
            go_on.wait(20)
    with center.join('slow', slow):
        two,three = (propose(center, risk__max_leverage=n).release for n in (9, 8))
        first = Thread(target=lambda: got.append(center.promote(two, by='ada', why='a test', strict=True)))
        first.start()
        began.wait(20)
        center.promote(three, by='bob', why='a test', wait_s=0)
        first.join()
        go_on.set()
        assert got[0].state == 'superseded' and center.promoted().release == three # nobody's promotion was undone
        until(lambda: center.status().rate == 1)


def propose_many(url, process, barrier):
    with Store(url, wait_s=60) as s:
        paper = Paper(s)
        def go(thread):
            for i in range(50): paper.propose({f'cache.{("ticker", "history", "indicators", "klines_5m", "klines_1h")[thread]}': process*100+i}, by=f'{process}.{thread}', why=f'{i}')
        threads = [Thread(target=go, args=(t,)) for t in range(5)]
        barrier.wait()
        for t in threads: t.start()
        for t in threads: t.join()


def test_a_thousand_proposals(url, center):
    barrier = many.Barrier(4, timeout=60)
    parts = [many.Process(target=propose_many, args=(url, p, barrier)) for p in range(4)]
    for p in parts: p.start()
    for p in parts: p.join()
    v = center.paper.history(2000)[::-1]
    assert [x.number for x in v] == list(range(1, 1002)) and [x.base for x in v] == list(range(1001))
    assert all(new.tree == old.tree | new.changes and len(new.changes) == 1 for old,new in zip(v, v[1:], strict=False))
    wrote = {}
    for x in v[1:]: wrote.setdefault(x.by, []).append(int(x.why))
    assert wrote == {f'{p}.{t}': list(range(50)) for p in range(4) for t in range(5)} # none lost, each author's in order
    assert [(r.number, r.version) for r in center.paper.releases(2000)[::-1]] == [(i, i) for i in range(1, 1002)]


def test_one_base_has_one_heir(center):
    said = []
    def go(i):
        try: said.append(center.paper.propose({'cache.ticker': i}, by=f'author {i}', why='a race', base=1).version)
        except Conflict as e: said.append(str(e))
    threads = [Thread(target=go, args=(i,)) for i in range(10)]
    for t in threads: t.start()
    for t in threads: t.join()
    refused = [x for x in said if x != 2]
    assert len(refused) == 9 and all('newest version 2, by author' in x and 'cache.ticker' in x for x in refused)


def test_a_tree_that_does_not_fit_this_code_is_not_applied(center):
    with center.join('engine', lambda r: None) as engine:
        n = propose(center, risk__max_leverage=9).release
        with center.store.write() as c: c.execute(text("update settings_version set tree = '{\"risk.of_tomorrow\": 1}' where number = 2"))
        got = center.promote(n, by='ada', why='a test')
        assert got.state == 'partial' and 'SettingsError' in next(iter(got.failed.values())) and engine.release.number == 1
    with pytest.raises(SettingsError, match='of_tomorrow'): center.join('late', lambda r: None)


def test_postgres_outage_is_caught_up_with(postgres, postgres_server):
    with Store(postgres) as s, Store(postgres) as other:
        here,heard = Center(s),[]
        with Center(other).join('engine', lambda r: None, beat_s=.5), Center(other).subscribe('risk', lambda risk, n: heard.append(n)):
            for i in range(3):
                n = propose(here, risk__max_leverage=5+i).release
                with psycopg.connect(postgres_server, autocommit=True) as c:
                    c.execute("select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'hftlab%'")
                assert here.promote(n, by='ada', why='a test').state == 'complete'
                until(lambda n=n: heard[-1:] == [n])
