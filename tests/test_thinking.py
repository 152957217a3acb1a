"Features and strategies on made and on recorded markets, and the same in another process"

import gzip
import json
import os
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

from hftlab.data.schema import BAR, instrument
from hftlab.data.synth import make_flow
from hftlab.indicators.features import FeatureSet, column, features, mids, observations, trend_flow
from hftlab.indicators.flow import ofi
from hftlab.strategies.strategy import STRATEGIES, check_strategy, strategy

ROOT = Path(__file__).parent.parent
DATA = ROOT/os.environ.get('HFTLAB_SHARED_DATA', '../shared/data')


def minutes(trades: np.ndarray) -> np.ndarray:
    "One bar for each minute that had a trade, the plain way"
    minute = trades['ts_ns']//(60*10**9)
    bars = np.zeros(len(np.unique(minute)), BAR)
    for bar, m in zip(bars, np.unique(minute), strict=True):
        px = trades['px'][minute == m]
        bar['open_time'], bar['high'], bar['low'], bar['close'] = 60_000*m, px.max(), px.min(), px[-1]
        bar['volume'] = trades['qty'][minute == m].sum()
    return bars


@pytest.fixture(scope='module')
def observed() -> np.ndarray:
    market = make_flow(7200, seed=11)
    return observations(market.quotes, minutes(market.trades)[:-1])[1]


@pytest.mark.parametrize('name', STRATEGIES)
def test_every_strategy_keeps_the_promises(name, observed):
    wanted = FeatureSet(tuple(column(n) for n in strategy(name).reads))
    assert strategy(name).name == name
    check_strategy(strategy(name), wanted.names, instrument(), mids(observed), features(observed, wanted))


def digest(a: np.ndarray) -> str: return blake2b(a.tobytes(), digest_size=8).hexdigest()


ASK = '''
import sys
import numpy as np
from hftlab.data.schema import instrument
from hftlab.indicators.features import features, mids, trend_flow
from hftlab.strategies.strategy import strategy
observed,wanted,ema_ofi = np.load(sys.argv[1]),trend_flow(),strategy('ema_ofi')
rows = features(observed, wanted)
said = ema_ofi.signals(ema_ofi.start(wanted.names, instrument()), mids(observed), rows)
from hashlib import blake2b
print(wanted.schema_hash, *(blake2b(a.tobytes(), digest_size=8).hexdigest() for a in (rows, said)))
'''


def test_the_same_in_another_process(observed, tmp_path):
    np.save(tmp_path/'observed.npy', observed)
    run = subprocess.run([sys.executable, '-c', ASK, tmp_path/'observed.npy'], capture_output=True, text=True, check=True)
    wanted, ema_ofi = trend_flow(), strategy('ema_ofi')
    rows = features(observed, wanted)
    said = ema_ofi.signals(ema_ofi.start(wanted.names, instrument()), mids(observed), rows)
    assert run.stdout.split() == [wanted.schema_hash, digest(rows), digest(said)]


RECORDED = DATA/'l2/usdm_btcusdt_20240808.gz'


@pytest.mark.skipif(not RECORDED.exists(), reason='needs the recorded market data')
def test_imbalance_explains_a_real_market():
    with gzip.open(RECORDED, 'rt') as lines:
        said = [json.loads(line.split(' ', 1)[1])['data'] for line in lines if '@bookTicker' in line]
    ts_ms = np.array([x['E'] for x in said])
    quotes = np.array([[x[k] for k in 'bBaA'] for x in said], float).T
    added, mid = np.nancumsum(ofi(*quotes)), .5*(quotes[0] + quotes[2])
    shares = []
    for seconds in (1, 10):
        i = np.searchsorted(ts_ms, np.arange(ts_ms[0], ts_ms[-1], 1000*seconds), side='right') - 1
        x, y = np.diff(added[i]), np.diff(mid[i])
        shares += [round(100*np.corrcoef(*pair)[0, 1]**2) for pair in ((x, y), (x[:-1], y[1:]))]
    assert len(said) == 66_089
    assert shares == [41, 1, 52, 0], 'percent of a second, of the next, of ten seconds, of the next ten'
