"Models across processes: what trading imports, who gets which number, what a killed trainer leaves"

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from hftlab.core.errors import DataError
from hftlab.data.schema import BAR
from hftlab.data.synth import make_flow
from hftlab.indicators.features import FeatureSet, column, features as matrix, features_step, mids, observations
from hftlab.models.boost import Boost
from hftlab.models.labels import labels
from hftlab.models.linear import Linear
from hftlab.models.model import compare
from hftlab.models.registry import load, register, versions
from hftlab.models.serve import serve
from hftlab.models.validation import check_split, purged_split

pytest.importorskip('onnx', reason='models are trained with the research extra')
RNG = np.random.default_rng(7)
X = RNG.normal(size=(500, 4))
Y = (RNG.random(500) < 1/(1 + np.exp(-X[:, 0]))).astype(float)

SERVE = '''
import json, sys
import numpy as np
from hftlab.models.serve import serve
ask = serve(sys.argv[1], sys.argv[2], 'v0001', 'f00d')
said = ask.batch(np.load(sys.argv[3]))
print(json.dumps({'p': said.tolist(), 'heavy': sorted({'xgboost', 'onnx', 'onnxmltools', 'skl2onnx', 'sklearn', 'scipy', 'pandas'} & set(sys.modules))}))
'''

TRAIN = '''
import sys
import numpy as np
from hftlab.models.linear import Linear
from hftlab.models.registry import register
X = np.random.default_rng(0).normal(size=(200, 4))
model = Linear('f00d').fit(X, (X[:, 0] > 0).astype(float))
for _ in range(int(sys.argv[2])): print(register(sys.argv[1], model, {}, X[:16]).version, flush=True)
'''


def python(code: str, *args: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], stdout=subprocess.PIPE, text=True)


def test_trading_needs_only_onnxruntime_and_answers_to_the_bit(tmp_path):
    pytest.importorskip('xgboost')
    np.save(tmp_path/'X.npy', X)
    for model in (Boost('f00d', trees=20).fit(X, Y), Linear('f00d').fit(X, Y)):
        name, version = register(tmp_path/'models', model, {}, X[:64])
        said, _ = python(SERVE, tmp_path/'models', name, tmp_path/'X.npy').communicate(timeout=60)
        there = json.loads(said)
        assert there['heavy'] == []
        assert there['p'] == serve(tmp_path/'models', name, version, 'f00d').batch(X).tolist()
        assert np.abs(np.array(there['p']) - load(tmp_path/'models', name, version, 'f00d').predict(X)).max() <= 1e-5


def test_trainers_in_many_processes_never_share_a_number(tmp_path):
    trainers = [python(TRAIN, tmp_path, 5) for _ in range(4)]
    given = [line for t in trainers for line in t.communicate(timeout=120)[0].split()]
    assert sorted(given) == versions(tmp_path)['linear'] == [f'v{i:04d}' for i in range(1, 21)]


def test_a_killed_trainer_leaves_whole_versions_only(tmp_path):
    for i in range(10):
        trainer = python(TRAIN, tmp_path, 10_000)
        assert trainer.stdout and trainer.stdout.readline().startswith('v')  # Busy with the next one
        time.sleep(.0007*i)  # Killed each time elsewhere in it
        trainer.kill()
        trainer.communicate(timeout=60)
    found = versions(tmp_path)['linear']
    assert len(found) >= 10, 'each trainer must have registered one at least'
    for version in found: assert 0 <= serve(tmp_path, 'linear', version, 'f00d')(X[0]) <= 1
    last = register(tmp_path, Linear('f00d').fit(X, Y), {}, X[:16])
    assert last.version == f'v{int(found[-1][1:])+1:04d}'


def test_half_a_model_is_refused_in_one_line_and_the_one_before_goes_on(tmp_path):
    model = Linear('f00d').fit(X, Y)
    for _ in range(2): name, version = register(tmp_path, model, {}, X[:16])
    before, file = serve(tmp_path, name, 'v0001', 'f00d'), tmp_path/name/version/'model.onnx'
    file.write_bytes(file.read_bytes()[:file.stat().st_size//2])
    for door in (serve, load):
        with pytest.raises(DataError, match=r'^\S+model\.onnx must have the sha256 .* cut or changed\)$'): door(tmp_path, name, version, 'f00d')
    assert before(X[0]) == serve(tmp_path, name, 'v0001', 'f00d')(X[0])


def test_from_a_market_to_a_served_probability(tmp_path):
    pytest.importorskip('xgboost')
    made, features = make_flow(3600, seed=7), FeatureSet(tuple(column('flow', f'flow_{n}', n=n) for n in (20, 100, 500)))
    ts, observed = observations(made.quotes, np.empty(0, BAR))
    rows, horizon = matrix(observed, features), 10**9
    y = labels(mids(observed), ts, horizon, cost_bps=0.)
    split = purged_split(ts, horizon, ts[0] + 45*60*10**9, embargo_ns=60*10**9)
    check_split(split, ts, horizon, 60*10**9)
    models = {'linear': Linear(features.schema_hash), 'boost': Boost(features.schema_hash)}
    scores = compare(models, rows, y, split)
    assert max(scores['linear'].log_loss, scores['boost'].log_loss) < scores['naive'].log_loss - .03
    for model in models.values():
        ask = serve(tmp_path, *register(tmp_path, model, scores, rows[split.test[:64]]), features.schema_hash)
        state, row, live = features.init(), features.row(), []
        for seen in observed[:3000]:
            features_step(state, *seen, row)
            live.append(ask(row))
        np.testing.assert_array_equal(ask.batch(rows[:3000]), live)
    with pytest.raises(DataError, match='must be for features'): serve(tmp_path, 'boost', 'v0001', 'other')
