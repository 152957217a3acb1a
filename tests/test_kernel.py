"Compiled code on disk: edited, torn, shared, unwritable, pruned. Each case runs real processes on a small copied package."
import os
import shutil
import subprocess
import sys
from pathlib import Path
import pytest
import hftlab

HERE = Path(hftlab.__file__).parent
KERNEL = 'from hftlab.core.kernel import kernel'
PLAIN = 'import numba\nkernel = numba.njit(cache=True)'
LOWER = '{how}\n@kernel\ndef lower(x): return x*{times}\n'
UPPER = '{how}\nfrom {home}lower import lower\n@kernel\ndef upper(x): return lower(x) + 0.5\n'
ASK = 'from hftlab.upper import upper as f; print(f({x}), sum(f.stats.cache_hits.values()))'


@pytest.fixture
def home(tmp_path):
    "A package of two kernels in two modules, one calling the other"
    (tmp_path/'hftlab'/'core').mkdir(parents=True)
    for name in ('__init__.py', 'core/__init__.py', 'core/errors.py', 'core/kernel.py'):
        shutil.copy(HERE/name, tmp_path/'hftlab'/name)
    return write(tmp_path, KERNEL, 2)

def write(home, how, times, folder='hftlab', prefix='hftlab.'):
    (home/folder/'lower.py').write_text(LOWER.format(how=how, times=times))
    (home/folder/'upper.py').write_text(UPPER.format(how=how, home=prefix))
    return home

def start(home, code, **env):
    keep = {k: v for k,v in os.environ.items() if not k.startswith(('NUMBA_', 'HFTLAB_', 'XDG_', 'PYTHON'))}
    env = {**keep, 'PYTHONPATH': str(home), 'PYTHONDONTWRITEBYTECODE': '1',
        'HFTLAB_KERNEL_CACHE': str(home/'cache'), 'TMPDIR': str(home), **env}
    return subprocess.Popen([sys.executable, '-c', code], cwd=home, env=env, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def say(process):
    out,err = process.communicate(timeout=60)
    assert process.returncode==0, err
    return out.split()

def run(home, code=ASK.format(x='1.'), **env): return say(start(home, code, **env))
def files(home): return sorted((home/'cache').rglob('*.nb?'))


def test_an_edited_callee_runs(home):
    assert run(home)==['2.5', '0'] and run(home)==['2.5', '1']
    for times in (3, 4): # Only the callee's file is written
        (home/'hftlab'/'lower.py').write_text(LOWER.format(how=KERNEL, times=times))
        assert run(home)==[f'{times}.5', '0']
    (home/'hftlab'/'lower.py').write_text(LOWER.format(how=KERNEL, times=2))
    assert run(home)==['2.5', '1'] # Taken back: the first folder is right again

def test_the_trap_is_real(home):
    write(home, PLAIN, 2)
    assert run(home)==['2.5', '0']
    (home/'hftlab'/'lower.py').write_text(LOWER.format(how=PLAIN, times=3))
    assert run(home)==['2.5', '1'], 'numba has learned to see this: the digest folder can go'

def test_a_user_module_is_not_kept(home):
    (home/'mine').mkdir()
    for times in (2, 3):
        write(home, KERNEL, times, 'mine', 'mine.')
        assert run(home, ASK.replace('hftlab.', 'mine.').format(x='1.'))==[f'{times}.5', '0']
    assert not files(home)

def test_sources_that_change_beneath_a_process(home):
    "It runs what it imported, and neither reads nor writes compiled code from then on"
    run(home)
    kept = files(home)
    edit = f"from hftlab.upper import upper as f; open({str(home/'hftlab'/'lower.py')!r}, 'a').write('#')"
    assert run(home, f'{edit}; print(f(1.), f(1), sum(f.stats.cache_hits.values()))')==['2.5', '2.5', '0']
    assert files(home)==kept

def test_many_processes_compile_at_once(home):
    asked = [('1.', '2.5'), ('1.', '2.5'), ('1', '2.5'), ('1j', '(0.5+2j)')]
    for hits in (('0', '1'), ('1',)):
        crowd = [(want, start(home, ASK.format(x=x))) for x,want in asked]
        answers = [(want, say(p)) for want,p in crowd]
        assert all(was[0]==want and was[1] in hits for want,was in answers), answers

@pytest.mark.parametrize('tear', [lambda b: b'', lambda b: b[:len(b)//2], lambda b: b'\0'*len(b)], ids=['empty', 'half', 'zeros'])
def test_torn_files_heal(home, tear):
    run(home)
    for f in files(home): f.write_bytes(tear(f.read_bytes()))
    assert run(home)==['2.5', '0'] and run(home)==['2.5', '1']

def test_nowhere_to_write(home):
    "Below a file nothing can be made, not even by root: first falls back to a temporary folder, then does without"
    (home/'file').write_text('')
    code = 'from hftlab.core.kernel import cache_folder; print(cache_folder()); ' + ASK.format(x='1.')
    for temp in (home/'temp', home/'worse'):
        temp.mkdir()
        if temp.name=='worse': (temp/f'hftlab-kernels-{os.getuid()}').write_text('')
        folder,*answer = run(home, code, HFTLAB_KERNEL_CACHE=str(home/'file'/'below'), TMPDIR=str(temp))
        assert answer==['2.5', '0'] and (folder=='None' if temp.name=='worse' else Path(folder).is_relative_to(temp))

def test_a_full_disk_stops_nothing(home):
    full = 'from hftlab.upper import upper; import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); '
    assert run(home, full + ASK.format(x='1.'))==['2.5', '0'] and not [f for f in files(home) if f.suffix=='.nbc']
    assert run(home)==['2.5', '0'] and run(home)==['2.5', '1']

def test_prune_spares_what_is_in_use(home):
    "Held by a living process, gone once it ended, were it killed"
    prune = 'from hftlab.core.kernel import cache_roots, prune; print(*prune(cache_roots()[0], days=0))'
    holder = start(home, 'from hftlab.upper import upper; print(upper(1.), flush=True); input()')
    assert holder.stdout.readline()=='2.5\n'
    assert run(home, prune)==[]
    holder.kill()
    holder.communicate(timeout=60)
    assert len(run(home, prune))==1 and not files(home)
