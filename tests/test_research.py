"Research and trading agree: a runner's journal, its replay and one pass over arrays; our money and vectorbt's"

from functools import partial

import msgspec
import numpy as np
import pytest
from hftlab.core import compute
from hftlab.core.events import Bar, Signal, decode, encode
from hftlab.core.journal import Journal, read_journal
from hftlab.core.settings import Settings
from hftlab.data.bars import bars
from hftlab.data.schema import instrument
from hftlab.data.synth import make_flow
from hftlab.engine.engine import Engine, Plan
from hftlab.engine.parity import compare, draw, parity, recorded, ways
from hftlab.engine.replay import HEADER, OUT
from hftlab.engine.runner import Runner
from hftlab.engine.sweep import Question, objective, wish
from hftlab.engine.vector import Terms, View, check_money, orders, sweep
from hftlab.indicators.features import observations, trend_flow
from hftlab.models.linear import Linear
from hftlab.models.registry import register
from hftlab.models.serve import serve
from hftlab.strategies.strategy import ANSWER, STRATEGIES, strategy
from hftlab.venues.sim import Sim

SHORT = trend_flow(2, 4, 3)
SECOND = 10**9


@pytest.fixture(scope='module')
def gate(tmp_path_factory):
    "A registered model, served as a runner is served"
    folder, rng = tmp_path_factory.mktemp('models'), np.random.default_rng(7)
    X = rng.normal(0, (1, 1e-3, 3), (400, 3)).astype(np.float32)
    model = Linear(SHORT.schema_hash, 'gate').fit(X, (X[:, 2] + rng.normal(0, 3, 400) > 0).astype(float))
    made = register(folder, model, {}, X[:16])
    return serve(folder, 'gate', made.version, SHORT.schema_hash)


@pytest.fixture(scope='module')
def plan_of(gate):
    "Release 1 has no model, 2 has other parameters, 3 is gated, 4 looks at other features"
    def plan(number):
        s, few = strategy('ema_ofi'), SHORT if number < 4 else trend_flow(2, 3, 2)
        p = s.params(pause=100, trend=.05, flow=1. + number/4, gate=.5)
        return Plan(number, few, s, p, Settings(), gate if number == 3 else None)
    return plan


@pytest.fixture(scope='module')
def session(tmp_path_factory, plan_of):
    "Twenty minutes through the real runner, over four releases"
    folder = tmp_path_factory.mktemp('journal')/'one'
    with Journal(folder) as journal:
        runner = Runner(lambda tell: Sim(tell, 2, vol=1e-3), Engine(instrument(), plan_of(1), 'one'), journal)
        runner.reconcile()
        for number in (1, 2, 3, 4):
            if number > 1: runner.command('release', 'test', 'next', number, plan_of(number))
            runner.run(speed=0, until_ns=runner.venue.now_ns + 300*SECOND)
    return folder


def copied(session, folder, seq, **turn):
    "The session once more, with one bit of one record turned over"
    def flip(x): return np.array([x]).view(np.int64).__xor__(1).view(float).item()
    with Journal(folder) as j:
        for r in read_journal(session):
            e = decode(r.payload) if r.kind != HEADER else None
            if r.seq == seq: e = msgspec.structs.replace(e, **{n: flip(getattr(e, n)) for n in turn})
            j.append(r.ts_ns, r.kind, encode(e) if e else r.payload)
    return folder


def test_a_runners_journal_its_replay_and_research_say_the_same(session, plan_of):
    found = parity(session, plan_of)
    assert found.equal and found.exit_code == 0, found.difference
    assert found.releases == [1, 2, 3, 4]
    assert len(set(found.signals.values())) == 1 and found.signals['live'] > 20
    assert {s.release for _, s in recorded(session).said} == {1, 2, 3, 4}


@pytest.mark.parametrize('field', ['stop_px', 'target_px', 'confidence'])
def test_one_bit_of_a_recorded_signal_is_found(session, plan_of, tmp_path, field):
    said = [r.seq for r in read_journal(session) if r.kind == OUT and isinstance(decode(r.payload), Signal)]
    found = parity(copied(session, tmp_path/'bent', said[len(said)//2], **{field: 1}), plan_of)
    assert found.exit_code == 1 and f': {field} must be ' in found.difference and found.difference.startswith('live, event ')


def test_one_bit_of_what_went_in_is_found(session, plan_of, tmp_path):
    closed = [r.seq for r in read_journal(session) if r.kind not in (HEADER, OUT) and isinstance(decode(r.payload), Bar)]
    assert parity(copied(session, tmp_path/'bent', closed[3], close=1), plan_of).exit_code == 1


def test_a_picture_of_it(session, plan_of, tmp_path):
    r = recorded(session)
    draw(r, ways(r, plan_of)).savefig(tmp_path/'parity.png')
    assert (tmp_path/'parity.png').stat().st_size > 10_000
    assert compare(r, {**ways(r, plan_of), 'live': r.said[1:]}).exit_code == 1


def test_a_whole_market_gives_the_same_view_as_its_journal(session):
    "What a runner was told is what the made market says of itself, so research on either is the same"
    from hftlab.engine.parity import observed_of
    at, live = observed_of(recorded(session))
    m = make_flow(1200, 2, vol=1e-3)
    _, made = observations(m.quotes, bars(m.trades))
    n = next(i for i, e in enumerate(recorded(session).events) if type(e).__name__ == 'Fill')
    k = int(np.searchsorted(at, n)) # our own orders change the book from here on
    assert k > 1000 and live[:k].tobytes() == made[:k].tobytes()


@pytest.mark.parametrize('seed', range(4))
def test_vectorbt_and_our_arithmetic_agree_on_anything(seed):
    "Any opinions at all on a market that jumps, holes and quotes of one moment included"
    rng, n = np.random.default_rng(seed), 3000
    mid = 100*np.exp(rng.normal(0, 2e-3, n).cumsum())
    half = rng.integers(1, 20, n)*.005
    best = np.column_stack([mid - half, mid + half])
    best[:5] = np.nan
    ts = np.sort(rng.integers(0, 2000, n))*SECOND
    v = View(ts, best, np.zeros((n, 0)), np.full(n, np.nan), (), instrument('SOLUSDT'))
    some = []
    for rate in (.3, .02, 0.):
        said = np.full((n, len(ANSWER)), np.nan)
        side = rng.choice([-1., 0., 1.], n, p=[rate/2, 1 - rate, rate/2])
        said[:, 0], said[:, 1], said[:, 4] = side, .5, rng.integers(1, 300, n)
        said[:, 2], said[:, 3] = mid*(1 - side*.004), np.where(rng.random(n) < .5, np.nan, mid*(1 + side*.006))
        some.append(orders(v, said, int(rng.integers(0, 3))*SECOND))
    assert len(some[0]) > 100 and not len(some[2])
    check_money(v, some, Terms(fees_bps=3.*seed, slippage_bps=seed, notional=5000.*(1 + 10*seed)))


@pytest.mark.parametrize('name', STRATEGIES)
def test_every_strategy_can_be_swept(name):
    m = make_flow(1800, 3, vol=1e-3)
    ts_ns, observed = observations(m.quotes, bars(m.trades))
    s = strategy(name)
    wanted = trend_flow(2, 4, 3)
    if not set(s.reads) <= set(wanted.names):
        from hftlab.indicators.features import FeatureSet, column
        wanted = FeatureSet(tuple(column(n) for n in s.reads))
    swept = sweep(observed, ts_ns, wanted, s, [{}, {}])
    assert repr(swept[0]) == repr(swept[1]) and swept[0][1].years > 0


def try_it(q, params): return objective(q)(params)


def test_a_trial_is_the_same_in_a_worker():
    q = Question(hours=1.5, features=trend_flow(3, 8, 5), slices=3, least_trades=1)
    params = {'trend': .2, 'flow': 2.}
    [found] = compute.gather(compute.run([partial(try_it, q, params)], timeout_s=120, progress=False))
    assert found == objective(q)(params) and found.score is not None
    assert msgspec.json.decode(msgspec.json.encode(wish(q)))['fixed']['hours'] == 1.5
