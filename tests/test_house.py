"The house stands: imports point down, the wings are apart, and what is generated is what its source says"

import ast
import filecmp
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
MODULES = {'.'.join(p.relative_to(ROOT).with_suffix('').parts): p for p in sorted((ROOT/'hftlab').rglob('*.py'))
           if p.name not in ('__init__.py', '_modidx.py')}


def written_by(nb: Path) -> set[str]:
    "Modules that a notebook exports to"
    said = re.findall(r'"#\|\s*(?:default_exp|exporti?)\s+([\w.]+)', nb.read_text())
    return {f'hftlab.{m}' for m in said}


PLACE = {m: str(nb.relative_to(ROOT/'nbs')) for nb in NOTEBOOKS for m in written_by(nb)}


def imports(mod: str) -> set[str]:
    "Modules of ours that `mod` imports, wherever in the file it does"
    found = set()
    for n in ast.walk(ast.parse(MODULES[mod].read_text())):
        if isinstance(n, ast.Import): found |= {a.name for a in n.names}
        if isinstance(n, ast.ImportFrom):
            base = '.'.join(filter(None, [*mod.split('.')[:-n.level], n.module])) if n.level else n.module
            found |= {base} | {f'{base}.{a.name}' for a in n.names}
    return {m for m in found if m in MODULES}


def decade(mod: str) -> int: return int(PLACE[mod][:2])


# 20, 30, 40 think; 50, 60 act; they meet in the engine
MAY_IMPORT = {0: set(), 10: {0}, 20: {0, 10}, 30: {0, 20}, 40: {0, 20, 30}, 50: {0, 10}, 60: {0, 10, 50},
              70: {0, 10, 20, 30, 40, 50, 60}, 80: {0, 10, 30, 70}, 90: {0, 10, 20, 30, 40, 50, 60, 70, 80}}


@pytest.mark.parametrize('mod', MODULES)
def test_imports_point_down(mod):
    up = {m: PLACE[m] for m in imports(mod) if PLACE[m] >= PLACE[mod] and PLACE[m] != PLACE[mod]}
    assert not up, f'{PLACE[mod]} must import only what stands before it, imports {up}'


@pytest.mark.parametrize('mod', MODULES)
def test_wings_are_apart(mod):
    far = {m for m in imports(mod) if decade(m) != decade(mod) and decade(m) not in MAY_IMPORT[decade(mod)]}
    if decade(mod) == 20: far |= {m for m in imports(mod) if decade(m) == 10 and m != 'hftlab.data.schema'}
    assert not far, f'{mod} stands on floor {decade(mod)} and must not know {far}'


def test_every_module_has_its_notebook():
    assert set(MODULES) == set(PLACE), 'a module must be written by a notebook, and a notebook must be exported'


def test_numbers_are_unique_and_notebooks_are_small():
    floors = [nb for nb in NOTEBOOKS if nb.parent.name[0].isdigit()]
    numbers = [str(nb.relative_to(ROOT/'nbs')).split('_')[0] + nb.name.split('_')[0] for nb in floors]
    assert len(numbers) == len(set(numbers))
    assert not [nb.name for nb in NOTEBOOKS if nb.stat().st_size > 400_000]


def test_outputs_are_saved_and_tell_nothing_of_this_machine():
    for nb in NOTEBOOKS:
        cells = [c for c in json.loads(nb.read_text())['cells'] if c['cell_type'] == 'code']
        assert any(c['outputs'] for c in cells), f'{nb.name} must have saved outputs'
        text = json.dumps([o for c in cells for o in c['outputs'] if 'image/png' not in o.get('data', {})])
        assert not re.search(r'(?<![\w.])/(root|home|Users|tmp|work)/', text), f'{nb.name} must not show a path of the machine it ran on'
        assert not [o for c in cells for o in c['outputs'] if o['output_type'] == 'error'], f'{nb.name} was saved with an error'


def test_one_door_to_the_compiler_and_none_to_pickle():
    for mod, path in MODULES.items():
        names = {a.name.split('.')[0] for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module.split('.')[0] for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.module}
        assert not names & {'pickle', 'joblib', 'dill', 'shelve'}, f'{mod} must not open what can run code'
        assert mod == 'hftlab.core.kernel' or 'numba' not in names, f'{mod} must ask core/kernel to compile'


@pytest.fixture(scope='module')
def again(tmp_path_factory):
    "A copy of the house, exported and cleaned once more"
    copy = tmp_path_factory.mktemp('house')
    for name in ('nbs', 'hftlab', 'pyproject.toml', 'settings.ini', 'README.md', 'Makefile', 'LICENSE', 'requirements.lock'):
        source = ROOT/name
        shutil.copytree(source, copy/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')) if source.is_dir() else shutil.copy(source, copy/name)
    for command in ('nbdev-export', 'nbdev-clean'): subprocess.run([BIN/command], cwd=copy, check=True, capture_output=True)
    (copy/'.venv/bin').mkdir(parents=True)
    (copy/'.venv/bin/jupyter').symlink_to(BIN/'jupyter')
    (copy/'.venv/.ready').touch()
    subprocess.run(['make', '-s', 'readme'], cwd=copy, check=True, capture_output=True)
    return copy


def different(a: Path, b: Path) -> list[str]:
    "Files that differ between two trees, or stand in only one of them"
    here, there = ({str(p.relative_to(r)) for p in r.rglob('*') if p.is_file() and not {'__pycache__', '.ipynb_checkpoints'} & set(p.parts)} for r in (a, b))
    return sorted(here ^ there | {p for p in here & there if not filecmp.cmp(a/p, b/p, shallow=False)})


def test_export_and_clean_leave_no_difference(again):
    assert not different(ROOT/'hftlab', again/'hftlab'), 'run nbdev-export, or nbdev-update if the module was edited'
    assert not different(ROOT/'nbs', again/'nbs'), 'run nbdev-clean'


def test_readme_is_written_by_the_index(again):
    assert (ROOT/'README.md').read_text() == (again/'README.md').read_text(), 'run make readme'


def test_wheel_carries_every_module(again):
    command = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', 'dist', '.']
    subprocess.run(command, cwd=again, check=True, capture_output=True)
    names = set(zipfile.ZipFile(next((again/'dist').glob('*.whl'))).namelist())
    assert {str(p.relative_to(ROOT)) for p in MODULES.values()} | {'hftlab/py.typed'} <= names
