"The command line as a stranger meets it: real processes, real files, exit codes"

import inspect
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from fastcore.docments import docments

from hftlab.app.cli import COMMANDS
from hftlab.core.sources import ini

HFTLAB = Path(sys.executable).parent/'hftlab'


def run(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(('HFTLAB_', 'BINANCE_'))}
    return subprocess.run([HFTLAB, *words], cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def folder(tmp_path):
    "A folder with a settings.ini in it"
    (tmp_path/'settings.ini').write_text(ini())
    return tmp_path


def one_line(r: subprocess.CompletedProcess, code: int, says: str):
    "The command failed as it should: one line, this code, no traceback"
    assert r.returncode == code, r.stderr
    assert re.search(says, r.stderr), r.stderr
    assert len(r.stderr.strip().splitlines()) == 1 and 'Traceback' not in r.stderr and not r.stdout, r.stderr


@pytest.mark.parametrize('name', COMMANDS)
def test_every_command_is_documented(name):
    fn = COMMANDS[name]
    assert fn.__doc__ and '\n' not in fn.__doc__
    bare = [k for k, o in docments(fn, full=True, returns=False).items() if k != 'here' and not o.docment]
    assert not bare, f'{name} must say what {bare} mean'
    assert list(inspect.signature(fn).parameters)[0] == 'here'


def test_help_names_every_command(folder):
    r = run(cwd=folder)
    assert r.returncode == 0 and all(f'hftlab {n} ' in r.stdout for n in COMMANDS)
    assert 'Who promotes' in run('release', 'promote', '--help', cwd=folder).stdout


def test_light_commands_load_nothing_heavy(folder):
    code = "import sys; from hftlab.app.cli import main; main(['config', 'check']); print(sorted({'numba', 'ray', 'pandas', 'sqlalchemy', 'matplotlib'} & set(sys.modules)))"
    r = subprocess.run([sys.executable, '-c', code], cwd=folder, capture_output=True, text=True)
    assert r.stdout.splitlines()[-1] == '[]', r.stdout + r.stderr


def test_a_settings_version_from_proposal_to_rollback(folder):
    def ask(*words): return json.loads((r := run(*words, '--json', cwd=folder)).stdout or r.stderr)
    assert ask('config', 'propose', 'risk.max_leverage=8', '--why', 'calmer')['release'] == 2
    assert ask('release', 'promote', '2', '--why', 'calmer')
    shown = {r['name']: r for r in ask('config', 'show')}
    assert shown['risk.max_leverage']['value'] == '8' and shown['risk.max_leverage']['from'] == 'release 2'
    assert [v['number'] for v in ask('config', 'history')] == [2, 1]
    assert 'risk.max_leverage' in json.dumps(ask('config', 'diff', '1', '2'))
    assert ask('release', 'rollback', '--why', 'worse')
    assert {r['name']: r for r in ask('config', 'show')}['risk.max_leverage']['value'] == '20'
    assert ask('config', 'rollback', '1', '--why', 'clean')
    assert [r['number'] for r in ask('release', 'list')] == [3, 2, 1]


def test_a_running_component_is_seen_and_acknowledges(folder):
    child = subprocess.Popen([HFTLAB, 'up', '--name', 'watcher'], cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        assert 'runs release 1' in child.stdout.readline()
        run('config', 'propose', 'risk.max_leverage=8', '--why', 'calmer', cwd=folder)
        assert run('release', 'promote', '2', '--why', 'calmer', '--strict', cwd=folder).returncode == 0
        assert 'runs release 2' in child.stdout.readline()
        assert '"watcher"' in run('release', 'status', '--json', cwd=folder).stdout
    finally:
        child.terminate()
        assert child.wait(10) == 0


def test_secrets_are_never_printed(folder):
    keys = dict(BINANCE_API_KEY='SEEKRIT1', BINANCE_API_SECRET='SEEKRIT2', HFTLAB_STORE__URL='postgresql://ann:SEEKRIT3@127.0.0.1:1/x')
    for words in (['config', 'show'], ['config', 'show', '--json'], ['config', 'check'], ['release', 'status'], ['release', 'status', '--debug']):
        r = run(*words, cwd=folder, **keys)
        assert 'SEEKRIT' not in r.stdout + r.stderr, words


BAD_FILES = {'half-written': (ini()[:3000], 'must end with the line'), 'cut in a line': ('[risk]\nmax_lev', 'settings.ini:2: a line must be'),
    'no section': ('max_leverage = 3', 'settings.ini:1: a line must be'), 'wrong type': ('[risk]\nmax_leverage = lots', 'settings.ini:2: risk.max_leverage must be'),
    'out of range': ('[risk]\nmax_leverage = 500', "less than or equal to 125, was '500'"), 'misspelled': ('[risk]\nmax_levrage = 5', 'did you mean risk.max_leverage'),
    'contradiction': ('[risk]\nmin_leverage = 12\nmax_leverage = 9', r'settings.ini:2, settings.ini:3: risk: min_leverage <= base_leverage'),
    'doubled': ('[risk]\nmax_leverage = 9\nmax_leverage = 8', 'settings.ini:3: '), 'zeros': ('\0'*512, 'settings.ini:1: '), 'empty list': ('[trading]\nsymbols =', 'trading.symbols must')}


@pytest.mark.parametrize('what', BAD_FILES)
def test_bad_settings_stop_the_start(tmp_path, what):
    text, says = BAD_FILES[what]
    (tmp_path/'settings.ini').write_text(text)
    one_line(run('config', 'check', cwd=tmp_path), 2, says)


def test_missing_and_unreadable_settings(tmp_path):
    one_line(run('config', 'check', cwd=tmp_path), 2, 'settings.ini must exist.*config init')
    (tmp_path/'settings.ini').mkdir()
    one_line(run('config', 'check', cwd=tmp_path), 2, 'must be a readable text file')
    one_line(run('config', 'check', '--settings', 'x.ini', cwd=tmp_path), 2, 'x.ini must exist')


def test_bad_words_and_bad_environment(folder):
    one_line(run('config', 'propse', cwd=folder), 2, 'did you mean config propose')
    one_line(run('config', 'check', '--set', 'risk.max_leverage', cwd=folder), 2, 'section.name=value')
    one_line(run('config', 'check', cwd=folder, MAX_LEVERAGE='lots'), 2, 'environment MAX_LEVERAGE: risk.max_leverage must be')
    one_line(run('config', 'check', cwd=folder, HFTLAB_RISK__MAX_LEVRAGE='5'), 2, 'did you mean risk.max_leverage')
    one_line(run('config', 'check', cwd=folder, BINANCE_API_KEY='k'), 2, 'must both be set')
    assert run('release', 'promote', cwd=folder).returncode == 2


def test_bad_databases(folder):
    def status(**env): return run('release', 'status', cwd=folder, **env)
    assert status().returncode == 0
    one_line(status(HFTLAB_STORE__URL='sqlite:///nowhere/x.db'), 1, 'folder that exists')
    one_line(status(HFTLAB_STORE__URL='sqlite:///settings.ini'), 1, 'intact SQLite database')
    one_line(status(HFTLAB_STORE__URL='mysql://x/y'), 2, 'sqlite:///file or postgresql')
    one_line(status(HFTLAB_STORE__URL='postgresql://127.0.0.1:1/x'), 1, 'must be reachable')
    with sqlite3.connect(folder/'hftlab.db') as db: db.execute("update alembic_version set version_num = 'v9999_future'")
    one_line(status(), 1, 'update hftlab')


def test_a_study_is_run_from_the_command_line(folder):
    shutil.copytree(Path(__file__).parent.parent/'nbs/research', folder/'nbs/research')
    one_line(run('report', 'run', 'nowhere', 'seed=3', cwd=folder), 2, 'nowhere')
    one_line(run('report', 'run', 'flow_moves_price', 'sede=3', cwd=folder), 2, 'seed')
    r = run('report', 'run', 'flow_moves_price', 'seed=3', '--json', cwd=folder)
    assert r.returncode == 0 and json.loads(r.stdout)['parameters']['seed'] == 3, r.stderr
    assert json.loads(run('report', 'list', '--json', cwd=folder).stdout)[0]['error'] == ''


def test_an_unknown_release_is_refused_and_json_errors_are_json(folder):
    one_line(run('release', 'promote', '99', '--why', 'x', cwd=folder), 2, 'from 1 to 1, was 99')
    r = run('release', 'promote', '99', '--why', 'x', '--json', cwd=folder)
    assert r.returncode == json.loads(r.stdout)['exit_code'] == 2 and not r.stderr
