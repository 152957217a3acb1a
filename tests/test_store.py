"The store across processes, on both databases, and when they fail"
import multiprocessing
import os
import signal
import sqlite3
import time
import psycopg
import pytest
from sqlalchemy import make_url, text
from hftlab.core.check_store import check_store
from hftlab.core.errors import Conflict, StoreError
from hftlab.core.store import Store

many = multiprocessing.get_context('forkserver')
many.set_forkserver_preload(['hftlab.core.center'])


def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.005)


@pytest.fixture
def store(url):
    with Store(url) as s:
        with s.write() as c: c.execute(text('create table note (id integer primary key, words text not null)'))
        yield s


def count(s):
    with s.read() as c: return c.execute(text('select count(*) from note')).scalar()


def note(s, i, words='x'):
    with s.write(alone='note') as c:
        c.execute(text('insert into note values (:i, :w)'), {'i': i, 'w': words})
        s.notify(c, 'notes')


def open_and_bump(url, barrier, times):
    barrier.wait()
    with Store(url, wait_s=30) as s:
        for _ in range(times):
            with s.write(alone='note') as c:
                n = c.execute(text('select count(*) from note')).scalar()
                c.execute(text('insert into note values (:n, :w)'), {'n': n, 'w': 'x'})


def test_processes_neither_lose_nor_interleave(store, url):
    barrier = many.Barrier(6, timeout=60)
    parts = [many.Process(target=open_and_bump, args=(url, barrier, 20)) for _ in range(6)]
    for p in parts: p.start()
    for p in parts: p.join()
    assert [p.exitcode for p in parts] == [0]*6 and count(store) == 120


def test_what_every_store_promises(url):
    assert len(check_store(lambda: Store(url))) == 6


def test_migrations_from_empty_and_again(url):
    for _ in range(2):
        with Store(url) as s, s.read() as c: assert len(c.execute(text('select version_num from alembic_version')).all()) == 1


def test_newer_schema_is_refused(url):
    with Store(url) as s, s.write() as c: c.execute(text("update alembic_version set version_num='v9999_later'"))
    with pytest.raises(StoreError, match='newest that this hftlab knows, was v9999_later'): Store(url)


def test_every_watch_hears_the_last_change(store, url):
    with Store(url) as other:
        here,there = [],[]
        with store.watch('notes', lambda: here.append(count(store))), other.watch('notes', lambda: there.append(count(other))):
            for i in range(50): note((store, other)[i % 2], i)
            until(lambda: here[-1:] == there[-1:] == [50])


def test_the_same_key_twice_is_a_conflict(store):
    note(store, 1)
    with pytest.raises(Conflict): note(store, 1)


def test_a_read_sees_one_moment_and_cannot_write(store):
    with store.read() as c:
        before = c.execute(text('select count(*) from note')).scalar()
        note(store, 1)
        assert c.execute(text('select count(*) from note')).scalar() == before
    with pytest.raises(StoreError, match='must be writable'), store.read() as c: c.execute(text('delete from note'))


def write_until_killed(url, out):
    with Store(url) as s:
        for i in range(100_000):
            note(s, i)
            out.send(i)


def test_what_was_committed_survives_kill_9(store, url):
    for _ in range(3):
        with store.write() as c: c.execute(text('delete from note'))
        got,out = many.Pipe(duplex=False)
        p = many.Process(target=write_until_killed, args=(url, out))
        p.start()
        out.close()
        for _ in range(20): done = got.recv()
        os.kill(p.pid, signal.SIGKILL)
        p.join()
        while got.poll():
            try: done = got.recv()
            except EOFError: break
        assert count(store) in (done+1, done+2)
        note(store, 200_000) # and nobody is locked out


def test_sqlite_locked(sqlite, tmp_path):
    with Store(sqlite, wait_s=.2) as s:
        held = sqlite3.connect(tmp_path/'lab.db', isolation_level=None)
        held.execute('begin immediate')
        with pytest.raises(StoreError, match=r'lab.db must be free within 0.2 s, was: database is locked'), s.write(): pass
        with s.read() as c: assert c.execute(text('select 1')).scalar() == 1
        held.close()
        with s.write(): pass


def test_sqlite_read_only(sqlite, tmp_path):
    with Store(sqlite) as s, Store(f'sqlite:///file:{tmp_path}/lab.db?mode=ro&uri=true') as ro:
        with pytest.raises(StoreError, match='must be writable'), ro.write() as c: c.execute(text('delete from promotion'))
        with ro.read() as c: assert c.execute(text('select count(*) from promotion')).scalar() == 0
        assert s.dialect == 'sqlite'


def test_sqlite_full(sqlite):
    with Store(sqlite) as s:
        with s.write() as c: c.execute(text('create table blob (b blob)'))
        with pytest.raises(StoreError, match='room'), s.write() as c:
            c.execute(text('PRAGMA max_page_count=1'))
            c.execute(text('insert into blob values (zeroblob(1000000))'))
        with s.read() as c: assert c.execute(text('select count(*) from blob')).scalar() == 0


def test_sqlite_paths(tmp_path):
    (tmp_path/'letter.txt').write_text('not a database '*100)
    with pytest.raises(StoreError, match='intact SQLite'): Store(f'sqlite:///{tmp_path}/letter.txt')
    with pytest.raises(StoreError, match='folder that exists'): Store(f'sqlite:///{tmp_path}/no/lab.db')
    with pytest.raises(StoreError, match='can be opened'): Store(f'sqlite:///{tmp_path}')


def test_sqlite_path_stays_when_the_folder_changes(tmp_path, monkeypatch):
    (tmp_path/'a').mkdir()
    monkeypatch.chdir(tmp_path/'a')
    with Store('sqlite:///lab.db') as s:
        monkeypatch.chdir(tmp_path)
        s._engine.dispose()
        with s.write(): pass
    assert not (tmp_path/'lab.db').exists()


def test_postgres_unreachable_and_unknown(postgres_server):
    with pytest.raises(StoreError, match='desk:\\*\\*\\*@127.0.0.1:1/lab must be reachable') as e: Store('postgresql://desk:hunter2@127.0.0.1:1/lab', wait_s=2)
    assert 'hunter2' not in str(e.value)
    with pytest.raises(StoreError, match='must exist'): Store(make_url(postgres_server).set(database='nowhere').render_as_string(False))


def test_postgres_wrong_password(postgres_folder, postgres_server):
    if postgres_folder is None: pytest.skip('the given server has its own rules of who comes in')
    rules = postgres_folder/'pg_hba.conf'
    rules.write_text('local all guarded scram-sha-256\n' + rules.read_text())
    with psycopg.connect(postgres_server, autocommit=True) as c:
        c.execute("create role guarded login password 'right'")
        c.execute('select pg_reload_conf()')
    where = postgres_server.partition('@')[2]
    def told():
        with pytest.raises(StoreError) as e: Store(f'postgresql://guarded:wrong@{where}')
        return str(e.value)
    until(lambda: 'must let this user in' in told())
    assert 'wrong' not in told()


def test_postgres_locked(postgres):
    with Store(postgres, wait_s=.3) as s, s.write(alone='x'), pytest.raises(StoreError, match='must be free within 0.3 s'), s.write(alone='x'): pass


def test_postgres_read_only(postgres, postgres_folder):
    if postgres_folder is None: pytest.skip('needs a role of its own, which the given server may not allow')
    with Store(postgres) as s, s.write() as c:
        for what in ('create role reader login', f'grant usage on schema {c.execute(text("select current_schema")).scalar()} to reader',
                     f'grant select on all tables in schema {c.execute(text("select current_schema")).scalar()} to reader'): c.execute(text(what))
    with Store(make_url(postgres).set(username='reader').render_as_string(False)) as ro:
        with pytest.raises(StoreError, match='must be writable'), ro.write() as c: c.execute(text('delete from promotion'))
        with ro.read() as c: assert c.execute(text('select count(*) from promotion')).scalar() == 0


def end_connections(server, like):
    with psycopg.connect(server, autocommit=True) as c:
        return c.execute('select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name like %s', [like]).fetchone()[0]


def test_postgres_a_dead_listener_is_replaced_and_nothing_lost(postgres, postgres_server):
    with Store(postgres) as s, Store(postgres) as other:
        with s.write() as c: c.execute(text('create table note (id integer primary key, words text not null)'))
        seen = []
        with other.watch('notes', lambda: seen.append(count(other))):
            until(lambda: seen)
            for i in range(4):
                until(lambda: end_connections(postgres_server, 'hftlab listens'))
                note(s, i)
                until(lambda n=i+1: seen[-1] == n)


def test_postgres_dead_connections_are_replaced(postgres, postgres_server):
    with Store(postgres) as s:
        assert end_connections(postgres_server, 'hftlab%')
        with s.read() as c: assert c.execute(text('select 1')).scalar() == 1
